# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The door to `gather_blocks`."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Array, Float32, Int32, Num

from pallas_kernels import _backend
from pallas_kernels.gather_blocks import mosaic_gpu, mosaic_gpu_unpack, reference
from pallas_kernels.gather_blocks.config import Tiles

Implementation = Literal["mosaic_gpu", "reference"]

PREFERRED = ("mosaic_gpu",)
"""The kernels, the fastest first."""


def check_moves(
    origin: Num[Array, "origin 2 W H"],
    target: Num[Array, "target 2 W H"],
    source: Int32[Array, " n"],
    places: Int32[Array, " n"],
    count: Int32[Array, " 1"],
    *,
    is_scaled: bool = False,
) -> None:
    """Check what is moved where.

    Args:
        origin: records that are read.
        target: records that are written.
        source: record of each move.
        places: place of each move.
        count: moves.
        is_scaled: whether numbers change their dtype on the way.

    Raises:
        ValueError: the records differ in shape or dtype, or the lists in length.
    """
    if origin.ndim != 4 or origin.shape[1] != 2 or origin.shape[1:] != target.shape[1:]:
        raise ValueError(
            f"{origin.shape=} and {target.shape=} must be [records 2 W H] and [slots 2 W H] with "
            "one W and one H; flatten the axes before them"
        )
    if origin.dtype != target.dtype and not is_scaled:
        raise ValueError(f"{origin.dtype=} must be {target.dtype=}: bytes are copied")
    if source.ndim != 1 or source.shape != places.shape:
        raise ValueError(f"{source.shape=} and {places.shape=} must be one list length, [n]")
    if count.shape != (1,):
        raise ValueError(f"{count.shape=} must be (1,): one number, read on the device")


def gather_blocks(
    records: Num[Array, "records 2 W H"],
    source: Int32[Array, " n"],
    places: Int32[Array, " n"],
    count: Int32[Array, " 1"],
    slots: Num[Array, "slots 2 W H"],
    *,
    receipt: Int32[Array, " 1"] | None = None,
    scales: Float32[Array, "records 2"] | None = None,
    implementation: Implementation | Sequence[Implementation] | None = None,
    tiles: Tiles | None = None,
) -> Num[Array, "slots 2 W H"]:
    """Fetch records into slots: slots[places[i]] = records[source[i]] for i < count.

    The lists are compacted: only their first `count` entries are looked at, and `count` lives on
    the device, so one program serves every number of missing blocks. The kernel reads page-locked
    host memory that is seen as a device array, and writes into the buffer of `slots` when that is
    donated.

    Args:
        records: all records, B · K · M of them.
        source: record of each move, 0 … B · K · M − 1; a kernel does not check it.
        places: slot of each move, 0 … B · K · R − 1, distinct; a kernel does not check it.
        count: moves; more than n count as n, fewer than 0 as 0.
        slots: B · K · R records.
        receipt: of the last write into `records` (see `write_blocks`). The fetch comes after it.
        scales: of the keys and of the values of each record, on the device, where the host holds
            fewer bits than the slots: a slot gets records · scales, rounded once. `None` moves bits
            as they are.
        implementation: a name, names in order, or `None` for the best that runs here.
        tiles: how the kernel spreads the moves.

    Returns:
        The slots after the moves; those that no move names keep their bits.

    Raises:
        ValueError: shapes or dtypes do not fit together.
        NotImplementedError: the named implementation cannot be used; the message says why.

    Example:
        >>> import jax.numpy as jnp
        >>> records = jnp.arange(4.0).reshape(4, 1, 1, 1) * jnp.ones((4, 2, 1, 1))
        >>> source, places = jnp.array([3, 1, 0]), jnp.array([0, 2, 1])
        >>> slots = gather_blocks(records, source, places, jnp.array([2]), -jnp.ones((3, 2, 1, 1)))
        >>> slots[:, 0, 0, 0].tolist()
        [3.0, -1.0, 1.0]
    """
    check_moves(records, slots, source, places, count, is_scaled=scales is not None)
    if scales is not None and scales.shape != (records.shape[0], 2):
        raise ValueError(f"{scales.shape=} must be {(records.shape[0], 2)}: keys, values")
    size, dtype, slot = records.shape[1:], records.dtype, None if scales is None else slots.dtype
    tiles = tiles or _default_tiles(size, dtype, slot)
    chosen = _backend.resolve(
        "gather_blocks",
        implementation,
        PREFERRED,
        lambda name: unsupported_reason(size, dtype, tiles, slot=slot),
    )
    if source.shape[0] == 0:
        return slots
    if chosen == _backend.REFERENCE:
        return reference.gather_blocks(records, source, places, count, slots, scales)
    moves = (source, places, count, slots, receipt)
    if scales is None:
        return mosaic_gpu.gather_blocks(records, *moves, tiles=tiles)
    return mosaic_gpu_unpack.gather_blocks(records, scales, *moves, tiles=tiles)


def _default_tiles(size: Sequence[int], dtype: np.dtype, slot: np.dtype | None) -> Tiles:
    _, block_size, head_dim = size
    return Tiles.default(block_size, head_dim, dtype.itemsize, slot and slot.itemsize)


def unsupported_reason(
    size: Sequence[int],
    dtype: np.dtype,
    tiles: Tiles | None = None,
    *,
    slot: np.dtype | None = None,
) -> str | None:
    """Say why the kernel cannot move such records here; `None` if it can.

    Args:
        size: [2 W H] of a record.
        dtype: of its numbers.
        tiles: how they are moved; `None` takes the default.
        slot: dtype of the slots, where records are unpacked on the way.
    """
    tiles = tiles or _default_tiles(size, dtype, slot)
    if slot is None:
        return mosaic_gpu.unsupported_reason(size, dtype, tiles)
    return mosaic_gpu_unpack.unsupported_reason(size, dtype, slot, tiles)
