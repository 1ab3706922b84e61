# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Needles: exact lengths, answers where they are said to be, and scores."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_jax.errors import DataError
from sparda_jax.evaluation.needles import (
    KEY_COUNT,
    NO_POSITION,
    accuracy_by_depth,
    make_needle_prompt,
    needle_text,
    random_keys,
    random_values,
    score_answers,
)
from sparda_jax.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
HAYSTACK = "".join(f"line {i} of the haystack\n" for i in range(400))


class DigitPairs(ByteTokenizer):
    """Bytes, but two equal digits in a row are one token: answers differ in length."""

    vocab_size = 269

    def encode(self, text):
        parts = re.findall(r"(\d)\1|(.|\n)", text)
        return [259 + int(pair) if pair else ord(one) for pair, one in parts]


def prompt_of(seed=0, **changes):
    chosen: dict[str, Any] = {"total_tokens": 2048, "needles": 6, "questions": 4}
    chosen |= {"tokenizer": BYTES} | changes
    haystack = chosen.pop("haystack", HAYSTACK)
    return make_needle_prompt(np.random.default_rng(seed), haystack, **chosen)


@given(
    seed=st.integers(0, 10_000),
    total=st.integers(600, 4000),
    needles=st.integers(1, 12),
    share=st.floats(0, 1),
)
@settings(deadline=None, max_examples=50)
def test_the_length_is_exact_and_every_answer_is_in_the_text_once_before(
    seed, total, needles, share
):
    questions = 1 + int(share * (needles - 1))
    prompt = prompt_of(seed, total_tokens=total, needles=needles, questions=questions)
    text = BYTES.decode(prompt.tokens.tolist())
    assert prompt.tokens.shape == (total,)
    assert text.endswith(needle_text(prompt.keys[-1], prompt.answers[-1]))
    assert len(re.findall(r"# note \w{6} = \d{6}\n", text)) == needles + questions
    for key, answer in zip(prompt.keys, prompt.answers, strict=True):
        assert text.count(needle_text(key, answer)) == 2


def test_answer_positions_point_at_the_answers():
    prompt = prompt_of()
    assert prompt.answer_positions.shape == (4, 6)
    said = ["".join(chr(t) for t in prompt.tokens[row]) for row in prompt.answer_positions]
    assert tuple(said) == prompt.answers
    assert np.array_equal(prompt.tokens[prompt.answer_positions], prompt.answer_tokens)
    assert np.array_equal(prompt.predicting_positions, prompt.answer_positions - 1)


def test_needles_stand_where_a_line_ends():
    text = BYTES.decode(prompt_of(needles=8, questions=1).tokens.tolist())
    body = text[: text.rindex("\n# note")]
    starts = [match.start() for match in re.finditer("\n# note", body)]
    assert len(starts) == 8
    assert all(start == 0 or text[start - 1] == "\n" for start in starts)


def test_a_wanted_depth_is_met_to_within_a_line():
    wanted = [0.0, 0.25, 0.5, 0.75, 1.0]
    prompt = prompt_of(total_tokens=4096, needles=5, questions=5, depths=wanted)
    assert np.abs(np.sort(prompt.depths) - wanted).max() < 0.02
    text = BYTES.decode(prompt.tokens.tolist())
    before_questions = 4096 - 5 * len(needle_text("bacedo", "000000"))
    places = [
        text.index(needle_text(k, a)) for k, a in zip(prompt.keys, prompt.answers, strict=True)
    ]
    np.testing.assert_allclose(prompt.depths, np.array(places) / before_questions)


def test_depths_are_spread_over_the_whole_text():
    depths = np.concatenate([prompt_of(seed, needles=8, questions=8).depths for seed in range(20)])
    counts = np.histogram(depths, bins=4, range=(0, 1))[0]
    assert counts.sum() == 160
    assert counts.min() >= 30


def test_the_same_state_gives_the_same_prompt_and_another_gives_another():
    assert np.array_equal(prompt_of(3).tokens, prompt_of(3).tokens)
    assert not np.array_equal(prompt_of(3).tokens, prompt_of(4).tokens)


def test_bytes_and_text_give_the_same_prompt():
    assert np.array_equal(prompt_of().tokens, prompt_of(haystack=HAYSTACK.encode()).tokens)


