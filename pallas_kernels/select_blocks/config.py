# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""How rows are spread over programs, and what the op has to move."""

import dataclasses

from pallas_kernels._roofline import Work

MAX_WARPS = 16
"""Warps of one program; more would leave a thread too few registers."""

SCORES_PER_WARP = 2048
"""Scores that the registers of one warp hold: 64 a thread."""

MAX_BLOCKS = MAX_WARPS * SCORES_PER_WARP
"""M of the longest row that one program holds."""

FEW_ROWS = 1024
"""Up to so many rows a row gets several warps: there are too few to fill the device."""


def padded_blocks(num_blocks: int) -> int:
    """Round M up to what a program works on: a power of two, at least a warp's 128 bits a thread.

    Example:
        >>> [padded_blocks(m) for m in (1, 128, 129, 2048)]
        [128, 128, 256, 2048]
    """
    return max(128, 1 << (num_blocks - 1).bit_length())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How the kernel works on a row of scores.

    Attributes:
        num_warps: that share a row, which lies in their registers.
    """

    num_warps: int = 4

    def __post_init__(self) -> None:
        """Refuse what no program could have."""
        if self.num_warps not in (1, 2, 4, 8, MAX_WARPS):
            raise ValueError(f"{self.num_warps=} must be a power of two from 1 to {MAX_WARPS}")

    @classmethod
    def default(cls, rows: int, num_blocks: int) -> "Tiles":
        """Pick tiles: as few warps as hold a row if there are many rows, else four times as many.

        Args:
            rows: B·T·K.
            num_blocks: M.

        Example:
            >>> Tiles.default(8, 2048), Tiles.default(1 << 18, 2048)
            (Tiles(num_warps=4), Tiles(num_warps=1))
        """
        least = max(1, padded_blocks(num_blocks) // SCORES_PER_WARP)
        return cls(num_warps=min(MAX_WARPS, 4 * least if rows <= FEW_ROWS else least))


def work(rows: int, num_blocks: int, width: int, *, visible: float | None = None) -> Work:
    """Count the bytes of the op: visible scores once, ids, counts and bitmasks once.

    Args:
        rows: B·T·K.
        num_blocks: M.
        width: ids per row.
        visible: blocks that a row may choose from, on average; `None` for all.

    Example:
        >>> work(2, 64, 8).bytes
        600
    """
    read = int(rows * (num_blocks if visible is None else visible)) * 4
    return Work(bytes=read + rows * 4 * (width + 1 + -(-num_blocks // 32)), flops=0)
