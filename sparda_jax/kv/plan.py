# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What is chosen but not resident, and the slots that it takes."""

import typing

from flax import struct
from jaxtyping import Array, Int

import pallas_kernels
from sparda_jax.errors import CapacityError
from sparda_jax.kv.state import SlotPool


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
        misses: index of each missing record in the flattened [B K M], and of the slot that it
            takes in the flattened [B K R]; then −1.
        miss_count: how many misses are real.
        counts: blocks resident (the tail among them), fetched, and evicted.
    """

    places: Places
    misses: Int[Array, "2 misses"]
    miss_count: Int[Array, " 1"]
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

        >>> import jax.numpy as jnp
        >>> pool = SlotPool(
        ...     table=jnp.array([[[0, 1, -1, -1, -1, -1, -1]]]),
        ...     slot_blocks=jnp.array([[[0, 1]]]),
        ...     ages=jnp.array([[[3, 3]]]),
        ... )
        >>> plan, after = plan_fetch(jnp.array([[[0, 5]]]), pool, jnp.array([6]), jnp.int32(4))
        >>> plan.misses.tolist(), plan.places.slots.tolist(), after.slot_blocks.tolist()
        ([[5, -1], [1, -1]], [[[0, 1]]], [[[0, 5]]])
    """
    width, num_slots = ids.shape[-1], pool.slot_blocks.shape[-1]
    if num_slots < width:
        raise CapacityError(
            f"{num_slots} slots per (sequence, KV head) cannot hold the {width} blocks that one "
            f"token reads; ask for slots={width} or more"
        )
    found = pallas_kernels.plan_fetch(ids, pool.table, pool.slot_blocks, pool.ages, own, step)
    plan = FetchPlan(
        places=Places(ids=ids, slots=found.slots, tail=found.tail),
        misses=found.misses,
        miss_count=found.miss_count,
        counts=found.counts,
    )
    after = SlotPool(table=found.table, slot_blocks=found.slot_blocks, ages=found.ages)
    return plan, after
