# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What `sparse_decode` computes, in plain JAX: everything gathered, everything in f32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

LOWEST = -1e30
"""The logit of a token that is not seen, and the log of the mass of a row that sees nothing."""


def reference(
    q: Float[Array, "B N H"],
    slots: Float[Array, "B K R 2 W H"],
    slot_ids: Int[Array, "B K J"],
    block_ids: Int[Array, "B K J"],
    positions: Int[Array, " B"],
    bias: Float32[Array, "B K X W"] | None,
    *,
    scale: float,
    bias_order: str,
) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
    """Attend to the tokens s ≤ t of the chosen blocks: softmax(scale · q · k + bias) v, and log Σ.

    The arguments are those of `api.sparse_decode`, settled.
    """
    batch, heads, dim = q.shape
    kv_heads, block_size = slots.shape[1], slots.shape[4]
    tokens = (batch, kv_heads, slot_ids.shape[-1] * block_size)
    take = jax.vmap(jax.vmap(lambda row, index: row[index]))
    chosen = take(slots, jnp.maximum(slot_ids, 0)).astype(jnp.float32)  # [B K J 2 W H]
    token = block_ids[..., None] * block_size + jnp.arange(block_size)[None, None, None, :]
    seen = (token <= positions[:, None, None, None]) & ((block_ids >= 0) & (slot_ids >= 0))[
        ..., None
    ]
    values = jnp.where(seen[..., None], chosen[:, :, :, 1], 0.0).reshape(*tokens, dim)
    seen = seen.reshape(tokens)[:, :, None, :]  # [B K 1 J·W]
    grouped = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads, dim)
    keys = chosen[:, :, :, 0].reshape(*tokens, dim)
    logits = jnp.einsum("bkgh,bksh->bkgs", grouped, keys, precision="highest") * scale
    if bias is not None:
        index = slot_ids if bias_order == "slot" else block_ids
        logits = logits + take(bias, jnp.maximum(index, 0)).reshape(tokens)[:, :, None, :]
    logits = jnp.where(seen, logits, LOWEST)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=LOWEST)
    mass = jnp.where(seen, jnp.exp(logits - top), 0.0)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    total = jnp.where(total > 0.0, total, 1.0)
    out = jnp.einsum("bkgs,bksh->bkgh", mass, values, precision="highest") / total
    lse = (top + jnp.log(total)).reshape(batch, heads)
    return out.reshape(batch, heads, dim).astype(q.dtype), lse
