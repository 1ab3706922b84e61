# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The forecast's scores against loops, its projections, and its start rule in parity mode."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.config import SparseConfig
from sparda_jax.pooling import LOWEST, PooledSummary
from sparda_jax.rope import make_rope
from sparda_jax.selection import select_blocks
from sparda_jax.selectors import ForecastSelector
from sparda_jax.testing import assert_close_float32, tiny_config, tiny_model
from tests import oracles

COUNT, BLOCKS, TOKENS = 11, 6, 24


def rule(ratio):
    stride = 4 // ratio
    return SparseConfig(
        block_size=4, pool_size=4, pool_stride=stride, local_blocks=1, selected_blocks=4
    )


def draw(seed):
    keys = jax.random.split(jax.random.key(seed))
    pooled = jax.random.normal(keys[1], (1, COUNT, 2, 8))
    return jax.random.normal(keys[0], (1, 5, 2, 8)), PooledSummary(
        pooled=pooled, tail=jnp.zeros((1, 4, 2, 8))
    )


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    st.sampled_from([1, 2, 4]),
    st.lists(st.integers(0, TOKENS - 1), min_size=5, max_size=5),
    st.integers(0, 99),
)
def test_block_scores_are_raw_products_with_the_visible_pooled_keys(ratio, positions, seed):
    sparse = rule(ratio)
    forecast, summary = draw(seed)
    selector = ForecastSelector(tiny_config(sparse=sparse))
    at = jnp.array([positions])
    got = selector.score_blocks(forecast, summary, at, jnp.array([TOKENS]), BLOCKS)
    for t, position in enumerate(positions):
        cells = oracles.score_by_forecast(
            np.asarray(forecast)[0, t], np.asarray(summary.pooled)[0], position, sparse
        )
        for head in range(2):
            want = oracles.pool_scores(cells[head], BLOCKS, ratio)
            scored = np.isfinite(want)
            np.testing.assert_array_equal(got[0, t, head] > LOWEST, scored)
            np.testing.assert_allclose(got[0, t, head][scored], want[scored], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [2.0**-20, 0.25, 1024.0])
def test_a_forecast_of_any_length_chooses_the_same_blocks(scale):
    sparse = rule(2)
    forecast, summary = draw(7)
    selector = ForecastSelector(tiny_config(sparse=sparse))
    at, lengths = jnp.array([[3, 11, 15, 19, 23]]), jnp.array([TOKENS])
    ids = [
        select_blocks(selector.score_blocks(probe, summary, at, lengths, BLOCKS), at, sparse).ids
        for probe in (forecast, forecast * scale)
    ]
    np.testing.assert_array_equal(ids[1], ids[0])


@pytest.mark.parametrize(("layer", "target"), [(0, 0), (0, 1), (1, 2)])
def test_a_probe_is_a_rotated_projection_of_the_normalised_input(key, layer, target):
    model = tiny_model()
    model.layers[layer].input_norm.scale[...] = jnp.linspace(0.5, 2.0, 32)
    x = jax.random.normal(key, (1, 5, 32)) * 3
    at = jnp.array([[4, 5, 6, 7, 8]])
    rope = make_rope(model.config.rope, 8, at, jnp.array([9]))
    selector = ForecastSelector(model.config)
    got = selector.probe(model, layer, target, x, jnp.zeros((1, 5, 4, 8)), rope)
    attention = model.layers[layer].attention
    weight = attention.entry_forecast_proj if target == 0 else attention.forecast_proj
    a = oracles.rms_norm(np.asarray(x, np.float64)[0], np.linspace(0.5, 2.0, 32), 1e-6)
    want = np.tensordot(a, np.asarray(weight[...], np.float64), axes=1)
    assert_close_float32(got[0], oracles.rotate(want, range(4, 9), 10000.0))


def test_layer_zero_asks_itself_and_every_other_the_one_before():
    selector = ForecastSelector(tiny_config())
    assert [selector.source(layer).probe_layer for layer in range(4)] == [0, 0, 1, 2]


def test_parity_shows_a_window_in_prefill_as_soon_as_it_starts():
    config = tiny_config(sparse=SparseConfig())
    summary = PooledSummary(pooled=jnp.ones((1, 8, 2, 8)), tail=jnp.zeros((1, 32, 2, 8)))
    parity, correct = ForecastSelector(config, parity="reference"), ForecastSelector(config)
    at, lengths = jnp.array([[47, 48, 64, 100]]), jnp.array([160])

    def scored(selector, part):
        probe = jnp.ones((1, part.stop - part.start, 2, 8))
        scores = selector.score_blocks(probe, summary, at[:, part], lengths, 3)
        return (np.asarray(scores)[0, :, 0] > LOWEST).tolist()

    # At token 48 cell 3, which touches block 1, has started; it ends at token 79.
    everything = slice(0, 4)
    assert scored(parity, everything) == [
        [True, False, False],
        [True, True, False],
        [True, True, False],
        [True, True, False],
    ]
    assert scored(correct, everything) == [
        [True, False, False],
        [True, False, False],
        [True, False, False],
        [True, True, False],
    ]
    assert scored(parity, slice(1, 2)) == [[True, False, False]], "decode has no such rule"


def test_parity_never_shows_a_window_that_the_sequence_does_not_hold():
    config = tiny_config(sparse=SparseConfig())
    summary = PooledSummary(pooled=jnp.ones((1, 8, 2, 8)), tail=jnp.zeros((1, 32, 2, 8)))
    parity = ForecastSelector(config, parity="reference")
    scores = parity.score_blocks(
        jnp.ones((1, 2, 2, 8)), summary, jnp.array([[40, 60]]), jnp.array([79]), 2
    )
    assert (np.asarray(scores)[0, 1, 0] > LOWEST).tolist() == [True, False]
