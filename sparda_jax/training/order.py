# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The order of training windows: a permutation that a small block cipher computes on the spot."""

import numpy as np
from jaxtyping import UInt64


def permute(
    positions: UInt64[np.ndarray, " n"], *, size: int, seed: int, epoch: int
) -> UInt64[np.ndarray, " n"]:
    """Permute 0 … size − 1: a Feistel cipher of four rounds, repeated until it lands below `size`.

    Every position is computed by itself in constant memory, which is what makes a batch a function
    of its step.

    Args:
        positions: positions in the epoch, below `size`.
        size: how many there are.
        seed: of the order.
        epoch: each epoch has an order of its own.

    Returns:
        the permuted positions.

    Raises:
        ValueError: if a position is not below `size`.

    References:
        Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002, section 4 (walking
        the cycle) and 5 (Feistel).

    Example:
        >>> sorted(permute(np.arange(5, dtype=np.uint64), size=5, seed=1, epoch=0).tolist())
        [0, 1, 2, 3, 4]
    """
    if positions.size and int(positions.max()) >= size:
        raise ValueError(f"position {int(positions.max())} must be below {size=}")
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.default_rng([seed, epoch]).integers(2**64, size=4, dtype=np.uint64)
    result = positions.copy()
    outside = np.ones(result.shape, bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        result[outside] = (left << half) | right
        outside = result >= np.uint64(size)
    return result


def _mix(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Scramble 64 bits by two rounds of multiply and shift (wrapping)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