def test_answers_of_fewer_tokens_end_in_no_position():
    prompt = prompt_of(needles=12, questions=12, tokenizer=DigitPairs())
    lengths = (prompt.answer_positions >= 0).sum(axis=1)
    assert lengths.min() < lengths.max() <= 6
    for row, length, answer in zip(prompt.answer_positions, lengths, prompt.answers, strict=True):
        assert np.all(row[length:] == NO_POSITION)
        assert prompt.tokens[row[:length]].tolist() == DigitPairs().encode(answer)
    assert prompt.predicting_positions.min() >= 0
    assert score_answers(prompt.answer_tokens, prompt).all()


def test_one_wrong_digit_makes_an_answer_wrong():
    prompt = prompt_of()
    predicted = prompt.answer_tokens.copy()
    assert score_answers(predicted, prompt).tolist() == [True] * 4
    predicted[1, 5] += 1
    predicted[3, 0] += 1
    assert score_answers(predicted, prompt).tolist() == [True, False, True, False]


def test_what_stands_at_no_position_is_not_scored():
    prompt = prompt_of(needles=12, questions=12, tokenizer=DigitPairs())
    predicted = np.where(prompt.answer_positions >= 0, prompt.answer_tokens, 7)
    assert score_answers(predicted, prompt).all()


def test_a_score_needs_one_prediction_for_each_answer_token(no_shape_hook):
    with pytest.raises(ValueError, match=r"\(4, 5\) must equal \(4, 6\)"):
        score_answers(np.zeros((4, 5), np.int32), prompt_of())


def test_accuracy_is_averaged_within_each_part_of_the_depth():
    correct = np.array([True, False, True, True])
    depths = np.array([0.0, 0.1, 0.5, 1.0])
    got = accuracy_by_depth(correct, depths, 4)
    np.testing.assert_array_equal(got, [0.5, np.nan, 1.0, 1.0])


def test_accuracy_needs_one_depth_for_each_answer(no_shape_hook):
    with pytest.raises(ValueError, match=r"\(2,\) must equal depths.shape=\(3,\)"):
        accuracy_by_depth(np.array([True, False]), np.zeros(3), 2)


def test_keys_are_different_words_of_consonant_and_vowel():
    keys = random_keys(np.random.default_rng(0), 5000)
    assert len(set(keys)) == 5000
    assert all(re.fullmatch(r"([bcdfghjklmnpqrstvwxz][aeiou]){3}", key) for key in keys)


def test_every_digit_is_as_likely_as_any_other():
    values = random_values(np.random.default_rng(0), 5000)
    assert {len(value) for value in values} == {6}
    counts = np.array([[value[i] for value in values].count("0") for i in range(6)])
    assert np.all(np.abs(counts - 500) < 100)


def test_more_keys_than_there_are_is_refused():
    with pytest.raises(ValueError, match=f"count={KEY_COUNT + 1} must be at most {KEY_COUNT}"):
        random_keys(np.random.default_rng(0), KEY_COUNT + 1)


@pytest.mark.parametrize("questions", [0, 7])
def test_questions_are_at_least_one_and_at_most_the_needles(questions):
    with pytest.raises(ValueError, match=f"{questions=} must be at least 1 and at most needles=6"):
        prompt_of(questions=questions)


def test_needles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"take 240 tokens, more than total_tokens=239"):
        prompt_of(total_tokens=239)
    assert prompt_of(total_tokens=240).tokens.shape == (240,)


def test_a_haystack_too_short_is_refused():
    with pytest.raises(DataError, match=r"has 3 tokens, fewer than the 1808 needed"):
        prompt_of(haystack="abc")


def test_a_haystack_that_is_not_text_is_refused():
    with pytest.raises(DataError, match=r"of 3 bytes is not UTF-8: byte 1 cannot be read"):
        prompt_of(haystack=b"a\xffb")


def test_one_depth_is_wanted_for_each_needle():
    with pytest.raises(ValueError, match=r"len\(depths\)=1 must equal needles=6"):
        prompt_of(depths=[0.5])


def test_a_depth_outside_the_text_is_refused():
    with pytest.raises(ValueError, match=r"depths from -0.5 to 1.5 must lie between 0 and 1"):
        prompt_of(depths=[-0.5, 0.0, 0.0, 0.0, 1.0, 1.5])
