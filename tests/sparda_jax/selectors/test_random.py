# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The lower bound: even, independent of everything but seed, layer, position, head and block."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.rope import make_rope
from sparda_jax.selectors import RandomSelector
from sparda_jax.testing import tiny_model

MODEL = tiny_model()
CONFIG = MODEL.config
POSITIONS, BLOCKS = 512, 16


def scores_of(seed=0, target=1, shift=0, blocks=BLOCKS):
    selector = RandomSelector(CONFIG, seed=seed)
    at = jnp.arange(shift, POSITIONS + shift)[None]
    rope = make_rope(CONFIG.rope, 8, at, jnp.array([POSITIONS + shift]))
    empty = jnp.zeros((1, POSITIONS, 32)), jnp.zeros((1, POSITIONS, 4, 8))
    probe = selector.probe(MODEL, target, target, *empty, rope)
    summary = selector.init_summary(1, 8, "float32")
    return np.asarray(selector.score_blocks(probe, summary, at, at[:, -1] + 1, blocks))[0]


def test_each_block_wins_equally_often():
    wins = np.bincount(scores_of().argmax(-1).ravel(), minlength=BLOCKS)
    expected = POSITIONS * 2 / BLOCKS
    # Twice the 99.9 % point of chi-squared with 15 degrees of freedom.
    assert ((wins - expected) ** 2 / expected).sum() < 2 * 37.7


@pytest.mark.parametrize("change", [{"seed": 1}, {"target": 2}, {"shift": 1}])
def test_another_seed_layer_or_position_ranks_otherwise(change):
    one, other = scores_of(), scores_of(**change)
    assert (one.argmax(-1) == other.argmax(-1)).mean() < 0.15
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.05


def test_heads_rank_independently():
    scores = scores_of()
    assert (scores[:, 0].argmax(-1) == scores[:, 1].argmax(-1)).mean() < 0.15


def test_a_position_ranks_its_blocks_alike_in_prefill_and_in_decode():
    np.testing.assert_array_equal(scores_of(shift=3)[:-3], scores_of()[3:])


def test_more_room_for_blocks_changes_no_score_of_a_block():
    np.testing.assert_array_equal(scores_of(blocks=40)[..., :BLOCKS], scores_of())
