# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The door to moving blocks: a name is a promise, and a refusal has a reason."""

from typing import Literal, get_args

Fetch = Literal["device_put"]
"""How missing records come to the device. `device_put`: gathered into staging memory on the host
and copied one layer ahead."""

_KNOWN = ("in_graph", *get_args(Fetch))


def unsupported_reason(fetch: str) -> str | None:
    """Say why a way to fetch cannot be used; `None` if it can.

    Args:
        fetch: a known name.

    Example:
        >>> unsupported_reason("device_put") is None
        True
    """
    if fetch == "in_graph":
        return (
            "fetch='in_graph' needs a kernel that reads host memory inside the step, and this "
            "version has none; use fetch='device_put'"
        )
    return None


def resolve_fetch(fetch: str | None) -> Fetch:
    """Settle how blocks move: `None` takes `device_put`; a name gets that one or an error.

    Args:
        fetch: a name, or `None`.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
        NotImplementedError: it cannot be used; the message is the reason.
    """
    if fetch is None:
        return "device_put"
    if fetch not in _KNOWN:
        raise ValueError(f"unknown {fetch=}; known: {', '.join(_KNOWN)}")
    reason = unsupported_reason(fetch)
    if reason is not None:
        raise NotImplementedError(reason)
    return "device_put"
