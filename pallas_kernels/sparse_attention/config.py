# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Tiles of the kernels, and what the op has to move and compute."""

import dataclasses
import typing

from pallas_kernels._roofline import Work

WARPGROUP_ROWS = 64
"""Rows that a warpgroup multiplies at once on Hopper."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How a kernel cuts its work.

    Attributes:
        rows: (query, head of a group) pairs of one tile, which read one union of blocks. A group
            takes the next power of two of rows, so a tile has `rows / padded_group(G)` queries.
            Mosaic: 64 for each computing warpgroup, and a warpgroup skips blocks that none of its
            own queries chose. Triton: a power of two.
        stages: blocks of K and V in flight.
        num_warps: of a Triton program; Mosaic ignores it.
        queries_in: where Mosaic's products read the queries from. Registers spare the bandwidth of
            shared memory, and take 32 registers of a thread at H = 128. Triton ignores it.
    """

    rows: int = 128
    stages: int = 4
    num_warps: int = 8
    queries_in: typing.Literal["registers", "shared"] = "registers"

    def __post_init__(self) -> None:
        if self.rows < 16 or self.rows % 16:
            raise ValueError(f"{self.rows=} must be a positive multiple of 16")
        if self.stages < 1:
            raise ValueError(f"{self.stages=} must be at least 1")
        if self.num_warps < 1 or self.num_warps & (self.num_warps - 1):
            raise ValueError(f"{self.num_warps=} must be a power of two")
        places = typing.get_args(Tiles.__annotations__["queries_in"])
        if self.queries_in not in places:
            raise ValueError(f"{self.queries_in=} must be one of {places}")

    @classmethod
    def default(
        cls, implementation: str, *, group: int, head_dim: int, block_size: int, itemsize: int
    ) -> "Tiles":
        """Give the tiles of an implementation.

        Args:
            implementation: a kernel's name.
            group: G, query heads per KV head.
            head_dim: H.
            block_size: W.
            itemsize: bytes of an element of K.

        Example:
            >>> Tiles.default("triton", group=16, head_dim=128, block_size=64, itemsize=4)
            Tiles(rows=64, stages=1, num_warps=4, queries_in='registers')
            >>> Tiles.default("mosaic_gpu", group=16, head_dim=128, block_size=64, itemsize=2)
            Tiles(rows=128, stages=5, num_warps=8, queries_in='registers')
        """
        if implementation == "mosaic_gpu":
            pair = 2 * block_size * head_dim * 2
            return cls(rows=2 * WARPGROUP_ROWS, stages=min(8, 160 * 1024 // pair))
        if itemsize > 2:
            return cls(rows=max(64, padded_group(group)), stages=1, num_warps=4)
        stages = 3 if block_size < 128 else 2
        return cls(rows=max(128, padded_group(group)), stages=stages, num_warps=8)


def shared_bytes(tiles: Tiles, *, head_dim: int, block_size: int) -> int:
    """Count the bytes of shared memory that queries and the ring of K and V take, 2 an element.

    Example:
        >>> shared_bytes(Tiles(rows=128, stages=5), head_dim=128, block_size=64)
        196608
    """
    return 2 * head_dim * (tiles.rows + 2 * tiles.stages * block_size)


def padded_group(group: int) -> int:
    """Round the heads of a group up to a power of two.

    Example:
        >>> [padded_group(g) for g in (1, 3, 8, 16)]
        [1, 4, 8, 16]
    """
    return 1 << (group - 1).bit_length()


def work(
    *,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    chosen: int,
    itemsize: int,
) -> Work:
    """Count the work: 4 · H · W FLOP for each (query head, query, chosen block).

    Args:
        queries: B · T.
        keys: B · S.
        heads: N.
        kv_heads: K.
        head_dim: H.
        block_size: W.
        chosen: (query, KV head, block) triples that are marked and not after the query.
        itemsize: bytes of an element of q, k and v.

    Returns:
        FLOPs over chosen blocks only, whatever else a union makes a kernel compute; bytes of q,
        out, k, v and the mask, once each.
    """
    flops = 4 * head_dim * block_size * (heads // kv_heads) * chosen
    words = -(-keys // block_size // 32)
    moved = itemsize * head_dim * 2 * (queries * heads + keys * kv_heads)
    return Work(bytes=moved + 4 * queries * kv_heads * words, flops=flops, ceiling="matmul")
