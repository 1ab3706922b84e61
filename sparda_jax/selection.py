# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""From block scores to the blocks that a query reads."""

import typing

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from sparda_jax.config import SparseConfig
from sparda_jax.shapes import NO_BLOCK, Parity


@typing.no_type_check
@struct.dataclass
class BlockChoice:
    """The blocks that each (query, KV head) reads.

    Attributes:
        ids: block ids, ascending, then `NO_BLOCK`.
        count: how many ids are real.
    """

    ids: Int[Array, "B T K J"]
    count: Int[Array, "B T K"]


def choice_width(sparse: SparseConfig, num_blocks: int, *, shortest: int | None = None) -> int:
    """Count the ids a choice needs: J, or more where short sequences attend to all their blocks.

    Args:
        sparse: the rule.
        num_blocks: M, blocks that the longest sequence may have.
        shortest: length in tokens of the shortest sequence, `None` if no sequence may be dense.

    Example:
        >>> sparse = SparseConfig(dense_below=8192)
        >>> choice_width(sparse, 2048), choice_width(sparse, 2048, shortest=100)
        (96, 128)
    """
    width = sparse.selected_blocks
    if shortest is not None and shortest < sparse.dense_below:
        width = max(width, sparse.blocks(sparse.dense_below - 1))
    return min(width, num_blocks)


def pinned_blocks(
    query_positions: Int[Array, "B T"], num_blocks: int, sparse: SparseConfig
) -> Bool[Array, "B T M"]:
    """Mark the blocks that are always chosen: sink, local and the query's own."""
    block = jnp.arange(num_blocks)[None, None, :]
    own = (query_positions // sparse.block_size)[:, :, None]
    near = (block >= own - sparse.local_blocks) & (block <= own)
    return near | ((block < sparse.sink_blocks) & (block <= own))


def select_blocks(
    scores: Float[Array, "B T K M"],
    query_positions: Int[Array, "B T"],
    sparse: SparseConfig,
    *,
    attend_all: Bool[Array, " B"] | None = None,
    width: int | None = None,
    parity: Parity = None,
) -> BlockChoice:
    """Select the blocks each query reads: the pinned ones, then the best scores.

    Pinned are the first `sink_blocks`, the query's own block and the `local_blocks` before it. They
    count towards `selected_blocks`, so the result has a fixed width and a kernel a fixed loop. A
    block after the query's own is never chosen, however high it scores. At ties the lower block id
    wins.

    Args:
        scores: block scores for each KV head, finite; only their order matters.
        query_positions: position of each query in its sequence, in tokens from 0; −1 for padding,
            which chooses nothing.
        sparse: block size (tokens) and the three counts (blocks).
        attend_all: sequences shorter than `dense_below`: they choose every block up to their own.
        width: ids per row, at least `selected_blocks` (or M); see `choice_width`.
        parity: `"reference"` lets a future block take a place that is then left empty, as the
            original does in prefill.

    Returns:
        Ids ascending, then `NO_BLOCK`; and how many are real.

    Raises:
        ValueError: if `query_positions` and `scores` disagree in B or T.

    References:
        SparDA, arXiv:2606.04511, section 4; InfLLM-V2, arXiv:2509.24663, for sink and local blocks.

    Example:
        Six blocks of 64 tokens. The query at token 300 owns block 4, so block 5 is its future.

        >>> sparse = SparseConfig(block_size=64, sink_blocks=1, local_blocks=1, selected_blocks=4)
        >>> scores = jnp.array([0.1, 0.9, 0.2, 0.3, 0.4, 0.8]).reshape(1, 1, 1, 6)
        >>> select_blocks(scores, jnp.array([[300]]), sparse).ids.tolist()
        [[[[0, 1, 3, 4]]]]
        >>> select_blocks(scores, jnp.array([[70]]), sparse).ids.tolist()
        [[[[0, 1, -1, -1]]]]
    """
    if query_positions.shape != scores.shape[:2]:
        raise ValueError(f"{query_positions.shape=} must equal [B T] of {scores.shape=}")
    num_blocks = scores.shape[-1]
    chosen = min(sparse.selected_blocks, num_blocks)
    width = chosen if width is None else width
    if parity is None:
        found = pallas_kernels.select_blocks(
            scores,
            query_positions,
            block_size=sparse.block_size,
            sink_blocks=sparse.sink_blocks,
            local_blocks=sparse.local_blocks,
            selected_blocks=sparse.selected_blocks,
            attend_all=attend_all,
            width=width,
        )
        return BlockChoice(ids=found.ids, count=found.count)

    own = jnp.where(query_positions < 0, -1, query_positions // sparse.block_size)
    own = own[:, :, None, None]  # [B T 1 1]
    pinned = pinned_blocks(query_positions, num_blocks, sparse)[:, :, None, :]
    ranked = jnp.where(pinned, jnp.inf, scores.astype(jnp.float32))
    best, ids = jax.lax.top_k(ranked, width)  # [B T K width], ties to the lower id
    allowed = jnp.full(own.shape, chosen)
    if attend_all is not None:
        allowed = jnp.where(attend_all[:, None, None, None], width, allowed)
    place = jnp.arange(width)[None, None, None, :]
    real = (best > -jnp.inf) & (ids <= own) & (place < allowed)
    ids = jnp.sort(jnp.where(real, ids, num_blocks), axis=-1)
    ids = jnp.where(ids < num_blocks, ids, NO_BLOCK).astype(jnp.int32)
    return BlockChoice(ids=ids, count=jnp.sum(ids != NO_BLOCK, axis=-1, dtype=jnp.int32))


def block_mask(ids: Int[Array, "B T K J"], num_blocks: int) -> Bool[Array, "B T K M"]:
    """Mark the chosen blocks: mask[m] = m in ids."""
    block = jnp.arange(num_blocks)[None, None, None, None, :]
    return jnp.any(ids[..., None] == block, axis=-2)
