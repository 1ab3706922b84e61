# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""NOSA's two steps against loops, and what it refuses."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.selection import select_blocks
from sparda_jax.selectors import ForecastSelector, NosaSelector, QuerySelector
from sparda_jax.testing import tiny_config
from sparda_jax.training.layer import GivenScores
from tests import oracles

QUERIES, BLOCKS, W = 4, 10, 4
TOKENS = BLOCKS * W


def rule(ratio, sink, local, query, rest):
    return SparseConfig(
        block_size=W,
        pool_size=4 // ratio,
        pool_stride=4 // ratio,
        sink_blocks=sink,
        local_blocks=local,
        query_blocks=query,
        selected_blocks=sink + local + query + rest,
    )


def numbers(count, low, high):
    return st.lists(st.integers(low, high), min_size=count, max_size=count)


# Windows as long as a block or shorter never reach past the local blocks.
RULES = [
    rule(1, 1, 1, 1, 3),
    rule(2, 1, 1, 3, 3),
    rule(2, 0, 2, 2, 3),
    rule(1, 2, 1, 2, 0),
    rule(1, 0, 1, 3, 6),
]


@functools.partial(jax.jit, static_argnames="sparse")
def choose(scores, importance, positions, sparse):
    config = tiny_config(sparse=sparse, token_importance=True)
    selector = NosaSelector(config, inner=GivenScores(config))
    summary = selector.extend_summary(
        selector.init_summary(1, TOKENS, "float32"),
        jnp.zeros((1, TOKENS, 2, 8)),
        jnp.arange(TOKENS)[None],
        importance,
    )
    ranked = selector.score_blocks(scores, summary, positions, jnp.array([TOKENS]), BLOCKS)
    return select_blocks(ranked, positions, sparse).ids


# Few levels, so that ties are common.
@hypothesis.settings(max_examples=40)
@hypothesis.given(
    st.sampled_from(RULES),
    numbers(QUERIES, 0, TOKENS - 1),
    numbers(QUERIES * 2 * BLOCKS, -2, 2),
    numbers(TOKENS * 2, -1, 1),
)
def test_the_choice_is_the_query_share_and_then_the_most_important(
    sparse, positions, scores, importance
):
    scores = np.array(scores, np.float32).reshape(1, QUERIES, 2, BLOCKS)
    importance = np.array(importance, np.float32).reshape(1, TOKENS, 2)
    got = np.asarray(choose(scores, importance, jnp.array([positions]), sparse))
    pooled = oracles.pool_keys(importance[0], sparse.pool_size, sparse.pool_stride)
    for t, head in np.ndindex(QUERIES, 2):
        rank = oracles.pool_scores(pooled[:, head], BLOCKS, sparse.cells_per_block)
        want = oracles.choose_nosa(scores[0, t, head], rank, positions[t], sparse)
        assert got[0, t, head].tolist() == oracles.padded(want, got.shape[-1])


def test_the_importance_of_tokens_after_the_query_changes_nothing():
    """Without local blocks a window of block own − 1 may reach past the query."""
    sparse = SparseConfig(
        block_size=W,
        pool_size=4,
        pool_stride=2,
        sink_blocks=0,
        local_blocks=0,
        query_blocks=1,
        selected_blocks=2,
    )
    importance = np.zeros((1, TOKENS, 2), np.float32)
    importance[0, :W] = 1.0
    scores, at = np.zeros((1, QUERIES, 2, BLOCKS), np.float32), jnp.array([[3, 12, 20, 37]])
    want = np.asarray(choose(scores, importance, at, sparse))
    assert want[0, 1:, 0].tolist() == [[0, 3], [0, 5], [0, 9]]
    for t, position in enumerate(np.asarray(at)[0]):
        later = importance.copy()
        later[0, position + 1 :] = 100.0
        got = np.asarray(choose(scores, later, at, sparse))
        np.testing.assert_array_equal(got[0, t], want[0, t])


def test_the_published_budget_leaves_twenty_three_blocks_to_the_query():
    config = ModelConfig.nosa_8b()
    sparse = config.sparse
    selector = NosaSelector(config, inner=GivenScores(config))
    blocks = 200
    # The query likes odd blocks, the later the better; importance likes early blocks.
    block = np.arange(blocks)
    liked = np.where(block % 2, 1.0 + block, 0.0).astype(np.float32)
    scores = jnp.broadcast_to(jnp.asarray(liked), (1, 1, 2, blocks))
    importance = np.repeat(np.linspace(1.0, 0.0, blocks * 64, dtype=np.float32)[:, None], 2, 1)
    summary = selector.extend_summary(
        selector.init_summary(1, blocks * 64, "float32"),
        jnp.zeros((1, blocks * 64, 2, 128)),
        jnp.arange(blocks * 64)[None],
        jnp.asarray(importance)[None],
    )
    at = jnp.array([[blocks * 64 - 1]])
    ranked = selector.score_blocks(scores, summary, at, at[:, 0] + 1, blocks)
    chosen = set(np.asarray(select_blocks(ranked, at, sparse).ids)[0, 0, 0].tolist())
    pinned = {0, *range(183, 200)}
    share = set(range(181, 181 - 2 * 23, -2))
    assert len(pinned) == 18
    assert pinned | share <= chosen
    rest = [m for m in range(blocks) if m not in pinned | share]
    assert chosen - pinned - share == set(rest[:55])


def test_importance_is_pooled_in_float32_whatever_the_keys_are():
    config = tiny_config(sparse=rule(1, 1, 1, 2, 1), token_importance=True, dtype="bfloat16")
    summary = NosaSelector(config).init_summary(1, 40, "bfloat16")
    assert summary.inner.pooled.dtype == jnp.bfloat16
    assert summary.importance.pooled.dtype == jnp.float32


def test_the_query_share_is_the_inner_selectors_business():
    config = tiny_config(sparse=rule(1, 1, 1, 2, 1), token_importance=True)
    assert NosaSelector(config).inner == QuerySelector(config)
    forecast = NosaSelector(config, inner=ForecastSelector(config))
    assert [forecast.source(layer).probe_layer for layer in (0, 1, 2)] == [0, 0, 1]


def test_a_model_without_importance_is_refused():
    message = (
        "selector 'nosa' needs a model with token importance, but "
        "self.config.token_importance=False; use 'query' or 'forecast'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        NosaSelector(tiny_config())


def test_new_tokens_without_importance_are_refused():
    config = tiny_config(sparse=rule(1, 1, 1, 2, 1), token_importance=True)
    selector = NosaSelector(config)
    message = "selector 'nosa' needs the importance of the new tokens, got None"
    with pytest.raises(ValueError, match=re.escape(message)):
        selector.extend_summary(
            selector.init_summary(1, 8, "float32"), jnp.zeros((1, 1, 2, 8)), jnp.array([[0]])
        )
