# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The definition of the op in plain JAX: whole rows of scores, 64 queries at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt32

LOWEST = -1e30
"""Stands for the logit of a key that is not seen."""


def sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_mask: UInt32[Array, "B T K words"],
    positions: Int32[Array, "B T"],
    *,
    block_size: int,
    scale: float,
    key_bias: Float32[Array, "B S K"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attend to the marked blocks: softmax(scale · q · k + bias) v over marked s ≤ t, f32 inside.

    See `pallas_kernels.sparse_attention.sparse_attention` for the arguments.
    """
    batch, _, heads, dim = q.shape
    length, kv_heads = k.shape[1:3]
    token = jnp.arange(length)
    word, bit = token // block_size // 32, (token // block_size % 32).astype(jnp.uint32)

    def one_query(query: tuple[Array, Array, Array]) -> Array:
        row, words, at = query  # [B N H], [B K words], [B]
        grouped = row.reshape(batch, kv_heads, heads // kv_heads, dim)
        marked = (words[:, :, word] >> bit[None, None, :]) & 1  # [B K S]
        seen = (marked == 1) & (token[None, :] <= at[:, None])[:, None, :]
        logits = jnp.einsum("bkgh,bskh->bkgs", grouped, k, preferred_element_type=jnp.float32)
        logits = logits * scale
        if key_bias is not None:
            logits = logits + key_bias.transpose(0, 2, 1)[:, :, None, :]
        logits = jnp.where(seen[:, :, None, :], logits, LOWEST)
        mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        mass = jnp.where(seen[:, :, None, :], mass, 0.0)
        total = jnp.sum(mass, axis=-1, keepdims=True)
        out = jnp.einsum(
            "bkgs,bskh->bkgh", mass.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        out = out / jnp.where(total > 0.0, total, 1.0)
        return out.reshape(batch, heads, dim).astype(q.dtype)

    queries = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, block_mask, positions))
    return jnp.moveaxis(jax.lax.map(one_query, queries, batch_size=64), 0, 1)
