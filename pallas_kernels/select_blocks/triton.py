# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`select_blocks` for NVIDIA GPUs through Pallas-Triton.

**Why.** A general top-k orders what it finds and passes over the scores several times, and its ids
have to be sorted again. Here a row is read once and stays in registers. The J-th greatest score is
found by bisection over the bits of an integer that is ordered as the scores are; a step counts the
scores from the trial up, and the search ends as soon as exactly J are left, so rarely after all 32
bits. Only visible scores are read.

**Numerics.** Everything is an integer from the first instruction on, so the choice is exact: that
of a stable top-k in the total order of floats, in which −0 ranks below 0. Ties at the threshold are
settled by a second bisection over the block id.

**Backend.** Triton on compute capability 8.0 and newer. A row is held by one program, so M is
bounded; positions of the chosen ids are prefix sums of bit counts, a scan over 1/16 of a row.
Mosaic GPU does not lower prefix sums.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import _backend
from pallas_kernels.select_blocks.config import MAX_BLOCKS, Tiles, padded_blocks
from pallas_kernels.select_blocks.reference import Selection

_DTYPES = ("float32", "bfloat16", "float16")
_LOWEST = jnp.iinfo(jnp.int32).min  # the key of a block that cannot be chosen
_INFINITY = 0x7F800000  # the key of a pinned block: the bits of +inf


def unsupported_reason(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, tiles: Tiles | None = None
) -> str | None:
    """Say why the kernel cannot take such scores here; `None` if it can.

    Args:
        shape: of the scores, [B T K M].
        dtype: of the scores.
        tiles: as asked for.
    """
    return _backend.triton_reason() or argument_reason(shape, dtype, tiles)


def argument_reason(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, tiles: Tiles | None = None
) -> str | None:
    """Say why the kernel cannot take such scores on any device; `None` if it can."""
    batch, queries, kv_heads, num_blocks = shape
    if jnp.dtype(dtype).name not in _DTYPES:
        return f"takes scores in {', '.join(_DTYPES)}, not {jnp.dtype(dtype).name}"
    if num_blocks > MAX_BLOCKS:
        return f"holds a row in registers, at most {MAX_BLOCKS} blocks, but M is {num_blocks}"
    if batch * queries * kv_heads >= 2**31:
        return f"counts rows in int32, but B·T·K is {batch * queries * kv_heads}"
    if tiles is not None and padded_blocks(num_blocks) > 4096 * tiles.num_warps:
        return f"takes at most 4096 blocks a warp, but M is {num_blocks} with {tiles.num_warps=}"
    return None


def _count(condition):
    return jnp.sum(condition.astype(jnp.int32))


def _ordered_keys(scores_ref, row, own, last, *, sink_blocks, local_blocks, padded):
    """Load a row as int32 keys ordered as its scores, with pinned and future blocks in place."""
    block = lax.iota(jnp.int32, padded)
    visible = block <= last
    # Rows of whole 16 bytes are loaded in such, up to three scores past the last one visible.
    vector = 4 if scores_ref.shape[1] % 4 == 0 else 1
    inside = lax.div(block, vector) <= lax.div(last, vector)
    scores = plt.load(scores_ref.at[row, block], mask=inside & (last >= 0), other=0.0)
    scores = scores.astype(jnp.float32)
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    pinned = (block >= own - local_blocks) | (block < sink_blocks)
    keys = jnp.where(pinned, _INFINITY, jnp.where(scores > -jnp.inf, keys, _LOWEST))
    return jnp.where(visible, keys, _LOWEST)


def _choose(keys, need, last, *, padded):
    """Mark the `need` greatest keys above `_LOWEST`, at ties those of the lower index."""

    def halve(state):
        bit, low, held = state
        trial = low | (jnp.int32(1) << bit)
        count = _count(keys >= (trial ^ _LOWEST))
        keep = count >= need
        return bit - 1, jnp.where(keep, trial, low), jnp.where(keep, count, held)

    # `low` is the threshold with its sign bit flipped, so that its bits are found from the top.
    visible = _count(keys > _LOWEST)
    top = 31 + jnp.minimum(visible, 0)  # 31, but unknown to a compiler that would unroll the loop
    start = (top, jnp.int32(0), visible)
    _, low, held = lax.while_loop(lambda s: (s[0] >= 0) & (s[2] > need), halve, start)
    threshold = jnp.maximum(low ^ _LOWEST, _LOWEST + 1)
    block = lax.iota(jnp.int32, padded)

    def first_ties():
        above = _count(keys > threshold)

        def halve(state):
            low, high = state
            middle = (low + high + 1) >> 1
            fits = above + _count((keys == threshold) & (block < middle)) <= need
            return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

        return lax.while_loop(lambda s: s[0] < s[1], halve, (jnp.int32(0), last))[0]

    # Of the keys at the threshold, those before the cut are taken: all of them, as a rule. (No
    # count is greater than `padded`; a branch must compute what it returns.)
    cut = lax.cond(held > need, first_ties, lambda: jnp.maximum(held, padded))
    return keys >= threshold + (block >= cut).astype(jnp.int32)


