# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`query_scores` in Triton: two kernels for decode and one for prefill.

**Why.** XLA writes the logits of all heads, their exponentials and the probabilities, [T, N, C]
each. In prefill the kernel passes over the pooled keys twice instead and writes block scores only:
first the greatest logit and the mass of every (query, head), then the probabilities, summed over
the heads of a group and maximised over the r + 1 cells of a block, which are r + 1 products with
strided rows, as in `block_scores`. In decode there are too few queries to fill the chip, so the
pooled keys are split over programs, and nothing is known about the whole softmax before all of them
are done. The first kernel reads its share of the keys once, writes the logits (4·G bytes a cell,
against 2·H of the key in bf16: a quarter at G = 16) and the maximum and mass of its share; the
second joins the shares and turns the logits, which are still in the L2 cache, into scores. So the
keys travel once.

**Numerics.** Logits, maxima, masses and probabilities are f32 and the softmax is exact: the running
maximum is rescaled by exp(old − new), shares are joined in one order, and the same call gives the
same bits. bf16 products are exact, sums f32; an f32 product is three TF32 products of halves, which
loses about 2⁻²¹ of it. Prefill counts in base 2. A cell that is not visible gets the lowest logit
and no mass, and its score is replaced, so what lies after the valid pooled keys is never looked at.

**Backend.** Triton, compute capability 8.0 or newer. In decode the keys of a step are the rows of a
product and the heads of a group, padded to 16, its columns: 64 rows are one wgmma. In prefill the
rows are the (query, head) pairs of `tile_q` neighbouring queries; G is padded to a power of two, so
that a reshape separates them, and the latest queries go first because they have the most to do.
Indices count rows along an axis in int32 and are never negative; where an array exceeds 4 GiB the
lowering multiplies them with the strides in 64 bits.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import _backend
from pallas_kernels.block_scores.triton import MOST_CELLS, described_tiles, multiply, seen_cells
from pallas_kernels.query_scores.config import SHARED_BYTES, Tiles
from pallas_kernels.query_scores.reference import LOWEST

Shaped = jax.Array | jax.ShapeDtypeStruct

_LOG2_E = 1.4426950408889634
_COLUMNS = 16
"""The least columns of a product."""

_MOST_MEMBERS = 64
"""Query heads of a KV head."""

_MOST_JOINED = 16384
"""Shares of the pooled keys, for each head, that the second kernel joins in registers."""


def unsupported_reason(q: Shaped, pooled: Shaped, cells_per_block: int, tiles: Tiles) -> str | None:
    """Say why this backend cannot score with these queries here; `None` if it can.

    Args:
        q: shape and dtype of the queries, [B T N H].
        pooled: of the pooled keys, [B C K H].
        cells_per_block: r.
        tiles: the cut.
    """
    return _backend.triton_reason() or shape_reason(q, pooled, cells_per_block, tiles)


def shape_reason(q: Shaped, pooled: Shaped, cells_per_block: int, tiles: Tiles) -> str | None:
    """Say what about the shapes the kernels cannot take, wherever they run; `None` if nothing.

    Args:
        q: shape and dtype of the queries, [B T N H].
        pooled: of the pooled keys, [B C K H].
        cells_per_block: r.
        tiles: the cut.
    """
    dim, dtype, group = q.shape[-1], q.dtype, q.shape[2] // pooled.shape[2]
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"takes bfloat16, float16 or float32, not {dtype}"
    if dim not in (16, 32, 64, 128, 256):
        return f"needs a head dim that is a power of two from 16 to 256, not {dim}"
    if group > _MOST_MEMBERS:
        return f"takes at most {_MOST_MEMBERS} query heads a KV head, not {group}"
    if cells_per_block > MOST_CELLS:
        return f"takes at most {MOST_CELLS} pooled keys a block, not {cells_per_block}"
    rows = tiles.tile_q * pl.next_power_of_2(group)
    if tiles.tile_q > 1 and rows < 16:
        return f"needs 16 rows of (query, head), but {tiles.tile_q=} and G = {group} make {rows}"
    parts = pl.cdiv(pooled.shape[1], tiles.span * tiles.tile_c)
    if tiles.tile_q == 1 and parts * group > _MOST_JOINED:
        return f"joins {parts} shares of {group} heads, at most {_MOST_JOINED}; a longer span"
    held = tiles.shared_bytes(group, dim, cells_per_block, dtype.itemsize)
    if held > SHARED_BYTES:
        return f"holds about {held} bytes in shared memory, at most {SHARED_BYTES}; smaller tiles"
    return None


