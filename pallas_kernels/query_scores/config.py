# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Tiles of `query_scores`, and what it has to move and compute."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels._roofline import Work

DECODE_QUERIES = 16
"""Fewer queries than this a sequence are scored one by one, split over the pooled keys."""

SHARED_BYTES = 227 * 1024
"""Shared memory that a program may have on Hopper."""

_PROGRAMS = 512
"""Most programs of decode's first pass: about four for each multiprocessor."""

_ROWS = 64
"""Rows (query, head) of a prefill program: what a Hopper wgmma takes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How the work is cut.

    Attributes:
        tile_q: queries of a program. 1 is the pair of kernels for decode, more the one for prefill.
        tile_c: pooled keys of a step of the first pass.
        tile_m: blocks of a step of the second pass.
        span: steps of a program in decode's first pass.
        num_warps: warps of a program; decode's second pass always has 4.
        num_stages: steps in flight.
    """

    tile_q: int
    tile_c: int = 64
    tile_m: int = 32
    span: int = 1
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        """Check what Triton demands.

        Raises:
            ValueError: a size is not a power of two, or too small for a tensor core.
        """
        for name in ("tile_q", "tile_c", "tile_m", "num_warps"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"self.{name}={size} must be a power of two, at least 1")
        if min(self.tile_c, self.tile_m) < 16:
            raise ValueError(f"{self.tile_c=} and {self.tile_m=} must be at least 16")
        if self.span < 1 or self.num_stages < 1:
            raise ValueError(f"{self.span=} and {self.num_stages=} must be at least 1")

    @classmethod
    def default(
        cls,
        *,
        batch: int,
        queries: int,
        cells: int,
        kv_heads: int,
        group: int,
        head_dim: int,
        cells_per_block: int,
        dtype: jax.typing.DTypeLike,
    ) -> "Tiles":
        """Choose tiles: enough programs in decode, two to a multiprocessor in prefill.

        Args:
            batch: B.
            queries: T.
            cells: C.
            kv_heads: K.
            group: G, query heads of a KV head.
            head_dim: H.
            cells_per_block: r.
            dtype: of queries and pooled keys.

        Example:
            >>> sizes = dict(cells=8191, kv_heads=2, group=16, head_dim=128, cells_per_block=4)
            >>> Tiles.default(batch=16, queries=1, **sizes, dtype=jnp.bfloat16).span
            8
            >>> Tiles.default(batch=1, queries=4096, **sizes, dtype=jnp.bfloat16).tile_q
            4
        """
        itemsize = jnp.dtype(dtype).itemsize
        if queries < DECODE_QUERIES:
            tiles = cls(tile_q=1, tile_c=64, num_stages=3)
            if tiles.shared_bytes(group, head_dim, cells_per_block, itemsize) > SHARED_BYTES:
                tiles = cls(tile_q=1, tile_c=32, num_stages=2)
            steps = -(-cells // tiles.tile_c) * batch * queries * kv_heads
            return dataclasses.replace(tiles, span=max(1, -(-steps // _PROGRAMS)))
        tile_q = max(2, _ROWS // (1 << (group - 1).bit_length()))
        for tile_c, tile_m in ((64, 32), (32, 16)):
            tiles = cls(tile_q=tile_q, tile_c=tile_c, tile_m=tile_m)
            held = tiles.shared_bytes(group, head_dim, cells_per_block, itemsize)
            if held <= SHARED_BYTES // 2:
                return tiles
        return tiles if held <= SHARED_BYTES else dataclasses.replace(tiles, num_stages=1)

    def shared_bytes(self, group: int, head_dim: int, cells_per_block: int, itemsize: int) -> int:
        """Estimate the shared memory of a program: queries, keys in flight, one result.

        Args:
            group: G.
            head_dim: H.
            cells_per_block: r; a step of the second pass loads r + 1 tiles of keys.
            itemsize: bytes of an element.
        """
        members = 1 << (group - 1).bit_length()
        row = head_dim * itemsize
        if self.tile_q == 1:
            members = max(members, 16)
            return (members + self.num_stages * self.tile_c) * row + members * self.tile_c * 4
        second = self.num_stages * (cells_per_block + 1) if self.num_stages > 1 else 2
        keys = max(self.num_stages * self.tile_c, second * self.tile_m)
        return (self.tile_q * members + keys) * row


def work(
    *,
    batch: int,
    queries: int,
    cells: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    num_blocks: int,
    itemsize: int,
    pairs: int | None = None,
) -> Work:
    """Count two passes over the pooled keys, the queries and the scores.

    Two passes is what an exact softmax takes without memory. The kernels for decode read the keys
    once and keep the logits instead, so their share of a ceiling can pass 1.

    Args:
        batch: B.
        queries: T.
        cells: C, pooled keys that somebody sees.
        heads: N.
        kv_heads: K.
        head_dim: H.
        num_blocks: M.
        itemsize: bytes of an element of queries and pooled keys.
        pairs: visible (query, pooled key) pairs, summed over the batch; `None` for all of them. In
            causal prefill about half of B·T·C.

    Example:
        >>> sizes = dict(cells=8191, heads=32, kv_heads=2, head_dim=128, num_blocks=2048)
        >>> work(batch=16, queries=1, **sizes, itemsize=2).bytes
        134594560
    """
    pairs = batch * queries * cells if pairs is None else pairs
    keys = batch * cells * kv_heads * head_dim * itemsize
    probes = batch * queries * heads * head_dim * itemsize
    scores = batch * queries * kv_heads * num_blocks * 4
    return Work(
        bytes=2 * keys + probes + scores,
        flops=4 * pairs * heads * head_dim,
        ceiling="copy" if queries < DECODE_QUERIES else "matmul",
    )
