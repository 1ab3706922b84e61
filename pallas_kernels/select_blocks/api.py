# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The door of `select_blocks`: arguments are checked here, once."""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import _backend
from pallas_kernels.select_blocks import reference, triton
from pallas_kernels.select_blocks.config import Tiles
from pallas_kernels.select_blocks.reference import Selection

Implementation = Literal["triton", "reference"]

PREFERRED: tuple[Implementation, ...] = ("triton",)


def select_blocks(
    scores: Float[Array, "B T K M"],
    positions: Int[Array, "B T"],
    *,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    selected_blocks: int,
    attend_all: Bool[Array, " B"] | None = None,
    width: int | None = None,
    implementation: Implementation | Sequence[Implementation] | None = None,
    tiles: Tiles | None = None,
) -> Selection:
    """Select the blocks each query reads: the pinned ones, then the best scores.

    Pinned are the first `sink_blocks`, the query's own block and the `local_blocks` before it. They
    count towards `selected_blocks`. A block after the query's own is never chosen. At ties the
    lower block id wins, so the choice is that of a stable top-k.

    Args:
        scores: block scores for each KV head; −inf is never chosen unless pinned, NaN is not
            allowed, −0 ranks below 0.
        positions: position of each query in its sequence, in tokens from 0; −1 for padding, which
            chooses nothing.
        block_size: tokens of a block.
        sink_blocks: leading blocks that are pinned.
        local_blocks: blocks before the query's own that are pinned.
        selected_blocks: blocks that a query reads, pinned included.
        attend_all: sequences that choose `width` blocks instead.
        width: ids per row, J; `min(selected_blocks, M)` by default, and not less.
        implementation: a name, several in order of preference, or `None` for the best that runs.
        tiles: of the kernel.

    Returns:
        Ids ascending, then −1; how many are real; and the same choice as bits.

    Raises:
        ValueError: `positions` or `attend_all` do not fit `scores`; `scores` is empty; a count is
            negative; `selected_blocks` < pinned blocks; `width` < min(selected_blocks, M) or > M.
        NotImplementedError: the named implementation cannot take these arguments.

    References:
        SparDA, arXiv:2606.04511, section 4; InfLLM-V2, arXiv:2509.24663, for sink and local blocks.

    Example:
        Six blocks of 64 tokens. The query at token 300 owns block 4, so block 5 is its future.

        >>> import jax.numpy as jnp
        >>> scores = jnp.array([0.1, 0.9, 0.2, 0.3, 0.4, 0.8]).reshape(1, 1, 1, 6)
        >>> choice = select_blocks(
        ...     scores, jnp.array([[300]]),
        ...     block_size=64, sink_blocks=1, local_blocks=1, selected_blocks=4,
        ... )
        >>> choice.ids.tolist(), choice.count.tolist(), bin(choice.mask[0, 0, 0, 0])
        ([[[[0, 1, 3, 4]]]], [[[4]]], '0b11011')
    """
    batch, queries, _, num_blocks = scores.shape
    if positions.shape != (batch, queries):
        raise ValueError(f"{positions.shape=} must equal [B T] of {scores.shape=}")
    if attend_all is not None and attend_all.shape != (batch,):
        raise ValueError(f"{attend_all.shape=} must equal [B] of {scores.shape=}")
    if scores.size == 0:
        raise ValueError(f"{scores.shape=} must have no axis of length 0")
    if block_size < 1:
        raise ValueError(f"{block_size=} must be at least 1")
    if min(sink_blocks, local_blocks) < 0:
        raise ValueError(f"{sink_blocks=} and {local_blocks=} must be at least 0")
    if selected_blocks < sink_blocks + local_blocks + 1:
        raise ValueError(
            f"{selected_blocks=} must be at least sink_blocks + local_blocks + 1 = "
            f"{sink_blocks + local_blocks + 1}"
        )
    chosen = min(selected_blocks, num_blocks)
    width = chosen if width is None else width
    if not chosen <= width <= num_blocks:
        raise ValueError(
            f"{width=} must be at least min(selected_blocks, M) = {chosen} and at most M = "
            f"{num_blocks}"
        )
    rule = {
        "block_size": block_size,
        "sink_blocks": sink_blocks,
        "local_blocks": local_blocks,
        "selected_blocks": chosen,
        "width": width,
    }
    name = _backend.resolve(
        "select_blocks",
        implementation,
        PREFERRED,
        lambda _: triton.unsupported_reason(scores.shape, scores.dtype, tiles),
    )
    if name == _backend.REFERENCE:
        return reference.select_blocks(scores, positions, attend_all, **rule)
    return triton.select_blocks(scores, positions, attend_all, **rule, tiles=tiles)