def _logits_kernel(
    q_ref,
    pooled_ref,
    positions_ref,
    counts_ref,
    logits_ref,
    top_ref,
    mass_ref,
    *,
    tiles: Tiles,
    group: int,
    scale: float,
    count_seen: Callable[..., Array],
    dot: Callable[..., Array],
):
    """Write the logits of a share of the cells for one query, their maxima and masses."""
    head, part, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    queries, tile_c, columns = positions_ref.shape[1], tiles.tile_c, top_ref.shape[3]
    cells, dim = pooled_ref.shape[1], pooled_ref.shape[3]
    batch, query = lax.div(row, queries), lax.rem(row, queries)
    seen = count_seen(positions_ref[batch, query], counts_ref[batch])
    member = jnp.arange(columns, dtype=jnp.int32)
    q = q_ref[batch, query, head * group + jnp.minimum(member, group - 1), :]  # [columns H]
    at_member = jnp.broadcast_to(member[None, :], (tile_c, columns))
    channel = jnp.broadcast_to(jnp.arange(dim, dtype=jnp.int32)[None, :], (tile_c, dim))
    nothing = jnp.zeros((), pooled_ref.dtype)
    start = part * (tiles.span * tile_c)

    def step(number, carry):
        top, mass = carry
        cell = start + number * tile_c + jnp.arange(tile_c, dtype=jnp.int32)
        visible = (cell < seen)[:, None]
        at = jnp.broadcast_to(jnp.minimum(cell, cells - 1)[:, None], (tile_c, dim))
        keys = plt.load(pooled_ref.at[batch, at, head, channel], mask=visible, other=nothing)
        logits = jnp.where(visible, dot(keys, q) * scale, LOWEST)  # [tile_c columns]
        at = jnp.broadcast_to(cell[:, None], (tile_c, columns))
        out = logits_ref.at[row, head, at, at_member]
        plt.store(out, logits, mask=visible & (at_member < group))
        higher = jnp.maximum(top, jnp.max(logits, axis=0))
        share = jnp.where(visible, jnp.exp(logits - higher[None, :]), 0.0)
        return higher, mass * jnp.exp(top - higher) + jnp.sum(share, axis=0)

    steps = lax.div(jnp.maximum(seen - start, 0) + (tile_c - 1), tile_c)
    empty = jnp.full((columns,), LOWEST, jnp.float32), jnp.zeros((columns,), jnp.float32)
    top, mass = lax.fori_loop(0, jnp.minimum(steps, tiles.span), step, empty)
    top_ref[row, head, part, :] = top
    mass_ref[row, head, part, :] = mass


