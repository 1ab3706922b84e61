# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Which blocks a tile of neighbouring queries reads, and which of its queries chose each.

**Why.** Neighbours agree on most blocks, so a tile reads the union of its queries' sets, and a
kernel needs that union as a compact list. XLA would make it from the bitmask by a prefix sum and a
scatter over every (tile, block), tens of millions at 128K tokens; here a tile is one small program
that reads its words once and writes only the entries that exist.

**Numerics.** Integers only, so the lists are exact. Blocks after a query's position are dropped.

**Backend.** Triton on compute capability 8.0 and newer, used by both attention kernels: Mosaic GPU
lowers neither prefix sums nor scatters.
"""

import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int32, UInt32

_CHUNK = 2048
"""Blocks that a program looks at together."""

type _Found = tuple[Array, list[Array], list[Array]]
"""Block ids of a chunk, bits of queries by word, and the kinds of `_classes`."""


class Union(typing.NamedTuple):
    """The blocks of every tile, as lists; entries past the count are not set.

    Attributes:
        ids: block ids: first those that end after some query that chose them (they need a causal
            mask), then those that every part of the tile chose, then the rest, parts in turn.
        bits: which queries chose the block, 32 to a word; query i of the tile is bit i % 32 of
            word i // 32.
        counts: how many entries need a causal mask, and how many there are.
    """

    ids: Int32[Array, "B K tiles M"]
    bits: Int32[Array, "B K tiles words M"]
    counts: Int32[Array, "B K tiles 2"]


def _marks(
    chunk: int | Array,
    at_tile: tuple[Array, Array, Array],
    mask_ref: Any,
    positions_ref: Any,
    *,
    size: int,
    num_blocks: int,
    block_size: int,
    tile_q: int,
) -> tuple[Array, list[Array], Array]:
    """Find who chose each block of a chunk: bits of queries by word, and whether one is cut."""
    batch, kv_head, tile = at_tile
    queries = mask_ref.shape[1]
    block = chunk * size + lax.iota(jnp.int32, size)
    start = block * block_size

    def add_query(i: int | Array, carry: tuple[Array, Array], *, first: int) -> tuple[Array, Array]:
        bits, cut = carry
        query = tile * tile_q + first + i
        inside = jnp.minimum(query, queries - 1)
        at = jnp.where(query < queries, positions_ref[batch, inside], -1)
        word = plt.load(
            mask_ref.at[batch, inside, kv_head, block >> 5], mask=block < num_blocks, other=0
        )
        chosen = jnp.where(start <= at, (word >> (block & 31)) & 1, 0)
        cut = cut | jnp.where(start + block_size - 1 > at, chosen, 0)
        return bits | (chosen << i), cut

    words, cut = [], jnp.zeros((size,), jnp.int32)
    for first in range(0, tile_q, 32):
        count = min(32, tile_q - first)
        carry = jnp.zeros((size,), jnp.int32), cut
        step = functools.partial(add_query, first=first)
        if count <= 16:
            for i in range(count):
                carry = step(i, carry)
        else:
            carry = lax.fori_loop(0, count, step, carry)
        bits, cut = carry
        words.append(bits)
    return block, words, cut


def _classes(words: list[Array], cut: Array, *, tile_q: int, parts: int) -> list[Array]:
    """Sort blocks into those with a causal cut, those of all parts, those of one part only."""
    size = tile_q // parts
    wanted = []
    for part in range(parts):
        found = jnp.zeros_like(cut)
        for word, bits in enumerate(words):
            low = max(part * size - 32 * word, 0)
            high = min((part + 1) * size - 32 * word, 32)
            if low < high:
                held = ((1 << (high - low)) - 1) << low
                found = found | (bits & jnp.int32(held - (1 << 32) if held >> 31 else held))
        wanted.append(found != 0)
    is_any = functools.reduce(jnp.logical_or, wanted)
    is_all = functools.reduce(jnp.logical_and, wanted)
    is_cut = cut != 0
    whole = is_any & ~is_cut
    if parts == 2:
        rest = [whole & ~is_all & wanted[0], whole & ~is_all & wanted[1]]
    else:
        rest = [whole & ~is_all]
    kinds = [is_any & is_cut, whole & is_all, *rest]
    return [kind.astype(jnp.int32) for kind in kinds]


def _places(kinds: list[Array], ranks: list[Array], totals: list[Array]) -> Array:
    """Compute where each block stands in its tile's list, from its rank within its kind."""
    starts = [jnp.int32(0), totals[0], totals[0] + totals[1]]
    places = [starts[0] + ranks[0], starts[1] + ranks[1]]
    if len(kinds) == 3:
        places.append(starts[2] + ranks[2])
    else:  # two parts take turns until one has no more
        for this, other in ((2, 3), (3, 2)):
            turn = 2 * ranks[this] + (this - 2)
            behind = ranks[this] + totals[other]
            places.append(starts[2] + jnp.where(ranks[this] < totals[other], turn, behind))
    place = jnp.zeros_like(kinds[0])
    for kind, at in zip(kinds, places, strict=True):
        place = jnp.where(kind != 0, at, place)
    return place


