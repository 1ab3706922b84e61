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
gives the same bits. bf16 products are exact. f32 operands are multiplied in f32 (no TF32), on the
plain ALUs, in pieces of 32 channels. A cell that is not visible is replaced after the product, so
that what lies in memory after the valid pooled keys is never looked at, NaN or not.

**Backend.** Triton, because decode is a plain stream of memory and prefill far from the limits of
the tensor cores: both are one line of loads and one product. The decode kernel's programs are one
KV head by `tile_m` blocks of one query, KV heads innermost, so that neighbours read both halves of
a row at about the same time. The prefill kernel's programs walk `span` tiles of blocks, the latest
queries first because they have the most to do; tiles of blocks that lie wholly in the future of
their queries are filled with `LOWEST` and not computed. Indices are int32 counts of rows along an
axis, never negative; their products with the strides are 64-bit where an array exceeds 4 GiB.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import _backend
from pallas_kernels.block_scores.config import Tiles
from pallas_kernels.block_scores.reference import LOWEST

EXACT_CHANNELS = 32
"""Channels of an f32 product: its operands stand in registers."""

MOST_CELLS = 16
"""Cells a block may have: the kernels write them out one by one."""


def unsupported_reason(
    forecast: jax.ShapeDtypeStruct | Array, *, pool_stride: int, block_size: int
) -> str | None:
    """Say why this backend cannot score these forecasts; `None` if it can.

    Args:
        forecast: [B T K H], or its shape and dtype.
        pool_stride: tokens between pooled keys.
        block_size: tokens of a block.
    """
    reason = _backend.triton_reason()
    if reason is not None:
        return reason
    dim, dtype = forecast.shape[-1], forecast.dtype
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"takes bfloat16, float16 or float32, but the forecast is {dtype.name}"
    if dim < 16 or dim > 256 or dim & (dim - 1):
        return f"needs a head dim that is a power of two from 16 to 256, but it is {dim}"
    if block_size // pool_stride > MOST_CELLS:
        return (
            f"takes blocks of up to {MOST_CELLS} pooled keys, "
            f"but {block_size=} has {block_size // pool_stride}"
        )
    return None


def _seen_cells(positions, counts, *, reach: int, stride: int, cells: int):
    """Count the cells that a query sees: those of index below it; none for padding."""
    past = positions - reach
    passed = lax.div(jnp.maximum(past, 0), stride) + 1
    held = jnp.minimum(counts, cells)
    return jnp.where(past >= 0, jnp.minimum(passed, held), 0)