def _pool_kernel(
    logits_ref,
    top_ref,
    mass_ref,
    positions_ref,
    counts_ref,
    out_ref,
    *,
    tile_m: int,
    per_block: int,
    count_seen: Callable[..., Array],
):
    """Join the shares of one query and score `tile_m` blocks by its logits."""
    head, tile, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    queries, num_blocks = out_ref.shape[1], out_ref.shape[3]
    cells, group, parts = logits_ref.shape[2], logits_ref.shape[3], top_ref.shape[2]
    members, joined = pl.next_power_of_2(group), pl.next_power_of_2(parts)
    batch, query = lax.div(row, queries), lax.rem(row, queries)
    seen = count_seen(positions_ref[batch, query], counts_ref[batch])
    member = jnp.arange(members, dtype=jnp.int32)[None, :]

    part = jnp.broadcast_to(jnp.arange(joined, dtype=jnp.int32)[:, None], (joined, members))
    at = (row, head, jnp.minimum(part, parts - 1), jnp.broadcast_to(member, (joined, members)))
    tops = plt.load(top_ref.at[at], mask=part < parts, other=jnp.float32(LOWEST))
    masses = plt.load(mass_ref.at[at], mask=part < parts, other=jnp.float32(0.0))
    top = jnp.max(tops, axis=0)  # [members]
    mass = jnp.sum(masses * jnp.exp(tops - top[None, :]), axis=0)
    share = 1.0 / jnp.where(mass > 0.0, mass, 1.0)

    block = tile * tile_m + jnp.arange(tile_m, dtype=jnp.int32)
    at_member = jnp.broadcast_to(member, (tile_m, members))
    best = jnp.full((tile_m,), LOWEST, jnp.float32)
    for place in range(per_block + 1):
        cell = block * per_block + (place - 1)
        visible = (cell >= 0) & (cell < seen)
        at = jnp.minimum(jnp.maximum(cell, 0), cells - 1)
        at = jnp.broadcast_to(at[:, None], (tile_m, members))
        logits = plt.load(
            logits_ref.at[row, head, at, at_member],
            mask=visible[:, None] & (at_member < group),
            other=jnp.float32(LOWEST),
        )
        probs = jnp.sum(jnp.exp(logits - top[None, :]) * share[None, :], axis=1)
        best = jnp.maximum(best, jnp.where(visible, probs, LOWEST))
    out = out_ref.at[batch, query, head, pl.ds(tile * tile_m, tile_m)]
    plt.store(out, best, mask=block < num_blocks)


def _prefill_kernel(
    q_ref,
    pooled_ref,
    positions_ref,
    counts_ref,
    out_ref,
    *,
    tiles: Tiles,
    group: int,
    scale: float,
    per_block: int,
    count_seen: Callable[..., Array],
    dot: Callable[..., Array],
):
    """Score all blocks for `tile_q` queries and one KV head, in two passes."""
    tile_q, tile_m, tile_c = tiles.tile_q, tiles.tile_m, tiles.tile_c
    members = pl.next_power_of_2(group)
    rows = tile_q * members
    cells, kv_heads = pooled_ref.shape[1:3]
    queries, num_blocks = out_ref.shape[1], out_ref.shape[3]
    batch, head = lax.div(pl.program_id(0), kv_heads), lax.rem(pl.program_id(0), kv_heads)
    start = (pl.num_programs(1) - 1 - pl.program_id(1)) * tile_q
    row = jnp.arange(rows, dtype=jnp.int32)
    member = lax.rem(row, members)
    at_query = jnp.minimum(start + lax.div(row, members), queries - 1)
    q = q_ref[batch, at_query, head * group + jnp.minimum(member, group - 1), :]  # [rows H]
    held = counts_ref[batch]
    row_seen = count_seen(positions_ref[batch, at_query], held)  # [rows]
    query = start + jnp.arange(tile_q, dtype=jnp.int32)
    seen = count_seen(positions_ref[batch, jnp.minimum(query, queries - 1)], held)  # [tile_q]
    most = jnp.max(seen)

    def score_cells(cell):
        at = jnp.minimum(jnp.maximum(cell, 0), cells - 1)
        return dot(q, pooled_ref[batch, at, head, :]) * (scale * _LOG2_E)

    def measure(tile, carry):
        top, mass = carry
        cell = tile * tile_c + jnp.arange(tile_c, dtype=jnp.int32)
        visible = cell[None, :] < row_seen[:, None]
        logits = jnp.where(visible, score_cells(cell), LOWEST)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        share = jnp.sum(jnp.exp2(logits - higher[:, None]), axis=1)
        return higher, mass * jnp.exp2(top - higher) + share

    # The first tile holds cell 0, which every row sees that sees any: its maximum is a real one.
    empty = jnp.full((rows,), LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32)
    top, mass = lax.fori_loop(0, lax.div(most + (tile_c - 1), tile_c), measure, empty)
    share = jnp.where(member < group, 1.0 / jnp.where(mass > 0.0, mass, 1.0), 0.0)

    def store(tile, scores):
        block = tile * tile_m + jnp.arange(tile_m, dtype=jnp.int32)
        real = (query < queries)[:, None] & (block < num_blocks)[None, :]
        out = out_ref.at[batch, pl.ds(start, tile_q), head, pl.ds(tile * tile_m, tile_m)]
        plt.store(out, scores, mask=real)

    def score(tile, carry):
        block = tile * tile_m + jnp.arange(tile_m, dtype=jnp.int32)
        best = jnp.full((tile_q, tile_m), LOWEST, jnp.float32)
        for place in range(per_block + 1):
            cell = block * per_block + (place - 1)
            probs = jnp.exp2(score_cells(cell) - top[:, None]) * share[:, None]
            probs = jnp.sum(probs.reshape(tile_q, members, tile_m), axis=1)
            visible = (cell >= 0)[None, :] & (cell[None, :] < seen[:, None])
            best = jnp.maximum(best, jnp.where(visible, probs, LOWEST))
        store(tile, best)
        return carry

    def fill(tile, carry):
        store(tile, jnp.full((tile_q, tile_m), LOWEST, jnp.float32))
        return carry

    stop = pl.cdiv(num_blocks, tile_m)
    known = jnp.minimum(described_tiles(most, per_block=per_block, tile_m=tile_m), stop)
    lax.fori_loop(0, known, score, None)
    lax.fori_loop(known, stop, fill, None)


