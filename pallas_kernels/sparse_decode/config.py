# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""How `sparse_decode` is cut into programs, and what it has to move."""

import dataclasses

from pallas_kernels._roofline import Work

_TILE_BYTES = 16 * 1024
"""The largest tile of keys that one load brings, unless a caller says otherwise."""


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """The cut of the work.

    Attributes:
        tile_kv: tokens in one load; a power of two from 16 on. A block is a whole number of tiles.
        programs: how many programs to aim at. The blocks of each (sequence, KV head) are dealt to
            ⌊programs / (B K)⌋ of them, at least one and at most one a block.
        warps: of a program.
        stages: of the software pipeline: `stages − 1` tiles of K and of V are on their way.

    Example:
        >>> Tiles(tile_kv=24)
        Traceback (most recent call last):
        ValueError: self.tile_kv=24 must be a power of two, at least 16
    """

    tile_kv: int = 64
    programs: int = 264
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        """Refuse what no program could run."""
        if self.tile_kv < 16 or not _is_power_of_two(self.tile_kv):
            raise ValueError(f"{self.tile_kv=} must be a power of two, at least 16")
        if not 1 <= self.warps <= 16 or not _is_power_of_two(self.warps):
            raise ValueError(f"{self.warps=} must be a power of two from 1 to 16")
        for name in ("programs", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @classmethod
    def default(cls, block_size: int, head_dim: int, itemsize: int) -> "Tiles":
        """Take whole blocks where they are small: a tile of K has at most 16 KiB.

        Args:
            block_size: W.
            head_dim: H.
            itemsize: bytes of one element of K.

        Example:
            >>> Tiles.default(64, 128, 2).tile_kv, Tiles.default(64, 128, 4).tile_kv
            (64, 32)
        """
        fits = max(_TILE_BYTES // (head_dim * itemsize), 16)
        return cls(tile_kv=max(min(block_size, fits), 16))

    def splits(self, rows: int, width: int) -> int:
        """Settle among how many programs the blocks of one (sequence, KV head) are dealt.

        Args:
            rows: B · K.
            width: J.

        Example:
            >>> [Tiles().splits(batch * 2, 96) for batch in (1, 4, 16, 64, 256)]
            [96, 32, 8, 2, 1]
        """
        wanted = max(1, min(width, self.programs // max(rows, 1)))
        each = -(-width // wanted)  # blocks of the busiest program
        return -(-width // each) if width else 1


def work(
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    width: int,
    block_size: int,
    head_dim: int,
    itemsize: int,
    has_bias: bool = False,
) -> Work:
    """Count what one call has to do: every chosen block is read once.

    Args:
        batch: B.
        heads: N.
        kv_heads: K.
        width: blocks read of each (sequence, KV head).
        block_size: W.
        head_dim: H.
        itemsize: bytes of one element of Q, K and V.
        has_bias: whether a bias is read.

    Example:
        >>> work(batch=16, heads=32, kv_heads=2, width=96, block_size=64, head_dim=128,
        ...      itemsize=2).bytes
        100950080
    """
    tokens = batch * kv_heads * width * block_size
    read = tokens * 2 * head_dim * itemsize + (4 * tokens if has_bias else 0)
    ends = 2 * batch * heads * head_dim * itemsize
    indices = 2 * 4 * batch * kv_heads * width + 4 * batch
    group = heads // kv_heads
    return Work(bytes=read + ends + indices, flops=4 * tokens * group * head_dim)
