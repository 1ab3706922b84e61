# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""How a row is worked on, and what the op has to move."""

import dataclasses

from pallas_kernels._roofline import Work

MAX_SLOTS = 1024
"""R that the registers of one program hold; J is at most R."""

MAX_ROWS = 16384
"""B·K whose counts one program adds up."""


def power_of_two(n: int) -> int:
    """Round up to a power of two.

    Example:
        >>> [power_of_two(n) for n in (1, 96, 128)]
        [1, 128, 128]
    """
    return 1 << (n - 1).bit_length()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How the kernel works on the row of one (sequence, KV head).

    Attributes:
        tile_slots: slots that all others are compared with in one step of the ranking.
        num_warps: of the program that plans a row.
    """

    tile_slots: int = 32
    num_warps: int = 4

    def __post_init__(self) -> None:
        """Refuse what no program could have."""
        if self.tile_slots not in (16, 32, 64, 128):
            raise ValueError(f"{self.tile_slots=} must be a power of two from 16 to 128")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"{self.num_warps=} must be a power of two from 1 to 8")

    @classmethod
    def default(cls, num_slots: int) -> "Tiles":
        """Pick tiles: a thread for each slot, so that slots are compared within threads.

        Args:
            num_slots: R.

        Example:
            >>> Tiles.default(96), Tiles.default(256)
            (Tiles(tile_slots=32, num_warps=4), Tiles(tile_slots=32, num_warps=8))
        """
        return cls(num_warps=min(8, max(1, power_of_two(num_slots) // 32)))


def work(rows: int, width: int, num_slots: int, missing: int) -> Work:
    """Count the bytes of the op: ids, their table entries, slots and ages, once each.

    Args:
        rows: B·K.
        width: J.
        num_slots: R.
        missing: blocks that a row fetches.

    Example:
        >>> work(8, 96, 128, 4).bytes
        27168
    """
    read = 2 * width + 2 * num_slots  # ids and their table entries; blocks and ages of the slots
    written = 2 * width + 1 + 4 * missing  # slots and ages of the used, tail; table, its inverse
    listed = 2 * width  # the misses, with what fills the list
    return Work(bytes=4 * rows * (read + written + listed), flops=0)
