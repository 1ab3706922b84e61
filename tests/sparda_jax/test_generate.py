# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The user's door: ends, streams, sampling, and what it gives back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.errors import CapacityError
from sparda_jax.generate import generate
from sparda_jax.model import forward
from sparda_jax.sampling import Draw, Rows, Sampling, draw_tokens
from sparda_jax.testing import tiny_model

PROMPTS = [np.random.default_rng(n).integers(0, 64, n).tolist() for n in (45, 3, 30)]
WARM = Sampling(temperature=1.0, top_k=20, top_p=0.95)


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=2)


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, max_new_tokens=12, kv="resident")


def test_greedy_tokens_are_the_arguments_of_the_maxima_of_forward(model, greedy):
    run = jax.jit(forward, static_argnames="logits")
    for prompt, new in zip(PROMPTS, greedy.tokens, strict=True):
        whole = jnp.array([[*prompt, *new]])
        logits = run(model, whole)[0]
        want = np.argmax(logits[len(prompt) - 1 : -1], axis=-1)
        assert new == want.tolist()


def test_everything_is_given_back(greedy):
    assert greedy.finish_reasons == ["length"] * 3
    assert [len(tokens) for tokens in greedy.tokens] == [12] * 3
    assert greedy.place == "resident"
    assert greedy.traffic.resident.shape == (11, 2)
    assert greedy.device_kv_bytes["slots"] == greedy.full_kv_bytes
    assert greedy.prefill_seconds > 0.0
    assert greedy.tokens_per_s > 0.0


@pytest.mark.parametrize("kv", ["resident", "offload"])
def test_an_end_token_ends_its_row_only(model, greedy, kv):
    end = greedy.tokens[1][4]
    ends = [tokens.index(end) + 1 if end in tokens else 12 for tokens in greedy.tokens]
    got = generate(model, PROMPTS, max_new_tokens=12, kv=kv, eos_ids=[end])
    assert got.tokens == [tokens[:n] for tokens, n in zip(greedy.tokens, ends, strict=True)]
    want = ["eos" if end in tokens else "length" for tokens in greedy.tokens]
    assert got.finish_reasons == want
    assert "eos" in want


@pytest.mark.parametrize("kv", ["resident", "offload"])
def test_nothing_runs_on_after_the_last_row_has_ended(model, kv):
    seen = []
    got = generate(model, PROMPTS, max_new_tokens=50, kv=kv, eos_ids=range(64), on_step=seen.append)
    assert [len(tokens) for tokens in got.tokens] == [1, 1, 1]
    assert got.finish_reasons == ["eos"] * 3
    assert len(seen) == 1
    assert got.traffic.resident.sum() == 0  # at most one idle step
    assert len(got.traffic.resident) <= 1


def test_progress_tells_every_token_in_order(model, greedy):
    seen = []
    end = greedy.tokens[1][4]
    got = generate(
        model, PROMPTS, max_new_tokens=12, kv="offload", eos_ids=[end], on_step=seen.append
    )
    for row, tokens in enumerate(got.tokens):
        told = [progress.tokens[row] for progress in seen]
        assert told == tokens + [None] * (len(seen) - len(tokens))
    assert [progress.step for progress in seen] == list(range(len(seen)))
    assert seen[0].hit_rate == 1.0
    assert seen[0].bytes_fetched == 0
    for progress, fetched, resident in zip(
        seen[1:], got.traffic.fetched, got.traffic.resident, strict=True
    ):
        assert progress.bytes_fetched == fetched.sum() * got.traffic.record_bytes
        assert progress.hit_rate == resident.sum() / (resident.sum() + fetched.sum())
        assert progress.tokens_per_s > 0.0


def test_a_request_gets_its_tokens_whoever_shares_the_batch(model, key):
    together = generate(model, PROMPTS, max_new_tokens=10, sampling=WARM, key=key, kv="resident")
    others = [PROMPTS[0], PROMPTS[2][:7], PROMPTS[1] * 4]
    apart = generate(model, others, max_new_tokens=10, sampling=WARM, key=key, kv="resident")
    assert together.tokens[0] == apart.tokens[0]
    assert together.tokens[1] != apart.tokens[1]
    offloaded = generate(model, PROMPTS, max_new_tokens=10, sampling=WARM, key=key, kv="offload")
    assert offloaded.tokens == together.tokens


def test_another_key_draws_other_tokens(model):
    first, second = (
        generate(
            model, PROMPTS, max_new_tokens=10, sampling=WARM, key=jax.random.key(n), kv="resident"
        ).tokens
        for n in (1, 2)
    )
    assert first != second


def test_sampling_without_a_key_is_refused(model):
    with pytest.raises(ValueError, match=r"temperature=1.0.* needs a key; got key=None"):
        generate(model, PROMPTS, max_new_tokens=2, sampling=WARM)


def test_lengths_are_checked_before_work_starts(model):
    with pytest.raises(CapacityError, match=r"1044 in all, but config.max_context=1024"):
        generate(model, [[1] * 1000], max_new_tokens=44)


def test_one_token_from_one_token(model):
    got = generate(model, [[7]], max_new_tokens=1, kv="offload")
    assert len(got.tokens[0]) == 1
    assert got.traffic.hit_rate == 1.0
    assert got.tokens_per_s == 0.0


def test_rows_end_by_an_end_token_or_their_last_token_and_then_draw_nothing():
    logits = jnp.array([[0.0, 5.0], [5.0, 0.0], [0.0, 5.0], [0.0, 5.0]])
    rows = Rows(
        tokens=jnp.zeros((4,), jnp.int32),
        active=jnp.array([True, True, False, True]),
        left=jnp.array([9, 9, 9, 1]),
        requests=jnp.arange(4),
    )
    after, drawn = draw_tokens(logits, rows, jnp.full((4,), 3), None, draw=Draw(eos_ids=(0,)))
    assert drawn.tokens.tolist() == after.tokens.tolist() == [1, 0, 0, 1]
    assert drawn.is_new.tolist() == rows.active.tolist()
    assert drawn.goes_on.tolist() == after.active.tolist() == [True, False, False, False]
    assert after.left.tolist() == [8, 8, 9, 0]
    assert after.requests.tolist() == [0, 1, 2, 3]
