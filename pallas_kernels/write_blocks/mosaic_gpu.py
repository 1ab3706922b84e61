# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""A few CTAs that pump finished blocks from slots into host memory.

**Why.** XLA cannot write into host memory that it does not own: it would allocate all records on
the device and copy them. The kernel writes the listed records straight through the link, and only
those.

**Numerics.** None: bytes are copied.

**Backend.** Mosaic GPU on Hopper: the pump of `gather_blocks` with source and target exchanged. The
records are a plain operand whose memory changes behind XLA's back, because an operand that aliases
a result would make XLA copy all of it. So the order of write and read must be in the data: the
kernel returns a receipt, and every later read in the program takes it as an operand. The last store
is waited for before the kernel ends, so a host that waited for the receipt sees the bytes.

The interpreter cannot change an operand in place; there the records are a mutable ref, and the body
is the same.
"""

import functools
from typing import Any

import jax
from jaxtyping import Array, Int32, Num

from pallas_kernels.gather_blocks.config import Tiles
from pallas_kernels.gather_blocks.mosaic_gpu import cut, move_records, unsupported_reason
from pallas_kernels.write_blocks.config import Written

__all__ = ["unsupported_reason", "write_blocks"]


def write_blocks(
    slots: Num[Array, "slots 2 W H"],
    records: Num[Array, "records 2 W H"],
    source: Int32[Array, " n"],
    places: Int32[Array, " n"],
    count: Int32[Array, " 1"],
    *,
    tiles: Tiles,
    interpret: bool = False,
) -> Written:
    """Run the kernel; see the reference for what it means.

    Args:
        slots: to read.
        records: page-locked host memory, changed in place.
        source: slot of each move, within bounds.
        places: record of each move, within bounds, distinct.
        count: moves.
        tiles: how they are moved.
        interpret: whether to run in the interpreter.
    """
    if not interpret:
        receipt = _pump(slots, records, source, places, count, tiles=tiles)
        return Written(receipt=receipt, records=records)
    target = jax.new_ref(cut(records, tiles.parts))
    receipt = _move(slots, target, source, places, count, tiles=tiles, interpret=True)
    return Written(receipt=receipt, records=jax.freeze(target).reshape(records.shape))


def _move(
    slots: Num[Array, "slots 2 W H"],
    target: Any,
    source: Int32[Array, " n"],
    places: Int32[Array, " n"],
    count: Int32[Array, " 1"],
    *,
    tiles: Tiles,
    interpret: bool,
) -> Int32[Array, " 1"]:
    return move_records(
        cut(slots, tiles.parts),
        target,
        source,
        places,
        count,
        has_receipt=True,
        tiles=tiles,
        name="write_blocks",
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("tiles",))  # which gives the receipt alone
def _pump(
    slots: Num[Array, "slots 2 W H"],
    records: Num[Array, "records 2 W H"],
    source: Int32[Array, " n"],
    places: Int32[Array, " n"],
    count: Int32[Array, " 1"],
    *,
    tiles: Tiles,
) -> Int32[Array, " 1"]:
    pieces = cut(records, tiles.parts)
    return _move(slots, pieces, source, places, count, tiles=tiles, interpret=False)
