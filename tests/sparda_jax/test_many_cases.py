# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Thousands of random rows against loops: choices under twelve rules, attention over them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.attention import attend_chosen, attend_masked
from sparda_jax.config import SparseConfig
from sparda_jax.selection import block_mask, select_blocks
from tests import oracles

W, BLOCKS, QUERIES, HEADS = 4, 12, 128, 2
RULES = [
    SparseConfig(
        block_size=W,
        pool_size=4,
        pool_stride=2,
        sink_blocks=sink,
        local_blocks=local,
        selected_blocks=sink + local + 1 + free,
        dense_below=0,
    )
    for sink, local, free in itertools.product((0, 1, 2), (0, 1), (0, 3))
]


def rows_of(sparse, seed):
    """Random positions and scores of few levels, so that ties are common, and the choice."""
    rng = np.random.default_rng(seed)
    positions = rng.integers(0, BLOCKS * W, QUERIES).astype(np.int32)
    scores = rng.integers(-3, 4, (QUERIES, HEADS, BLOCKS)).astype(np.float32)
    choice = jax.jit(select_blocks, static_argnames="sparse")(
        jnp.asarray(scores)[None], jnp.asarray(positions)[None], sparse=sparse
    )
    return rng, positions, scores, np.asarray(choice.ids)[0]


@pytest.mark.parametrize("seed", range(len(RULES)))
def test_choices_are_those_of_loops(seed):
    _, positions, scores, ids = rows_of(RULES[seed], seed)
    for t, head in np.ndindex(QUERIES, HEADS):
        want = oracles.choose(scores[t, head], int(positions[t]), RULES[seed])
        assert ids[t, head].tolist() == oracles.padded(want, ids.shape[-1]), (t, head)


@pytest.mark.parametrize("seed", range(0, len(RULES), 2))
@pytest.mark.parametrize("group", [1, 4])
def test_attention_over_choices_is_that_of_loops(seed, group):
    rng, positions, _, ids = rows_of(RULES[seed], seed)
    shape = (BLOCKS * W, HEADS, 8)
    q = rng.standard_normal((QUERIES, HEADS * group, 8)).astype(np.float32)
    k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    bias = rng.standard_normal(shape[:2]).astype(np.float32)
    want = oracles.attend(q, k, v, ids, positions, W, bias)
    arrays = [jnp.asarray(a)[None] for a in (q, k, v, ids, positions, bias)]
    got = jax.jit(attend_chosen, static_argnames=("block_size", "tile_q"))(
        *arrays, block_size=W, tile_q=48
    )
    np.testing.assert_allclose(np.asarray(got)[0], want, rtol=2e-5, atol=2e-5)


def test_masked_attention_of_whole_sequences_is_that_of_loops():
    rng = np.random.default_rng(7)
    length = BLOCKS * W
    positions = np.arange(length, dtype=np.int32)
    scores = rng.standard_normal((1, length, HEADS, BLOCKS)).astype(np.float32)
    ids = select_blocks(jnp.asarray(scores), jnp.asarray(positions)[None], RULES[5]).ids
    q = rng.standard_normal((length, HEADS * 4, 8)).astype(np.float32)
    k, v = (rng.standard_normal((length, HEADS, 8)).astype(np.float32) for _ in range(2))
    want = oracles.attend(q, k, v, np.asarray(ids)[0], positions, W)
    got = attend_masked(
        *(jnp.asarray(a)[None] for a in (q, k, v)),
        block_mask(ids, BLOCKS),
        jnp.asarray(positions)[None],
        block_size=W,
    )
    np.testing.assert_allclose(np.asarray(got)[0], want, rtol=2e-5, atol=2e-5)
