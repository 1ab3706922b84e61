# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The training-free lookahead: another layer's queries, guessed from this layer's input."""

import jax
import jax.numpy as jnp
import numpy as np

from sparda_jax.rope import make_rope
from sparda_jax.selectors import PreviousQuerySelector, QuerySelector
from sparda_jax.testing import assert_close_float32, tiny_model


def probe_of(model, layer, target, x, q):
    rope = make_rope(model.config.rope, 8, jnp.arange(6)[None], jnp.array([6]))
    return PreviousQuerySelector(model.config).probe(model, layer, target, x, q, rope)


def test_layer_zero_uses_its_own_queries(key):
    q = jax.random.normal(key, (1, 6, 4, 8))
    np.testing.assert_array_equal(probe_of(tiny_model(), 0, 0, jnp.zeros((1, 6, 32)), q), q)


def test_a_probe_is_what_the_target_would_ask_if_its_input_were_this_one(key):
    model = tiny_model()
    model.layers[2].input_norm.scale[...] = jnp.linspace(0.5, 2.0, 32)
    x = jax.random.normal(key, (1, 6, 32))
    rope = make_rope(model.config.rope, 8, jnp.arange(6)[None], jnp.array([6]))
    target = model.layers[2]
    want, _, _ = target.attention.project(target.input_norm(x), rope)
    assert_close_float32(probe_of(model, 1, 2, x, jnp.zeros((1, 6, 4, 8))), want)


def test_it_looks_one_layer_ahead_and_scores_as_the_query_rule_does():
    selector = PreviousQuerySelector(tiny_model().config)
    assert [selector.source(layer).probe_layer for layer in range(4)] == [0, 0, 1, 2]
    assert PreviousQuerySelector.score_blocks is QuerySelector.score_blocks
