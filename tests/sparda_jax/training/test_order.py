# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The order of windows: every one once, none beyond the last, no trend."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_jax.training.order import permute


@given(size=st.integers(1, 300), seed=st.integers(0, 1000), epoch=st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_the_order_is_a_permutation(size, seed, epoch):
    got = permute(np.arange(size, dtype=np.uint64), size=size, seed=seed, epoch=epoch)
    assert sorted(got.tolist()) == list(range(size))


def test_the_order_leaves_no_trend():
    size = 10_000
    got = permute(np.arange(size, dtype=np.uint64), size=size, seed=0, epoch=0).astype(np.float64)
    assert abs(np.corrcoef(got, np.arange(size))[0, 1]) < 0.05
    assert abs(np.corrcoef(got[1:], got[:-1])[0, 1]) < 0.05


def test_positions_beyond_32_bits_are_permuted_in_range():
    size = 2**40 + 123
    positions = np.array([0, 1, 2**33, size - 1], np.uint64)
    got = permute(positions, size=size, seed=0, epoch=0)
    assert int(got.max()) < size
    assert len(set(got.tolist())) == 4
    assert int(got.max()) > 2**32


def test_a_position_outside_is_refused():
    with pytest.raises(ValueError, match="position 5 must be below size=5"):
        permute(np.array([5], np.uint64), size=5, seed=0, epoch=0)
