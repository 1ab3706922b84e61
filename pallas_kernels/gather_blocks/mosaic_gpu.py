# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""A few CTAs that pump listed records through shared memory, reading or writing host memory.

**Why.** XLA's gather from host memory makes a new array, which a scatter then copies into the slots
(each record is written twice and read once more), its length is fixed when it is compiled, and it
spreads over the whole GPU, which slows down matmuls beside it. Here the bytes cross the link once
and land where they belong, the number of moves is read from an array, and `ctas` says how much of
the GPU that may take. The link is slow: 4 CTAs with several transfers in flight fill it.

**Numerics.** None: bytes are copied.

**Backend.** Mosaic GPU on Hopper, for its bulk copies (TMA): one thread starts a transfer of up to
16 KiB, no register holds data, and the latency of the link (about 2 us) hides behind the other
transfers. One warpgroup a CTA owns a ring of `in_flight` pieces in shared memory: wait for the
oldest, store it, and start the next load into the piece whose store has been read out. Triton needs
registers and many warps for the same bytes in flight. `slots` is a mutable ref, which JAX turns
into an operand that aliases the result, so XLA knows of the change, updates in place where the
array is donated, and copies it first where somebody still needs the old value.

Offsets are counted in records: a transfer takes int32 coordinates (record, part, row, column) and
64-bit strides, so neither 2^31 numbers nor 2^31 bytes are a limit; 2^31 records are.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32, Num

from pallas_kernels import _backend, _compat
from pallas_kernels.gather_blocks.config import Tiles

DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "int8", "uint8")
"""What the kernel moves."""


def shape_reason(size: Sequence[int], dtype: np.dtype, tiles: Tiles) -> str | None:
    """Say why no device could move such records so; `None` if Hopper can.

    Args:
        size: [2 W H] of a record.
        dtype: of its numbers.
        tiles: how they are moved.
    """
    if dtype.name not in DTYPES:
        return f"moves {', '.join(DTYPES)}, but the records are {dtype.name}"
    _, block_size, head_dim = size
    return tiles.unsupported_reason(block_size, head_dim, dtype.itemsize)


def unsupported_reason(size: Sequence[int], dtype: np.dtype, tiles: Tiles) -> str | None:
    """Say why the kernel cannot move such records here; `None` if it can.

    Args:
        size: [2 W H] of a record.
        dtype: of its numbers.
        tiles: how they are moved.
    """
    return _backend.hopper_reason() or shape_reason(size, dtype, tiles)


def deal_pieces(cta: Any, moves: Any, tiles: Tiles) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
    """Deal the pieces of all moves out to the CTAs: each takes every `ctas`-th.

    Args:
        cta: its number.
        moves: how many there are.
        tiles: how they are moved.

    Returns:
        How many pieces are its own, and what gives the move and the part of the nth of them.
    """
    ctas, parts = tiles.ctas, tiles.parts

    def entry_and_part(nth):
        piece = cta + nth * ctas
        return lax.div(piece, parts), lax.rem(piece, parts)

    return lax.div(moves * parts - cta + (ctas - 1), ctas), entry_and_part


def move_records(
    origin: Num[Array, "origin parts rows H"],
    target: Any,
    source: Int32[Array, " n"],
    places: Int32[Array, " n"],
    count: Int32[Array, " 1"],
    *,
    after: Sequence[Int32[Array, " 1"]] = (),
    has_receipt: bool = False,
    tiles: Tiles,
    name: str,
    interpret: bool,
) -> Any:
    """Copy origin[source[i]] to target[places[i]] for i < count.

    Args:
        origin: records in parts, read.
        target: records in parts, written: a mutable ref, or an array of host memory.
        source: record of each move.
        places: place of each move.
        count: moves.
        after: receipts of writes that must have happened.
        has_receipt: whether to return a receipt, which is the number of moves.
        tiles: how they are moved.
        name: of the kernel, in profiles.
        interpret: whether to run in the interpreter.
    """
    most, ring = source.shape[0], tiles.in_flight

    def body(origin_ref, target_ref, source_ref, places_ref, count_ref, *rest: Any):
        *receipts, staging, arrived = rest
        cta = lax.axis_index("cta")
        moves = jnp.clip(count_ref[0], 0, most)
        mine, entry_and_part = deal_pieces(cta, moves, tiles)

        def load(nth, record):
            slot = lax.rem(nth, ring)
            part = entry_and_part(nth)[1]
            plgpu.copy_gmem_to_smem(origin_ref.at[record, part], staging.at[slot], arrived.at[slot])

        def fill(nth, carry):
            load(nth, source_ref[entry_and_part(nth)[0]])
            return carry

        def step(nth, carry):
            slot = lax.rem(nth, ring)
            entry, part = entry_and_part(nth)
            ahead = nth + (ring - 1)  # goes where the store before this one came from
            # The lists are read before the wait, so that their latency hides in it.
            place = places_ref[entry]
            record = source_ref[entry_and_part(jnp.minimum(ahead, mine - 1))[0]]
            plgpu.barrier_wait(arrived.at[slot])
            plgpu.copy_smem_to_gmem(staging.at[slot], target_ref.at[place, part])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)

            @pl.when((nth > 0) & (ahead < mine))
            def _():
                load(ahead, record)

            return carry

        lax.fori_loop(0, jnp.minimum(mine, ring), fill, None)
        lax.fori_loop(0, mine, step, None)
        plgpu.wait_smem_to_gmem(0)
        if has_receipt:

            @pl.when(cta == 0)
            def _():
                receipts[-1][0] = moves

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((1,), jnp.int32) if has_receipt else (),
        scratch_types=(
            plgpu.SMEM((ring, *origin.shape[2:]), origin.dtype),
            plgpu.Barrier(num_barriers=ring),
        ),
        grid=(tiles.ctas,),
        grid_names=("cta",),
        kernel_name=name,
        **_compat.mosaic_interpret(interpret),
    )(origin, target, source, places, count, *after)


def cut(records: Num[Array, "records 2 W H"], parts: int) -> Num[Array, "records parts rows H"]:
    """See each record as `parts` pieces, without moving a byte."""
    count, two, block_size, head_dim = records.shape
    return records.reshape(count, parts, two * block_size // parts, head_dim)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def gather_blocks(
    records: Num[Array, "records 2 W H"],
    source: Int32[Array, " n"],
    places: Int32[Array, " n"],
    count: Int32[Array, " 1"],
    slots: Num[Array, "slots 2 W H"],
    receipt: Int32[Array, " 1"] | None,
    *,
    tiles: Tiles,
    interpret: bool = False,
) -> Num[Array, "slots 2 W H"]:
    """Run the kernel; see the reference for what it means.

    Args:
        records: to read, on the device or in page-locked host memory.
        source: record of each move, within bounds.
        places: slot of each move, within bounds, distinct.
        count: moves.
        slots: changed in place.
        receipt: of the last write into `records`, if there was one.
        tiles: how they are moved.
        interpret: whether to run in the interpreter.
    """
    slots_ref = jax.new_ref(cut(slots, tiles.parts))
    move_records(
        cut(records, tiles.parts),
        slots_ref,
        source,
        places,
        count,
        after=() if receipt is None else (receipt,),
        tiles=tiles,
        name="gather_blocks",
        interpret=interpret,
    )
    return jax.freeze(slots_ref).reshape(slots.shape)
