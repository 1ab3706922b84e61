# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The doors: arguments checked once, a backend resolved, visibility and masks made."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import _backend
from pallas_kernels.forecast_kl import reference, triton
from pallas_kernels.forecast_kl.config import Tiles

Implementation = Literal["triton", "reference"]

_PREFERRED = ("triton",)
_WORD = 32


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _seen(
    positions: Int[Array, "B T"], lengths: Int[Array, " B"], size: int, stride: int, count: int
) -> Int[Array, "B T"]:
    """Count the windows that have started at each query and that its sequence fills."""
    started = positions // stride + 1  # 0 for padding
    full = (lengths - size) // stride + 1
    return jnp.clip(jnp.minimum(started, full[:, None]), 0, count).astype(jnp.int32)


def teacher_mass(
    q: Float[Array, "B T N H"],
    fine: Float[Array, "B fine K H"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    num_cells: int,
    pool_stride: int,
    teacher_pool_size: int,
    teacher_pool_stride: int,
    alignment: Literal["max", "mean"] = "max",
    scale: float | None = None,
    implementation: Implementation | Sequence[Implementation] | None = None,
    tiles: Tiles | None = None,
) -> Float32[Array, "B T K C"]:
    """Compute the teacher: max over u = r·c − 1 … r·c + r − 1 of Σ_g softmax_u(scale · q_g · fine).

    r is `pool_stride / teacher_pool_stride`. A fine key is visible as soon as it starts, stride · u
    ≤ t. The caller bounds the tile of queries: the result is its largest array.

    Args:
        q: rotated queries of this tile.
        fine: fine keys, means of `teacher_pool_size` keys, at least those that the tile's last
            query sees.
        positions: of these queries, in tokens from 0; −1 marks padding, whose row is zero.
        lengths: tokens of each sequence; a fine key that reaches beyond them is never seen.
        num_cells: C; cells beyond the fine keys given get zero.
        pool_stride: tokens between the starts of neighbouring cells.
        teacher_pool_size: tokens averaged into one fine key.
        teacher_pool_stride: tokens between their starts.
        alignment: the max over the window, or the mean of its r + 1 values, those out of range
            counted as zero. With r = 1 neither: the mass is only cut.
        scale: of the logits, positive; left out, 1/√H.
        implementation: `None` takes the kernel where there is a GPU.
        tiles: of the kernels.

    Returns:
        Mass on the pooled grid, not normalised.

    Raises:
        ValueError: the strides do not divide, or the shapes disagree.
        NotImplementedError: the named kernel cannot take these operands.

    References:
        SparDA, arXiv:2606.04511, section 4.2, equation 6.
    """
    batch, queries, heads, dim = q.shape
    kv_heads = fine.shape[2]
    _check(heads % kv_heads == 0, f"teacher_mass: {heads=} must be a multiple of {kv_heads=}")
    _check(dim == fine.shape[3], f"teacher_mass: head dims of {q.shape=} and {fine.shape=} differ")
    _check(
        positions.shape == (batch, queries) and lengths.shape == (batch,),
        f"teacher_mass: {positions.shape=} and {lengths.shape=} must be [B T] and [B] of "
        f"{q.shape=}",
    )
    _check(
        pool_stride % teacher_pool_stride == 0,
        f"teacher_mass: {pool_stride=} must be a multiple of {teacher_pool_stride=}",
    )
    _check(alignment in ("max", "mean"), f"teacher_mass: {alignment=} must be 'max' or 'mean'")
    scale = dim**-0.5 if scale is None else scale
    _check(scale > 0.0, f"teacher_mass: {scale=} must be positive")
    ratio = pool_stride // teacher_pool_stride
    tiles = Tiles.default(q.dtype.itemsize) if tiles is None else tiles
    chosen = _backend.resolve(
        "teacher_mass",
        implementation,
        _PREFERRED,
        lambda _: triton.unsupported_reason((q.dtype, fine.dtype), dim, ratio, tiles.mass_fine),
    )
    seen = _seen(positions, lengths, teacher_pool_size, teacher_pool_stride, fine.shape[1])
    static: dict[str, Any] = {
        "num_cells": num_cells,
        "ratio": ratio,
        "alignment": alignment,
        "scale": scale,
    }
    if chosen == _backend.REFERENCE or 0 in (batch, queries, fine.shape[1], num_cells):
        return reference.teacher_mass(q, fine, seen, **static)
    return triton.teacher_mass(q, fine, seen, **static, tiles=tiles)


def forecast_kl_and_gradient(
    forecast: Float[Array, "B T K H"],
    pooled: Float[Array, "B C K H"],
    teacher: Float32[Array, "B T K C"],
    ids: Int[Array, "B T K J"],
    counted: Bool[Array, "B T K"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    block_size: int,
    pool_size: int,
    pool_stride: int,
    sink_blocks: int,
    local_blocks: int,
    scale: float | None = None,
    has_gradient: bool = True,
    implementation: Implementation | Sequence[Implementation] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float32[Array, "B T K"], Float32[Array, "B T K H"]]:
    """Compute KL(teacher ‖ student) of each row, and the gradient of their sum in f32.

    The student is softmax_c(scale · forecast · pooled) over the cells that have started and that
    the sequence fills. Both distributions are compared on the cells of the listed blocks that are
    neither pinned nor future, and one bucket for the rest; each of the cells_per_block · J + 1
    entries is at least 1e-8.

    Args:
        forecast: rotated forecasts for this layer.
        pooled: pooled keys of this layer.
        teacher: on the pooled grid, not normalised; zero on cells that start `pool_stride` tokens
            or more after the query.
        ids: listed blocks, each at most once; negative ids mark no block.
        counted: rows that count; the others give zero.
        positions: of the queries, in tokens from 0; −1 marks padding, which supervises nothing.
        lengths: tokens of each sequence.
        block_size: tokens in one block.
        pool_size: tokens averaged into one pooled key.
        pool_stride: tokens between the starts of neighbouring cells.
        sink_blocks: leading blocks that are pinned.
        local_blocks: blocks before the query's own that are pinned, as the own is.
        scale: of the logits, positive; left out, 1/√H.
        has_gradient: leave the gradient zero if false.
        implementation: `None` takes the kernel where there is a GPU.
        tiles: of the kernel.

    Returns:
        The divergence in nats, and the gradient.

    Raises:
        ValueError: the strides do not divide, or the shapes disagree.
        NotImplementedError: the named kernel cannot take these operands.

    References:
        SparDA, arXiv:2606.04511, section 4.2, equation 7.
    """
    operands = (pooled, teacher, ids, counted, positions, lengths)
    _check_loss(forecast, *operands, block_size=block_size, pool_stride=pool_stride)
    batch, queries, _, dim = forecast.shape
    count = pooled.shape[1]
    scale = dim**-0.5 if scale is None else scale
    _check(scale > 0.0, f"forecast_kl: {scale=} must be positive")
    cells_per_block = block_size // pool_stride
    tiles = Tiles.default(forecast.dtype.itemsize) if tiles is None else tiles
    chosen = _backend.resolve(
        "forecast_kl",
        implementation,
        _PREFERRED,
        lambda _: triton.unsupported_reason(
            (forecast.dtype, pooled.dtype), dim, cells_per_block, 1 << 20
        ),
    )
    own = (positions // block_size)[:, :, None, None]
    free = (ids >= sink_blocks) & (ids < own - local_blocks)
    words = _mark(jnp.where(free, ids, -1), -(-count // (cells_per_block * _WORD)))
    seen = _seen(positions, lengths, pool_size, pool_stride, count)
    static: dict[str, Any] = {
        "entries": cells_per_block * ids.shape[-1] + 1,
        "scale": scale,
        "has_gradient": has_gradient,
    }
    if chosen == _backend.REFERENCE or 0 in (batch, queries, count):
        kept = _cells_of(words, cells_per_block, count)
        return reference.forecast_kl(forecast, pooled, teacher, kept, counted, seen, **static)
    reach = jnp.where(positions < 0, 0, jnp.minimum(positions // pool_stride + 2, count))
    return triton.forecast_kl(
        forecast,
        pooled,
        teacher,
        words,
        counted,
        seen,
        reach.astype(jnp.int32),
        cells_per_block=cells_per_block,
        tiles=tiles,
        **static,
    )


def _check_loss(
    forecast: Array,
    pooled: Array,
    teacher: Array,
    ids: Array,
    counted: Array,
    positions: Array,
    lengths: Array,
    *,
    block_size: int,
    pool_stride: int,
) -> None:
    """Refuse operands of `forecast_kl` that do not fit together."""
    batch, queries, kv_heads, dim = forecast.shape
    count = pooled.shape[1]
    _check(
        pooled.shape == (batch, count, kv_heads, dim),
        f"forecast_kl: {pooled.shape=} must agree in B, K and H with {forecast.shape=}",
    )
    for name, array, shape in (
        ("teacher", teacher, (batch, queries, kv_heads, count)),
        ("ids", ids, (batch, queries, kv_heads, ids.shape[-1])),
        ("counted", counted, (batch, queries, kv_heads)),
        ("positions", positions, (batch, queries)),
        ("lengths", lengths, (batch,)),
    ):
        _check(array.shape == shape, f"forecast_kl: {name} has {array.shape=}, must be {shape}")
    _check(
        block_size % pool_stride == 0,
        f"forecast_kl: {block_size=} must be a multiple of {pool_stride=}",
    )


def _mark(ids: Int[Array, "B T K J"], words: int) -> Int[Array, "B T K words"]:
    """Mark blocks by bits: bit m % 32 of word m // 32 is block m; negative ids mark none."""
    word, bit = ids // _WORD, ids % _WORD
    here = word[..., None, :] == jnp.arange(words, dtype=ids.dtype)[None, None, None, :, None]
    bits = lax.shift_left(jnp.ones(ids.shape, jnp.int32), bit.astype(jnp.int32))
    return lax.reduce(
        jnp.where(here, bits[..., None, :], 0), jnp.int32(0), lax.bitwise_or, dimensions=(4,)
    )


def _cells_of(
    words: Int[Array, "B T K words"], cells_per_block: int, count: int
) -> Bool[Array, "B T K C"]:
    """Mark the cells that start in a marked block."""
    bits = lax.shift_right_logical(
        jnp.broadcast_to(words[..., None], (*words.shape, _WORD)),
        jnp.broadcast_to(jnp.arange(_WORD, dtype=jnp.int32), (*words.shape, _WORD)),
    )
    marked = (bits & 1).reshape(*words.shape[:3], -1) == 1
    return jnp.repeat(marked, cells_per_block, axis=-1)[..., :count]


def forecast_kl(
    forecast: Float[Array, "B T K H"],
    pooled: Float[Array, "B C K H"],
    teacher: Float32[Array, "B T K C"],
    ids: Int[Array, "B T K J"],
    counted: Bool[Array, "B T K"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    block_size: int,
    pool_size: int,
    pool_stride: int,
    sink_blocks: int,
    local_blocks: int,
    scale: float | None = None,
    implementation: Implementation | Sequence[Implementation] | None = None,
    tiles: Tiles | None = None,
) -> Float32[Array, "B T K"]:
    """Compute KL(teacher ‖ student) of each row, differentiable with respect to the forecast.

    The forward pass under differentiation computes the gradient too and keeps nothing else, so the
    backward pass is a multiplication. Everything but the forecast is a constant. Arguments, result
    and errors as those of `forecast_kl_and_gradient`.
    """
    run = functools.partial(
        forecast_kl_and_gradient,
        block_size=block_size,
        pool_size=pool_size,
        pool_stride=pool_stride,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        scale=scale,
        implementation=implementation,
        tiles=tiles,
    )
    return _rows(run, forecast, (pooled, teacher, ids, counted, positions, lengths))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(run: Callable[..., Any], forecast: Array, constants: tuple[Array, ...]) -> Array:
    return run(forecast, *constants, has_gradient=False)[0]


def _rows_forward(
    run: Callable[..., Any], forecast: Array, constants: tuple[Array, ...]
) -> tuple[Array, tuple[Array, Array]]:
    kl, gradient = run(forecast, *constants)
    return kl, (gradient, jnp.zeros((), forecast.dtype))


def _rows_backward(
    run: Callable[..., Any], kept: tuple[Array, Array], cotangent: Array
) -> tuple[Array, None]:
    del run
    gradient, like = kept
    return (cotangent[..., None] * gradient).astype(like.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)
