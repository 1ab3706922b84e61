# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Recall of selectors on one run's states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.evaluation.recall import add_totals, recall_totals
from sparda_jax.selectors import QuerySelector, names
from sparda_jax.testing import tiny_config, tiny_model
from sparda_jax.training.layer import LayerPlan
from sparda_jax.training.state import heads_from
from sparda_jax.training.step import divide_totals, walk_layers

MODEL = tiny_model()
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 96)).astype(np.int32))
LENGTHS = jnp.array([96, 71])
SELECTORS = ("forecast", "previous_query", "query", "random")


@functools.cache
def compiled(selectors, mode):
    def run(model, tokens, lengths):
        return recall_totals(model, tokens, lengths=lengths, selectors=selectors, mode=mode)

    return jax.jit(run)


def measure(model=MODEL, tokens=TOKENS, lengths=LENGTHS, selectors=SELECTORS, mode="sparse"):
    return compiled(selectors, mode)(model, tokens, lengths)


@pytest.fixture(scope="module")
def found():
    """Measure once; not while tests are collected."""
    return measure()


@pytest.mark.parametrize("name", SELECTORS)
def test_recall_and_overlap_lie_between_zero_and_one(name, found):
    for values in (found[name].recall(), found[name].overlap()):
        assert values.shape == (3, 2)
        assert ((values > 0) & (values <= 1)).all()
    assert found[name].mean_recall() == pytest.approx(found[name].recall_of_layers().mean())


def test_the_own_query_overlaps_itself_and_finds_more_than_chance(found):
    np.testing.assert_allclose(found["query"].overlap(), 1.0)
    assert found["query"].mean_recall() > found["random"].mean_recall() + 0.1
    for name in SELECTORS[1:]:
        np.testing.assert_allclose(found[name].best, found["query"].best, rtol=1e-6)


def test_all_selectors_agree_in_layer_zero_where_they_ask_the_same(found):
    """The previous layer of layer 0 is layer 0, so its guess is the query itself."""
    np.testing.assert_array_equal(found["previous_query"].held[0], found["query"].held[0])


def test_queries_with_a_choice_are_counted(found):
    # Five blocks of eight tokens are the budget, so positions from 40 on count.
    assert float(found["query"].rows) == (96 - 40) + (71 - 40)


def test_totals_of_rows_add_up_to_those_of_the_batch(found):
    rows = [measure(lengths=jnp.array(lengths)) for lengths in ([96, 0], [0, 71])]
    for name in SELECTORS:
        both = add_totals(rows[0][name], rows[1][name])
        for mine, theirs in zip(jax.tree.leaves(both), jax.tree.leaves(found[name]), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_the_forecast_has_the_recall_that_training_reports_on_the_same_states():
    found = measure(mode="sparda", selectors=("forecast",))["forecast"]
    plan = LayerPlan(config=MODEL.config, routing="forecast", has_gradient=False)
    sums = jax.jit(lambda m: walk_layers(plan, m, heads_from(m), TOKENS, LENGTHS))(MODEL)
    _, metrics = divide_totals(*sums)
    np.testing.assert_allclose(found.recall_of_layers(), metrics.recall, rtol=1e-5)
    overlap = np.asarray(found.both).sum(1) / np.asarray(found.either).sum(1)
    np.testing.assert_allclose(overlap, metrics.overlap, rtol=1e-5)


def test_a_budget_of_all_blocks_leaves_nothing_to_measure():
    short = measure(tokens=TOKENS[:, :40], lengths=jnp.array([40, 40]), selectors=("query",))
    assert np.isnan(short["query"].recall()).all()
    assert float(short["query"].rows) == 0


def test_a_model_with_token_importance_is_measured_by_its_two_step_rule():
    config = tiny_config()
    sparse = dataclasses.replace(config.sparse, query_blocks=2, selected_blocks=6)
    model = tiny_model(sparse=sparse, token_importance=True)
    found = measure(model, selectors=("forecast", "nosa"))
    np.testing.assert_allclose(found["nosa"].overlap(), 1.0)
    assert ((found["forecast"].recall() > 0) & (found["forecast"].recall() <= 1)).all()


def test_selectors_need_different_names(found):
    assert set(SELECTORS) <= set(names())
    twice = ("query", "query")
    with pytest.raises(ValueError, match="2 selectors need as many names"):
        recall_totals(MODEL, TOKENS, selectors=twice)
    by_class = measure(selectors=(QuerySelector(MODEL.config), "random"))
    np.testing.assert_array_equal(by_class["QuerySelector"].held, found["query"].held)
