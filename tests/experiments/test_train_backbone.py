# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import alignment
from experiments import train_backbone as backbone
from experiments.backbone_data import Mixture, WeightedBatch
from sparda_jax.errors import CheckpointError
from sparda_jax.testing import tiny_config

SPARSE = tiny_config().sparse


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A packed corpus of two short texts a split."""
    folder = tmp_path_factory.mktemp("corpus")
    text = b"".join(b"def function_%d(x):\n    return x + %d\n" % (i, i) for i in range(400))
    for split, cut in (("training", 9000), ("heldout", 8500)):
        data = np.frombuffer(text[:cut] + text[-cut:], np.uint8)
        np.save(folder / f"{split}.npy", data)
        np.save(folder / f"{split}_offsets.npy", np.array([0, cut, 2 * cut]))
    return folder


def phase(**changes):
    fields = {
        "name": "tiny",
        "seq_len": 256,
        "batch": 2,
        "steps": 6,
        "learning_rate": 3e-3,
        "warm_up": 2,
        "mixture": Mixture(),
    }
    return backbone.Phase(**(fields | changes))


def config_for(corpus, out, *phases, **changes):
    fields = {"log_every": 2, "workers": 1, "evaluate": False}
    return backbone.Config(corpus=corpus, out=out, phases=phases, **(fields | changes))


def test_the_rate_rises_to_the_peak_and_falls_to_its_share():
    one = phase(learning_rate=1.0, warm_up=4, final_share=0.1)
    rates = [backbone.learning_rate(one, step, 20) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[20] == pytest.approx(0.1)
    assert sorted(rates[4:], reverse=True) == rates[4:]


def test_half_of_the_looked_at_queries_predict_an_answer():
    weights = np.ones((2, 64), np.float32)
    weights[0, 20:26] = 4.0
    batch = WeightedBatch(np.zeros((2, 64), np.int32), weights)
    chosen = alignment.choose_queries(batch, 16, 0, 3)
    assert chosen.shape == (2, 16)
    assert set(chosen[0, :8].tolist()) <= set(range(19, 25))
    assert chosen.max() < 64


def _alignment(key, *, boost=None):
    keys = jax.random.split(key, 3)
    q = jax.random.normal(keys[0], (1, 128, 4, 8))
    k = jax.random.normal(keys[1], (1, 128, 2, 8))
    if boost is not None:  # every key of one block answers one query
        k = k.at[:, 40:48].set(boost * q[:, 120:121, ::2])
    pooled = jnp.stack([k[:, c * 2 : c * 2 + 4].mean(axis=1) for c in range(63)], axis=1)
    return q, k, pooled, jnp.array([[120]])


def test_alignment_is_small_where_pooled_keys_find_the_wanted_block(key):
    q, k, pooled, at = _alignment(key, boost=3.0)
    found, recall = alignment.alignment_loss(q, k, pooled, at, SPARSE, 1.0)
    wrong = jnp.roll(pooled, 20, axis=1)
    missed, recall_missed = alignment.alignment_loss(q, k, wrong, at, SPARSE, 1.0)
    assert 0.0 <= float(found) < 0.5 * float(missed)
    assert float(recall_missed) < float(recall) <= 1.0 + 1e-6


def test_alignment_teaches_queries_and_pooled_keys_but_not_the_attention_it_copies(key):
    q, k, pooled, at = _alignment(key, boost=1.0)
    gradient = jax.grad(
        lambda *args: alignment.alignment_loss(*args, at, SPARSE, 2.0)[0], argnums=(0, 1, 2)
    )(q, k, pooled)
    assert float(jnp.abs(gradient[1]).max()) == 0.0
    assert float(jnp.abs(gradient[0][0, 120]).max()) > 0.0
    assert float(jnp.abs(gradient[0][0, :120]).max()) == 0.0
    assert float(jnp.abs(gradient[2]).max()) > 0.0
    assert all(bool(jnp.isfinite(g).all()) for g in gradient)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_weights(corpus, tmp_path):
    model = tiny_config(vocab_size=259)
    one = phase(steps=4, alignment=0.5, alignment_queries=8)
    whole = config_for(corpus, tmp_path / "whole", one)
    assert backbone.train(whole, model)["finished"]

    parts = config_for(corpus, tmp_path / "parts", one)
    stopped = dataclasses.replace(parts, time_limit_s=1e-6)
    assert not backbone.train(stopped, model)["finished"]
    assert backbone.train(parts, model)["finished"]
    weights = [dict(np.load(tmp_path / part / "weights.npz")) for part in ("whole", "parts")]
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][name], err_msg=name)
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [row["step"] for row in log] == [2, 4]
    assert all(np.isfinite(row["loss"]) for row in log)


@pytest.mark.slow
def test_a_state_of_another_model_is_refused_with_both_shapes(corpus, tmp_path):
    one = config_for(corpus, tmp_path, phase(steps=2, mode="dense"))
    backbone.train(one, tiny_config(vocab_size=259))
    other = dataclasses.replace(one, phases=(*one.phases, phase()))
    with pytest.raises(CheckpointError, match=r"\(259, 32\), \(259, 16\)"):
        backbone.train(other, tiny_config(vocab_size=259, width=16))
