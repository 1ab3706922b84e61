# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Fetch inside the program: a kernel reads missing records from host memory into their slots.

Nothing of a step comes to the host. On CUDA the records are page-locked host memory seen as a
device array (`HostKV.operand`); the gather runs beside the matmuls of the layer before
(`overlap`), and blocks that the step completed are written back by a kernel whose receipt the next
gather takes. On a CPU the same program reads the same memory, but cannot write there: it returns
the completed blocks, and `HostKV.write` stores them between steps.
"""

import typing

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Num

import pallas_kernels
from sparda_jax.kv.plan import FetchPlan


@typing.no_type_check
@struct.dataclass
class Completed:
    """The rows whose block is full after this step.

    Attributes:
        rows: those rows, then B.
        blocks: the block that each completed; means nothing behind them.
        count: how many rows.
    """

    rows: Int[Array, " B"]
    blocks: Int[Array, " B"]
    count: Int[Array, ""]


def completed_rows(
    positions: Int[Array, " B"], active: Bool[Array, " B"], block_size: int
) -> Completed:
    """List the rows whose newest token is the last of its block.

    Args:
        positions: of the new tokens.
        active: rows that take part.
        block_size: W.

    Example:
        >>> done = completed_rows(jnp.array([7, 8, 15]), jnp.array([True, True, True]), 8)
        >>> done.rows.tolist(), done.blocks[:2].tolist(), int(done.count)
        ([0, 2, 3], [0, 1], 2)
    """
    batch = positions.shape[0]
    is_full = active & (positions % block_size == block_size - 1)
    place = jnp.where(is_full, jnp.cumsum(is_full.astype(jnp.int32)) - 1, batch)
    row = jnp.arange(batch, dtype=jnp.int32)
    rows = jnp.full((batch,), batch, jnp.int32).at[place].set(row, mode="drop")
    blocks = (positions // block_size)[jnp.minimum(rows, batch - 1)]
    return Completed(rows=rows, blocks=blocks, count=jnp.sum(is_full, dtype=jnp.int32))


@jax.named_scope("fetch_records")
def fetch_records(
    slots: Float[Array, "B K R 2 W H"],
    records: Num[Array, "B K M 2 W H"],
    plan: FetchPlan,
    receipt: Int[Array, " 1"] | None,
    *,
    scales: Float[Array, "B K M 2"] | None = None,
    after: Float[Array, ""] | None = None,
) -> Float[Array, "B K R 2 W H"]:
    """Move the missing records of a plan into their slots, in place where the slots are donated.

    Args:
        slots: of a layer.
        records: of the same layer, in host memory.
        plan: what is missing.
        receipt: of the last write into these records.
        scales: of the records; `None` where they are of the slots' dtype.
        after: a finite number that must be computed first; `None` starts as soon as it can.
    """
    count = plan.miss_count
    if after is not None:  # concurrent commands know no order but data
        count = jnp.where(jnp.isfinite(after), count, jnp.int32(0))
    # `misses` is two lists joined: XLA takes one of them as the kernel made it, without a slice.
    source, places = plan.misses[0], plan.misses[1]
    flat = records.reshape(-1, *records.shape[3:])
    filled = pallas_kernels.gather_blocks(
        flat,
        source,
        places,
        count,
        slots.reshape(-1, *slots.shape[3:]),
        receipt=receipt,
        scales=None if scales is None else scales.reshape(-1, 2),
    )
    return filled.reshape(slots.shape)


@jax.named_scope("store_completed")
def store_completed(
    slots: Num[Array, "B K R 2 W H"],
    records: Num[Array, "B K M 2 W H"],
    tail: Int[Array, "B K"],
    completed: Completed,
) -> Int[Array, " 1"]:
    """Write completed blocks from their slots to their host records, in place.

    Args:
        slots: of a layer, or records that were packed for the host.
        records: of the same layer, in host memory, of the same dtype.
        tail: slot of the block being filled, of each row and head.
        completed: which rows.

    Returns:
        The receipt: whatever reads these records later takes it.
    """
    batch, kv_heads, num_slots = slots.shape[:3]
    head = jnp.arange(kv_heads, dtype=jnp.int32)[None, :]
    row = jnp.minimum(completed.rows, batch - 1)[:, None]
    lane = row * kv_heads + head
    source = lane * num_slots + jnp.maximum(tail[row[:, 0]], 0)
    places = lane * records.shape[2] + completed.blocks[:, None]
    return pallas_kernels.write_blocks(
        slots.reshape(-1, *slots.shape[3:]),
        records.reshape(-1, *records.shape[3:]),
        source.reshape(-1),
        places.reshape(-1),
        (completed.count * kv_heads).reshape(1),
    ).receipt
