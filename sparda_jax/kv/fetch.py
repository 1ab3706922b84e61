# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The door to moving blocks: a name is a promise, and a refusal has a reason."""

from typing import Literal, cast, get_args

import jax

from pallas_kernels.gather_blocks.api import unsupported_reason as gather_unsupported_reason
from sparda_jax.config import ModelConfig
from sparda_jax.kv.pack import HostDtype

Fetch = Literal["in_graph", "device_put"]
"""How missing records come to the device. `in_graph`: a kernel reads host memory inside the one
program of a step. `device_put`: gathered into staging memory on the host and copied one layer
ahead, layer by layer."""


def unsupported_reason(
    fetch: str, config: ModelConfig, host_dtype: HostDtype | None = None
) -> str | None:
    """Say why a way to fetch cannot be used for a model here; `None` if it can.

    Args:
        fetch: a known name.
        config: of the model.
        host_dtype: of the numbers on the host; `None` takes the model's.

    Example:
        >>> unsupported_reason("device_put", ModelConfig.shipped()) is None
        True
    """
    if fetch == "device_put" or jax.default_backend() == "cpu":
        return None
    sparse = config.sparse
    size = (2, sparse.block_size, config.head_dim)
    dtype = jax.numpy.dtype(host_dtype or config.dtype)
    slot = None if host_dtype is None else jax.numpy.dtype(config.dtype)
    reason = gather_unsupported_reason(size, dtype, slot=slot)
    if reason is None:
        return None
    return f"fetch='in_graph': the kernel that reads host memory {reason}; use fetch='device_put'"


def resolve_fetch(
    fetch: str | None, config: ModelConfig, host_dtype: HostDtype | None = None
) -> Fetch:
    """Settle how blocks move: a name gets that one or an error.

    `None` takes `in_graph` on a GPU where it can be used, else `device_put`.

    Args:
        fetch: a name, or `None`.
        config: of the model.
        host_dtype: of the numbers on the host; `None` takes the model's.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
        NotImplementedError: it cannot be used; the message is the reason.

    Example:
        >>> resolve_fetch("in_graph", ModelConfig.shipped())
        'in_graph'
    """
    if fetch is None:
        if jax.default_backend() == "cpu" or unsupported_reason("in_graph", config, host_dtype):
            return "device_put"
        return "in_graph"
    if fetch not in get_args(Fetch):
        raise ValueError(f"unknown {fetch=}; known: {', '.join(get_args(Fetch))}")
    reason = unsupported_reason(fetch, config, host_dtype)
    if reason is not None:
        raise NotImplementedError(reason)
    return cast(Fetch, fetch)
