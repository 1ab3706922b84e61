# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The door of `query_scores`: checks the arguments once and finds the implementation."""

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import _backend
from pallas_kernels.query_scores import reference, triton
from pallas_kernels.query_scores.config import Tiles

Implementation = Literal["triton", "reference"]

PREFERRED: tuple[Implementation, ...] = ("triton",)


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
    scale: float | None = None,
    implementation: Implementation | Sequence[Implementation] | None = None,
    tiles: Tiles | None = None,
) -> Float32[Array, "B T K M"]:
    """Score blocks by queries: cell[c] = Σ over a group's heads of softmax(scale · q · pooled)[c].

    A block's score is the max over its cells r·m − 1 … r·m + r − 1, r = block_size / pool_stride:
    the cell before a block reaches into it, so neighbours share a cell and often tie. The softmax
    is exact, in f32, over the windows that a query sees; its parts sum to G. Scores rank blocks and
    have no gradient in the kernels.

    Args:
        q: rotated queries; head n belongs to KV head n // G.
        pooled: one vector per window of `pool_size` tokens, one window every `pool_stride`.
        positions: of the queries, in tokens from 0; −1 for padding, which sees nothing. A query
            sees the windows that end at its position or before.
        counts: pooled keys of each sequence that are valid; what lies behind them is not looked at.
        num_blocks: M; cells of later blocks are left out of the scores, not of the softmax.
        pool_size: tokens of a window.
        pool_stride: tokens between the starts of windows.
        block_size: tokens of a block, a multiple of `pool_stride`.
        scale: of the logits; 1/√H by default.
        implementation: a backend, several in order of preference, or `None` to choose.
        tiles: how the kernels cut their work; `None` for the default.

    Returns:
        Block scores, from 0 to G; −1e30 for a block without a visible cell.

    Raises:
        ValueError: shapes or dtypes do not fit together, a size < 1, or `block_size` is no
            multiple of `pool_stride`.
        NotImplementedError: the named implementation cannot run this.

    References:
        InfLLM-V2, arXiv:2509.24663; SparDA, arXiv:2606.04511, section 3.

    Example:
        Windows of 2 tokens, one at every token; blocks of 4. All cells are alike.

        >>> import jax.numpy as jnp
        >>> q, pooled = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 7, 1, 4))
        >>> rule = dict(num_blocks=3, pool_size=2, pool_stride=1, block_size=4)
        >>> scores = query_scores(q, pooled, jnp.array([[4]]), jnp.array([7]), **rule)
        >>> scores.ravel()[:2].tolist(), float(scores[..., 2].item()) < -1e29
        ([0.5, 0.5], True)
    """
    _check(q, pooled, positions, counts)
    if min(num_blocks, pool_size, pool_stride) < 1:
        raise ValueError(f"{num_blocks=}, {pool_size=} and {pool_stride=} must be at least 1")
    if block_size < 1 or block_size % pool_stride:
        raise ValueError(f"{block_size=} must be a multiple of {pool_stride=}")
    batch, queries, heads, dim = q.shape
    cells, kv_heads = pooled.shape[1:3]
    scale = dim**-0.5 if scale is None else scale
    cells_per_block = block_size // pool_stride
    if tiles is None:
        tiles = Tiles.default(
            batch=batch,
            queries=queries,
            cells=cells,
            kv_heads=kv_heads,
            group=heads // kv_heads,
            head_dim=dim,
            cells_per_block=cells_per_block,
            dtype=q.dtype,
        )
    cut = tiles
    name = _backend.resolve(
        "query_scores",
        implementation,
        PREFERRED,
        lambda _: triton.unsupported_reason(q, pooled, cells_per_block, cut),
    )
    rule: dict[str, Any] = {
        "num_blocks": num_blocks,
        "pool_size": pool_size,
        "pool_stride": pool_stride,
        "block_size": block_size,
        "scale": scale,
    }
    if name == _backend.REFERENCE or cells == 0:  # a fill, whoever does it
        return reference.query_scores(q, pooled, positions, counts, **rule)
    return triton.query_scores(q, pooled, positions, counts, **rule, tiles=cut)


def _check(
    q: Float[Array, "B T N H"],
    pooled: Float[Array, "B C K H"],
    positions: Int32[Array, "B T"],
    counts: Int32[Array, " B"],
) -> None:
    batch, queries, heads, dim = q.shape
    if q.size == 0:
        raise ValueError(f"{q.shape=} must have no axis of length 0")
    if (pooled.shape[0], pooled.shape[3]) != (batch, dim):
        raise ValueError(f"{pooled.shape=} must equal {q.shape=} in B and H")
    kv_heads = pooled.shape[2]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"N of {q.shape=} must be a multiple of K of {pooled.shape=}")
    if positions.shape != (batch, queries):
        raise ValueError(f"{positions.shape=} must equal [B T] of {q.shape=}")
    if counts.shape != (batch,):
        raise ValueError(f"{counts.shape=} must equal [B] of {q.shape=}")
    if pooled.dtype != q.dtype:
        raise ValueError(f"{pooled.dtype=} must equal {q.dtype=}")