def _write(row, chosen, ids_ref, count_ref, mask_ref, *, padded, width):
    """Write the chosen ids in ascending order, the −1 behind them, their count and their bits."""
    halves, words = padded // 16, padded // 32
    lane = lax.iota(jnp.int32, padded) & 15
    bits = jnp.where(chosen, jnp.int32(1) << lane, 0)
    half = jnp.sum(bits.reshape(halves, 16), axis=1)  # [halves], 16 bits each
    held = lax.population_count(half)
    count = jnp.sum(held)

    # Bits and the count before them in one number: one array to spread over the threads, not two.
    packed = ((jnp.cumsum(held) - held) << 16) | half
    packed = jnp.broadcast_to(packed[:, None], (halves, 16))
    lane = lax.broadcasted_iota(jnp.int32, (halves, 16), 1)
    id = lax.broadcasted_iota(jnp.int32, (halves, 16), 0) * 16 + lane
    is_chosen = ((packed >> lane) & 1) != 0
    place = (packed >> 16) + lax.population_count(packed & ((jnp.int32(1) << lane) - 1))
    # Past the end where nothing is written, so that the interpreter drops it too.
    plt.store(ids_ref.at[row, jnp.where(is_chosen, place, width)], id, mask=is_chosen)

    places = 1 << (width - 1).bit_length()
    place = lax.iota(jnp.int32, places)
    empty = (place >= count) & (place < width)
    plt.store(
        ids_ref.at[row, jnp.where(empty, place, width)],
        jnp.full((places,), -1, jnp.int32),
        mask=empty,
    )
    count_ref[row] = count
    pair = lax.broadcasted_iota(jnp.int32, (words, 2), 1)
    word = jnp.sum(half.reshape(words, 2) << (pair * 16), axis=1)
    index = lax.iota(jnp.int32, words)
    inside = index < mask_ref.shape[1]
    plt.store(
        mask_ref.at[row, jnp.where(inside, index, mask_ref.shape[1])],
        word.astype(jnp.uint32),
        mask=inside,
    )


def _kernel(scores_ref, positions_ref, *refs: Any, queries, kv_heads, rule):
    *attend_all_ref, ids_ref, count_ref, mask_ref = refs
    num_blocks, width = scores_ref.shape[1], ids_ref.shape[1]
    padded = padded_blocks(num_blocks)
    row = pl.program_id(0)
    position = positions_ref[lax.div(row, kv_heads)]
    # (Typed constants: the lowering gives untyped ones of a scalar choice the condition's type.)
    own = lax.div(jnp.maximum(position, 0), rule["block_size"])
    own = jnp.where(position < 0, jnp.int32(-1), own)
    last = jnp.minimum(own, num_blocks - 1)
    need = jnp.int32(rule["selected_blocks"])
    for ref in attend_all_ref:
        need = jnp.where(ref[lax.div(row, queries * kv_heads)], jnp.int32(width), need)
    keys = _ordered_keys(
        scores_ref,
        row,
        own,
        last,
        sink_blocks=rule["sink_blocks"],
        local_blocks=rule["local_blocks"],
        padded=padded,
    )
    chosen = _choose(keys, need, last, padded=padded)
    _write(row, chosen, ids_ref, count_ref, mask_ref, padded=padded, width=width)


@functools.partial(
    jax.jit,
    static_argnames=(
        "block_size",
        "sink_blocks",
        "local_blocks",
        "selected_blocks",
        "width",
        "tiles",
        "interpret",
    ),
)
def select_blocks(
    scores: Float[Array, "B T K M"],
    positions: Int[Array, "B T"],
    attend_all: Bool[Array, " B"] | None,
    *,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    selected_blocks: int,
    width: int,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Selection:
    """Select blocks with the kernel; see the op for the arguments.

    Raises:
        NotImplementedError: on no device could the kernel take these arguments.
    """
    reason = argument_reason(scores.shape, scores.dtype, tiles)
    if reason is not None:
        raise NotImplementedError(f"select_blocks: implementation='triton' {reason}")
    batch, queries, kv_heads, num_blocks = scores.shape
    rows, words = batch * queries * kv_heads, -(-num_blocks // 32)
    tiles = Tiles.default(rows, num_blocks) if tiles is None else tiles
    rule = {
        "block_size": block_size,
        "sink_blocks": sink_blocks,
        "local_blocks": local_blocks,
        "selected_blocks": selected_blocks,
    }
    kernel = functools.partial(_kernel, queries=queries, kv_heads=kv_heads, rule=rule)
    operands = [scores.reshape(rows, num_blocks), positions.astype(jnp.int32).reshape(-1)]
    if attend_all is not None:
        operands.append(attend_all)
    ids, count, mask = pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((rows, width), jnp.int32),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
            jax.ShapeDtypeStruct((rows, words), jnp.uint32),
        ),
        grid=(rows,),
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=1),
        interpret=interpret,
        name="select_blocks",
    )(*operands)
    shape = scores.shape[:3]
    return Selection(
        ids=ids.reshape(*shape, width),
        count=count.reshape(shape),
        mask=mask.reshape(*shape, words),
    )
