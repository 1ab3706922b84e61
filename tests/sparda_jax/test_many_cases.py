# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Thousands of drawn cases against loops: choices, the ranks behind them, attention over them.

Hypothesis draws the structure of a case (rule, ties, where the queries stand, what is missing) and
a seed for its arrays. Shapes are few, so that each program is compiled once.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.attention import attend_chosen, attend_masked
from sparda_jax.config import SparseConfig
from sparda_jax.pooling import LOWEST
from sparda_jax.selection import block_mask, select_blocks
from sparda_jax.selectors import get
from sparda_jax.testing import assert_close_float32, tiny_config
from tests import oracles

ROWS, QUERIES, HEADS, W = 2, 5, 2, 4
DIM = 8


def rule(sink, local, free, pooling=(4, 2), query=None):
    """Make a rule with blocks of 4 tokens and `free` blocks beyond the pinned ones."""
    return SparseConfig(
        block_size=W,
        pool_size=pooling[0],
        pool_stride=pooling[1],
        sink_blocks=sink,
        local_blocks=local,
        selected_blocks=sink + local + 1 + free,
        query_blocks=query,
        dense_below=0,
    )


seeds = st.integers(0, 2**32 - 1)
places = st.sampled_from(["anywhere", "early", "edges of blocks", "late"])
# How many different numbers an array holds: with one everything ties, with 0 nothing does.
levels = st.sampled_from([0, 1, 2, 3, 7])


