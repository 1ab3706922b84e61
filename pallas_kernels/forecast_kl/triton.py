# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Teacher mass and KL as three Triton kernels.

Why: XLA writes the logits of every query head against every fine key, [T, N, S] f32, and reads them
back several times. Here the first kernel leaves one log-sum-exp per (query, head); the second
computes the logits again, adds the heads of a group in registers and leaves only the greatest (or
the sum) of each pooled cell's window. The third never writes the student: one sweep over the cells
for its normaliser, one for the sums of the divergence, one for the gradient.

Numerics: products accumulate in f32, f32 operands are multiplied in IEEE f32 (no TF32). Softmax,
mass, divergence and sums are f32; exponentials are base 2 with the hardware's approximation (2
ulp, results below 2⁻¹²⁶ are zero). The slope that contracts with the pooled keys is split into two
terms of the operands' dtype, so 16 of its bits survive in bf16. No atomics: two runs give the same
bits.

Backend: Triton, CUDA compute capability 8.0 or newer. Both large kernels are one matmul per
exponential, which Triton keeps on the tensor cores; a Mosaic twin would mainly overlap the two
better. Refuses other dtypes than bf16 and f32, head dims that are no power of two from 16 to 256,
and grids whose ratios are no powers of two.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import _backend
from pallas_kernels.forecast_kl.config import Tiles
from pallas_kernels.forecast_kl.reference import FLOOR, LOWEST

_LOG2_E = math.log2(math.e)
_WORD = 32
"""Blocks that one word of a mask marks."""


