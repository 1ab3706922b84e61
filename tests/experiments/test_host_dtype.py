# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The study of packed records at a size that says nothing: rows, and what they compare."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import host_dtype
from experiments.host_dtype import PLAIN, Config, main, read_on
from sparda_jax.testing import tiny_model
from tests.compiled import forward


@pytest.mark.slow
def test_every_dtype_gives_a_row_and_the_record_holds_them(tmp_path, monkeypatch):
    model = tiny_model(layers=2, vocab_size=259)
    monkeypatch.setattr(host_dtype, "load_shipped", lambda: model)
    config = Config(
        host_dtypes=(PLAIN, "int8"),
        batch=1,
        beginning=640,
        steps=20,
        context=768,
        questions=1,
        commit="0123abcd",
        dirty=False,
        out=tmp_path,
    )
    record = main(config)
    plain, packed = record.rows
    assert (plain["bits_per_byte_ratio"], plain["mean_nats_change"]) == (1.0, 0.0)
    assert packed["bits_per_byte_ratio"] != 1.0
    assert 0.0 < packed["mean_nats_change"] < 0.1
    assert packed["host_bytes"] * 4 == plain["host_bytes"]
    assert 3.9 < plain["fetched_bytes_per_step"] / packed["fetched_bytes_per_step"] < 4.1
    assert {plain["needle_samples"], packed["needle_samples"]} == {1}
    (path,) = tmp_path.glob("*.json")
    assert len(json.loads(path.read_text())["rows"]) == 2
    assert "--host-dtypes" in record.command


def test_a_reading_judges_every_token_before_it_is_fed():
    model = tiny_model(layers=2)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 44)).astype(np.int32)
    found = read_on(model, tokens, 37, PLAIN)
    logits = np.asarray(forward(model, jnp.asarray(tokens), mode="sparda"), np.float64)[:, 36:43]
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    right = np.take_along_axis(wanted, tokens[:, 37:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.nats.T, -right, rtol=1e-4)
    np.testing.assert_array_equal(found.said.T, logits.argmax(-1))
    assert found.host_bytes > 0


def test_more_documents_than_there_are_and_unknown_dtypes_are_refused(monkeypatch):
    monkeypatch.setattr(host_dtype, "load_shipped", lambda: tiny_model(layers=2))
    with pytest.raises(ValueError, match=r"config.batch=999 documents are asked for, \d+ are"):
        host_dtype.measure(Config(batch=999, beginning=8, steps=2))
    with pytest.raises(ValueError, match="unknown host_dtype='int4'"):
        read_on(tiny_model(layers=2), np.zeros((1, 20), np.int32), 9, "int4")
