# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The exam: what counts as text, and that batches change nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.exam import measure_recall, needle_exam, plain_exam, take_exam
from sparda_jax.evaluation.perplexity import evaluate_perplexity
from sparda_jax.evaluation.recall import recall_totals
from sparda_jax.testing import tiny_model
from tests.compiled import forward

TEXT = b"".join(b"line %d of a text that says little\n" % i for i in range(40))


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=259)


@pytest.fixture(scope="module")
def exam():
    return needle_exam([TEXT, TEXT[5:]], prompts=3, questions=2, context=192, seed=4)


def test_needles_and_questions_do_not_count_as_text(exam):
    for row, is_text, prompt in zip(exam.tokens, exam.is_text, exam.prompts, strict=True):
        kept = bytes(row[is_text].astype(np.uint8))
        assert b"# note" not in kept
        assert re.sub(rb"# note \w+ = \d+\n?", b"", bytes(row.astype(np.uint8))) == kept
        assert not is_text[prompt.answer_positions].any()
        assert is_text.sum() > 80


def test_bits_per_byte_agree_with_perplexity(model):
    documents = [TEXT[:96], TEXT[96:192], TEXT[200:296]]
    exam = plain_exam(documents)
    lengths = np.full(3, 96, np.int32)
    want = evaluate_perplexity(model, [(exam.tokens, lengths)], mode="sparse").bits_per_byte()
    got = take_exam(model, exam, "sparse", batch=2)
    assert got.bits_per_byte == pytest.approx(want, rel=1e-5)
    assert got.correct.size == 0


def test_a_short_last_batch_changes_nothing(model, exam):
    told = []
    one = take_exam(model, exam, "sparda", batch=1)
    two = take_exam(model, exam, "sparda", batch=2, tell=lambda *at: told.append(at))
    assert told == [(2, 3), (3, 3)]
    assert two.bits_per_byte == pytest.approx(one.bits_per_byte, rel=1e-5)
    np.testing.assert_array_equal(two.correct, one.correct)
    assert two.correct.size == 6


def test_an_answer_is_right_when_the_likeliest_bytes_are_its_digits(model, exam):
    from sparda_jax.evaluation.needles import score_answers

    said = np.asarray(forward(model, jnp.asarray(exam.tokens), mode="dense")).argmax(-1)
    want = [
        score_answers(row[prompt.predicting_positions], prompt)
        for row, prompt in zip(said, exam.prompts, strict=True)
    ]
    got = take_exam(model, exam, "dense", batch=3)
    np.testing.assert_array_equal(got.correct, np.concatenate(want))
    assert got.needle_accuracy == got.correct.mean()


def test_the_choices_of_the_first_row_are_kept(model, exam):
    _, ids = forward(model, jnp.asarray(exam.tokens[:1]), mode="sparda", return_choices=True)
    got = take_exam(model, exam, "sparda", batch=1, has_choices=True)
    np.testing.assert_array_equal(got.choices, np.asarray(ids)[:, 0, ::16])


@pytest.mark.slow
def test_other_heads_rank_on_the_states_of_the_first_model(model):
    other = tiny_model(1, vocab_size=259)
    documents = [TEXT[:128]]
    got = measure_recall(model, documents, batch=1, selectors=("forecast",), fresh=other)
    tokens = jnp.asarray(plain_exam(documents).tokens)
    want = jax.jit(recall_totals)(model, tokens)["forecast"]
    np.testing.assert_allclose(got["forecast"], want.recall_of_layers(), rtol=1e-5)
    assert got["forecast_fresh"] != got["forecast"]
    same = measure_recall(model, documents, batch=1, selectors=("forecast",), fresh=model)
    np.testing.assert_allclose(same["forecast_fresh"], same["forecast"], rtol=1e-6)


def test_documents_that_do_not_fill_their_batches_are_refused(model):
    with pytest.raises(ValueError, match=r"3 documents must be a multiple of batch=2"):
        measure_recall(model, [TEXT[:128]] * 3, batch=2)
