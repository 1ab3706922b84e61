# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file

from experiments import train_shipped_heads as shipped_heads
from experiments.backbone_data import BackboneBatches
from experiments.corpus import pack
from sparda_jax.shipped import FOLDER, HEADS, WEIGHTS, load_shipped, save_shipped
from sparda_jax.testing import tiny_model
from sparda_jax.training.state import heads_from


def test_the_guess_ranks_like_the_mean_query_of_the_next_layer(key):
    model = tiny_model()
    model.layers[1].input_norm.scale[...] = jnp.full((32,), 2.0)
    heads = shipped_heads.heads_from_queries(model)
    x = jax.random.normal(key, (1, 5, 32))
    a = [layer.input_norm(x) for layer in model.layers]
    queries = jnp.einsum("btd,dnh->btnh", a[1], model.layers[1].attention.q_proj[...])
    want = queries.reshape(1, 5, 2, 2, 8).mean(axis=3)
    got = jnp.einsum("btd,dkh->btkh", a[0], heads.forecast[0])
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    own = jnp.einsum("btd,dnh->btnh", a[0], model.layers[0].attention.q_proj[...])
    got = jnp.einsum("btd,dkh->btkh", a[0], heads.entry)
    np.testing.assert_allclose(got, own.reshape(1, 5, 2, 2, 8).mean(axis=3), rtol=2e-5, atol=2e-5)
    assert len(heads.forecast) == model.config.layers - 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("corpus"))


def test_micro_batches_are_the_batches_of_the_mixture_in_order(corpus):
    source = BackboneBatches(corpus, 3, 2, 256)
    batches = shipped_heads.MixtureBatches(source, micro_batches=2)
    batch = batches.batch_at(1, 1)
    np.testing.assert_array_equal(batch.tokens, source.batch_at(3).tokens)
    assert batch.lengths.tolist() == [256, 256]


@pytest.mark.slow
def test_training_changes_the_heads_on_the_disk_and_nothing_else(corpus, tmp_path):
    model = load_shipped()
    folder = tmp_path / "shipped"
    weights = load_file(FOLDER / WEIGHTS)
    save_shipped(folder, {name: np.asarray(array) for name, array in weights.items()}, model)
    before = (folder / WEIGHTS).read_bytes()
    result = shipped_heads.main(
        shipped_heads.Config(
            corpus=corpus,
            out=tmp_path / "run",
            shipped=folder,
            start="shipped",
            dtype="float32",
            seq_len=512,
            batch=1,
            steps=2,
            learning_rate=1e-2,
            evaluate_every=1,
        )
    )
    assert result["steps"] == 2
    assert (folder / WEIGHTS).read_bytes() == before
    old, new = heads_from(model), heads_from(load_shipped(folder=folder))
    assert (folder / HEADS).is_file()
    moved = [float(jnp.abs(a - b).max()) for a, b in zip(old.forecast, new.forecast, strict=True)]
    assert min(moved) > 1e-3
