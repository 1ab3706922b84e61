# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The definition of `select_blocks` in plain JAX."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32


@typing.no_type_check  # vmap and eval_shape rebuild it from leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """The blocks that each (query, KV head) reads.

    Attributes:
        ids: block ids, ascending, then −1.
        count: how many ids are real.
        mask: bit m % 32 of word m // 32 says whether block m is chosen.
    """

    ids: Int32[Array, "B T K J"]
    count: Int32[Array, "B T K"]
    mask: UInt32[Array, "B T K words"]


def select_blocks(
    scores: Float[Array, "B T K M"],
    positions: Int[Array, "B T"],
    attend_all: Bool[Array, " B"] | None,
    *,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    selected_blocks: int,
    width: int,
) -> Selection:
    """Select the pinned blocks, then the best scores; see the op for the arguments."""
    num_blocks = scores.shape[-1]
    block = jnp.arange(num_blocks, dtype=jnp.int32)[None, None, None, :]
    own = jnp.where(positions < 0, -1, positions // block_size)[:, :, None, None]
    pinned = (block >= own - local_blocks) | (block < sink_blocks)
    ranked = jnp.where(pinned, jnp.inf, scores.astype(jnp.float32))
    ranked = jnp.where(block <= own, ranked, -jnp.inf)

    best, ids = jax.lax.top_k(ranked, width)  # [B T K width], ties to the lower id
    allowed = jnp.full((scores.shape[0],), selected_blocks)
    if attend_all is not None:
        allowed = jnp.where(attend_all, width, allowed)
    place = jnp.arange(width)[None, None, None, :]
    real = (best > -jnp.inf) & (place < allowed[:, None, None, None])
    ids = jnp.sort(jnp.where(real, ids, num_blocks), axis=-1)
    real = ids < num_blocks
    ids = jnp.where(real, ids, -1).astype(jnp.int32)

    chosen = jnp.any(ids[..., None, :] == block[..., None], axis=-1)  # [B T K M]
    chosen = jnp.pad(chosen, ((0, 0),) * 3 + ((0, -num_blocks % 32),))
    bits = chosen.reshape(*chosen.shape[:3], -1, 32).astype(jnp.uint32)
    bits = bits << jnp.arange(32, dtype=jnp.uint32)[None, None, None, None, :]
    return Selection(
        ids=ids,
        count=jnp.sum(real, axis=-1, dtype=jnp.int32),
        mask=jnp.sum(bits, axis=-1, dtype=jnp.uint32),
    )
