# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`plan_fetch` for NVIDIA GPUs through Pallas-Triton.

**Why.** In XLA a plan is a sort and a dozen gathers and scatters, each a launch of its own, on a
few kilobytes. Here it is two launches: one program a row plans, then one program a row writes its
misses behind those of the rows before it. The block table is read and written only at the blocks
that are chosen or evicted, so its length costs nothing.

**Numerics.** Integers only. No atomics: the order of the misses is that of the rows, in every run.

**Backend.** Triton on compute capability 8.0 and newer. Threads of a program meet in two scratch
outputs, in device memory but a few hundred bytes a row, with a barrier between writing and reading;
Triton has no other memory that one thread can write and another index. The rank of a slot in the
order of eviction is a count over all slots, R² comparisons spread over the threads, for want of a
sort.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int32

from pallas_kernels import _backend
from pallas_kernels.plan_fetch.config import MAX_ROWS, MAX_SLOTS, Tiles, power_of_two
from pallas_kernels.plan_fetch.reference import Plan

_EMPTY = jnp.iinfo(jnp.int32).min  # the age of an empty slot
_USED = jnp.iinfo(jnp.int32).max  # the age of a slot that is used now


def unsupported_reason(shape: tuple[int, ...], num_slots: int) -> str | None:
    """Say why the kernel cannot plan such a choice here; `None` if it can.

    Args:
        shape: of the ids, [B K J].
        num_slots: R.
    """
    return _backend.triton_reason() or argument_reason(shape, num_slots)


def argument_reason(shape: tuple[int, ...], num_slots: int) -> str | None:
    """Say why the kernel cannot plan such a choice on any device; `None` if it can."""
    rows = shape[0] * shape[1]
    if num_slots > MAX_SLOTS:
        return f"holds the ages of a row in registers, at most {MAX_SLOTS} slots, not {num_slots}"
    if rows > MAX_ROWS:
        return f"adds up the counts of all rows at once, at most {MAX_ROWS}, but B·K is {rows}"
    return None


class _Row(NamedTuple):
    """Outputs of the planning kernel, in order: their shapes, references or values."""

    table: Any
    slot_blocks: Any
    ages: Any
    slots: Any
    tail: Any
    moves: Any  # of each row what `misses` has of all
    tally: Any  # of each row what `counts` has of all
    keys: Any  # scratch: the age of each slot as eviction sees it
    missing: Any  # scratch: the blocks that need a slot, and their places among the ids


def _count(condition):
    return jnp.sum(condition.astype(jnp.int32))


def _masked(index, mask, size):
    """Send the index of what is masked out past the end, where the interpreter drops it too."""
    return jnp.where(mask, index, size)


