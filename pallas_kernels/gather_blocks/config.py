# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""How records are moved, and how many bytes that is."""

import dataclasses

from pallas_kernels._roofline import Work

SHARED_MEMORY_BYTES = 227 * 1024
"""What a CTA can have on Hopper."""

RESERVED_BYTES = 2048
"""Kept free for barriers and transfer descriptors."""

MOST_ROWS = 256
"""What one transfer of the copy engine can hold along an axis."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How the moves are spread.

    Attributes:
        ctas: thread blocks. Each takes a multiprocessor from whatever computes beside it.
        in_flight: pieces that each of them has under way, at least 2: one arrives, one leaves.
        parts: pieces that a record is cut into; divides its 2 · W rows.
    """

    ctas: int = 4
    in_flight: int = 12
    parts: int = 2

    def __post_init__(self) -> None:
        if self.ctas < 1:
            raise ValueError(f"{self.ctas=} must be at least 1")
        if self.in_flight < 2:
            raise ValueError(f"{self.in_flight=} must be at least 2: one arrives, one leaves")
        if self.parts < 1:
            raise ValueError(f"{self.parts=} must be at least 1")

    @classmethod
    def default(
        cls, block_size: int, head_dim: int, itemsize: int, slot_itemsize: int | None = None
    ) -> "Tiles":
        """Choose for a shape of record: pieces of at most 16 KiB, up to 12 of them in flight.

        Args:
            block_size: W.
            head_dim: H.
            itemsize: bytes of one number.
            slot_itemsize: of one number in the slots, where records are unpacked on the way: a
                piece is then of keys or of values, and the 16 KiB are those of the slots.

        Example:
            >>> Tiles.default(64, 128, 2)
            Tiles(ctas=4, in_flight=12, parts=2)
            >>> Tiles.default(128, 128, 4)
            Tiles(ctas=4, in_flight=12, parts=8)
            >>> Tiles.default(64, 128, 1, 2)
            Tiles(ctas=4, in_flight=12, parts=2)
        """
        rows, row_bytes = 2 * block_size, head_dim * (slot_itemsize or itemsize)
        parts = 1 if slot_itemsize is None else 2
        while rows % (2 * parts) == 0 and rows // parts * row_bytes > 16 * 1024:
            parts *= 2
        piece = rows // parts * head_dim
        room = SHARED_MEMORY_BYTES - RESERVED_BYTES - 2 * piece * (slot_itemsize or 0)
        return cls(in_flight=max(2, min(12, room // (piece * itemsize))), parts=parts)

    def unsupported_reason(
        self, block_size: int, head_dim: int, itemsize: int, slot_itemsize: int | None = None
    ) -> str | None:
        """Say why records of this shape cannot be moved so; `None` if they can.

        Args:
            block_size: W.
            head_dim: H.
            itemsize: bytes of one number.
            slot_itemsize: of one number in the slots, where records are unpacked on the way.
        """
        rows, row_bytes = 2 * block_size, head_dim * itemsize
        if row_bytes % 16:
            return f"moves rows of a multiple of 16 bytes, but H={head_dim} makes {row_bytes}"
        if head_dim > MOST_ROWS:
            return f"moves rows of at most {MOST_ROWS} numbers, but H={head_dim}"
        if rows % self.parts:
            return f"cannot cut the {rows} rows of a record into {self.parts} parts"
        rows //= self.parts
        if rows > MOST_ROWS:
            return f"moves at most {MOST_ROWS} rows at once, but {self.parts=} leaves {rows}"
        piece = rows * row_bytes
        if piece % 128:
            return f"moves pieces of a multiple of 128 bytes, but {self.parts=} makes {piece}"
        room = SHARED_MEMORY_BYTES - RESERVED_BYTES - 2 * piece // itemsize * (slot_itemsize or 0)
        if self.in_flight * piece > room:
            return (
                f"has {room} bytes of shared memory, but "
                f"{self.in_flight=} pieces of {piece} bytes need {self.in_flight * piece}"
            )
        return None


def record_bytes(block_size: int, head_dim: int, itemsize: int) -> int:
    """Count the bytes of one record: K and V of one block and KV head.

    Args:
        block_size: W.
        head_dim: H.
        itemsize: bytes of one number.

    Example:
        >>> record_bytes(64, 128, 2)
        32768
    """
    return 2 * block_size * head_dim * itemsize


def work(count: int, block_size: int, head_dim: int, itemsize: int) -> Work:
    """Count what moving `count` records takes: each crosses the link once.

    Args:
        count: records moved.
        block_size: W.
        head_dim: H.
        itemsize: bytes of one number.
    """
    moved = count * record_bytes(block_size, head_dim, itemsize)
    return Work(bytes=moved, flops=0, ceiling="h2d")
