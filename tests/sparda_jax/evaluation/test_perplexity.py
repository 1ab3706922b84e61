# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Negative log-likelihood against the logits themselves, and how it is summed."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.evaluation import perplexity
from sparda_jax.evaluation.perplexity import evaluate_perplexity, nll_totals, token_nll
from sparda_jax.model import forward
from sparda_jax.testing import tiny_model

MODEL = tiny_model()
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 50)).astype(np.int32)
LENGTHS = np.array([50, 33], np.int32)


@functools.cache
def wanted_nll(mode):
    """From all logits at once, f64; padding is not a number."""
    read = jax.jit(functools.partial(forward, mode=mode))
    logits = read(MODEL, jnp.asarray(TOKENS), lengths=jnp.asarray(LENGTHS))
    logits = np.asarray(logits, np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logs[:, :-1], TOKENS[:, 1:, None], -1)[..., 0]
    return np.where(np.arange(1, 50)[None] < LENGTHS[:, None], nll, np.nan)


@pytest.mark.parametrize("mode", ["dense", "sparse", "sparda"])
def test_every_token_has_the_likelihood_that_the_logits_give_it(mode, monkeypatch):
    monkeypatch.setattr(perplexity, "_TILE_BYTES", 4 * 2 * 64 * 11)  # eleven positions a tile
    measure = jax.jit(functools.partial(token_nll, mode=mode))
    found = measure(MODEL, jnp.asarray(TOKENS), lengths=jnp.asarray(LENGTHS))
    wanted = wanted_nll(mode)
    np.testing.assert_allclose(found, np.nan_to_num(wanted), atol=1e-5)


def test_totals_are_sums_by_the_position_of_the_predicted_token():
    starts = (0, 16, 40)
    measure = jax.jit(functools.partial(nll_totals, mode="dense", bucket_starts=starts))
    totals = measure(MODEL, jnp.asarray(TOKENS), lengths=jnp.asarray(LENGTHS))
    wanted, at = wanted_nll("dense"), np.arange(1, 50)
    for bucket, (start, end) in enumerate(((0, 16), (16, 40), (40, 50))):
        part = wanted[:, (at >= start) & (at < end)]
        assert float(totals.tokens[bucket]) == np.isfinite(part).sum()
        assert float(totals.nll[bucket]) == pytest.approx(np.nansum(part), rel=1e-5)
    np.testing.assert_allclose(
        totals.nll_by_bucket(), np.asarray(totals.nll) / np.asarray(totals.tokens), rtol=1e-6
    )
    assert totals.nll_per_token() == pytest.approx(np.nanmean(wanted), rel=1e-5)
    assert totals.perplexity() == pytest.approx(math.exp(np.nanmean(wanted)), rel=1e-4)
    assert totals.bits_per_byte() == pytest.approx(np.nanmean(wanted) / math.log(2), rel=1e-5)


def test_bits_per_byte_count_the_bytes_of_the_predicted_tokens():
    sizes = np.arange(64) % 3
    totals = evaluate_perplexity(
        MODEL, [(TOKENS, LENGTHS)], mode="dense", token_bytes=sizes.tolist()
    )
    wanted = wanted_nll("dense")
    count = sum(sizes[TOKENS[row, 1:length]].sum() for row, length in enumerate(LENGTHS))
    assert float(totals.size.sum()) == count
    assert totals.bits_per_byte() == pytest.approx(
        np.nansum(wanted) / math.log(2) / count, rel=1e-5
    )


def test_batches_add_up():
    rows = [(TOKENS[i : i + 1], LENGTHS[i : i + 1]) for i in range(2)]
    apart = evaluate_perplexity(MODEL, rows, mode="sparse", bucket_starts=(0, 20))
    together = evaluate_perplexity(MODEL, [(TOKENS, LENGTHS)], mode="sparse", bucket_starts=(0, 20))
    np.testing.assert_allclose(apart.nll, together.nll, rtol=1e-5)
    np.testing.assert_array_equal(apart.tokens, together.tokens)


def test_an_empty_bucket_is_not_a_number():
    measure = jax.jit(functools.partial(nll_totals, mode="dense", bucket_starts=(0, 100)))
    totals = measure(MODEL, jnp.asarray(TOKENS))
    assert jax.numpy.isnan(totals.nll_by_bucket()).tolist() == [False, True]


def test_buckets_must_ascend_and_there_must_be_a_batch():
    for starts in ((), (1, 2), (0, 5, 5), (0, 9, 4)):
        with pytest.raises(ValueError, match="must ascend from 0"):
            nll_totals(MODEL, jnp.asarray(TOKENS), bucket_starts=starts)
    with pytest.raises(ValueError, match="0 batches to evaluate, at least 1"):
        evaluate_perplexity(MODEL, [])
