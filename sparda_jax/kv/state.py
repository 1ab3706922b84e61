# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What the device holds between two decode steps, as pytrees.

A layer has a pool of slots, each with room for one record (K and V of one block and KV head). With
everything resident there is a slot per block, in order. Offloaded, there are R slots, and a
`SlotPool` says which block stands in which.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Num

from sparda_jax.attention import block_bias, block_records
from sparda_jax.chunk import LayerCache
from sparda_jax.kv.pack import HostDtype, pack_records, unpack_records
from sparda_jax.selectors import KeySummary
from sparda_jax.shapes import NO_BLOCK, NO_SLOT

EMPTY = jnp.iinfo(jnp.int32).min
"""The age of a slot that holds nothing: older than every block."""


@typing.no_type_check
@struct.dataclass
class SlotPool:
    """Which blocks stand in which slots of a layer.

    Attributes:
        table: block → slot, `NO_SLOT` where a block is not on the device.
        slot_blocks: slot → block, `NO_BLOCK` where a slot is empty.
        ages: step of the last use of each slot; the lowest is evicted first.
    """

    table: Int[Array, "B K M"]
    slot_blocks: Int[Array, "B K R"]
    ages: Int[Array, "B K R"]


def empty_pool(batch: int, kv_heads: int, num_blocks: int, slots: int) -> SlotPool:
    """Make the pool of a layer that holds nothing yet.

    Args:
        batch: B.
        kv_heads: K.
        num_blocks: M.
        slots: R.
    """
    lanes = (batch, kv_heads)
    return SlotPool(
        table=jnp.full((*lanes, num_blocks), NO_SLOT, jnp.int32),
        slot_blocks=jnp.full((*lanes, slots), NO_BLOCK, jnp.int32),
        ages=jnp.full((*lanes, slots), EMPTY, jnp.int32),
    )


@typing.no_type_check
@struct.dataclass
class LayerKV:
    """Everything that the device holds of one layer's keys and values.

    Attributes:
        slots: records; slot m is block m when everything is resident (R = M).
        pool: `None` when everything is resident.
        importance: NOSA's bias per key, f32; `None` for other models.
        summary: the selector's; `None` in dense mode.
        scales: of the records on the host; `None` where they are of the model's dtype.
    """

    slots: Float[Array, "B K R 2 W H"]
    pool: SlotPool | None
    importance: Float[Array, "B K M W"] | None
    summary: KeySummary | None
    scales: Float[Array, "B K M 2"] | None = None


@typing.no_type_check
@struct.dataclass
class KVState:
    """The state of a batch between two steps.

    Attributes:
        layers: one `LayerKV` a layer.
        lengths: tokens held of each sequence.
        reach: length that each sequence may grow to; selects LongRoPE's factors.
        step: number of the next step, from 1.
        receipt: of the last step's writes into host records by kernels; `None` if no kernel writes
            there.
    """

    layers: list[LayerKV]
    lengths: Int[Array, " B"]
    reach: Int[Array, " B"]
    step: Int[Array, ""]
    receipt: Int[Array, " 1"] | None = None


def seed_resident(cache: LayerCache, *, block_size: int) -> LayerKV:
    """Turn the cache of a prompt into slots that hold every block, in order.

    Args:
        cache: keys and values in token order, a whole number of blocks long.
        block_size: W.
    """
    importance = cache.importance
    return LayerKV(
        slots=block_records(cache.k, cache.v, block_size),
        pool=None,
        importance=None if importance is None else block_bias(importance, block_size),
        summary=cache.summary,
    )


def seed_slots(
    cache: LayerCache,
    chosen: Int[Array, "B K J"],
    lengths: Int[Array, " B"],
    scales: Float[Array, "B K M 2"] | None = None,
    *,
    slots: int,
    block_size: int,
) -> LayerKV:
    """Fill the slots from a prompt's cache: what its last query chose, then the newest blocks.

    Args:
        cache: keys and values in token order, a whole number of blocks long.
        chosen: the last query's choice, `NO_BLOCK` where there is none.
        lengths: tokens of each prompt; 0 leaves all slots empty.
        scales: of the records on the host; `None` where they are of the model's dtype.
        slots: R, at most the number of blocks.
        block_size: W.

    Returns:
        The layer's state. Blocks stand in ascending order; those not chosen count as used longer
        ago the older they are.
    """
    records = block_records(cache.k, cache.v, block_size)
    batch, kv_heads, num_blocks = records.shape[:3]
    block = jnp.arange(num_blocks, dtype=jnp.int32)[None, None, :]
    held = block < ((lengths + block_size - 1) // block_size)[:, None, None]
    is_chosen = jnp.any(chosen[..., None] == block[:, :, None, :], axis=2)  # [B K M]
    rank = jnp.where(is_chosen, num_blocks, 0) + block
    rank = jnp.where(held, rank, -1)
    best, ids = jax.lax.top_k(rank, slots)
    ids = jnp.sort(jnp.where(best >= 0, ids, num_blocks), axis=-1)
    empty = ids == num_blocks
    safe = jnp.where(empty, 0, ids)
    take = jax.vmap(jax.vmap(lambda row, index: row[index]))
    ages = jnp.where(take(is_chosen, safe), 0, safe - num_blocks)
    place = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None, None, :], ids.shape)
    table = jnp.full((batch, kv_heads, num_blocks), NO_SLOT, jnp.int32)
    write = jax.vmap(jax.vmap(lambda row, index, value: row.at[index].set(value, mode="drop")))
    importance = cache.importance
    return LayerKV(
        slots=take(records, safe),
        pool=SlotPool(
            table=write(table, ids, place),
            slot_blocks=jnp.where(empty, NO_BLOCK, ids),
            ages=jnp.where(empty, EMPTY, ages),
        ),
        importance=None if importance is None else block_bias(importance, block_size),
        summary=cache.summary,
        scales=scales,
    )


