# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The teacher: where a layer's own queries put their attention, on the grid of pooled keys.

The layer's queries attend to *fine keys*, means of two neighbouring keys by default. Their mass is
summed over the query heads of a KV head and brought to the pooled grid by the max (or mean) over
the fine keys around each cell. Where the fine grid is the pooled grid, the teacher is the
own-query score itself.

Everything here is for a tile of queries: the caller bounds the tile, so that no [S, S] is ever
whole in memory.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.pooling import LOWEST, pool_keys, pool_scores
from sparda_jax.selection import pinned_blocks
from sparda_jax.selectors import QuerySelector
from sparda_jax.selectors.query import score_by_queries
from sparda_jax.shapes import Parity

EPSILON = 1e-8
"""Added to the sum by which a teacher row is divided."""


def is_own_query(sparse: SparseConfig) -> bool:
    """Tell whether the teacher's grid is the pooled grid: then it is the own-query score."""
    fine = (sparse.teacher_pool_size, sparse.teacher_pool_stride)
    return fine == (sparse.pool_size, sparse.pool_stride)


def fine_keys(k: Float[Array, "B S K H"], sparse: SparseConfig) -> Float[Array, "B fine K H"]:
    """Pool keys on the teacher's grid: the mean of `teacher_pool_size` keys, in their dtype."""
    return pool_keys(k, sparse.teacher_pool_size, sparse.teacher_pool_stride)


