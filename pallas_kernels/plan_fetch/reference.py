# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The definition of `plan_fetch` in plain JAX."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32


@typing.no_type_check  # vmap and eval_shape rebuild it from leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the chosen blocks stand, what has to move there, and the pool after it.

    Attributes:
        slots: the slot of each chosen block, −1 where there is none.
        tail: slot of the block being filled; −1 for a row that does nothing.
        table: block → slot, −1 where a block is in none.
        slot_blocks: slot → block, −1 where a slot is empty.
        ages: step of the last use of each slot.
        misses: records to fetch, index b·K·M + k·M + m, and the slots they go to, index
            b·K·R + k·R + r; in the order of b, k and m, then −1.
        miss_count: how many misses are real.
        counts: blocks resident (the tail among them), fetched, and evicted.
    """

    slots: Int32[Array, "B K J"]
    tail: Int32[Array, "B K"]
    table: Int32[Array, "B K M"]
    slot_blocks: Int32[Array, "B K R"]
    ages: Int32[Array, "B K R"]
    misses: Int32[Array, "2 misses"]
    miss_count: Int32[Array, " 1"]
    counts: Int32[Array, " 3"]


def plan_fetch(
    ids: Int[Array, "B K J"],
    table: Int[Array, "B K M"],
    slot_blocks: Int[Array, "B K R"],
    ages: Int[Array, "B K R"],
    own: Int[Array, " B"],
    step: Int[Array, ""],
) -> Plan:
    """Plan the fetch of a choice; see the op for the arguments."""
    batch, kv_heads, width = ids.shape
    num_blocks, num_slots = table.shape[-1], ages.shape[-1]
    smallest, greatest = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
    take = jax.vmap(jax.vmap(lambda row, index: row[index]))
    write = jax.vmap(jax.vmap(lambda row, index, value: row.at[index].set(value, mode="drop")))

    real = ids >= 0
    held = jnp.where(real, take(table, jnp.where(real, ids, 0)), -1)
    needs_slot = real & (held < 0)
    age = jnp.where(slot_blocks < 0, smallest, ages)
    age = write(age, jnp.where(held < 0, num_slots, held), jnp.full(ids.shape, greatest, jnp.int32))
    victims = jnp.argsort(age, axis=-1, stable=True)[..., :width].astype(jnp.int32)
    nth = jnp.cumsum(needs_slot, axis=-1, dtype=jnp.int32) - 1
    slots = jnp.where(needs_slot, take(victims, jnp.maximum(nth, 0)), held)
    evicted = jnp.where(needs_slot, take(slot_blocks, jnp.maximum(slots, 0)), -1)

    table = write(table, jnp.where(evicted < 0, num_blocks, evicted), jnp.full_like(ids, -1))
    table = write(table, jnp.where(needs_slot, ids, num_blocks), slots)
    place = jnp.where(real, slots, num_slots)
    at_tail = real & (ids == own[:, None, None])
    fetched = needs_slot & ~at_tail

    row = jnp.arange(batch * kv_heads, dtype=jnp.int32).reshape(batch, kv_heads, 1)
    moves = jnp.stack([row * num_blocks + ids, row * num_slots + slots]).reshape(2, -1)
    first = jnp.argsort(~fetched.reshape(-1), stable=True)
    count = jnp.sum(fetched, dtype=jnp.int32)
    counts = [jnp.sum(x, dtype=jnp.int32) for x in (real & ~fetched, fetched, evicted >= 0)]
    return Plan(
        slots=slots,
        tail=jnp.max(jnp.where(at_tail, slots, -1), axis=-1),
        table=table,
        slot_blocks=write(slot_blocks, place, ids),
        ages=write(ages, place, jnp.broadcast_to(step, ids.shape)),
        misses=jnp.where((jnp.arange(first.size) < count)[None], moves[:, first], -1),
        miss_count=count[None],
        counts=jnp.stack(counts),
    )
