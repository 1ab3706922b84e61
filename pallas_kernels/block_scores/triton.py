# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`block_scores` in Triton: a kernel for decode and one for prefill.

**Why.** XLA writes a score for every pair of a query and a pooled key, [T, C], reads it again to
pool it (4.3 GB a layer at 128K × 128K), and copies all pooled keys into another layout in every
decode step. Here a program reads the r + 1 cells of its blocks as r + 1 strided tiles; the max over
a block's cells is then an elementwise max of r + 1 arrays, and a score exists in registers only.
The cell before a block is the last one of the block before: it is read and multiplied twice. In
decode its second read hits the cache; in prefill it costs one product in five at r = 4, which the
tensor cores have to spare, where moving columns between threads would cost as much.

**Numerics.** Products and sums are f32, in an order that depends on the tiles only: the same call
gives the same bits. bf16 products are exact. In prefill an f32 product is three TF32 products of
halves, which loses about 2⁻²¹ of it; in decode it is one f32 product. A cell that is not visible is
replaced after the product, so that what lies in memory after the valid pooled keys is never looked
at, NaN or not.

**Backend.** Triton, compute capability 8.0 or newer: decode is a plain stream of memory, prefill is
far from the limits of the tensor cores, and both are some loads and a product. A program of the
decode kernel takes `tile_m` blocks of one query and one KV head. KV heads are the innermost axis of
the grid, so that programs that run together read both halves of a row. A program of the prefill
kernel walks `span` tiles of blocks, the latest queries first because they have the most to do;
tiles of blocks that lie wholly in the future of their queries are filled and not computed. Indices
count rows along an axis in int32 and are never negative; where an array exceeds 4 GiB the lowering
multiplies them with the strides in 64 bits, and below that no element has an index past int32.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import _backend
from pallas_kernels.block_scores.config import SHARED_BYTES, Tiles
from pallas_kernels.block_scores.reference import LOWEST

Shaped = jax.Array | jax.ShapeDtypeStruct

MOST_CELLS = 16
"""Cells that a block may have: the kernels write them out one by one."""


def unsupported_reason(forecast: Shaped, cells_per_block: int, tiles: Tiles) -> str | None:
    """Say why this backend cannot score these forecasts here; `None` if it can.

    Args:
        forecast: shape and dtype of the forecast, [B T K H].
        cells_per_block: r.
        tiles: the cut.
    """
    return _backend.triton_reason() or shape_reason(forecast, cells_per_block, tiles)


def shape_reason(forecast: Shaped, cells_per_block: int, tiles: Tiles) -> str | None:
    """Say what about the shapes the kernels cannot take, wherever they run; `None` if nothing.

    Args:
        forecast: shape and dtype of the forecast, [B T K H].
        cells_per_block: r.
        tiles: the cut.
    """
    dim, dtype = forecast.shape[-1], forecast.dtype
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"takes bfloat16, float16 or float32, not {dtype}"
    if dim not in (16, 32, 64, 128, 256):
        return f"needs a head dim that is a power of two from 16 to 256, not {dim}"
    if cells_per_block > MOST_CELLS:
        return f"takes at most {MOST_CELLS} pooled keys a block, not {cells_per_block}"
    held = tiles.shared_bytes(dim, cells_per_block, dtype.itemsize)
    if tiles.tile_q > 1 and held > SHARED_BYTES:
        return f"holds about {held} bytes in shared memory, at most {SHARED_BYTES}; smaller tiles"
    return None


def seen_cells(positions: Array, counts: Array, *, reach: int, stride: int, cells: int) -> Array:
    """Count the cells that a query sees: those of an index below it; none for padding.

    Args:
        positions: of queries.
        counts: valid cells; of a shape that broadcasts to that of `positions`.
        reach: tokens after a window's first that must not lie after the query.
        stride: tokens between windows.
        cells: C.
    """
    past = positions - reach
    passed = lax.div(jnp.maximum(past, 0), stride) + 1
    held = jnp.minimum(counts, cells)
    return jnp.where(past >= 0, jnp.minimum(passed, held), 0)


def multiply(rows: Array, keys: Array, *, interpret: bool) -> Array:
    """Multiply [rows H] by [keys H] to [rows keys], with f32 sums.

    Args:
        rows: left.
        keys: right.
        interpret: f32 in one product, because a CPU has no TF32.
    """
    precision = None
    if rows.dtype == jnp.float32:
        exact, split = lax.Precision.HIGHEST, lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = exact if interpret else split
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(
        rows, keys, dims, precision=precision, preferred_element_type=jnp.float32
    )


def described_tiles(seen: Array, *, per_block: int, tile_m: int) -> Array:
    """Count the tiles of blocks that have a cell below `seen`: block m begins at cell r·m − 1.

    Args:
        seen: the most cells that a query of the program sees.
        per_block: r.
        tile_m: blocks of a tile.
    """
    blocks = jnp.where(seen > 0, lax.div(seen, per_block) + 1, 0)
    return lax.div(blocks + (tile_m - 1), tile_m)