def fine_mass(
    q: Float[Array, "B T N H"],
    fine: Float[Array, "B fine K H"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    sparse: SparseConfig,
) -> Float[Array, "B K T fine"]:
    """Sum over each group's heads softmax(q · fine / √H) over the fine keys that t can see.

    A fine key is visible as soon as it starts, stride · u ≤ t. The newest one therefore averages
    one key of the future; it lies in the query's own block, which is pinned.

    Args:
        q: rotated queries of this tile.
        fine: fine keys, at least those that the tile's last query can see.
        positions: of these queries; −1 marks padding, whose mass is zero.
        lengths: tokens of each sequence; a fine key that reaches beyond them is never seen.
        sparse: the teacher's grid.

    Returns:
        Mass in f32; a row sums to G, the query heads per KV head.

    References:
        SparDA, arXiv:2606.04511, section 4.2, equation 6.
    """
    batch, queries, heads, dim = q.shape
    count, kv_heads = fine.shape[1], fine.shape[2]
    if count == 0:
        return jnp.zeros((batch, kv_heads, queries, 0))
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("btkgh,bukh->bktgu", grouped, fine, preferred_element_type=jnp.float32)
    start = jnp.arange(count)[None, None, :] * sparse.teacher_pool_stride
    seen = start <= positions[:, :, None]
    seen &= start + sparse.teacher_pool_size <= lengths[:, None, None]
    seen = seen[:, None, :, None, :]  # [B 1 T 1 fine]
    logits = jnp.where(seen, logits * dim**-0.5, LOWEST)
    top = jnp.max(logits, axis=-1, keepdims=True)
    mass = jnp.where(seen, jnp.exp(logits - top), 0.0)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    return jnp.sum(mass * (1.0 / jnp.where(total > 0.0, total, 1.0)), axis=3)


def align_mass(
    mass: Float[Array, "B K T fine"], count: int, sparse: SparseConfig
) -> Float[Array, "B T K C"]:
    """Bring fine mass to `count` pooled cells: max over u = r·c − 1 … r·c + r − 1.

    r is `pool_stride / teacher_pool_stride`. In `mean` alignment these r + 1 values are averaged,
    those out of range counted as zero. With r = 1 the grids have the same stride and the mass is
    only cut.

    Args:
        mass: what `fine_mass` gives.
        count: C; cells beyond the fine keys given get zero.
        sparse: both grids and the alignment.

    Example:
        >>> sparse = SparseConfig(teacher_pool_stride=4)
        >>> mass = jnp.arange(8.0).reshape(1, 1, 1, 8)
        >>> align_mass(mass, 2, sparse).ravel().tolist()
        [3.0, 7.0]
    """
    ratio = sparse.pool_stride // sparse.teacher_pool_stride
    room = count * ratio
    mass = mass[..., :room]
    mass = jnp.pad(mass, ((0, 0),) * 3 + ((1, room - mass.shape[-1]),))  # fine key u is at u + 1
    inside = mass[..., 1:].reshape(*mass.shape[:3], count, ratio)
    if ratio == 1:
        aligned = inside[..., 0]
    else:
        before = mass[..., :room:ratio]
        if sparse.teacher_alignment == "max":
            aligned = jnp.maximum(jnp.max(inside, axis=-1), before)
        else:
            aligned = (jnp.sum(inside, axis=-1) + before) / (ratio + 1)
    return jnp.swapaxes(aligned, 1, 2)


def teacher_cells(
    q: Float[Array, "B T N H"],
    fine: Float[Array, "B fine K H"],
    pooled: Float[Array, "B C K H"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    config: ModelConfig,
    *,
    parity: Parity = None,
) -> Float[Array, "B T K C"]:
    """Compute the teacher on the pooled grid, not normalised, for a tile of queries.

    Args:
        q: rotated queries of this tile.
        fine: fine keys, at least those that the tile's last query can see.
        pooled: pooled keys of the same layer; their number is C.
        positions: of these queries; −1 marks padding.
        lengths: tokens of each sequence.
        config: of the model.
        parity: the original's visibility of own-query scores.
    """
    count = pooled.shape[1]
    if is_own_query(config.sparse):
        visible = QuerySelector(config, parity).visible(positions, lengths, count)
        return score_by_queries(q, pooled, visible)
    mass = fine_mass(q, fine, positions, lengths, config.sparse)
    return align_mass(mass, count, config.sparse)


def teacher_scores(
    cells: Float[Array, "B T K C"], num_blocks: int, sparse: SparseConfig
) -> Float[Array, "B T K M"]:
    """Score blocks by the teacher, as a selector would: the max over the cells of each."""
    return pool_scores(cells, num_blocks, sparse.cells_per_block)


def normalise(cells: Float[Array, "B T K C"]) -> Float[Array, "B T K C"]:
    """Divide teacher rows by their sum + 1e-8; a row without mass stays zero."""
    return cells / (jnp.sum(cells, axis=-1, keepdims=True) + EPSILON)


def block_mass(
    cells: Float[Array, "B T K C"], num_blocks: int, sparse: SparseConfig
) -> Float[Array, "B T K M"]:
    """Sum the normalised teacher over the cells that start in each block."""
    ratio = sparse.cells_per_block
    room = num_blocks * ratio
    cells = normalise(cells)[..., :room]
    cells = jnp.pad(cells, ((0, 0),) * 3 + ((0, room - cells.shape[-1]),))
    return jnp.sum(cells.reshape(*cells.shape[:3], num_blocks, ratio), axis=-1)


def rows_with_a_choice(positions: Int[Array, "B T"], sparse: SparseConfig) -> Bool[Array, "B T"]:
    """Mark the queries that see more than J blocks: elsewhere every method chooses everything."""
    return positions // sparse.block_size >= sparse.selected_blocks


def free_blocks(
    positions: Int[Array, "B T"], num_blocks: int, sparse: SparseConfig
) -> Bool[Array, "B T 1 M"]:
    """Mark the blocks that a choice decides about: past ones that are not pinned."""
    block = jnp.arange(num_blocks)[None, None, :]
    past = block <= (positions // sparse.block_size)[:, :, None]
    return (past & ~pinned_blocks(positions, num_blocks, sparse))[:, :, None, :]


def recall_rows(
    mass: Float[Array, "B T K M"],
    chosen: Bool[Array, "B T K M"],
    positions: Int[Array, "B T"],
    sparse: SparseConfig,
) -> tuple[Float[Array, "B T K"], Float[Array, "B T K"]]:
    """Measure a choice: teacher mass on its non-pinned blocks, and the most that J could carry.

    Recall is the quotient of the sums of the two over queries: 1 for a choice that is the best by
    the teacher's mass, whatever it ranked by. Queries that see at most J blocks give zeros to both.

    Args:
        mass: what `block_mass` gives.
        chosen: the blocks chosen.
        positions: of the queries; −1 marks padding.
        sparse: the budget and the pinned blocks.

    Returns:
        Mass on the chosen blocks and on the teacher's own best, each without the pinned ones.
    """
    num_blocks = mass.shape[-1]
    counted = rows_with_a_choice(positions, sparse)[:, :, None]
    free = jnp.where(free_blocks(positions, num_blocks, sparse), mass, 0.0)
    held = jnp.sum(jnp.where(chosen, free, 0.0), axis=-1)
    budget = min(sparse.selected_blocks - sparse.pinned_blocks, num_blocks)
    best = jnp.sum(jax.lax.top_k(free, budget)[0], axis=-1)
    return jnp.where(counted, held, 0.0), jnp.where(counted, best, 0.0)


def overlap_rows(
    chosen: Bool[Array, "B T K M"],
    other: Bool[Array, "B T K M"],
    positions: Int[Array, "B T"],
    sparse: SparseConfig,
) -> tuple[Float[Array, "B T K"], Float[Array, "B T K"]]:
    """Count the non-pinned blocks in both choices and in either, over the rows of `recall_rows`.

    Block overlap is the quotient of the sums: intersection over union.
    """
    num_blocks = chosen.shape[-1]
    counted = rows_with_a_choice(positions, sparse)[:, :, None, None]
    free = free_blocks(positions, num_blocks, sparse) & counted
    both = jnp.sum(free & chosen & other, axis=-1).astype(jnp.float32)
    either = jnp.sum(free & (chosen | other), axis=-1).astype(jnp.float32)
    return both, either