def tail_place(
    tail: Int[Array, "B K"], positions: Int[Array, " B"], num_slots: int, block_size: int
) -> tuple[
    Int[Array, "B 1"], Int[Array, "1 K"], Int[Array, "B K"], Int[Array, "B 1"], Bool[Array, " B"]
]:
    """Index the place of a new token: row, head, slot (past the end for padding), offset; active.

    Args:
        tail: slot of the block being filled; negative for padding.
        positions: of the new tokens; −1 for padding.
        num_slots: R.
        block_size: W.
    """
    active = positions >= 0
    rows = jnp.arange(tail.shape[0])[:, None]
    heads = jnp.arange(tail.shape[1])[None, :]
    slot = jnp.where(active[:, None] & (tail >= 0), tail, num_slots)
    offset = jnp.where(active, positions % block_size, 0)[:, None]
    return rows, heads, slot, offset, active


def append_tokens(
    kv: LayerKV,
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    importance: Float[Array, "B 1 K"] | None,
    tail: Int[Array, "B K"],
    positions: Int[Array, " B"],
) -> LayerKV:
    """Write one new token of each sequence into its tail slot.

    Args:
        kv: the layer's state.
        k: rotated keys.
        v: values.
        importance: NOSA's bias of the new keys.
        tail: slot of the block being filled.
        positions: of the new tokens; −1 for padding, which writes nothing.
    """
    num_slots, block_size = kv.slots.shape[2], kv.slots.shape[4]
    rows, heads, slot, offset, _ = tail_place(tail, positions, num_slots, block_size)
    both = jnp.stack([k[:, 0], v[:, 0]], axis=2)  # [B K 2 H]
    slots = kv.slots.at[rows, heads, slot, :, offset].set(both, mode="drop")
    if importance is None:
        return dataclasses.replace(kv, slots=slots)
    assert kv.importance is not None  # it has room for what the model makes
    num_blocks = kv.importance.shape[2]
    own = jnp.where(positions >= 0, positions // block_size, num_blocks)[:, None]
    bias = kv.importance.at[rows, heads, own, offset].set(importance[:, 0], mode="drop")
    return dataclasses.replace(kv, slots=slots, importance=bias)


def insert_records(
    slots: Float[Array, "B K R 2 W H"],
    records: Float[Array, "n 2 W H"],
    places: Int[Array, " n"],
) -> Float[Array, "B K R 2 W H"]:
    """Put fetched records into their slots.

    Args:
        slots: of a layer.
        records: as fetched.
        places: index of each into the flattened [B K R]; past the end drops the record.
    """
    flat = slots.reshape(-1, *slots.shape[3:])
    return flat.at[places].set(records, mode="drop").reshape(slots.shape)


def insert_packed(
    slots: Float[Array, "B K R 2 W H"],
    packed: Num[Array, "n 2 W H"],
    places: Int[Array, " n"],
    scales: Float[Array, "B K M 2"],
    sources: Int[Array, " n"],
) -> Float[Array, "B K R 2 W H"]:
    """Put fetched records of one byte a number into their slots, in the model's dtype.

    Args:
        slots: of a layer.
        packed: as fetched.
        places: index of each into the flattened [B K R]; past the end drops the record.
        scales: of all records of the layer.
        sources: index of each into the flattened [B K M]; 0 where a record is dropped.
    """
    mine = scales.reshape(-1, 2)[sources]
    return insert_records(slots, unpack_records(packed, mine, slots.dtype), places)


def take_tail(slots: Num[Array, "B K R 2 W H"], tail: Int[Array, "B K"]) -> Num[Array, "B K 2 W H"]:
    """Copy the record of the block being filled out of its slot."""
    return jax.vmap(jax.vmap(lambda row, index: row[index]))(slots, jnp.maximum(tail, 0))


def pack_tail(
    slots: Float[Array, "B K R 2 W H"],
    scales: Float[Array, "B K M 2"],
    tail: Int[Array, "B K"],
    rows: Int[Array, " B"],
    blocks: Int[Array, " B"],
    *,
    host_dtype: HostDtype,
) -> tuple[Num[Array, "B K 2 W H"], Float[Array, "B K M 2"]]:
    """Pack the records of the blocks being filled; note the scales of those that are full.

    Args:
        slots: of a layer.
        scales: of all its records.
        tail: slot of the block being filled, of each row and head.
        rows: whose block is full; B stands for none.
        blocks: the block of each.
        host_dtype: of the result.

    Returns:
        A record of every row, and the scales after it.
    """
    packed, new = pack_records(take_tail(slots, tail), host_dtype)
    mine = new[jnp.minimum(rows, new.shape[0] - 1)]
    return packed, scales.at[rows, :, blocks].set(mine, mode="drop")


def join_layers(groups: list[list[LayerKV]]) -> list[LayerKV]:
    """Join the states of groups of rows, layer by layer; every leaf has the rows first."""
    if len(groups) == 1:
        return groups[0]
    return [
        jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        for parts in zip(*groups, strict=True)
    ]
