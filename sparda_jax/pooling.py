# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Keys to pooled keys, and cell scores to block scores.

A pooled key is the mean of `pool_size` neighbouring keys, one every `pool_stride`. The mean is a
sum in token order in f32, so pooling a sequence at once, in chunks or token by token gives the same
bits.
"""

import functools
import typing

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from sparda_jax.config import SparseConfig

LOWEST = -1e30
"""The finite score of a block that no visible cell describes."""


@typing.no_type_check
@struct.dataclass
class PooledSummary:
    """Pooled keys of one layer, and the newest raw keys that are still needed to make more.

    Attributes:
        pooled: one vector per window; valid up to `pooled_count(length)`.
        tail: the last `pool_size` vectors, oldest first.
    """

    pooled: Float[Array, "B C K H"]
    tail: Float[Array, "B P K H"]


def pooled_count(lengths: Int[Array, "*B"], sparse: SparseConfig) -> Int[Array, "*B"]:
    """Count the full windows of sequences of `lengths` tokens: C = ⌊(S − size)/stride⌋ + 1."""
    full = (lengths - sparse.pool_size) // sparse.pool_stride + 1
    return jnp.where(lengths < sparse.pool_size, 0, full)


def init_pooled(
    batch: int, capacity: int, heads: int, dim: int, sparse: SparseConfig, dtype: str
) -> PooledSummary:
    """Make an empty summary with room for the windows of `capacity` tokens a sequence."""
    return PooledSummary(
        pooled=jnp.zeros((batch, sparse.pooled(capacity), heads, dim), dtype),
        tail=jnp.zeros((batch, sparse.pool_size, heads, dim), dtype),
    )


def _mean_in_order(windows: list[Float[Array, "..."]], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Average in f32, adding in the order given: the same bits however the keys arrived."""
    total = windows[0].astype(jnp.float32)
    for window in windows[1:]:
        total = total + window.astype(jnp.float32)
    return (total / len(windows)).astype(dtype)


def pool_keys(
    k: Float[Array, "B S K H"], pool_size: int, pool_stride: int
) -> Float[Array, "B C K H"]:
    """Pool keys: pooled[c] = mean of k[stride·c … stride·c + size − 1], full windows only.

    Example:
        >>> k = jnp.arange(6.0).reshape(1, 6, 1, 1)
        >>> pool_keys(k, 4, 2).ravel().tolist()
        [1.5, 3.5]
    """
    count = 0 if k.shape[1] < pool_size else (k.shape[1] - pool_size) // pool_stride + 1
    if count == 0:
        return jnp.zeros((k.shape[0], 0, *k.shape[2:]), k.dtype)
    span = (count - 1) * pool_stride + 1
    return _mean_in_order([k[:, j : j + span : pool_stride] for j in range(pool_size)], k.dtype)


@functools.partial(jax.jit, static_argnames="sparse")  # traced once for all layers of a program
def extend_pooled(
    summary: PooledSummary,
    k: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    sparse: SparseConfig,
) -> PooledSummary:
    """Add new keys to a summary: every window that they complete is pooled.

    Args:
        summary: what is held so far.
        k: new keys, consecutive in each sequence.
        positions: their positions; −1 marks padding, which stands at the end of a row. A row of
            padding only is left as it was.
        sparse: pooling grid.

    Returns:
        The summary of the longer sequences, equal to pooling them from scratch.
    """
    size, stride = sparse.pool_size, sparse.pool_stride
    batch, new = positions.shape
    added = jnp.sum(positions >= 0, axis=1)  # [B]
    start = jnp.where(added > 0, positions[:, 0], 0)
    first, last = pooled_count(start, sparse), pooled_count(start + added, sparse)
    joined = jnp.concatenate([summary.tail, k.astype(summary.tail.dtype)], axis=1)  # [B P+T K H]

    window = first[:, None] + jnp.arange(-(-new // stride))[None, :]  # [B windows]
    begin = jnp.clip(window * stride - start[:, None] + size, 0, new)
    take = jax.vmap(lambda row, index: row[index])
    means = _mean_in_order([take(joined, begin + j) for j in range(size)], joined.dtype)
    capacity = summary.pooled.shape[1]
    place = jnp.where((window < last[:, None]) & (added > 0)[:, None], window, capacity)
    rows = jnp.arange(batch)[:, None]
    tail_index = added[:, None] + jnp.arange(size)[None, :]
    return PooledSummary(
        pooled=summary.pooled.at[rows, place].set(means, mode="drop"),
        tail=take(joined, tail_index),
    )


def pool_scores(
    cells: Float[Array, "B T K C"], num_blocks: int, cells_per_block: int
) -> Float[Array, "B T K M"]:
    """Pool cell scores to block scores: the max over cells r·m − 1 … r·m + r − 1.

    The cell before a block reaches into it, so neighbouring blocks share one cell and often tie.

    Args:
        cells: scores on the pooled grid; `LOWEST` (or −inf) where a cell is not visible.
        num_blocks: M.
        cells_per_block: r = block_size / pool_stride.

    Returns:
        Block scores; `LOWEST` where a block has no cell.

    References:
        InfLLM-V2, arXiv:2509.24663: max pooling with kernel r + 1, stride r and padding 1.

    Example:
        >>> pool_scores(jnp.arange(7.0).reshape(1, 1, 1, 7), 2, 4).ravel().tolist()
        [3.0, 6.0]
    """
    room = num_blocks * cells_per_block
    if cells.shape[-1] > room:
        cells = cells[..., :room]
    width = ((0, 0),) * 3 + ((1, room - cells.shape[-1]),)
    padded = jnp.pad(cells, width, constant_values=LOWEST)  # cell c stands at c + 1
    inside = padded[..., 1:].reshape(*cells.shape[:3], num_blocks, cells_per_block).max(axis=-1)
    before = padded[..., :-1:cells_per_block]
    return jnp.maximum(inside, before)
