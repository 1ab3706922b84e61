# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""A model cut into parts and put together again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparda_jax.parts import HEAD, commit, cut, pick, without_heads
from sparda_jax.testing import tiny_config, tiny_model
from tests.compiled import forward

TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)


def test_a_model_put_together_again_is_the_same():
    model = tiny_model()
    layout, parts = cut(model)
    merged = layout.merge(parts)
    np.testing.assert_array_equal(forward(merged, TOKENS), forward(model, TOKENS))


def test_models_of_one_configuration_share_a_layout():
    first, second = cut(tiny_model(0))[0], cut(tiny_model(1))[0]
    assert first is second  # what looks a program up compares no further
    assert first != cut(tiny_model(0, layers=2))[0]


def test_a_layout_is_hashed_once_however_often_a_program_is_looked_up(monkeypatch):
    layout, _ = cut(tiny_model())
    expected = hash(layout)
    monkeypatch.setattr(type(layout.graph), "__hash__", lambda graph: pytest.fail("hashed again"))
    assert hash(layout) == expected


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


def test_without_their_heads_all_layers_are_of_one_structure():
    model = tiny_model()
    graphs = [nnx.split(without_heads(layer))[0] for layer in model.layers]
    assert graphs[0] == graphs[1] == graphs[2]
    assert model.layers[0].attention.forecast_proj is not None  # the model keeps them
    layer = without_heads(model.layers[0])
    assert layer.attention.o_proj[...] is model.layers[0].attention.o_proj[...]


def test_free_arrays_are_committed_where_others_are():
    free = {"a": jnp.ones(3)}
    assert commit(free, free) is free
    assert jax.eval_shape(lambda: commit({"a": jnp.ones(3)}, jnp.ones(2)))["a"].shape == (3,)
    pinned = jax.device_put(jnp.ones(2), jax.devices()[0])
    together = commit(free, pinned)
    assert not free["a"].committed
    assert together["a"].committed
    assert together["a"].sharding == pinned.sharding
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    spread = commit(free, jax.device_put(jnp.ones(2), rows))
    assert spread["a"].sharding == jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
