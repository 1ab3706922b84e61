# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Reading the chosen blocks of whole sequences, forward only.

The backbone is frozen, so nothing is kept for a backward pass and tiles can be as small as the
device likes: on a CPU a masked tile that stays in the cache is several times faster than gathering
blocks or than large masked tiles.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.attention import map_tiles
from sparda_jax.pooling import LOWEST
from sparda_jax.shapes import blocks_in

_SPAN = 2048
"""Queries per span, up to `_SPANS` spans."""

_SPANS = 4


def map_spans(
    f: Callable[..., Any], arrays: Any, tile: int, padding: Any, *, spans: int | None = None
) -> Any:
    """Apply `f(tile, end)` to tiles of the T axis, where no query of the tile is past `end`.

    Args:
        f: maps a pytree of [B tile ...] and a static bound to a pytree of [B tile ...].
        arrays: pytree of [B T ...], query t at position t.
        tile: queries in one tile.
        padding: pytree of scalars like `arrays`: what fills the last tile of a span.
        spans: how many different bounds; `None` takes one per 2048 queries, at most four. Each is
            compiled by itself.

    Returns:
        A pytree of [B T ...].
    """
    queries = jax.tree.leaves(arrays)[0].shape[1]
    if spans is None:
        spans = max(1, min(_SPANS, queries // _SPAN))
    ends = [queries * (span + 1) // spans for span in range(spans)]
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        rows = jax.tree.map(lambda x, start=start, end=end: x[:, start:end], arrays)
        parts.append(map_tiles(functools.partial(f, end=end), rows, tile, padding))
    return parts[0] if spans == 1 else jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


def mark_blocks(ids: Int[Array, "B T K J"], num_blocks: int) -> Bool[Array, "B T K M"]:
    """Mark the blocks of a list, in time that does not grow with J · M."""
    rows = ids.reshape(-1, ids.shape[-1])
    place = jnp.where(rows < 0, num_blocks, rows)
    marks = jnp.zeros((rows.shape[0], num_blocks), bool)
    marks = marks.at[jnp.arange(rows.shape[0])[:, None], place].set(True, mode="drop")
    return marks.reshape(*ids.shape[:3], num_blocks)


@jax.named_scope("attend_listed")
def attend_listed(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    block_ids: Int[Array, "B T K J"],
    positions: Int[Array, "B T"],
    key_bias: Float[Array, "B T K"] | None = None,
    *,
    block_size: int,
    tile: int,
) -> Float[Array, "B T N H"]:
    """Attend causally to the listed blocks: softmax(q · k / √H + bias) v, under a mask.

    Args:
        q: rotated queries, query t at position t.
        k: rotated keys of the same tokens.
        v: values.
        block_ids: blocks that each (query, KV head) reads; negative where there is none.
        positions: of the queries; −1 marks padding, which gives zeros.
        key_bias: added to the logits, per key and KV head, f32.
        block_size: W.
        tile: queries in one tile.

    Returns:
        The attended values in the dtype of `q`.
    """
    batch, _, heads, dim = q.shape
    kv_heads = k.shape[2]

    def attend(rows: tuple[Array, Array, Array], end: int) -> Array:
        queries, ids, at = rows
        grouped = queries.reshape(batch, -1, kv_heads, heads // kv_heads, dim)
        logits = jnp.einsum(
            "btkgh,bskh->bktgs", grouped, k[:, :end], preferred_element_type=jnp.float32
        )
        logits = logits * dim**-0.5
        if key_bias is not None:
            logits = logits + key_bias[:, :end].transpose(0, 2, 1)[:, :, None, None, :]
        marked = mark_blocks(ids, blocks_in(end, block_size))
        seen = jnp.repeat(marked, block_size, axis=-1)[..., :end].transpose(0, 2, 1, 3)
        seen &= jnp.arange(end)[None, None, None, :] <= at[:, None, :, None]
        seen = seen[:, :, :, None, :]  # [B K T 1 S]
        logits = jnp.where(seen, logits, LOWEST)
        mass = jnp.where(seen, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0.0)
        total = jnp.sum(mass, axis=-1)[..., None].transpose(0, 2, 1, 3, 4)  # [B T K G 1]
        out = jnp.einsum(
            "bktgs,bskh->btkgh",
            mass.astype(v.dtype),
            v[:, :end],
            preferred_element_type=jnp.float32,
        )
        out = out / jnp.where(total > 0.0, total, 1.0)
        return out.reshape(queries.shape).astype(q.dtype)

    return map_spans(attend, (q, block_ids, positions), tile, (0, -1, -1))