def _is_power(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def unsupported_reason(
    dtypes: tuple[jnp.dtype, ...], head_dim: int, ratio: int, widest: int
) -> str | None:
    """Say why the kernels cannot take these operands; `None` if they can.

    Args:
        dtypes: of the operands of the products.
        head_dim: H.
        ratio: fine keys per cell, or cells per block.
        widest: the greatest ratio that the tiles have room for.
    """
    names = [jnp.dtype(dtype).name for dtype in dtypes]
    if len(set(names)) != 1 or names[0] not in ("bfloat16", "float32"):
        return f"takes operands that are all bfloat16 or all float32, not {', '.join(names)}"
    if not (_is_power(head_dim) and 16 <= head_dim <= 256):
        return f"needs a head_dim that is a power of two from 16 to 256, but {head_dim=}"
    if not (_is_power(ratio) and ratio <= widest):
        return f"needs a ratio of the grids that is a power of two up to {widest}, but {ratio=}"
    return _backend.triton_reason()


def _exp2(x: Array, interpret: bool) -> Array:
    if interpret:
        return jnp.exp2(x)
    (y,) = plt.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return y


def _dot(a: Array, b: Array, b_axis: int) -> Array:
    """Contract the last axis of `a` with axis `b_axis` of `b`, in f32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _vectors(ref: Any, batch: Array, at: Array, head: Array) -> Array:
    """Load rows `at` of a [B rows heads H] array."""
    return plt.load(ref.at[batch, at[:, None], head, jnp.arange(ref.shape[3])[None, :]])


def _lse_kernel(q_ref, fine_ref, seen_ref, lse_ref, *, rows, wide, factor, interpret):
    """log2-sum-exp2 of the scaled logits of one head: [rows] queries against all they see."""
    head, batch = pl.program_id(0), pl.program_id(2)
    start = (pl.num_programs(1) - 1 - pl.program_id(1)) * rows  # the longest rows first
    kv_head = lax.div(head, q_ref.shape[2] // fine_ref.shape[2])
    at = jnp.minimum(start + jnp.arange(rows), q_ref.shape[1] - 1)
    q = _vectors(q_ref, batch, at, head)
    seen = plt.load(seen_ref.at[batch, at])
    count = fine_ref.shape[1]

    def step(i, carry, *, masked):
        top, total = carry
        u = i * wide + jnp.arange(wide)
        keys = _vectors(fine_ref, batch, jnp.minimum(u, count - 1), kv_head)
        logits = _dot(q, keys, 1)  # [rows wide]
        if masked:
            logits = jnp.where(u[None, :] < seen[:, None], logits, LOWEST)
        new = jnp.maximum(top, jnp.max(logits, axis=1) * factor)
        mass = jnp.sum(_exp2(logits * factor - new[:, None], interpret), axis=1)
        return new, total * _exp2(top - new, interpret) + mass

    # Every row that counts sees the fine keys of the steps before `full`.
    stop = lax.div(jnp.max(seen) + (wide - 1), wide)
    full = lax.div(jnp.min(jnp.where(seen > 0, seen, count)), wide)
    full = jnp.minimum(full, stop)
    carry = (jnp.full((rows,), LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32))
    carry = lax.fori_loop(0, full, functools.partial(step, masked=False), carry)
    top, total = lax.fori_loop(full, stop, functools.partial(step, masked=True), carry)
    lse = top + jnp.log(jnp.where(total > 0.0, total, 1.0)) * _LOG2_E
    plt.store(lse_ref.at[batch, head, pl.ds(start, rows)], lse)


def _mass_kernel(
    q_ref,
    fine_ref,
    seen_ref,
    lse_ref,
    inside_ref,
    last_ref: Any = None,
    *,
    rows,
    wide,
    ratio,
    alignment,
    factor,
    interpret,
):
    """Mass of one KV head: [rows] queries on `wide` fine keys, reduced over each cell's window.

    Column x of the tile is fine key (c + x mod cells) · ratio + x div cells: the window of a cell
    is then spread over a thread's own registers, not over threads.
    """
    cells = wide // ratio
    first_cell, start = pl.program_id(0) * cells, pl.program_id(1) * rows
    kv_heads = fine_ref.shape[2]
    batch, kv_head = lax.div(pl.program_id(2), kv_heads), lax.rem(pl.program_id(2), kv_heads)
    group, count = q_ref.shape[2] // kv_heads, fine_ref.shape[1]
    at = jnp.minimum(start + jnp.arange(rows), q_ref.shape[1] - 1)
    seen = plt.load(seen_ref.at[batch, at])
    x = jnp.arange(wide)
    u = (first_cell + lax.rem(x, cells)) * ratio + lax.div(x, cells)
    keys = _vectors(fine_ref, batch, jnp.minimum(u, count - 1), kv_head)

    def add_head(g, mass):
        head = kv_head * group + g
        q = _vectors(q_ref, batch, at, head)
        lse = plt.load(lse_ref.at[batch, head, pl.ds(start, rows)])
        return mass + _exp2(_dot(q, keys, 1) * factor - lse[:, None], interpret)

    heads = (first_cell * ratio < jnp.max(seen)).astype(jnp.int32) * group  # none where unseen
    mass = lax.fori_loop(0, heads, add_head, jnp.zeros((rows, wide), jnp.float32))
    mass = jnp.where(u[None, :] < seen[:, None], mass, 0.0)
    here = (batch, pl.ds(start, rows), kv_head, pl.ds(first_cell, cells))
    if ratio == 1:
        plt.store(inside_ref.at[here], mass)
        return
    windows = mass.reshape(rows, ratio, cells)
    reduce = jnp.max if alignment == "max" else jnp.sum
    plt.store(inside_ref.at[here], reduce(windows, axis=1))
    is_last = jnp.arange(ratio)[None, :, None] == ratio - 1
    plt.store(last_ref.at[here], jnp.max(jnp.where(is_last, windows, 0.0), axis=1))


@functools.partial(
    jax.jit,
    static_argnames=(
        "num_cells",
        "ratio",
        "alignment",
        "scale",
        "tiles",
        "interpret",
    ),
)
def teacher_mass(
    q: Float[Array, "B T N H"],
    fine: Float[Array, "B fine K H"],
    seen: Int[Array, "B T"],
    *,
    num_cells: int,
    ratio: int,
    alignment: str,
    scale: float,
    tiles: Tiles,
    interpret: bool = False,
) -> Float32[Array, "B T K C"]:
    """Run the first two kernels; arguments as those of the reference."""
    batch, queries, heads, _ = q.shape
    kv_heads = fine.shape[2]
    factor = scale * _LOG2_E
    padded = pl.cdiv(queries, max(tiles.lse_q, tiles.mass_q)) * max(tiles.lse_q, tiles.mass_q)
    lse = pl.pallas_call(
        functools.partial(
            _lse_kernel, rows=tiles.lse_q, wide=tiles.lse_fine, factor=factor, interpret=interpret
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
        grid=(heads, padded // tiles.lse_q, batch),
        compiler_params=plt.CompilerParams(num_warps=tiles.lse_warps, num_stages=tiles.lse_stages),
        interpret=interpret,
        name="teacher_lse",
    )(q, fine, seen)

    cells = tiles.mass_fine // ratio
    width = pl.cdiv(num_cells, cells) * cells
    shape = jax.ShapeDtypeStruct((batch, padded, kv_heads, width), jnp.float32)
    parts = pl.pallas_call(
        functools.partial(
            _mass_kernel,
            rows=tiles.mass_q,
            wide=tiles.mass_fine,
            ratio=ratio,
            alignment=alignment,
            factor=factor,
            interpret=interpret,
        ),
        out_shape=[shape] if ratio == 1 else [shape, shape],
        grid=(width // cells, padded // tiles.mass_q, batch * kv_heads),
        compiler_params=plt.CompilerParams(
            num_warps=tiles.mass_warps, num_stages=tiles.mass_stages
        ),
        interpret=interpret,
        name="teacher_mass",
    )(q, fine, seen, lse)
    inside = parts[0][:, :queries, :, :num_cells]
    if ratio == 1:
        return inside
    before = parts[1][:, :queries, :, : num_cells - 1]
    before = jnp.pad(before, ((0, 0),) * 3 + ((1, 0),))  # the cell before it ends with fine r·c − 1
    return jnp.maximum(inside, before) if alignment == "max" else (inside + before) / (ratio + 1)


def _kl_kernel(
    forecast_ref,
    pooled_ref,
    teacher_ref,
    words_ref,
    seen_ref,
    reach_ref,
    kl_ref,
    gradient_ref: Any = None,
    *,
    rows,
    wide,
    cells_per_block,
    entries,
    scale,
    interpret,
):
    """KL of [rows] queries of one KV head over all cells, `wide` at a time, in three sweeps."""
    start, kv_head, batch = pl.program_id(0) * rows, pl.program_id(1), pl.program_id(2)
    at = jnp.minimum(start + jnp.arange(rows), forecast_ref.shape[1] - 1)
    forecast = _vectors(forecast_ref, batch, at, kv_head)
    seen = plt.load(seen_ref.at[batch, at])
    count = pooled_ref.shape[1]
    stop = lax.div(jnp.max(plt.load(reach_ref.at[batch, at])) + (wide - 1), wide)
    factor = scale * _LOG2_E
    add = lambda value: jnp.sum(value, axis=1)

    def cells_of(i):
        c = i * wide + jnp.arange(wide)
        held = jnp.minimum(c, count - 1)
        keys = _vectors(pooled_ref, batch, held, kv_head)
        mass = plt.load(teacher_ref.at[batch, at[:, None], kv_head, held[None, :]])
        mass = jnp.where((c < count)[None, :], mass, 0.0)
        logits = jnp.where(c[None, :] < seen[:, None], _dot(forecast, keys, 1) * factor, LOWEST)
        return c, keys, mass, logits

    def normaliser(i, carry):
        top, total, mass_total = carry
        c, _, mass, logits = cells_of(i)
        new = jnp.maximum(top, jnp.max(logits, axis=1))
        parts = _exp2(logits - new[:, None], interpret)
        parts = jnp.where(c[None, :] < seen[:, None], parts, 0.0)
        return new, total * _exp2(top - new, interpret) + add(parts), mass_total + add(mass)

    zeros = jnp.zeros((rows,), jnp.float32)
    carry = (jnp.full((rows,), LOWEST, jnp.float32), zeros, zeros)
    top, total, mass_total = lax.fori_loop(0, stop, normaliser, carry)
    inverse = 1.0 / jnp.where(total > 0.0, total, 1.0)
    per_mass = 1.0 / (mass_total + FLOOR)

    def probabilities(i):
        c, keys, mass, logits = cells_of(i)
        p = _exp2(logits - top[:, None], interpret) * inverse[:, None]
        p = jnp.where(c[None, :] < seen[:, None], p, 0.0)
        block = lax.div(i * wide, cells_per_block)
        word = plt.load(words_ref.at[batch, at, kv_head, lax.div(block, _WORD)])
        bit = lax.rem(lax.div(c, cells_per_block), _WORD)
        bit = jnp.broadcast_to(bit[None, :], (rows, wide))
        word = jnp.broadcast_to(word[:, None], (rows, wide))
        kept = (lax.shift_right_logical(word, bit) & 1) == 1
        return keys, p, mass * per_mass[:, None], kept & (c < count)[None, :]

    def sums(i, carry):
        _, p, y, kept = probabilities(i)
        y_cell, p_cell = jnp.maximum(y, FLOOR), jnp.maximum(p, FLOOR)
        pulled = kept & (p > FLOOR)
        parts = (
            kept.astype(jnp.float32),
            jnp.where(kept, y_cell, 0.0),
            jnp.where(kept, p_cell, 0.0),
            jnp.where(kept, 0.0, y),
            jnp.where(kept, 0.0, p),
            jnp.where(kept, y_cell * jnp.log(y_cell / p_cell), 0.0),
            jnp.where(pulled, y_cell, 0.0),
            jnp.where(pulled, p, 0.0),
        )
        return tuple(held + add(part) for held, part in zip(carry, parts, strict=True))

    found = lax.fori_loop(0, stop, sums, (zeros,) * 8)
    kept_count, y_total, p_total, y_out, p_out, parts, y_pulled, p_pulled = found
    spare = (entries - 1 - kept_count) * FLOOR
    y_rest, p_rest = jnp.maximum(y_out, FLOOR), jnp.maximum(p_out, FLOOR)
    y_total, p_total = y_total + y_rest + spare, p_total + p_rest + spare
    kl = (parts + y_rest * jnp.log(y_rest / p_rest)) / y_total - jnp.log(y_total / p_total)
    plt.store(kl_ref.at[batch, kv_head, pl.ds(start, rows)], kl)
    if gradient_ref is None:
        return
    rest = jnp.where(p_rest > FLOOR, 1.0 / p_total - y_rest / (y_total * p_rest), 0.0)
    y_share, p_share = 1.0 / y_total, 1.0 / p_total
    back = p_pulled * p_share - y_pulled * y_share + rest * p_out  # the sum of `pull` over cells

    def contract(i, gradient):
        keys, p, y, kept = probabilities(i)
        cell = p * p_share[:, None] - jnp.maximum(y, FLOOR) * y_share[:, None]
        cell = jnp.where(p > FLOOR, cell, 0.0)
        slope = jnp.where(kept, cell, p * rest[:, None]) - p * back[:, None]
        gradient = gradient + _dot(slope.astype(keys.dtype), keys, 0)
        if keys.dtype == jnp.float32:
            return gradient
        left = slope - slope.astype(keys.dtype).astype(jnp.float32)
        return gradient + _dot(left.astype(keys.dtype), keys, 0)

    dim = forecast_ref.shape[3]
    gradient = lax.fori_loop(0, stop, contract, jnp.zeros((rows, dim), jnp.float32))
    plt.store(gradient_ref.at[batch, pl.ds(start, rows), kv_head, :], gradient * scale)


@functools.partial(
    jax.jit,
    static_argnames=(
        "cells_per_block",
        "entries",
        "scale",
        "has_gradient",
        "tiles",
        "interpret",
    ),
)
def forecast_kl(
    forecast: Float[Array, "B T K H"],
    pooled: Float[Array, "B C K H"],
    teacher: Float32[Array, "B T K C"],
    words: Int[Array, "B T K words"],
    counted: Bool[Array, "B T K"],
    seen: Int[Array, "B T"],
    reach: Int[Array, "B T"],
    *,
    cells_per_block: int,
    entries: int,
    scale: float,
    has_gradient: bool,
    tiles: Tiles,
    interpret: bool = False,
) -> tuple[Float32[Array, "B T K"], Float32[Array, "B T K H"]]:
    """Run the third kernel.

    Args:
        forecast: as in the reference.
        pooled: at least one.
        teacher: as in the reference.
        words: bit m % 32 of word m // 32 marks block m as supervised.
        counted: as in the reference.
        seen: cells that each query's student sees.
        reach: cells of each query that may hold teacher mass, at least `seen`.
        cells_per_block: pooled keys that start in one block.
        entries: as in the reference.
        scale: as in the reference.
        has_gradient: leave the gradient zero if false.
        tiles: of the kernel.
        interpret: run in the interpreter.
    """
    batch, queries, kv_heads, dim = forecast.shape
    padded = pl.cdiv(queries, tiles.kl_q) * tiles.kl_q
    shapes = [jax.ShapeDtypeStruct((batch, kv_heads, padded), jnp.float32)]
    if has_gradient:
        shapes.append(jax.ShapeDtypeStruct((batch, padded, kv_heads, dim), jnp.float32))
    found = pl.pallas_call(
        functools.partial(
            _kl_kernel,
            rows=tiles.kl_q,
            wide=min(tiles.kl_cells, _WORD * cells_per_block),  # the blocks of a step share a word
            cells_per_block=cells_per_block,
            entries=entries,
            scale=scale,
            interpret=interpret,
        ),
        out_shape=shapes,
        grid=(padded // tiles.kl_q, kv_heads, batch),
        compiler_params=plt.CompilerParams(num_warps=tiles.kl_warps, num_stages=tiles.kl_stages),
        interpret=interpret,
        name="forecast_kl",
    )(forecast, pooled, teacher, words, seen, reach)
    kl = jnp.where(counted, jnp.swapaxes(found[0], 1, 2)[:, :queries], 0.0)
    if not has_gradient:
        return kl, jnp.zeros(forecast.shape, jnp.float32)
    return kl, jnp.where(counted[..., None], found[1][:, :queries], 0.0)