@functools.partial(
    jax.jit,
    static_argnames=(
        "num_blocks",
        "pool_size",
        "pool_stride",
        "block_size",
        "scale",
        "tiles",
        "interpret",
    ),
)
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
    tiles: Tiles,
    interpret: bool = False,
) -> Float32[Array, "B T K M"]:
    """Score blocks; the arguments are those of the op, checked in `api.py`.

    Args:
        q: queries, at least one.
        pooled: pooled keys, at least one.
        positions: of the queries.
        counts: valid pooled keys.
        num_blocks: M.
        pool_size: tokens of a window.
        pool_stride: tokens between windows.
        block_size: tokens of a block.
        scale: of the logits.
        tiles: the cut.
        interpret: whether to interpret the kernels instead of compiling them.
    """
    batch, queries, heads, _ = q.shape
    cells, kv_heads = pooled.shape[1:3]
    group, per_block = heads // kv_heads, block_size // pool_stride
    count_seen = functools.partial(seen_cells, reach=pool_size - 1, stride=pool_stride, cells=cells)
    first = {
        "tiles": tiles,
        "group": group,
        "scale": scale,
        "count_seen": count_seen,
        "dot": functools.partial(multiply, interpret=interpret),
    }
    params = plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    scores = jax.ShapeDtypeStruct((batch, queries, kv_heads, num_blocks), jnp.float32)
    if tiles.tile_q > 1:
        return pl.pallas_call(
            functools.partial(_prefill_kernel, **first, per_block=per_block),
            out_shape=scores,
            grid=(batch * kv_heads, pl.cdiv(queries, tiles.tile_q)),
            compiler_params=params,
            interpret=interpret,
            name="query_scores",
        )(q, pooled, positions, counts)
    rows, parts = batch * queries, pl.cdiv(cells, tiles.span * tiles.tile_c)
    columns = max(pl.next_power_of_2(group), _COLUMNS)
    logits = jax.ShapeDtypeStruct((rows, kv_heads, cells, group), jnp.float32)
    part = jax.ShapeDtypeStruct((rows, kv_heads, parts, columns), jnp.float32)
    found = pl.pallas_call(
        functools.partial(_logits_kernel, **first),
        out_shape=(logits, part, part),
        grid=(kv_heads, parts, rows),
        compiler_params=params,
        interpret=interpret,
        name="query_scores_logits",
    )(q, pooled, positions, counts)
    return pl.pallas_call(
        functools.partial(
            _pool_kernel, tile_m=tiles.tile_m, per_block=per_block, count_seen=count_seen
        ),
        out_shape=scores,
        grid=(kv_heads, pl.cdiv(num_blocks, tiles.tile_m), rows),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="query_scores_pool",
    )(*found, positions, counts)