def _rank(keys_ref, row, keys, *, num_slots, tile_slots):
    """Count, for every slot, those that are evicted before it: older, or as old and lower."""
    slot = lax.iota(jnp.int32, keys.shape[0])

    def compare(tile, rank):
        other = tile * tile_slots + lax.iota(jnp.int32, tile_slots)
        inside = other < num_slots
        key = plt.load(keys_ref.at[row, other], mask=inside, other=_USED)
        # An older one has a smaller key; of two equal ones the lower slot goes first.
        bound = keys[None, :] + (other[:, None] < slot[None, :]).astype(jnp.int32)
        return rank + jnp.sum((key[:, None] < bound).astype(jnp.int32), axis=0)

    tiles = -(-num_slots // tile_slots)
    return lax.fori_loop(0, tiles, compare, jnp.zeros_like(slot))


def _plan_row(ids_ref, own_ref, step_ref, *refs: Any, kv_heads, tile_slots, barrier):
    ref = _Row(*refs[3:])  # behind the three inputs that are updated in place
    width, num_blocks = ids_ref.shape[1], ref.table.shape[1]
    num_slots, step = ref.ages.shape[1], step_ref[0]
    row = pl.program_id(0)
    own = own_ref[lax.div(row, kv_heads)]

    # All loads that wait for nothing stand before the one that waits for the ids.
    place = lax.iota(jnp.int32, power_of_two(width))
    listed = place < width
    ids = plt.load(ids_ref.at[row, place], mask=listed, other=-1)
    slot = lax.iota(jnp.int32, power_of_two(num_slots))
    inside = slot < num_slots
    block = plt.load(ref.slot_blocks.at[row, slot], mask=inside, other=-1)
    keys = plt.load(ref.ages.at[row, slot], mask=inside, other=_USED)
    keys = jnp.where(inside & (block < 0), _EMPTY, keys)
    plt.store(ref.keys.at[row, _masked(slot, inside, num_slots)], keys, mask=inside)
    real = ids >= 0
    held = plt.load(ref.table.at[row, jnp.maximum(ids, 0)], mask=real, other=-1)
    needs_slot = real & (held < 0)
    has_slot = real & (held >= 0)
    nth = jnp.cumsum(needs_slot.astype(jnp.int32)) - 1
    missing = _count(needs_slot)

    barrier()

    # What is written here is read below by other threads.
    used = _masked(held, has_slot, num_slots)
    plt.store(ref.keys.at[row, used], jnp.full_like(held, _USED), mask=has_slot)
    nth = _masked(nth, needs_slot, width)
    plt.store(ref.missing.at[0, row, nth], ids, mask=needs_slot)
    plt.store(ref.missing.at[1, row, nth], place, mask=needs_slot)
    kept = listed & ~needs_slot
    plt.store(ref.slots.at[row, _masked(place, kept, width)], held, mask=kept)
    plt.store(ref.ages.at[row, used], jnp.full_like(held, step), mask=has_slot)
    barrier()

    keys = plt.load(ref.keys.at[row, slot], mask=inside, other=_USED)
    rank = _rank(ref.keys, row, keys, num_slots=num_slots, tile_slots=tile_slots)
    taken = inside & (keys < _USED) & (rank < missing)
    rank = jnp.where(taken, rank, 0)
    new = plt.load(ref.missing.at[0, row, rank], mask=taken, other=-1)
    place = plt.load(ref.missing.at[1, row, rank], mask=taken, other=width)
    plt.store(ref.slots.at[row, _masked(place, taken, width)], slot, mask=taken)
    taken_slot = _masked(slot, taken, num_slots)
    plt.store(ref.slot_blocks.at[row, taken_slot], new, mask=taken)
    plt.store(ref.ages.at[row, taken_slot], jnp.full_like(slot, step), mask=taken)
    evicts = taken & (block >= 0)
    old = _masked(block, evicts, num_blocks)
    plt.store(ref.table.at[row, old], jnp.full_like(slot, -1), mask=evicts)
    plt.store(ref.table.at[row, _masked(new, taken, num_blocks)], slot, mask=taken)

    begun = taken & (new == own)  # the block being filled, when a row has just entered it
    fetched = taken & ~begun
    begun_rank = jnp.min(jnp.where(begun, rank, width))
    nth = _masked(rank - (rank > begun_rank).astype(jnp.int32), fetched, width)
    plt.store(ref.moves.at[0, row, nth], row * num_blocks + new, mask=fetched)
    plt.store(ref.moves.at[1, row, nth], row * num_slots + slot, mask=fetched)
    tail = jnp.max(jnp.where(real & (ids == own), held, -1))
    ref.tail[row] = jnp.maximum(tail, jnp.max(jnp.where(begun, slot, -1)))
    moving = missing - (begun_rank < width).astype(jnp.int32)
    ref.tally[0, row] = _count(real) - moving
    ref.tally[1, row] = moving
    ref.tally[2, row] = _count(evicts)


def _list_misses(moves_ref, tally_ref, source_ref, places_ref, count_ref, counts_ref):
    _, rows, width = moves_ref.shape
    row = pl.program_id(0)
    other = lax.iota(jnp.int32, power_of_two(rows))
    fetched = plt.load(tally_ref.at[1, other], mask=other < rows, other=0)
    total = jnp.sum(fetched)
    before = jnp.sum(jnp.where(other < row, fetched, 0))
    mine = jnp.sum(jnp.where(other == row, fetched, 0))

    place = lax.iota(jnp.int32, power_of_two(width))
    real = place < mine
    behind = row * width + place
    empty = (place < width) & (behind >= total)
    for part, listed_ref in enumerate((source_ref, places_ref)):
        move = plt.load(moves_ref.at[part, row, place], mask=real, other=-1)
        target = _masked(before + place, real, rows * width)
        plt.store(listed_ref.at[target], move, mask=real)
        target = _masked(behind, empty, rows * width)
        plt.store(listed_ref.at[target], jnp.full_like(place, -1), mask=empty)

    @pl.when(row == 0)
    def _():
        count_ref[0] = total
        for i in range(3):
            tally = plt.load(tally_ref.at[i, other], mask=other < rows, other=0)
            counts_ref[i] = jnp.sum(tally)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def plan_fetch(
    ids: Int32[Array, "B K J"],
    table: Int32[Array, "B K M"],
    slot_blocks: Int32[Array, "B K R"],
    ages: Int32[Array, "B K R"],
    own: Int32[Array, " B"],
    step: Int32[Array, ""],
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Plan:
    """Plan the fetch with the kernels; see the op for the arguments.

    Raises:
        NotImplementedError: on no device could the kernels take these arguments.
    """
    batch, kv_heads, width = ids.shape
    num_blocks, num_slots = table.shape[-1], ages.shape[-1]
    reason = argument_reason(ids.shape, num_slots)
    if reason is not None:
        raise NotImplementedError(f"plan_fetch: implementation='triton' {reason}")
    tiles = Tiles.default(num_slots) if tiles is None else tiles
    rows = batch * kv_heads
    shapes = _Row(
        table=(rows, num_blocks),
        slot_blocks=(rows, num_slots),
        ages=(rows, num_slots),
        slots=(rows, width),
        tail=(rows,),
        moves=(2, rows, width),
        tally=(3, rows),
        keys=(rows, num_slots),
        missing=(2, rows, width),
    )
    kernel = functools.partial(
        _plan_row,
        kv_heads=kv_heads,
        tile_slots=tiles.tile_slots,
        # The interpreter runs a program as one thread.
        barrier=(lambda: None) if interpret else plt.debug_barrier,
    )
    done = _Row(
        *pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes],
            grid=(rows,),
            input_output_aliases={3: 0, 4: 1, 5: 2},
            compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=1),
            interpret=interpret,
            name="plan_fetch",
        )(
            ids.reshape(rows, width),
            own,
            step.reshape(1),
            table.reshape(rows, num_blocks),
            slot_blocks.reshape(rows, num_slots),
            ages.reshape(rows, num_slots),
        )
    )
    # Two outputs: who reads one of the lists finds a buffer of its own, not a slice to be cut out.
    source, places, miss_count, counts = pl.pallas_call(
        _list_misses,
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.int32)
            for shape in ((rows * width,), (rows * width,), (1,), (3,))
        ],
        grid=(rows,),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="list_misses",
    )(done.moves, done.tally)
    return Plan(
        slots=done.slots.reshape(ids.shape),
        tail=done.tail.reshape(batch, kv_heads),
        table=done.table.reshape(table.shape),
        slot_blocks=done.slot_blocks.reshape(slot_blocks.shape),
        ages=done.ages.reshape(ages.shape),
        misses=jnp.stack([source, places]),
        miss_count=miss_count,
        counts=counts,
    )