def _decode_kernel(
    forecast_ref, pooled_ref, positions_ref, counts_ref, out_ref, *, tile_m, per_block, seen_cells
):
    """Score `tile_m` blocks for one query and one KV head."""
    head, tile, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    queries, num_blocks = out_ref.shape[1], out_ref.shape[3]
    cells, dim = pooled_ref.shape[1], pooled_ref.shape[3]
    batch, query = lax.div(row, queries), lax.rem(row, queries)
    seen = seen_cells(positions_ref[batch, query], counts_ref[batch])
    forecast = forecast_ref[batch, query, head, :].astype(jnp.float32)  # [H]
    block = tile * tile_m + jnp.arange(tile_m, dtype=jnp.int32)
    channel = jnp.broadcast_to(jnp.arange(dim, dtype=jnp.int32)[None, :], (tile_m, dim))
    nothing = jnp.zeros((), pooled_ref.dtype)
    best = jnp.full((tile_m,), LOWEST, jnp.float32)
    for place in range(per_block + 1):
        cell = block * per_block + (place - 1)
        held = (cell >= 0) & (cell < seen)
        index = jnp.minimum(jnp.maximum(cell, 0), cells - 1)
        index = jnp.broadcast_to(index[:, None], (tile_m, dim))
        keys = plt.load(
            pooled_ref.at[batch, index, head, channel], mask=held[:, None], other=nothing
        )
        score = jnp.sum(keys.astype(jnp.float32) * forecast[None, :], axis=1)
        best = jnp.maximum(best, jnp.where(held, score, LOWEST))
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
    channels: int,
    seen_cells,
):
    """Score `span` tiles of `tile_m` blocks for `tile_q` queries and one KV head."""
    tile_q, tile_m = tiles.tile_q, tiles.tile_m
    kv_heads, dim = forecast_ref.shape[2:]
    queries, num_blocks, cells = out_ref.shape[1], out_ref.shape[3], pooled_ref.shape[1]
    batch, head = lax.div(pl.program_id(0), kv_heads), lax.rem(pl.program_id(0), kv_heads)
    start = (pl.num_programs(2) - 1 - pl.program_id(2)) * tile_q
    query = start + jnp.arange(tile_q, dtype=jnp.int32)
    query_index = jnp.minimum(query, queries - 1)
    seen = seen_cells(positions_ref[batch, query_index], counts_ref[batch])  # [tile_q]
    pieces = range(0, dim, channels)
    forecasts = [forecast_ref[batch, query_index, head, pl.ds(at, channels)] for at in pieces]

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
            row_index = jnp.minimum(jnp.maximum(cell, 0), cells - 1)
            scores = jnp.zeros((tile_q, tile_m), jnp.float32)
            for at, forecast in zip(pieces, forecasts, strict=True):
                keys = pooled_ref[batch, row_index, head, pl.ds(at, channels)]  # [tile_m channels]
                scores += _dot(forecast, keys)
            visible = (cell >= 0)[None, :] & (cell[None, :] < seen[:, None])
            best = jnp.maximum(best, jnp.where(visible, scores, LOWEST))
        store(tile, best)
        return carry

    def fill(tile, carry):
        store(tile, jnp.full((tile_q, tile_m), LOWEST, jnp.float32))
        return carry

    most = jnp.max(seen)
    described = jnp.where(most > 0, lax.div(most, per_block) + 1, 0)  # blocks with a visible cell
    first = pl.program_id(1) * tiles.span
    stop = jnp.minimum(first + tiles.span, pl.cdiv(num_blocks, tile_m))
    past = jnp.maximum(jnp.minimum(stop, lax.div(described + (tile_m - 1), tile_m)), first)
    lax.fori_loop(first, past, score, None)
    lax.fori_loop(past, stop, fill, None)


def _dot(rows, keys):
    """Multiply [rows channels] by [keys channels]: exact products, f32 sums."""
    exact = rows.dtype == jnp.float32
    return lax.dot_general(
        rows,
        keys,
        (((1,), (1,)), ((), ())),
        precision=lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if exact else None,
        preferred_element_type=jnp.float32,
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
        forecast: what ranks the blocks.
        pooled: pooled keys, at least one.
        positions: of the queries.
        counts: valid pooled keys.
        num_blocks: M.
        pool_size: tokens of a window.
        pool_stride: tokens between windows.
        block_size: tokens of a block.
        visible: the rule.
        tiles: `tile_q=1` for the decode kernel.
        interpret: whether to interpret the kernel instead of compiling it.
    """
    batch, queries, kv_heads, dim = forecast.shape
    per_block = block_size // pool_stride
    reach = pool_size - 1 if visible == "end" else 0
    seen_cells = functools.partial(
        _seen_cells, reach=reach, stride=pool_stride, cells=pooled.shape[1]
    )
    steps = pl.cdiv(num_blocks, tiles.tile_m)
    if tiles.tile_q == 1:
        kernel = functools.partial(
            _decode_kernel, tile_m=tiles.tile_m, per_block=per_block, seen_cells=seen_cells
        )
        grid = (kv_heads, steps, batch * queries)
    else:
        channels = dim
        kernel = functools.partial(
            _prefill_kernel,
            tiles=tiles,
            per_block=per_block,
            channels=channels,
            seen_cells=seen_cells,
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
