# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""How `append_kv` is cut into programs, and what it has to move."""

import dataclasses

from pallas_kernels._roofline import Work


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """The cut of the work: one program for each (sequence, KV head).

    Attributes:
        warps: of a program.

    Example:
        >>> Tiles(warps=3)
        Traceback (most recent call last):
        ValueError: self.warps=3 must be a power of two from 1 to 16
    """

    warps: int = 4

    def __post_init__(self) -> None:
        """Refuse what no program could run."""
        if not 1 <= self.warps <= 16 or self.warps & (self.warps - 1):
            raise ValueError(f"{self.warps=} must be a power of two from 1 to 16")


def work(
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    extra_heads: int,
    head_dim: int,
    itemsize: int,
    pool_size: int = 0,
    pool_stride: int = 1,
) -> Work:
    """Count what one call has to do; windows complete once in `pool_stride` tokens.

    Args:
        batch: B.
        heads: N.
        kv_heads: K.
        extra_heads: F.
        head_dim: H.
        itemsize: bytes of one element of Q, K and V.
        pool_size: recent keys that move up by one; 0 without a summary.
        pool_stride: tokens between the starts of neighbouring windows.

    Example:
        >>> work(batch=1, heads=2, kv_heads=1, extra_heads=1, head_dim=64, itemsize=2).bytes
        1672
    """
    vectors = 2 * (heads + extra_heads) + (2 + 3) * kv_heads  # k, v read; k twice and v written
    vectors += 2 * pool_size * kv_heads
    tables = 4 * head_dim + 4 + 4 * kv_heads  # cos, sin, position, tail
    moved = batch * (vectors * head_dim * itemsize + tables)
    windows = batch * kv_heads * head_dim / pool_stride if pool_size else 0
    flops = 3 * batch * (heads + extra_heads + kv_heads) * head_dim + int(windows * pool_size)
    return Work(bytes=moved + int(windows * itemsize), flops=flops)
