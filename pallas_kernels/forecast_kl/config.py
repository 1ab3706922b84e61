# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Tiles of the kernels, and what the op has to compute and move."""

import dataclasses

from pallas_kernels._roofline import Work


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How the three kernels cut their work; every size a power of two.

    The first makes the log-sum-exp of each query head, the second the mass of a KV head, the third
    the loss.

    Attributes:
        lse_q: queries of one program of the first kernel.
        lse_fine: fine keys of one of its steps.
        lse_warps: its warps.
        lse_stages: loads in flight.
        mass_q: queries of one program of the second kernel.
        mass_fine: fine keys of one program; the queries of the group's heads pass by them.
        mass_warps: its warps.
        mass_stages: loads in flight.
        kl_q: queries of one program of the third kernel.
        kl_cells: cells of one of its steps.
        kl_warps: its warps.
        kl_stages: loads in flight.
    """

    lse_q: int = 128
    lse_fine: int = 128
    lse_warps: int = 8
    lse_stages: int = 2
    mass_q: int = 64
    mass_fine: int = 128
    mass_warps: int = 4
    mass_stages: int = 2
    kl_q: int = 32
    kl_cells: int = 64
    kl_warps: int = 4
    kl_stages: int = 2

    def __post_init__(self) -> None:
        """Refuse what no kernel could use."""
        for name in ("lse_q", "lse_fine", "mass_q", "mass_fine", "kl_q", "kl_cells"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"Tiles: {name}={value} must be a power of two, at least 16")
        for name in ("lse_warps", "mass_warps", "kl_warps"):
            value = getattr(self, name)
            if value not in (1, 2, 4, 8, 16):
                raise ValueError(f"Tiles: {name}={value} must be 1, 2, 4, 8 or 16")
        for name in ("lse_stages", "mass_stages", "kl_stages"):
            value = getattr(self, name)
            if not 1 <= value <= 8:
                raise ValueError(f"Tiles: {name}={value} must be from 1 to 8")

    @classmethod
    def default(cls, itemsize: int = 2) -> "Tiles":
        """Give the tiles for operands of `itemsize` bytes an element.

        f32 is multiplied without tensor cores, whose operands live in registers: smaller tiles.
        """
        if itemsize <= 2:
            return cls()
        return cls(
            lse_q=32,
            lse_fine=32,
            lse_warps=4,
            mass_q=32,
            mass_fine=32,
            kl_q=16,
            kl_cells=32,
        )


def _pairs(first: int, queries: int, stride: int, count: int) -> int:
    """Count (query, key) pairs with stride · key ≤ query, for consecutive queries from `first`."""
    return sum(min(count, t // stride + 1) for t in range(first, first + queries))


def teacher_work(
    *,
    batch: int,
    first: int,
    queries: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    fine: int,
    num_cells: int,
    teacher_pool_stride: int = 1,
    itemsize: int = 2,
) -> Work:
    """Count what `teacher_mass` must do for consecutive queries from position `first`.

    Each visible logit is computed twice, before and after its row's normaliser is known.

    Example:
        >>> teacher_work(batch=1, first=0, queries=2, heads=4, kv_heads=1, head_dim=8, fine=1,
        ...              num_cells=1).flops
        256
    """
    pairs = batch * heads * _pairs(first, queries, teacher_pool_stride, fine)
    moved = batch * head_dim * itemsize * (queries * heads + fine * kv_heads)
    return Work(
        bytes=moved + 4 * batch * queries * kv_heads * num_cells,
        flops=2 * 2 * head_dim * pairs,
        ceiling="matmul",
    )


def loss_work(
    *,
    batch: int,
    first: int,
    queries: int,
    kv_heads: int,
    head_dim: int,
    num_cells: int,
    pool_stride: int,
    itemsize: int = 2,
) -> Work:
    """Count what `forecast_kl_and_gradient` must do for consecutive queries from `first`.

    One product for the student's logits and one for the gradient; the teacher is read once.

    Example:
        >>> loss_work(batch=1, first=0, queries=1, kv_heads=1, head_dim=8, num_cells=4,
        ...           pool_stride=16).flops
        32
    """
    pairs = batch * kv_heads * _pairs(first, queries, pool_stride, num_cells)
    vectors = batch * kv_heads * head_dim * (queries * (itemsize + 4) + num_cells * itemsize)
    return Work(bytes=vectors + 4 * pairs, flops=2 * 2 * head_dim * pairs, ceiling="copy")


def layer_work(
    *,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    pool_size: int,
    pool_stride: int,
    teacher_pool_size: int = 2,
    teacher_pool_stride: int = 1,
    itemsize: int = 2,
) -> Work:
    """Count what the loss of one layer must do for whole sequences: teacher, KL and gradient.

    The teacher on the pooled grid need not leave the chip, so its cells count no bytes.

    Example:
        >>> work = layer_work(batch=1, tokens=32768, heads=32, kv_heads=2, head_dim=128,
        ...                   pool_size=32, pool_stride=16)
        >>> round(work.flops / 1e12, 1)
        8.8
    """
    fine = max(0, (tokens - teacher_pool_size) // teacher_pool_stride + 1)
    cells = max(0, (tokens - pool_size) // pool_stride + 1)
    pairs = heads * _pairs(0, tokens, teacher_pool_stride, fine)
    pairs += kv_heads * _pairs(0, tokens, pool_stride, cells)
    rows = tokens * (heads + kv_heads) + (fine + cells) * kv_heads
    moved = batch * head_dim * (itemsize * rows + 4 * tokens * kv_heads)
    return Work(bytes=moved, flops=4 * head_dim * batch * pairs, ceiling="matmul")
