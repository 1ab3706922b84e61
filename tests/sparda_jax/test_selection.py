# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The choice of blocks against loops, and what holds for every choice."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.config import SparseConfig
from sparda_jax.selection import block_mask, choice_width, pinned_blocks, select_blocks
from sparda_jax.shapes import NO_BLOCK
from tests import oracles

QUERIES, HEADS, BLOCKS = 6, 2, 12
W = 4


def rule(sink=1, local=1, free=2, **changes):
    """Make a rule with blocks of 4 tokens and `free` blocks beyond the pinned ones."""
    fields = {"block_size": W, "pool_size": 2, "pool_stride": 1, "dense_below": 0}
    return SparseConfig(
        **(fields | changes),
        sink_blocks=sink,
        local_blocks=local,
        selected_blocks=sink + local + 1 + free,
    )


def budget(sink, local, selected):
    return rule(sink, local, selected - sink - local - 1)


# Three budgets only, because each makes arrays of another width, and these are compiled for.
rules = st.builds(budget, st.integers(0, 2), st.integers(0, 3), st.sampled_from([6, 8, 13]))
positions = st.lists(st.integers(0, BLOCKS * W - 1), min_size=QUERIES, max_size=QUERIES).map(
    lambda at: np.array(at, np.int32)[None]
)
# Few levels, so that ties are common.
scores = st.lists(
    st.integers(-2, 2), min_size=QUERIES * HEADS * BLOCKS, max_size=QUERIES * HEADS * BLOCKS
).map(lambda x: np.array(x, np.float32).reshape(1, QUERIES, HEADS, BLOCKS))
many = hypothesis.settings(max_examples=40)


jitted = jax.jit(select_blocks, static_argnames=("sparse", "width", "parity"))


def ids_of(scores, positions, sparse, select=select_blocks, **options):
    return np.asarray(select(jnp.asarray(scores), jnp.asarray(positions), sparse, **options).ids)


@many
@hypothesis.given(scores, positions, rules)
def test_the_choice_is_the_one_made_by_loops_with_ties_to_the_lower_id(scores, positions, sparse):
    got = ids_of(scores, positions, sparse)
    width = min(sparse.selected_blocks, BLOCKS)
    assert got.shape == (1, QUERIES, HEADS, width)
    for t, head in np.ndindex(QUERIES, HEADS):
        want = oracles.choose(scores[0, t, head], int(positions[0, t]), sparse)
        assert got[0, t, head].tolist() == oracles.padded(want, width)


@many
@hypothesis.given(scores, positions, rules)
def test_a_choice_is_causal_unique_ascending_and_holds_the_pinned_blocks(scores, positions, sparse):
    choice = select_blocks(jnp.asarray(scores), jnp.asarray(positions), sparse)
    pinned = np.asarray(pinned_blocks(jnp.asarray(positions), BLOCKS, sparse))
    for t, head in np.ndindex(QUERIES, HEADS):
        row = np.asarray(choice.ids)[0, t, head]
        real = row[row != NO_BLOCK]
        own = positions[0, t] // W
        assert len(real) == choice.count[0, t, head] == min(own + 1, len(row))
        assert (np.diff(real) > 0).all()
        assert (row[len(real) :] == NO_BLOCK).all()
        assert real.max() <= own
        assert set(np.flatnonzero(pinned[0, t])) <= set(real)
        wanted = oracles.pinned(int(positions[0, t]), BLOCKS, sparse)
        assert np.flatnonzero(pinned[0, t]).tolist() == wanted


@many
@hypothesis.given(scores, positions, st.integers(0, 2), st.integers(0, 3), st.just(6))
def test_a_larger_budget_keeps_every_block_and_never_lowers_the_mass(
    scores, positions, sink, local, selected
):
    few = ids_of(scores, positions, budget(sink, local, selected))
    more = ids_of(scores, positions, budget(sink, local, selected + 2))
    for t, head in np.ndindex(QUERIES, HEADS):
        a, b = (set(ids[0, t, head]) - {NO_BLOCK} for ids in (few, more))
        assert a <= b
        mass = np.exp(scores[0, t, head])
        assert mass[list(b)].sum() >= mass[list(a)].sum()


@many
@hypothesis.given(scores, positions, rules)
def test_only_the_order_of_scores_matters(scores, positions, sparse):
    want = ids_of(scores, positions, sparse)
    np.testing.assert_array_equal(ids_of(scores * 8.0, positions, sparse), want)
    np.testing.assert_array_equal(ids_of(scores**3 + 5.0, positions, sparse), want)


