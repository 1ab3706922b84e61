# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens: what is kept, how often, and from which stream."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.sampling import (
    GREEDY,
    Sampling,
    keep_top_k,
    keep_top_p,
    request_keys,
    sample_tokens,
)

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))


def kept(logits):
    return np.flatnonzero(np.isfinite(np.asarray(logits)[0])).tolist()


def draws(key, sampling, count=4000):
    keys = jax.random.split(key, count)
    tokens = sample_tokens(jnp.tile(LOGITS, (count, 1)), sampling, keys)
    return np.bincount(np.asarray(tokens), minlength=4) / count


def test_greedy_takes_the_lower_of_equal_tokens_without_a_key():
    assert sample_tokens(jnp.array([[1.0, 5.0, 5.0], [2.0, 0.0, 1.0]]), GREEDY, None).tolist() == [
        1,
        0,
    ]


def test_top_k_keeps_exactly_k_even_at_ties():
    assert kept(keep_top_k(jnp.zeros((1, 5)), 2)) == [0, 1]
    assert kept(keep_top_k(LOGITS, 3)) == [1, 2, 3]
    assert kept(keep_top_k(LOGITS, 99)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("p", "want"),
    [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_fewest_tokens_that_hold_the_mass(p, want):
    assert kept(keep_top_p(LOGITS, p)) == want


def test_frequencies_follow_the_probabilities(key):
    np.testing.assert_allclose(draws(key, Sampling(temperature=1.0)), np.exp(LOGITS)[0], atol=0.03)


def test_a_low_temperature_sharpens(key):
    probs = np.exp(LOGITS)[0] ** 2
    got = draws(key, Sampling(temperature=0.5))
    np.testing.assert_allclose(got, probs / probs.sum(), atol=0.03)


def test_top_k_and_top_p_work_together(key):
    got = draws(key, Sampling(temperature=1.0, top_k=3, top_p=0.5))
    np.testing.assert_allclose(got, [0, 4 / 7, 0, 3 / 7], atol=0.03)


def test_a_request_draws_from_its_own_stream(key):
    sampling = Sampling(temperature=1.0)
    logits = jnp.tile(LOGITS, (3, 1))
    together = request_keys(key, jnp.array([4, 7, 4]), jnp.array([10, 10, 11]))
    alone = request_keys(key, jnp.array([7]), jnp.array([10]))
    want = jax.random.fold_in(jax.random.fold_in(key, 7), 10)
    assert jnp.all(jax.random.key_data(alone[0]) == jax.random.key_data(want))
    assert sample_tokens(logits, sampling, together)[1] == sample_tokens(LOGITS, sampling, alone)[0]
    data = np.asarray(jax.random.key_data(together))
    assert len({tuple(row) for row in data}) == 3


def test_random_draws_need_keys():
    with pytest.raises(ValueError, match=r"temperature=1.0.* needs a key; got None"):
        sample_tokens(LOGITS, Sampling(temperature=1.0), None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 must be in \(0, 1\]"),
    ],
)
def test_numbers_that_leave_no_token_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)
