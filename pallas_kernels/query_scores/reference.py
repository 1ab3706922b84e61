# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The definition of `query_scores` in plain JAX: every head's probability is written."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

LOWEST = -1e30
"""The finite score of a block that no visible cell describes."""


def query_scores(
    q: Float[Array, "B T N H"],
    pooled: Float[Array, "B C K H"],
    positions: Int32[Array, "B T"],
    counts: Int32[Array, " B"],
    *,
    num_blocks: int,
    pool_size: int,
    pool_stride: int,
    block_size: int,
    scale: float,
) -> Float32[Array, "B T K M"]:
    """Score blocks by the best of their cells Σ over a group's heads of softmax(q · pooled).

    The arguments are those of the op; `api.py` describes and checks them.
    """
    batch, queries, heads, dim = q.shape
    cells, kv_heads = pooled.shape[1:3]
    last = jnp.arange(cells)[None, None, :] * pool_stride + pool_size - 1
    seen = last <= positions[:, :, None]
    seen &= jnp.arange(cells)[None, None, :] < counts[:, None, None]
    mask = seen[:, :, None, None, :]
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, dim)
    logits = scale * jnp.einsum(
        "btkgh,bckh->btkgc", grouped, pooled, preferred_element_type=jnp.float32
    )
    logits = jnp.where(mask, logits, LOWEST)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=LOWEST)
    mass = jnp.where(mask, jnp.exp(logits - top), 0.0)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    probs = jnp.sum(mass / jnp.where(total > 0.0, total, 1.0), axis=3)  # [B T K C]
    scores = jnp.where(seen[:, :, None, :], probs, LOWEST)

    cells_per_block = block_size // pool_stride
    room = num_blocks * cells_per_block
    scores = scores[..., :room]
    width = ((0, 0),) * 3 + ((1, room - scores.shape[-1]),)
    scores = jnp.pad(scores, width, constant_values=LOWEST)  # cell c stands at c + 1
    inside = scores[..., 1:].reshape(*scores.shape[:3], num_blocks, cells_per_block)
    return jnp.maximum(inside.max(axis=-1), scores[..., :-1:cells_per_block])