@many
@hypothesis.given(scores, positions, rules)
def test_scores_of_future_blocks_change_nothing(scores, positions, sparse):
    want = ids_of(scores, positions, sparse)
    future = np.arange(BLOCKS) > (positions // W)[:, :, None, None]
    for value in (1e30, -1e30):
        np.testing.assert_array_equal(
            ids_of(np.where(future, np.float32(value), scores), positions, sparse), want
        )


def test_permuting_the_batch_permutes_the_choice(key):
    scores = jax.random.normal(key, (3, QUERIES, HEADS, BLOCKS))
    positions = jnp.arange(3 * QUERIES).reshape(3, QUERIES) * 2
    order = jnp.array([2, 0, 1])
    want = ids_of(scores, positions, rule(), jitted)[order]
    np.testing.assert_array_equal(ids_of(scores[order], positions[order], rule(), jitted), want)


@pytest.mark.parametrize(("local", "count", "first"), [(32, 34, 68), (16, 18, 84)])
def test_the_pinned_blocks_of_a_late_query_are_the_published_ones(local, count, first):
    sparse = SparseConfig(local_blocks=local)
    pinned = np.flatnonzero(pinned_blocks(jnp.array([[6400]]), 128, sparse)[0, 0])
    assert pinned.tolist() == [0, *range(first, 101)]
    assert len(pinned) == count


@pytest.mark.parametrize("position", [0, 63, 64, 4000, 6143])
def test_an_early_query_chooses_every_block_up_to_its_own(key, position):
    scores = jax.random.normal(key, (1, 1, 2, 200))
    ids = ids_of(scores, jnp.array([[position]]), SparseConfig(), jitted)
    own = position // 64
    np.testing.assert_array_equal(ids[0, 0, 0], oracles.padded(range(own + 1), 96))
    np.testing.assert_array_equal(ids[0, 0, 1], ids[0, 0, 0])


def test_a_future_block_is_never_chosen_even_if_all_past_scores_are_minus_infinity():
    scores = jnp.full((1, 1, 1, 6), -jnp.inf).at[..., 4:].set(9.0)
    ids = ids_of(scores, jnp.array([[3 * W]]), rule(1, 0, 4), jitted)
    assert ids.ravel().tolist() == [0, 3, -1, -1, -1, -1]


def test_padding_chooses_nothing(key):
    scores = jax.random.normal(key, (1, 2, 2, 6))
    choice = jitted(scores, jnp.array([[-1, 9]]), rule())
    assert (choice.ids[0, 0] == NO_BLOCK).all()
    assert choice.count[0].tolist() == [[0, 0], [3, 3]]


def test_parity_lets_a_future_block_take_a_place_that_stays_empty():
    scores = jnp.array([0.0, 3.0, 1.0, 0.0, 0.0, 5.0]).reshape(1, 1, 1, 6)
    at, sparse = jnp.array([[4 * W]]), rule(1, 1, 2)
    assert ids_of(scores, at, sparse, jitted).ravel().tolist() == [0, 1, 2, 3, 4]
    got = ids_of(scores, at, sparse, jitted, parity="reference")
    assert got.ravel().tolist() == [0, 1, 3, 4, -1]


def test_a_sequence_that_attends_to_all_is_wider_than_the_budget(key):
    scores = jax.random.normal(key, (2, 1, 1, 8))
    at = jnp.full((2, 1), 7 * W)
    got = jitted(scores, at, rule(1, 1, 0), attend_all=jnp.array([True, False]), width=8)
    assert got.ids[0].ravel().tolist() == list(range(8))
    assert got.ids[1].ravel().tolist() == [0, 6, 7, -1, -1, -1, -1, -1]
    assert got.count.ravel().tolist() == [8, 3]


@pytest.mark.parametrize(
    ("dense_below", "blocks", "shortest", "width"),
    [
        (8192, 2048, None, 96),
        (8192, 2048, 100, 128),
        (8192, 2048, 8192, 96),
        (8193, 2048, 8192, 128),
        (6144, 2048, 1, 96),
        (8192, 20, 1, 20),
        (0, 2048, 1, 96),
    ],
)
def test_a_choice_is_wide_enough_for_dense_sequences(dense_below, blocks, shortest, width):
    sparse = SparseConfig(dense_below=dense_below)
    assert choice_width(sparse, blocks, shortest=shortest) == width


def test_a_mask_marks_the_chosen_blocks():
    ids = jnp.array([[[[0, 2, -1], [-1, -1, -1]]]])
    assert block_mask(ids, 4)[0, 0].tolist() == [[True, False, True, False], [False] * 4]


@pytest.mark.usefixtures("no_shape_hook")
def test_queries_and_scores_must_agree():
    message = "query_positions.shape=(1, 3) must equal [B T] of scores.shape=(1, 2, 1, 4)"
    with pytest.raises(ValueError, match=re.escape(message)):
        select_blocks(jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 3), jnp.int32), rule())