def numbers(rng, shape, count):
    """Draw f32 numbers of `count` levels around 0, or normal ones where it is 0."""
    if count == 0:
        return rng.standard_normal(shape, np.float32)
    return rng.integers(-(count // 2), count - count // 2, shape).astype(np.float32)


def positions_of(rng, place, lengths, queries):
    """Draw where the queries of each row stand, −1 for some: [B T]."""
    ends = np.asarray(lengths)[:, None]
    shape = (len(lengths), queries)
    if place == "early":
        at = rng.integers(0, 2 * W, shape)
    elif place == "late":
        at = ends - 1 - rng.integers(0, 2 * W, shape)
    else:
        at = rng.integers(0, ends, shape)
    if place == "edges of blocks":
        at = at // W * W - rng.integers(0, 2, shape)
    at = np.clip(at, 0, ends - 1)
    return np.where(rng.random(shape) < 0.1, -1, at).astype(np.int32)


def choice_by_loops(scores, position, sparse, attends_all, leaks):
    """Choose the blocks of one query; in the original a future block may win a place in vain."""
    if position < 0:
        return []
    own = position // W
    if attends_all:
        return list(range(own + 1))
    if not leaks:
        return oracles.choose(scores, position, sparse)
    pinned = oracles.pinned(position, len(scores), sparse)
    rest = [m for m in range(len(scores)) if m not in pinned]
    places_left = min(sparse.selected_blocks, len(scores)) - len(pinned)
    best = oracles.best(scores, rest, places_left)
    return sorted(pinned + [m for m in best if m <= own])


BLOCKS = 12
CHOICES = [
    rule(sink, local, free)
    for sink, local, free in [
        (0, 0, 0),
        (0, 1, 3),
        (1, 0, 1),
        (1, 1, 0),
        (1, 2, 2),
        (2, 0, 5),
        (2, 3, 3),
        (1, 1, 11),
    ]
]
select = jax.jit(select_blocks, static_argnames=("sparse", "width", "parity"))


@hypothesis.settings(max_examples=1200)
@hypothesis.given(
    seeds,
    st.sampled_from(CHOICES),
    levels,
    places,
    st.none() | st.tuples(*[st.booleans()] * ROWS),
    st.sampled_from([None, "reference"]),
)
def test_choices_are_those_of_loops(seed, sparse, count, place, attends_all, parity):
    rng = np.random.default_rng(seed)
    scores = numbers(rng, (ROWS, QUERIES, HEADS, BLOCKS), count)
    at = positions_of(rng, place, [BLOCKS * W] * ROWS, QUERIES)
    options = {"sparse": sparse, "parity": parity}
    if attends_all is not None:
        options |= {"attend_all": np.array(attends_all), "width": BLOCKS}
    choice = jax.tree.map(np.asarray, select(scores, at, **options))
    assert choice.ids.shape[-1] == min(
        sparse.selected_blocks if attends_all is None else 99, BLOCKS
    )
    for row, t, head in np.ndindex(ROWS, QUERIES, HEADS):
        want = choice_by_loops(
            scores[row, t, head],
            int(at[row, t]),
            sparse,
            attends_all is not None and attends_all[row],
            parity is not None,
        )
        got = choice.ids[row, t, head].tolist()
        assert got == oracles.padded(want, len(got)), (row, t, head)
        assert choice.count[row, t, head] == len(want)


GROUP, PLACES = 2, 8
TOKENS = PLACES * W
RANKS = [
    rule(1, 1, 2),
    rule(0, 0, 3, (4, 4)),
    rule(2, 1, 1, (2, 1)),
    rule(0, 2, 2, (8, 4)),
]
SHARES = [
    rule(1, 1, 3, (4, 2), query=2),
    rule(0, 0, 3, (4, 4), query=1),
    rule(2, 1, 2, (2, 1), query=3),
    rule(0, 2, 4, (8, 4), query=3),
]


@functools.partial(jax.jit, static_argnames=("name", "sparse"))
def rank_and_choose(name, sparse, probe, k, importance, lengths, at):
    """Summarise the keys of ragged rows, rank their blocks by a probe, choose: scores and ids."""
    config = tiny_config(sparse=sparse, token_importance=name == "nosa")
    inner = {"inner": get("forecast", config)} if name == "nosa" else {}
    selector = get(name, config, **inner)
    token = jnp.arange(TOKENS)[None, :]
    token = jnp.where(token < lengths[:, None], token, -1)
    summary = selector.init_summary(ROWS, TOKENS, "float32")
    summary = selector.extend_summary(summary, k, token, importance)
    scores = selector.score_blocks(probe, summary, at, lengths, PLACES)
    return scores, select_blocks(scores, at, sparse).ids


def ranks_by_loops(name, sparse, probe, k, importance, position):
    """Rank the blocks of one query by its own row: scores [K][M], and the choices [K]."""
    pooled = oracles.pool_keys(k, sparse.pool_size, sparse.pool_stride)
    score = oracles.score_by_queries if name == "query" else oracles.score_by_forecast
    cells = score(probe, pooled, position, sparse)
    ratio = sparse.cells_per_block
    scores = [oracles.pool_scores(cells[head], PLACES, ratio) for head in range(HEADS)]
    if name != "nosa":
        return scores, [oracles.choose(row, position, sparse) for row in scores]
    pooled = oracles.pool_keys(importance, sparse.pool_size, sparse.pool_stride)
    for c in range(len(pooled)):
        if not oracles.is_visible(c, position, sparse):
            pooled[c] = -np.inf
    worth = [oracles.pool_scores(pooled[:, head], PLACES, ratio) for head in range(HEADS)]
    return scores, [
        oracles.choose_nosa(row, other, position, sparse)
        for row, other in zip(scores, worth, strict=True)
    ]


@pytest.mark.parametrize("name", ["query", "forecast", "nosa"])
@hypothesis.settings(max_examples=500)
@hypothesis.given(
    seeds,
    st.integers(0, len(RANKS) - 1),
    st.sampled_from([2, 3, 7]),
    places,
    st.tuples(*[st.integers(1, TOKENS - 1)] * ROWS),
)
def test_blocks_of_ragged_rows_are_ranked_and_chosen_as_by_loops(
    name, seed, number, count, place, lengths
):
    """Whole numbers make products and means exact; an own query may stand one token ahead."""
    sparse = (SHARES if name == "nosa" else RANKS)[number]
    rng = np.random.default_rng(seed)
    at = positions_of(rng, place, np.array(lengths) + (name == "query"), QUERIES)
    heads = HEADS * GROUP if name == "query" else HEADS
    # A softmax over normal numbers is the harder case, and has fewer ties.
    probe = numbers(rng, (ROWS, QUERIES, heads, DIM), 0 if name == "query" and seed % 2 else count)
    k = numbers(rng, (ROWS, TOKENS, HEADS, DIM), count)
    importance = numbers(rng, (ROWS, TOKENS, HEADS), count)
    given = (probe, k, importance, np.array(lengths, np.int32), at)
    scores, ids = (np.asarray(x) for x in rank_and_choose(name, sparse, *given))
    for row, t in zip(*np.nonzero(at >= 0), strict=True):
        length, position = lengths[row], int(at[row, t])
        parts = (probe[row, t], k[row, :length], importance[row, :length])
        wanted, choices = ranks_by_loops(name, sparse, *parts, position)
        for head, want in enumerate(choices):
            if name != "nosa":
                past = slice(0, position // W + 1)
                seen = np.isfinite(wanted[head][past])
                mine = scores[row, t, head, past]
                np.testing.assert_array_equal(mine > LOWEST, seen)
                np.testing.assert_allclose(mine[seen], wanted[head][past][seen], rtol=0, atol=5e-6)
            got = ids[row, t, head].tolist()
            assert got == oracles.padded(want, len(got)), (row, t, head)
    assert (ids[at < 0] == -1).all()


READ, LENGTH = 4, 7 * W - 1


def drawn_blocks(rng, shape, missing):
    """Draw distinct blocks in any order, past and future ones; some places, or rows, are empty."""
    blocks = -(-LENGTH // W)
    ids = np.argsort(rng.random((*shape, blocks)), axis=-1)[..., :READ].astype(np.int32)
    if missing == "places":
        ids = np.where(rng.random(ids.shape) < 0.4, -1, ids)
    if missing == "rows":
        ids = np.where(rng.random((*shape, 1)) < 0.3, -1, ids)
    return ids.astype(np.int32)


def drawn_heads(rng, queries, group, scale, count, has_bias):
    """Draw queries, keys, values and a bias of ragged rows."""
    q = numbers(rng, (ROWS, queries, HEADS * group, DIM), count) * np.float32(scale)
    k = numbers(rng, (ROWS, LENGTH, HEADS, DIM), count)
    v = numbers(rng, (ROWS, LENGTH, HEADS, DIM), 0)
    bias = numbers(rng, (ROWS, LENGTH, HEADS), count) if has_bias else None
    return q, k, v, bias


cases_of_attention = (
    seeds,
    st.sampled_from([1, 4]),
    st.sampled_from([0.0, 0.25, 1.0, 4.0]),
    levels,
    st.booleans(),
    st.sampled_from(["nothing", "places", "rows"]),
)
gather = jax.jit(attend_chosen, static_argnames=("block_size", "tile_q"))
mask = jax.jit(attend_masked, static_argnames=("block_size", "tile_q"))


def hold_to_loops(got, q, k, v, ids, at, bias):
    """Hold attention to the loops, row by row."""
    for row in range(ROWS):
        own = None if bias is None else bias[row]
        want = oracles.attend(q[row], k[row], v[row], ids[row], at[row], W, own)
        assert_close_float32(np.asarray(got)[row], want)


@hypothesis.settings(max_examples=1200)
@hypothesis.given(*cases_of_attention, places)
def test_gathered_attention_is_that_of_loops(seed, group, scale, count, has_bias, missing, place):
    rng = np.random.default_rng(seed)
    q, k, v, bias = drawn_heads(rng, QUERIES, group, scale, count, has_bias)
    at = positions_of(rng, place, [LENGTH] * ROWS, QUERIES)
    ids = drawn_blocks(rng, (ROWS, QUERIES, HEADS), missing)
    got = gather(q, k, v, ids, at, bias, block_size=W, tile_q=3)
    hold_to_loops(got, q, k, v, ids, at, bias)


@hypothesis.settings(max_examples=1000)
@hypothesis.given(*cases_of_attention, st.tuples(*[st.integers(0, LENGTH)] * ROWS))
def test_masked_attention_of_ragged_rows_is_that_of_loops(
    seed, group, scale, count, has_bias, missing, lengths
):
    rng = np.random.default_rng(seed)
    q, k, v, bias = drawn_heads(rng, LENGTH, group, scale, count, has_bias)
    at = np.arange(LENGTH, dtype=np.int32)[None]
    at = np.where(at < np.array(lengths)[:, None], at, -1).astype(np.int32)
    ids = drawn_blocks(rng, (ROWS, LENGTH, HEADS), missing)
    marked = block_mask(jnp.asarray(ids), -(-LENGTH // W))
    got = mask(q, k, v, marked, at, bias, block_size=W, tile_q=16)
    hold_to_loops(got, q, k, v, ids, at, bias)