def _decode_kernel(
    forecast_ref,
    pooled_ref,
    positions_ref,
    counts_ref,
    out_ref,
    *,
    tile_m: int,
    per_block: int,
    count_seen: Callable[..., Array],
):
    """Score `tile_m` blocks for one query and one KV head."""
    head, tile, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    queries, num_blocks = out_ref.shape[1], out_ref.shape[3]
    cells, dim = pooled_ref.shape[1], pooled_ref.shape[3]
    batch, query = lax.div(row, queries), lax.rem(row, queries)
    seen = count_seen(positions_ref[batch, query], counts_ref[batch])
    forecast = forecast_ref[batch, query, head, :].astype(jnp.float32)  # [H]
    block = tile * tile_m + jnp.arange(tile_m, dtype=jnp.int32)
    channel = jnp.broadcast_to(jnp.arange(dim, dtype=jnp.int32)[None, :], (tile_m, dim))
    nothing = jnp.zeros((), pooled_ref.dtype)
    best = jnp.full((tile_m,), LOWEST, jnp.float32)
    for place in range(per_block + 1):
        cell = block * per_block + (place - 1)
        visible = (cell >= 0) & (cell < seen)
        at = jnp.minimum(jnp.maximum(cell, 0), cells - 1)
        at = jnp.broadcast_to(at[:, None], (tile_m, dim))
        # What is not visible is not read: a short sequence costs no memory traffic.
        keys = plt.load(
            pooled_ref.at[batch, at, head, channel], mask=visible[:, None], other=nothing
        )
        score = jnp.sum(keys.astype(jnp.float32) * forecast[None, :], axis=1)
        best = jnp.maximum(best, jnp.where(visible, score, LOWEST))
    out = out_ref.at[batch, query, head, pl.ds(tile * tile_m, tile_m)]
    plt.store(out, best, mask=block < num_blocks)


def _prefill_kernel(
    forecast_ref,
    pooled_ref,
    positions_ref,
    counts_ref,
    out_ref,
    *,
    tiles: Tiles,
    per_block: int,
    count_seen: Callable[..., Array],
    dot: Callable[..., Array],
):
    """Score `span` tiles of `tile_m` blocks for `tile_q` queries and one KV head."""
    tile_q, tile_m = tiles.tile_q, tiles.tile_m
    kv_heads, cells = forecast_ref.shape[2], pooled_ref.shape[1]
    queries, num_blocks = out_ref.shape[1], out_ref.shape[3]
    batch, head = lax.div(pl.program_id(0), kv_heads), lax.rem(pl.program_id(0), kv_heads)
    start = (pl.num_programs(2) - 1 - pl.program_id(2)) * tile_q
    query = start + jnp.arange(tile_q, dtype=jnp.int32)
    at_query = jnp.minimum(query, queries - 1)
    seen = count_seen(positions_ref[batch, at_query], counts_ref[batch])  # [tile_q]
    forecast = forecast_ref[batch, at_query, head, :]  # [tile_q H]

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
            at = jnp.minimum(jnp.maximum(cell, 0), cells - 1)
            scores = dot(forecast, pooled_ref[batch, at, head, :])
            visible = (cell >= 0)[None, :] & (cell[None, :] < seen[:, None])
            best = jnp.maximum(best, jnp.where(visible, scores, LOWEST))
        store(tile, best)
        return carry

    def fill(tile, carry):
        store(tile, jnp.full((tile_q, tile_m), LOWEST, jnp.float32))
        return carry

    first = pl.program_id(1) * tiles.span
    stop = jnp.minimum(first + tiles.span, pl.cdiv(num_blocks, tile_m))
    known = described_tiles(jnp.max(seen), per_block=per_block, tile_m=tile_m)
    known = jnp.maximum(jnp.minimum(known, stop), first)
    lax.fori_loop(first, known, score, None)
    lax.fori_loop(known, stop, fill, None)


@functools.partial(
    jax.jit,
    static_argnames=(
        "num_blocks",
        "pool_size",
        "pool_stride",
        "block_size",
        "visible",
        "tiles",
        "interpret",
    ),
)
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
    visible: Literal["end", "start"],
    tiles: Tiles,
    interpret: bool = False,
) -> Float32[Array, "B T K M"]:
    """Score blocks; the arguments are those of the op, checked in `api.py`.

    Args:
        forecast: what ranks the blocks, at least one query.
        pooled: pooled keys, at least one.
        positions: of the queries.
        counts: valid pooled keys.
        num_blocks: M.
        pool_size: tokens of a window.
        pool_stride: tokens between windows.
        block_size: tokens of a block.
        visible: the rule.
        tiles: the cut.
        interpret: whether to interpret the kernel instead of compiling it.
    """
    batch, queries, kv_heads, _ = forecast.shape
    per_block = block_size // pool_stride
    reach = pool_size - 1 if visible == "end" else 0
    count_seen = functools.partial(
        seen_cells, reach=reach, stride=pool_stride, cells=pooled.shape[1]
    )
    steps = pl.cdiv(num_blocks, tiles.tile_m)
    if tiles.tile_q == 1:
        kernel = functools.partial(
            _decode_kernel, tile_m=tiles.tile_m, per_block=per_block, count_seen=count_seen
        )
        grid = (kv_heads, steps, batch * queries)
    else:
        kernel = functools.partial(
            _prefill_kernel,
            tiles=tiles,
            per_block=per_block,
            count_seen=count_seen,
            dot=functools.partial(multiply, interpret=interpret),
        )
        grid = (batch * kv_heads, pl.cdiv(steps, tiles.span), pl.cdiv(queries, tiles.tile_q))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, queries, kv_heads, num_blocks), jnp.float32),
        grid=grid,
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="block_scores",
    )(forecast, pooled, positions, counts)
