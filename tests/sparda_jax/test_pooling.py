# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Pooled keys and pooled scores against loops; pooling in pieces against pooling at once."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.config import SparseConfig
from sparda_jax.pooling import (
    LOWEST,
    extend_pooled,
    init_pooled,
    pool_keys,
    pool_scores,
    pooled_count,
)
from sparda_jax.testing import assert_close_float32
from tests import oracles

SMALL = SparseConfig(block_size=8, pool_size=4, pool_stride=2, local_blocks=1, selected_blocks=4)
CAPACITY = 40
PIECE = 7
GRIDS = [(4, 2), (3, 3), (8, 2), (2, 1), (1, 1)]


extend = jax.jit(extend_pooled, static_argnames="sparse")
pool = jax.jit(pool_keys, static_argnames=("pool_size", "pool_stride"))
score = jax.jit(pool_scores, static_argnames=("num_blocks", "cells_per_block"))


def pool_in_pieces(k, cuts, sparse, start=0):
    """Extend a summary piece by piece, each padded to `PIECE` tokens."""
    summary = init_pooled(k.shape[0], CAPACITY, *k.shape[2:], sparse, str(k.dtype))
    for size in cuts:
        chunk = jnp.zeros((k.shape[0], PIECE, *k.shape[2:]), k.dtype)
        chunk = chunk.at[:, :size].set(k[:, start : start + size])
        at = jnp.arange(PIECE)
        positions = jnp.where(at < size, start + at, -1)
        summary = extend(summary, chunk, jnp.tile(positions[None], (k.shape[0], 1)), sparse)
        start += size
    return summary


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 13])
def test_pooled_keys_are_means_of_full_windows(key, grid, tokens):
    k = jax.random.normal(key, (2, tokens, 2, 3))
    got = pool(k, *grid)
    for row in range(2):
        assert_close_float32(got[row], oracles.pool_keys(np.asarray(k)[row], *grid))


def test_a_mean_is_taken_in_float32_and_rounded_once():
    k = jnp.array([256.0, 1.0, 1.0, 1.0], jnp.bfloat16).reshape(1, 4, 1, 1)
    got = pool(k, 4, 2)
    assert got.dtype == jnp.bfloat16
    assert float(got[0, 0, 0, 0]) == float(jnp.bfloat16(64.75))


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.lists(st.integers(1, PIECE), min_size=1, max_size=12), st.integers(0, 9))
def test_pooling_in_any_pieces_is_pooling_at_once_bit_for_bit(cuts, seed):
    while sum(cuts) > CAPACITY:
        cuts = cuts[:-1]
    tokens = sum(cuts)
    k = jax.random.normal(jax.random.key(seed), (1, CAPACITY, 2, 3))
    summary = pool_in_pieces(k, cuts, SMALL)
    count = SMALL.pooled(tokens)
    # Windows of the first `tokens` keys are a prefix of those of all keys: one shape for all cases.
    np.testing.assert_array_equal(summary.pooled[:, :count], pool(k, 4, 2)[:, :count])
    assert not np.asarray(summary.pooled[:, count:]).any()
    kept = min(tokens, SMALL.pool_size)
    np.testing.assert_array_equal(summary.tail[:, -kept:], k[:, tokens - kept : tokens])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grid", [(32, 16), (8, 2)])
def test_pooling_token_by_token_is_pooling_at_once_at_every_length(key, grid, dtype):
    sparse = SparseConfig(pool_size=grid[0], pool_stride=grid[1])
    k = jax.random.normal(key, (1, 150, 1, 2), dtype)
    want = np.asarray(pool(k, *grid))

    def step(summary, t):
        at = jax.lax.dynamic_slice_in_dim(k, t, 1, axis=1)
        summary = extend_pooled(summary, at, t[None, None], sparse)
        return summary, summary.pooled

    start = init_pooled(1, 150, 1, 2, sparse, dtype)
    _, history = jax.lax.scan(step, start, jnp.arange(150))
    history = np.asarray(history)
    for t in range(150):
        count = sparse.pooled(t + 1)
        np.testing.assert_array_equal(history[t, :, :count], want[:, :count])
        assert not history[t, :, count:].any()


def test_rows_of_a_ragged_batch_are_pooled_as_if_alone(key):
    k = jax.random.normal(key, (4, 12, 2, 3))
    lengths = jnp.array([12, 5, 0, 1])
    at = jnp.arange(12)[None]
    positions = jnp.where(at < lengths[:, None], at, -1)
    summary = init_pooled(4, 12, 2, 3, SMALL, "float32")
    got = extend(summary, k, positions, SMALL)
    for row, length in enumerate([12, 5, 0, 1]):
        count = SMALL.pooled(length)
        want = pool(k, 4, 2)[row, :count]
        np.testing.assert_array_equal(got.pooled[row, :count], want)
        assert not np.asarray(got.pooled[row, count:]).any()
    np.testing.assert_array_equal(got.tail[2], summary.tail[2])


def test_a_row_of_padding_leaves_its_summary_as_it_was(key):
    k = jax.random.normal(key, (2, 16, 1, 2))
    summary = pool_in_pieces(k, [7, 6], SMALL)
    positions = jnp.array([[13, 14, -1], [-1, -1, -1]])
    got = extend(summary, k[:, 13:16], positions, SMALL)
    np.testing.assert_array_equal(got.pooled[1], summary.pooled[1])
    np.testing.assert_array_equal(got.tail[1], summary.tail[1])
    np.testing.assert_array_equal(got.tail[0], k[0, 11:15])


def test_a_summary_without_room_drops_what_does_not_fit(key):
    k = jax.random.normal(key, (1, 12, 1, 2))
    summary = init_pooled(1, 6, 1, 2, SMALL, "float32")
    got = extend(summary, k, jnp.arange(12)[None], SMALL)
    np.testing.assert_array_equal(got.pooled, pool(k, 4, 2)[:, :2])


@pytest.mark.parametrize("grid", [(32, 16), (4, 2), (1, 1)])
def test_lengths_are_counted_on_the_device_as_on_the_host(grid):
    sparse = SparseConfig(pool_size=grid[0], pool_stride=grid[1])
    lengths = np.arange(100)
    got = pooled_count(jnp.asarray(lengths), sparse)
    assert got.tolist() == [sparse.pooled(int(n)) for n in lengths]


@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("cells", [0, 1, 4, 11, 12])
def test_a_block_scores_as_its_best_cell_or_the_one_before(key, ratio, cells):
    scores = jax.random.normal(key, (1, 2, 2, cells))
    got = np.asarray(score(scores, 3, ratio))
    for t, head in np.ndindex(2, 2):
        want = oracles.pool_scores(np.asarray(scores)[0, t, head], 3, ratio)
        want = np.where(np.isneginf(want), LOWEST, want).astype(np.float32)
        np.testing.assert_array_equal(got[0, t, head], want)


@pytest.mark.parametrize(
    ("block", "cells"), [(0, range(0, 4)), (1, range(3, 8)), (10, range(39, 44))]
)
def test_the_cells_of_a_block_are_the_published_ones(block, cells):
    """Raise one cell at a time: only the blocks that read it change."""
    scores = jnp.eye(48)[None, :, None, :]
    got = score(scores, 12, 4)[0, :, 0, block]
    assert np.flatnonzero(np.asarray(got) == 1.0).tolist() == list(cells)


def test_token_scores_are_pooled_with_the_token_before_the_block():
    got = score(jnp.eye(256)[None, :, None, :], 4, 64)[0, :, 0, 3]
    assert np.flatnonzero(np.asarray(got) == 1.0).tolist() == list(range(191, 256))
