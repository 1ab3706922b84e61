# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""A model cut into parts and put together again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.model import forward
from sparda_jax.parts import HEAD, cut, pick
from sparda_jax.testing import tiny_config, tiny_model

TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)


def test_a_model_put_together_again_is_the_same():
    model = tiny_model()
    layout, parts = cut(model)
    merged = layout.merge(parts)
    np.testing.assert_array_equal(forward(merged, TOKENS), forward(model, TOKENS))


def test_models_of_one_configuration_share_a_layout_and_its_hash():
    first, second = cut(tiny_model(0))[0], cut(tiny_model(1))[0]
    assert first == second
    assert hash(first) == hash(second)
    assert first != cut(tiny_model(0, layers=2))[0]


def test_every_weight_has_one_part():
    model = tiny_model(tie_embeddings=True)
    _, parts = cut(model)
    assert len(parts[HEAD]) == 2  # embedding and final norm
    assert set(parts) == {HEAD, *range(model.config.layers)}
    assert len(parts[0]) == len(parts[1]) + 1  # the entry forecast
    assert len(parts[2]) == len(parts[1]) - 1  # the last layer forecasts nothing


def test_a_part_that_is_left_out_is_not_needed_for_the_others():
    model = tiny_model()
    layout, parts = cut(model)
    embed = jax.jit(lambda given: layout.merge(given).embed_tokens(TOKENS))
    np.testing.assert_array_equal(embed(pick(parts, [HEAD])), model.embed_tokens(TOKENS))


def test_a_part_that_is_left_out_cannot_be_read():
    layout, parts = cut(tiny_model())
    x = jnp.zeros((1, 1, tiny_config().width))
    with pytest.raises(TypeError):
        layout.merge(pick(parts, [0])).logits(x)
