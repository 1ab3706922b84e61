# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The own-query rule against loops, and the windows that a query sees."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.config import SparseConfig
from sparda_jax.pooling import LOWEST, PooledSummary
from sparda_jax.selectors import QuerySelector
from sparda_jax.selectors.query import score_by_queries, visible_cells
from sparda_jax.testing import tiny_config
from tests import oracles

COUNT, BLOCKS, TOKENS = 11, 6, 24


def rule(ratio):
    """Make a rule with 4-token blocks and `ratio` windows starting in each."""
    stride = 4 // ratio
    return SparseConfig(
        block_size=4, pool_size=4, pool_stride=stride, local_blocks=1, selected_blocks=4
    )


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    st.sampled_from([1, 2, 4]),
    st.lists(st.integers(0, TOKENS - 1), min_size=5, max_size=5),
    st.integers(0, 99),
)
def test_block_scores_are_the_summed_softmaxes_of_the_group(ratio, positions, seed):
    sparse = rule(ratio)
    q, pooled, _ = _draw(seed)
    selector = QuerySelector(tiny_config(sparse=sparse))
    summary = PooledSummary(pooled=pooled, tail=jnp.zeros((1, 4, 2, 8)))
    got = selector.score_blocks(q, summary, jnp.array([positions]), jnp.array([TOKENS]), BLOCKS)
    for t, position in enumerate(positions):
        cells = oracles.score_by_queries(
            np.asarray(q)[0, t], np.asarray(pooled)[0], position, sparse
        )
        for head in range(2):
            want = oracles.pool_scores(cells[head], BLOCKS, ratio)
            scored = np.isfinite(want)
            np.testing.assert_array_equal(got[0, t, head] > LOWEST, scored)
            np.testing.assert_allclose(got[0, t, head][scored], want[scored], rtol=0, atol=2e-6)


def _draw(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(1, 5, 4, 8), (1, COUNT, 2, 8), (1, 5, 2, 8)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def test_rows_sum_to_the_group_or_to_nothing(key):
    q = jax.random.normal(key, (1, 6, 32, 8)) * 10
    pooled = jax.random.normal(jax.random.fold_in(key, 1), (1, 5, 2, 8)) * 10
    visible = jnp.arange(5)[None, None, :] < jnp.arange(6)[None, :, None]
    mass = np.asarray(score_by_queries(q, pooled, visible))
    np.testing.assert_allclose(mass[0, 1:].sum(-1), 16.0, rtol=1e-6)
    assert not mass[0, 0].any()
    assert not mass[0].transpose(1, 0, 2)[:, ~np.asarray(visible)[0]].any()


def test_large_logits_do_not_overflow():
    q = jnp.full((1, 1, 2, 4), 1e4)
    pooled = jnp.full((1, 3, 1, 4), 1e4).at[:, 1].set(-1e4)
    mass = score_by_queries(q, pooled, jnp.ones((1, 1, 3), bool))
    np.testing.assert_array_equal(mass.ravel(), [1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("position", "count"), [(0, 0), (30, 0), (31, 1), (46, 1), (47, 2), (62, 2), (63, 3)]
)
def test_a_window_is_visible_once_its_last_token_is_past(position, count):
    seen = visible_cells(jnp.array([[position]]), 4, SparseConfig())[0, 0]
    assert seen.tolist() == [c < count for c in range(4)]


def test_parity_hides_the_newest_window_where_fifteen_tokens_are_left_over():
    config = tiny_config(sparse=SparseConfig())
    parity, correct = QuerySelector(config, parity="reference"), QuerySelector(config)
    lengths = np.arange(32, 140)
    positions = np.arange(139)[None, :]
    held = positions < lengths[:, None]
    args = jnp.asarray(np.where(held, positions, -1)), jnp.asarray(lengths), 7
    seen = [np.asarray(selector.visible(*args)).sum(-1) for selector in (correct, parity)]
    loses = held & (positions >= 31) & (lengths[:, None] % 16 == 15)
    np.testing.assert_array_equal((seen[0] - seen[1])[held], loses[held])


def test_parity_leaves_decode_alone():
    config = tiny_config(sparse=SparseConfig())
    at, lengths = jnp.array([[62]]), jnp.array([63])
    got = QuerySelector(config, parity="reference").visible(at, lengths, 2)
    assert got.ravel().tolist() == [True, True]