def _kernel(
    mask_ref: Any,
    positions_ref: Any,
    ids_ref: Any,
    bits_ref: Any,
    counts_ref: Any,
    *,
    num_blocks: int,
    block_size: int,
    tile_q: int,
    parts: int,
) -> None:
    at = (pl.program_id(2), pl.program_id(1), pl.program_id(0))  # [B K tiles]
    size = min(_CHUNK, 1 << max(num_blocks - 1, 15).bit_length())
    chunks = -(-num_blocks // size)

    def look(chunk: int | Array) -> _Found:
        block, words, cut = _marks(
            chunk, at, mask_ref, positions_ref,
            size=size, num_blocks=num_blocks, block_size=block_size, tile_q=tile_q,
        )  # fmt: skip
        return block, words, _classes(words, cut, tile_q=tile_q, parts=parts)

    def write(found: _Found, before: list[Array], totals: list[Array]) -> None:
        block, words, kinds = found
        ranks = [start + jnp.cumsum(kind) - kind for start, kind in zip(before, kinds, strict=True)]
        is_any = functools.reduce(jnp.bitwise_or, kinds) != 0
        # Past the end where nothing is written, so that the interpreter drops it too.
        place = jnp.where(is_any, _places(kinds, ranks, totals), num_blocks)
        plt.store(ids_ref.at[(*at, place)], block, mask=is_any)
        for word, bits in enumerate(words):
            plt.store(bits_ref.at[(*at, word, place)], bits, mask=is_any)

    none = [jnp.int32(0)] * (4 if parts == 2 else 3)
    if chunks == 1:
        found = look(0)
        totals = [jnp.sum(kind) for kind in found[2]]
        write(found, none, totals)
    else:

        def count(chunk: Array, totals: list[Array]) -> list[Array]:
            return [a + jnp.sum(kind) for a, kind in zip(totals, look(chunk)[2], strict=True)]

        def place(chunk: Array, before: list[Array]) -> list[Array]:
            found = look(chunk)
            write(found, before, totals)
            return [a + jnp.sum(kind) for a, kind in zip(before, found[2], strict=True)]

        totals = lax.fori_loop(0, chunks, count, none)
        lax.fori_loop(0, chunks, place, none)
    counts_ref[(*at, 0)] = totals[0]
    counts_ref[(*at, 1)] = functools.reduce(jnp.add, totals)


def unite(
    block_mask: UInt32[Array, "B T K maskwords"],
    positions: Int32[Array, "B T"],
    *,
    num_blocks: int,
    block_size: int,
    tile_q: int,
    parts: int = 1,
    interpret: bool = False,
) -> Union:
    """List the blocks of every tile of `tile_q` queries.

    Args:
        block_mask: bit m % 32 of word m // 32 marks block m.
        positions: of the queries; −1 chooses nothing.
        num_blocks: M.
        block_size: W.
        tile_q: queries of a tile; a multiple of `parts`.
        parts: equal parts of a tile that walk the list on their own.
        interpret: run the kernel in the interpreter.
    """
    batch, queries, kv_heads = block_mask.shape[:3]
    tiles, words = -(-queries // tile_q), -(-tile_q // 32)
    lists = (batch, kv_heads, tiles)
    kernel = functools.partial(
        _kernel, num_blocks=num_blocks, block_size=block_size, tile_q=tile_q, parts=parts
    )
    return Union(
        *pl.pallas_call(
            kernel,
            grid=(tiles, kv_heads, batch),
            out_shape=[
                jax.ShapeDtypeStruct((*lists, num_blocks), jnp.int32),
                jax.ShapeDtypeStruct((*lists, words, num_blocks), jnp.int32),
                jax.ShapeDtypeStruct((*lists, 2), jnp.int32),
            ],
            compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
            interpret=interpret,
            name="sparse_attention_union",
        )(lax.bitcast_convert_type(block_mask, jnp.int32), positions)
    )
