# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The door to `write_blocks`."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int32, Num

from pallas_kernels import _backend
from pallas_kernels.gather_blocks.api import check_moves
from pallas_kernels.write_blocks import mosaic_gpu, reference
from pallas_kernels.write_blocks.config import Tiles, Written

Implementation = Literal["mosaic_gpu", "reference"]

PREFERRED = ("mosaic_gpu",)
"""The kernels, the fastest first."""


def write_blocks(
    slots: Num[Array, "slots 2 W H"],
    records: Num[Array, "records 2 W H"],
    source: Int32[Array, " n"],
    places: Int32[Array, " n"],
    count: Int32[Array, " 1"],
    *,
    implementation: Implementation | Sequence[Implementation] | None = None,
    tiles: Tiles | None = None,
) -> Written:
    """Write finished blocks to their records: records[places[i]] = slots[source[i]] for i < count.

    With `mosaic_gpu` the records are page-locked host memory, seen as a device array, and change in
    place. XLA does not know, hence four rules: take the receipt into whatever reads them later,
    return it from the program, never donate or return the records, and never read in the same
    program, before or after, a record that is written there without such a receipt.

    Args:
        slots: B · K · R records on the device.
        records: all records, B · K · M of them.
        source: slot of each move, 0 … B · K · R − 1; a kernel does not check it.
        places: record of each move, 0 … B · K · M − 1, distinct; a kernel does not check it.
        count: moves; more than n count as n, fewer than 0 as 0.
        implementation: a name, names in order, or `None` for the best that runs here.
        tiles: how the kernel spreads the moves.

    Returns:
        The receipt, and the records to read from then on: the operand itself where a kernel changed
        it in place, a new array from the reference.

    Raises:
        ValueError: shapes or dtypes do not fit together.
        NotImplementedError: the named implementation cannot be used; the message says why.

    Example:
        >>> slots = jnp.ones((2, 2, 1, 1)) * jnp.array([5.0, 7.0]).reshape(2, 1, 1, 1)
        >>> moves = jnp.array([1]), jnp.array([2]), jnp.array([1])
        >>> written = write_blocks(slots, jnp.zeros((4, 2, 1, 1)), *moves)
        >>> written.receipt.tolist(), written.records[:, 0, 0, 0].tolist()
        ([1], [0.0, 0.0, 7.0, 0.0])
    """
    check_moves(slots, records, source, places, count)
    if tiles is None:
        _, _, block_size, head_dim = records.shape
        tiles = Tiles.default(block_size, head_dim, records.dtype.itemsize)
    chosen = _backend.resolve(
        "write_blocks",
        implementation,
        PREFERRED,
        lambda name: mosaic_gpu.unsupported_reason(records.shape[1:], records.dtype, tiles),
    )
    if source.shape[0] == 0:
        return Written(receipt=jnp.zeros((1,), jnp.int32), records=records)
    if chosen == _backend.REFERENCE:
        return Written(*reference.write_blocks(slots, records, source, places, count))
    return mosaic_gpu.write_blocks(slots, records, source, places, count, tiles=tiles)
