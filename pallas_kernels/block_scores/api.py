# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The door of `block_scores`: checks the arguments once and finds the implementation."""

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import _backend
from pallas_kernels.block_scores import reference, triton
from pallas_kernels.block_scores.config import Tiles

Implementation = Literal["triton", "reference"]

PREFERRED: tuple[Implementation, ...] = ("triton",)


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
    implementation: Implementation | Sequence[Implementation] | None = None,
    tiles: Tiles | None = None,
) -> Float32[Array, "B T K M"]:
    """Score blocks by forecasts: the max of forecast · pooled[c] over c = r·m − 1 … r·m + r − 1.

    r = block_size / pool_stride. The cell before a block reaches into it, so neighbours share a
    cell and often tie. Scores are raw inner products, in f32. They rank blocks and have no gradient
    in the kernels.

    Args:
        forecast: one ranking vector per query and KV head.
        pooled: one vector per window of `pool_size` tokens, one window every `pool_stride`.
        positions: of the queries, in tokens from 0; −1 for padding, which sees nothing.
        counts: pooled keys of each sequence that are valid; what lies behind them is not looked at.
        num_blocks: M; cells of later blocks are left out.
        pool_size: tokens of a window.
        pool_stride: tokens between the starts of windows.
        block_size: tokens of a block, a multiple of `pool_stride`.
        visible: a query sees the windows that end at its position or before (`"end"`), or those
            that start there or before (`"start"`: the original's rule in prefill).
        implementation: a backend, several in order of preference, or `None` to choose.
        tiles: how the kernel cuts its work; `None` for the default.

    Returns:
        Block scores; −1e30 for a block without a visible cell.

    Raises:
        ValueError: shapes or dtypes do not fit together, a size < 1, `block_size` is no multiple
            of `pool_stride`, or `visible` is unknown.
        NotImplementedError: the named implementation cannot run this.

    References:
        SparDA, arXiv:2606.04511, section 4.1 and equation 4; InfLLM-V2, arXiv:2509.24663, for the
        pooling from cells to blocks.

    Example:
        Windows of 2 tokens, one at every token; blocks of 4. The last window ends at token 7.

        >>> import jax.numpy as jnp
        >>> forecast = jnp.ones((1, 1, 1, 1))
        >>> pooled = jnp.arange(7.0).reshape(1, 7, 1, 1)
        >>> rule = dict(num_blocks=2, pool_size=2, pool_stride=1, block_size=4)
        >>> counts = jnp.array([7])
        >>> block_scores(forecast, pooled, jnp.array([[7]]), counts, **rule).ravel().tolist()
        [3.0, 6.0]
        >>> block_scores(forecast, pooled, jnp.array([[5]]), counts, **rule).ravel().tolist()
        [3.0, 4.0]
    """
    check_operands(forecast, pooled, positions, counts)
    check_grid(num_blocks, pool_size, pool_stride, block_size)
    if visible not in ("end", "start"):
        raise ValueError(f"{visible=} must be 'end' or 'start'")
    cells_per_block = block_size // pool_stride
    if tiles is None:
        tiles = Tiles.default(
            queries=forecast.shape[1],
            head_dim=forecast.shape[3],
            cells_per_block=cells_per_block,
            dtype=forecast.dtype,
        )
    cut = tiles
    name = _backend.resolve(
        "block_scores",
        implementation,
        PREFERRED,
        lambda _: triton.unsupported_reason(forecast, cells_per_block, cut),
    )
    rule: dict[str, Any] = {
        "num_blocks": num_blocks,
        "pool_size": pool_size,
        "pool_stride": pool_stride,
        "block_size": block_size,
        "visible": visible,
    }
    if name == _backend.REFERENCE or pooled.shape[1] == 0:  # a fill, whoever does it
        return reference.block_scores(forecast, pooled, positions, counts, **rule)
    return triton.block_scores(forecast, pooled, positions, counts, **rule, tiles=cut)


def check_operands(
    forecast: Float[Array, "B T K H"],
    pooled: Float[Array, "B C K H"],
    positions: Int32[Array, "B T"],
    counts: Int32[Array, " B"],
) -> None:
    """Refuse arrays that do not fit together.

    Raises:
        ValueError: they differ in an axis or a dtype, or there is nothing to score.
    """
    batch, queries, kv_heads, dim = forecast.shape
    if (pooled.shape[0], *pooled.shape[2:]) != (batch, kv_heads, dim):
        raise ValueError(f"{pooled.shape=} must equal {forecast.shape=} in B, K and H")
    if positions.shape != (batch, queries):
        raise ValueError(f"{positions.shape=} must equal [B T] of {forecast.shape=}")
    if counts.shape != (batch,):
        raise ValueError(f"{counts.shape=} must equal [B] of {forecast.shape=}")
    if pooled.dtype != forecast.dtype:
        raise ValueError(f"{pooled.dtype=} must equal {forecast.dtype=}")
    if forecast.size == 0:
        raise ValueError(f"{forecast.shape=} must have no axis of length 0")


def check_grid(num_blocks: int, pool_size: int, pool_stride: int, block_size: int) -> None:
    """Refuse a grid of windows and blocks that do not fit together.

    Raises:
        ValueError: a size < 1, or `block_size` is no multiple of `pool_stride`.
    """
    if min(num_blocks, pool_size, pool_stride) < 1:
        raise ValueError(f"{num_blocks=}, {pool_size=} and {pool_stride=} must be at least 1")
    if block_size < 1 or block_size % pool_stride:
        raise ValueError(f"{block_size=} must be a multiple of {pool_stride=}")
