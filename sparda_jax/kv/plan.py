# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What is chosen but not resident, and the slots that it takes."""

import typing

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from sparda_jax.errors import CapacityError
from sparda_jax.kv.state import EMPTY, SlotPool
from sparda_jax.shapes import NO_BLOCK, NO_SLOT


@typing.no_type_check
@struct.dataclass
class Places:
    """Where a step reads and writes in the slots of a layer.

    Attributes:
        ids: chosen blocks, ascending, then `NO_BLOCK`.
        slots: the slot of each, `NO_SLOT` where there is no block.
        tail: slot of the block being filled; `NO_SLOT` for a row that does nothing.
    """

    ids: Int[Array, "B K J"]
    slots: Int[Array, "B K J"]
    tail: Int[Array, "B K"]


@typing.no_type_check
@struct.dataclass
class FetchPlan:
    """The moves that make a choice resident.

    Attributes:
        places: where the chosen blocks stand once the moves are done.
        moves: missing blocks (`NO_BLOCK` where nothing moves), and the slots that they take.
        counts: blocks resident (the tail among them), fetched, and evicted.
    """

    places: Places
    moves: Int[Array, "2 B K J"]
    counts: Int[Array, " 3"]


def plan_fetch(
    ids: Int[Array, "B K J"],
    pool: SlotPool,
    own: Int[Array, " B"],
    step: Int[Array, ""],
) -> tuple[FetchPlan, SlotPool]:
    """Plan the fetch of a choice: the i-th missing block takes the i-th slot in order of eviction.

    Empty slots go first, then those used longest ago, at ties the lower slot; a slot whose block is
    chosen now is never taken. The block being filled has a slot like any other but is never
    fetched: when a row enters a new block, the plan only gives it a slot.

    Args:
        ids: chosen blocks, distinct, ascending, then `NO_BLOCK`; a row that chose anything chose
            its own block.
        pool: of the layer, before this step.
        own: the block being filled; `NO_BLOCK` for a row that does nothing.
        step: number of this step, greater than all before.

    Returns:
        The plan, and the pool after it.

    Raises:
        CapacityError: R < J: a choice could not be resident all at once.

    Example:
        Two slots hold blocks 0 and 1. Block 5 is chosen with 0, so it takes the slot of 1.

        >>> pool = SlotPool(
        ...     table=jnp.array([[[0, 1, -1, -1, -1, -1, -1]]]),
        ...     slot_blocks=jnp.array([[[0, 1]]]),
        ...     ages=jnp.array([[[3, 3]]]),
        ... )
        >>> plan, after = plan_fetch(jnp.array([[[0, 5]]]), pool, jnp.array([6]), jnp.int32(4))
        >>> plan.moves.tolist(), plan.places.slots.tolist(), after.slot_blocks.tolist()
        ([[[[-1, 5]]], [[[-1, 1]]]], [[[0, 1]]], [[[0, 5]]])
    """
    width, num_slots = ids.shape[-1], pool.slot_blocks.shape[-1]
    if num_slots < width:
        raise CapacityError(
            f"{num_slots} slots per (sequence, KV head) cannot hold the {width} blocks that one "
            f"token reads; ask for slots={width} or more"
        )
    num_blocks = pool.table.shape[-1]
    take = jax.vmap(jax.vmap(lambda row, index: row[index]))
    real = ids >= 0
    safe = jnp.where(real, ids, 0)
    held = jnp.where(real, take(pool.table, safe), NO_SLOT)  # [B K J]
    needs_slot = real & (held == NO_SLOT)

    mark = jax.vmap(jax.vmap(lambda row, index: row.at[index].set(True, mode="drop")))
    used = jnp.zeros(pool.slot_blocks.shape, bool)
    used = mark(used, jnp.where(held == NO_SLOT, num_slots, held))
    is_empty = pool.slot_blocks == NO_BLOCK
    age = jnp.where(used, jnp.iinfo(jnp.int32).max, jnp.where(is_empty, EMPTY, pool.ages))
    victims = jnp.argsort(age, axis=-1, stable=True)[..., :width].astype(jnp.int32)
    nth = jnp.cumsum(needs_slot, axis=-1, dtype=jnp.int32) - 1
    slots = jnp.where(needs_slot, take(victims, jnp.maximum(nth, 0)), held)

    evicted = jnp.where(needs_slot, take(pool.slot_blocks, jnp.maximum(slots, 0)), NO_BLOCK)
    write = jax.vmap(jax.vmap(lambda row, index, value: row.at[index].set(value, mode="drop")))
    nowhere = jnp.full(ids.shape, NO_SLOT, jnp.int32)
    table = write(pool.table, jnp.where(evicted >= 0, evicted, num_blocks), nowhere)
    table = write(table, jnp.where(needs_slot, ids, num_blocks), slots)
    place = jnp.where(real, slots, num_slots)
    after = SlotPool(
        table=table,
        slot_blocks=write(pool.slot_blocks, place, ids),
        ages=write(pool.ages, place, jnp.broadcast_to(step, ids.shape)),
    )
    at_tail = real & (ids == own[:, None, None])
    fetched = needs_slot & ~at_tail
    counts = [jnp.sum(x, dtype=jnp.int32) for x in (real & ~fetched, fetched, evicted >= 0)]
    plan = FetchPlan(
        places=Places(
            ids=ids, slots=slots, tail=jnp.max(jnp.where(at_tail, slots, NO_SLOT), axis=-1)
        ),
        moves=jnp.stack([jnp.where(fetched, ids, NO_BLOCK), jnp.where(fetched, slots, NO_SLOT)]),
        counts=jnp.stack(counts),
    )
    return plan, after
