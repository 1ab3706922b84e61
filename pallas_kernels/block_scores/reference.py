# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The definition of `block_scores` in plain JAX: every cell's score is written, then pooled."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

LOWEST = -1e30
"""The finite score of a block that no visible cell describes."""


def block_scores(
    forecast: Float[Array, "B T K H"],
    pooled: Float[Array, "B C K H"],
    positions: Int32[Array, "B T"],
    counts: Int32[Array, " B"],
    *,
    num_blocks: int,
    pool_size: int,
    pool_stride: int,
    block_size: int,
    visible: Literal["end", "start"] = "end",
) -> Float32[Array, "B T K M"]:
    """Score blocks by the best forecast · pooled key among the cells r·m − 1 … r·m + r − 1.

    The arguments are those of the op; `api.py` describes and checks them.
    """
    cell = jnp.arange(pooled.shape[1])[None, None, :]
    reach = pool_size - 1 if visible == "end" else 0
    seen = cell * pool_stride + reach <= positions[:, :, None]
    seen &= cell < counts[:, None, None]
    scores = jnp.einsum(
        "btkgh,bckh->btkgc", forecast[:, :, :, None], pooled, preferred_element_type=jnp.float32
    )[:, :, :, 0]
    scores = jnp.where(seen[:, :, None, :], scores, LOWEST)

    cells_per_block = block_size // pool_stride
    room = num_blocks * cells_per_block
    scores = scores[..., :room]
    width = ((0, 0),) * 3 + ((1, room - scores.shape[-1]),)
    scores = jnp.pad(scores, width, constant_values=LOWEST)  # cell c stands at c + 1
    inside = scores[..., 1:].reshape(*scores.shape[:3], num_blocks, cells_per_block)
    return jnp.maximum(inside.max(axis=-1), scores[..., :-1:cells_per_block])
