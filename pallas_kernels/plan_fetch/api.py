# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The door of `plan_fetch`: arguments are checked here, once."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import _backend
from pallas_kernels.plan_fetch import reference, triton
from pallas_kernels.plan_fetch.config import Tiles
from pallas_kernels.plan_fetch.reference import Plan

Implementation = Literal["triton", "reference"]

PREFERRED: tuple[Implementation, ...] = ("triton",)


def plan_fetch(
    ids: Int[Array, "B K J"],
    table: Int[Array, "B K M"],
    slot_blocks: Int[Array, "B K R"],
    ages: Int[Array, "B K R"],
    own: Int[Array, " B"],
    step: Int[Array, ""],
    *,
    implementation: Implementation | Sequence[Implementation] | None = None,
    tiles: Tiles | None = None,
) -> Plan:
    """Plan the fetch of a choice: the i-th missing block takes the i-th slot in order of eviction.

    Empty slots go first, then those used longest ago, at ties the lower slot; a slot whose block is
    chosen now is never taken. The block being filled has a slot like any other but is never
    fetched. Donate `table`, `slot_blocks` and `ages` to have the kernel update them in place.

    Args:
        ids: chosen blocks, distinct, ascending, then −1; a row that chose anything chose its own
            block.
        table: block → slot, −1 where a block is in none.
        slot_blocks: slot → block, −1 where a slot is empty; the inverse of `table`.
        ages: step of the last use of each slot, less than 2³¹ − 1; of an empty slot any number.
        own: the block being filled; −1 for a row that does nothing.
        step: number of this step.
        implementation: a name, several in order of preference, or `None` for the best that runs.
        tiles: of the kernel.

    Returns:
        The slots of the chosen blocks, the list of records to fetch, and the pool after it.

    Raises:
        ValueError: shapes disagree or are empty; R < J: a choice could not be resident all at once;
            B·K·M or B·K·R is not less than 2³¹, so that a record has no index.
        NotImplementedError: the named implementation cannot take these arguments.

    Example:
        Two slots hold blocks 0 and 1. Block 5 is chosen with 0, so it takes the slot of 1.

        >>> table = jnp.array([[[0, 1, -1, -1, -1, -1, -1]]])
        >>> slot_blocks, ages = jnp.array([[[0, 1]]]), jnp.array([[[3, 3]]])
        >>> ids, own, step = jnp.array([[[0, 5]]]), jnp.array([6]), jnp.int32(4)
        >>> plan = plan_fetch(ids, table, slot_blocks, ages, own, step)
        >>> plan.misses.tolist(), plan.slots.tolist(), plan.slot_blocks.tolist()
        ([[5, -1], [1, -1]], [[[0, 1]]], [[[0, 5]]])
    """
    batch, kv_heads, width = ids.shape
    num_blocks, num_slots = table.shape[-1], slot_blocks.shape[-1]
    for name, shape in (("table", table.shape), ("slot_blocks", slot_blocks.shape)):
        if shape[:-1] != (batch, kv_heads):
            raise ValueError(f"{name}.shape={shape} must begin with [B K] of {ids.shape=}")
    if ages.shape != slot_blocks.shape:
        raise ValueError(f"{ages.shape=} must equal {slot_blocks.shape=}")
    if own.shape != (batch,):
        raise ValueError(f"{own.shape=} must equal [B] of {ids.shape=}")
    if step.shape != ():
        raise ValueError(f"{step.shape=} must be ()")
    if ids.size == 0 or num_blocks == 0:
        raise ValueError(f"{ids.shape=} and {table.shape=} must have no axis of length 0")
    if num_slots < width:
        raise ValueError(
            f"{num_slots} slots per (sequence, KV head) cannot hold the {width} blocks that one "
            f"token reads; ask for {width} slots or more"
        )
    for axis, size in (("M", num_blocks), ("R", num_slots)):
        if batch * kv_heads * size >= 2**31:
            raise ValueError(
                f"B·K·{axis} = {batch * kv_heads * size} must be less than 2**31 = {2**31}; "
                "split the batch"
            )
    name = _backend.resolve(
        "plan_fetch",
        implementation,
        PREFERRED,
        lambda _: triton.unsupported_reason(ids.shape, num_slots),
    )
    arrays = [x.astype(jnp.int32) for x in (ids, table, slot_blocks, ages, own, step)]
    if name == _backend.REFERENCE:
        return reference.plan_fetch(*arrays)
    return triton.plan_fetch(*arrays, tiles=tiles)
