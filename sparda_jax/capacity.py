# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What fits where: everything that is checked before a batch starts.

Prompts are refused here, lengths are rounded so that near ones share a program, and K and V get
their place: the device, or the host with slots on the device.
"""

import logging
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Int

from sparda_jax.config import ModelConfig
from sparda_jax.errors import CapacityError, DataError
from sparda_jax.kv.host import record_bytes
from sparda_jax.shapes import Mode

KVPlace = Literal["auto", "resident", "offload"]
"""Where K and V live: on the device, on the host, or on the device if they fit there."""

Prompt = Sequence[int] | Int[np.ndarray, "..."]
"""Token ids of one prompt, at least one."""

_LOG = logging.getLogger(__name__)
_SHARE = 0.9  # of the free device memory that KV may take; the rest is for activations


def round_capacity(tokens: int, chunk: int) -> int:
    """Round a length up, so that near lengths share a program: at most an eighth is wasted.

    Args:
        tokens: the longest sequence.
        chunk: the result is a multiple of it.

    Example:
        >>> round_capacity(8300, 64), round_capacity(100, 64)
        (9216, 128)
    """
    step = max(chunk, 1 << max(tokens.bit_length() - 4, 0))
    step = -(-step // chunk) * chunk
    return -(-tokens // step) * step


def full_kv_bytes(config: ModelConfig, batch: int, capacity: int) -> int:
    """Count the bytes of K and V of all layers with room for `capacity` tokens a sequence."""
    blocks = batch * config.kv_heads * config.sparse.blocks(capacity)
    return config.layers * blocks * record_bytes(config)


def free_device_bytes() -> int | None:
    """Ask the default device for its free memory; `None` where it does not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


def choose_place(
    kv: KVPlace, mode: Mode, config: ModelConfig, batch: int, capacity: int, free: int | None
) -> Literal["resident", "offload"]:
    """Decide where K and V live, and log the arithmetic.

    Args:
        kv: what the caller asked for.
        mode: `dense` reads every block and cannot be offloaded.
        config: of the model.
        batch: B.
        capacity: tokens of room for each sequence.
        free: free device memory in bytes; `None` if unknown, then everything fits.

    Raises:
        ValueError: an unknown name, or dense mode with `kv="offload"`.
        CapacityError: what must be resident does not fit.
    """
    if kv not in ("auto", "resident", "offload"):
        raise ValueError(f"{kv=} must be 'auto', 'resident' or 'offload'")
    if kv == "offload":
        if mode == "dense":
            raise ValueError("mode='dense' reads every block, so kv='offload' would move them all")
        return "offload"
    # While the last layer's cache is turned into slots, both exist.
    layers = config.layers
    needed = full_kv_bytes(config, batch, capacity) * (layers + 1) // layers
    room = None if free is None else int(free * _SHARE)
    fits = room is None or needed <= room
    _LOG.info(
        "KV of %d x %d tokens x %d layers: %.1f MiB; free for it on the device: %s; %s",
        batch,
        capacity,
        layers,
        needed / 2**20,
        "unknown" if room is None else f"{room / 2**20:.1f} MiB",
        "resident" if fits or kv == "resident" else "offload",
    )
    if fits:
        return "resident"
    if kv == "auto" and mode != "dense":
        return "offload"
    raise CapacityError(
        f"KV needs {needed} bytes on the device, of which {room} can be used; take fewer or "
        "shorter prompts, or kv='offload' with mode='sparda' or 'sparse'"
    )


def check_prompts(
    prompts: Sequence[Prompt], max_new_tokens: int, config: ModelConfig
) -> list[np.ndarray]:
    """Turn prompts into arrays, refusing what no model could run.

    Args:
        prompts: token ids of each prompt, at least one each.
        max_new_tokens: tokens that may follow.
        config: of the model.

    Raises:
        DataError: no prompts, an empty one, or a token id outside the vocabulary.
        ValueError: `max_new_tokens` < 1.
        CapacityError: a prompt and what may follow exceed `max_context`.
    """
    if len(prompts) == 0:
        raise DataError("got 0 prompts; generation needs at least 1")
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} must be at least 1")
    arrays = []
    for number, prompt in enumerate(prompts):
        tokens = np.asarray(prompt, dtype=np.int64)
        if tokens.ndim != 1 or tokens.size == 0:
            raise DataError(f"prompt {number} has shape {tokens.shape}: it needs at least 1 token")
        wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
        if wrong.size:
            raise DataError(
                f"prompt {number} holds token {wrong[0]}, but the vocabulary ends at "
                f"{config.vocab_size - 1}: was it encoded with this model's tokenizer?"
            )
        total = tokens.size + max_new_tokens
        if total > config.max_context:
            raise CapacityError(
                f"prompt {number} has {tokens.size} tokens and {max_new_tokens=} may follow: "
                f"{total} in all, but {config.max_context=}; shorten one of them"
            )
        arrays.append(tokens.astype(np.int32))
    return arrays
