# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Tiles of `block_scores`, and what it has to move and compute."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels._roofline import Work

DECODE_QUERIES = 16
"""Fewer queries than this a sequence are scored one by one: a tensor core takes 16 rows."""

SHARED_BYTES = 227 * 1024
"""Shared memory that a program may have on Hopper."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How the work is cut.

    Attributes:
        tile_q: queries of a program. 1 is the kernel for decode, on the plain ALUs; 16 or more is
            the one for prefill, on the tensor cores.
        tile_m: blocks of a step.
        span: steps of a prefill program, which walks `span · tile_m` blocks; decode has one.
        num_warps: warps of a program.
        num_stages: steps in flight in prefill.
    """

    tile_q: int
    tile_m: int
    span: int = 1
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        """Check what Triton demands.

        Raises:
            ValueError: a size is not a power of two, or too small for a tensor core.
        """
        for name in ("tile_q", "tile_m", "num_warps"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"self.{name}={size} must be a power of two, at least 1")
        if self.tile_q > 1 and min(self.tile_q, self.tile_m) < 16:
            raise ValueError(f"{self.tile_q=} and {self.tile_m=} must be at least 16 if tile_q > 1")
        if self.span < 1 or self.num_stages < 1:
            raise ValueError(f"{self.span=} and {self.num_stages=} must be at least 1")

    @classmethod
    def default(
        cls, *, queries: int, head_dim: int, cells_per_block: int, dtype: jax.typing.DTypeLike
    ) -> "Tiles":
        """Choose tiles so that two prefill programs share a multiprocessor if they can.

        Args:
            queries: T.
            head_dim: H.
            cells_per_block: r.
            dtype: of forecast and pooled keys.

        Example:
            >>> sizes = dict(head_dim=128, cells_per_block=4, dtype=jnp.bfloat16)
            >>> Tiles.default(queries=1, **sizes).tile_q, Tiles.default(queries=99, **sizes).tile_q
            (1, 64)
        """
        if queries < DECODE_QUERIES:
            return cls(tile_q=1, tile_m=16)
        itemsize = jnp.dtype(dtype).itemsize
        for tile_m in (32, 16):
            tiles = cls(tile_q=64, tile_m=tile_m, span=512 // tile_m)
            if tiles.shared_bytes(head_dim, cells_per_block, itemsize) <= SHARED_BYTES // 2:
                return tiles
        if tiles.shared_bytes(head_dim, cells_per_block, itemsize) <= SHARED_BYTES:
            return tiles
        return dataclasses.replace(tiles, num_stages=1)

    def shared_bytes(self, head_dim: int, cells_per_block: int, itemsize: int) -> int:
        """Estimate the shared memory of a prefill program: queries, keys in flight, one result.

        Args:
            head_dim: H.
            cells_per_block: r; a step loads r + 1 tiles of keys.
            itemsize: bytes of an element.
        """
        row = head_dim * itemsize
        loads = self.num_stages * (cells_per_block + 1) if self.num_stages > 1 else 2
        return (self.tile_q + loads * self.tile_m) * row + self.tile_q * self.tile_m * 4


def work(
    *,
    batch: int,
    queries: int,
    cells: int,
    kv_heads: int,
    head_dim: int,
    num_blocks: int,
    itemsize: int,
    pairs: int | None = None,
) -> Work:
    """Count the least that the op must do: every operand read once, every score written once.

    Args:
        batch: B.
        queries: T.
        cells: C, pooled keys that somebody sees.
        kv_heads: K.
        head_dim: H.
        num_blocks: M.
        itemsize: bytes of an element of forecast and pooled keys.
        pairs: visible (query, pooled key) pairs of one KV head, summed over the batch; `None` for
            all of them. In causal prefill about half of B·T·C.

    Example:
        >>> sizes = dict(cells=8191, kv_heads=2, head_dim=128, num_blocks=2048, itemsize=2)
        >>> work(batch=16, queries=1, **sizes).bytes
        67371008
    """
    pairs = batch * queries * cells if pairs is None else pairs
    keys = batch * cells * kv_heads * head_dim * itemsize
    forecasts = batch * queries * kv_heads * head_dim * itemsize
    scores = batch * queries * kv_heads * num_blocks * 4
    return Work(
        bytes=keys + forecasts + scores,
        flops=2 * pairs * kv_heads * head_dim,
        ceiling="copy" if queries < DECODE_QUERIES else "matmul",
    )
