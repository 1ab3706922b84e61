# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Retrieval over long range: numbers hidden in a text, asked for at its end.

A needle is a line of its own, put where a line of the haystack ends:

    # note <key> = <six digits>

A question repeats the line up to the digits, at the end of the text; the digits are the answer.
Keys are made-up words and values are uniform digits, so nothing but the needle tells the answer: a
model that does not read the right block is right once in a million.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from sparda_jax.errors import DataError
from sparda_jax.tokenizer import Tokenizer

CONSONANTS = "bcdfghjklmnpqrstvwxz"
VOWELS = "aeiou"
KEY_LETTERS = 6
VALUE_DIGITS = 6
NO_POSITION = -1
"""Fills a row of `NeedlePrompt.answer_positions` whose answer has fewer tokens than the longest."""

_SYLLABLES = tuple(c + v for c in CONSONANTS for v in VOWELS)
KEY_COUNT = len(_SYLLABLES) ** 3
"""How many different keys there are."""


@dataclasses.dataclass(frozen=True, eq=False)
class NeedlePrompt:
    """A text with needles, its questions at the end, and their answers in place.

    Attributes:
        tokens: the whole text, answers included.
        answer_positions: where in `tokens` each answer's tokens stand, ascending, then
            `NO_POSITION`; six to a row with a byte tokenizer.
        answer_tokens: the tokens at those positions, and `NO_POSITION` where there is none.
        depths: where each asked-for needle begins, as a share of the text before the questions,
            from 0 (start) to 1 (just before the questions).
        keys: the key of each question, in the order asked.
        answers: the six digits of each.
    """

    tokens: Int32[np.ndarray, " T"]
    answer_positions: Int32[np.ndarray, "questions digits"]
    answer_tokens: Int32[np.ndarray, "questions digits"]
    depths: Float[np.ndarray, " questions"]
    keys: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def predicting_positions(self) -> Int32[np.ndarray, "questions digits"]:
        """The positions whose logits predict the answers: `answer_positions − 1`, at least 0."""
        return np.maximum(self.answer_positions - 1, 0).astype(np.int32)


def random_keys(rng: np.random.Generator, count: int) -> list[str]:
    """Draw different words of six letters, consonant and vowel in turn.

    Args:
        rng: the source of randomness.
        count: how many, at most `KEY_COUNT` (a million).

    Raises:
        ValueError: if `count > KEY_COUNT`.

    Example:
        >>> random_keys(np.random.default_rng(0), 2)
        ['wacego', 'qoruqe']
    """
    if count > KEY_COUNT:
        raise ValueError(f"{count=} must be at most {KEY_COUNT}, the number of different keys")
    drawn = rng.choice(KEY_COUNT, count, replace=False)
    syllables = np.stack([drawn // 10000, drawn // 100 % 100, drawn % 100], axis=-1)
    return ["".join(_SYLLABLES[i] for i in row) for row in syllables.tolist()]


def random_values(rng: np.random.Generator, count: int) -> list[str]:
    """Draw numbers of six digits, each digit uniform and leading zeros kept.

    Example:
        >>> random_values(np.random.default_rng(0), 2)
        ['850624', '636961']
    """
    return [f"{n:0{VALUE_DIGITS}d}" for n in rng.integers(10**VALUE_DIGITS, size=count).tolist()]


def question_text(key: str) -> str:
    r"""Write the question for `key`: a needle up to its value, preceded by a line end.

    Example:
        >>> question_text("bacedo")
        '\n# note bacedo = '
    """
    return f"\n# note {key} = "


def needle_text(key: str, value: str) -> str:
    r"""Write the needle that says what `key` is.

    Example:
        >>> needle_text("bacedo", "012345")
        '\n# note bacedo = 012345\n'
    """
    return f"{question_text(key)}{value}\n"


def make_needle_prompt(
    rng: np.random.Generator,
    haystack: str | bytes,
    *,
    total_tokens: int,
    needles: int,
    questions: int,
    tokenizer: Tokenizer,
    depths: Sequence[float] | None = None,
) -> NeedlePrompt:
    """Hide needles in a haystack and ask for some: exactly `total_tokens` tokens.

    The haystack is cut at its end to make room; needles and questions never are. Parts are encoded
    one by one, in needles and questions alike, so that an answer's tokens are those of its needle
    with any tokenizer. No special id is added.

    Args:
        rng: the source of randomness: the same state gives the same prompt.
        haystack: the text; bytes are read as UTF-8.
        total_tokens: length of the whole, answers included.
        needles: how many lines are hidden.
        questions: how many of them are asked for, each once, in random order.
        tokenizer: turns text into tokens.
        depths: the wanted depth of each needle, 0 … 1; None spreads them uniformly, one in each of
            `needles` equal parts. A needle goes to the nearest line end, and `NeedlePrompt.depths`
            says where that is.

    Raises:
        ValueError: if not `1 <= questions <= needles`, if there are not `needles` depths or one is
            outside 0 … 1, or if needles and questions alone exceed `total_tokens`.
        DataError: if the haystack is not UTF-8 or has too few tokens to fill the prompt.
    """
    if not 1 <= questions <= needles:
        raise ValueError(f"{questions=} must be at least 1 and at most {needles=}")
    wanted = _wanted_depths(rng, needles, depths)
    keys, values = random_keys(rng, needles), random_values(rng, needles)
    asked = rng.permutation(needles)[:questions]

    parts = [_encode_needle(tokenizer, key, value) for key, value in zip(keys, values, strict=True)]
    lines = [question + value + end for question, value, end in parts]
    tail_length = sum(len(lines[i]) for i in asked)
    room = total_tokens - sum(len(line) for line in lines) - tail_length
    if room < 0:
        raise ValueError(
            f"{needles} needles and {questions} questions take {total_tokens - room} tokens, more "
            f"than {total_tokens=}; ask for fewer or for a longer prompt"
        )
    text, line_ends = _encode_haystack(tokenizer, haystack, room)

    places = line_ends[np.argmin(np.abs(line_ends[None, :] - wanted[:, None] * room), axis=1)]
    tokens: list[int] = []
    starts = np.zeros(needles, np.int64)
    previous = 0
    for i in np.argsort(places, kind="stable").tolist():
        tokens += text[previous : places[i]]
        previous = int(places[i])
        starts[i] = len(tokens)
        tokens += lines[i]
    tokens += text[previous:]

    positions = np.full((questions, max(len(parts[i][1]) for i in asked)), NO_POSITION, np.int32)
    for row, i in enumerate(asked.tolist()):
        question, value, _ = parts[i]
        first = len(tokens) + len(question)
        positions[row, : len(value)] = np.arange(first, first + len(value))
        tokens += lines[i]

    whole = np.array(tokens, np.int32)
    return NeedlePrompt(
        tokens=whole,
        answer_positions=positions,
        answer_tokens=np.where(positions >= 0, whole[positions], NO_POSITION).astype(np.int32),
        depths=starts[asked] / max(total_tokens - tail_length, 1),
        keys=tuple(keys[i] for i in asked),
        answers=tuple(values[i] for i in asked),
    )


def score_answers(
    predicted_tokens: Int[np.ndarray, "questions digits"], prompt: NeedlePrompt
) -> Bool[np.ndarray, " questions"]:
    """Tell which answers are right: every predicted token equals the answer's.

    One forward pass over `prompt.tokens` scores as greedy decoding would. Its first token is the
    argmax at the end of the question; each further one is the argmax after the right answer's
    beginning. Greedy decoding reads that same beginning as long as it has been right, and both
    count a question as wrong from the first token that differs. (A question sees the right answers
    of those before it, as if each had been asked alone at that place.)

    Args:
        predicted_tokens: argmax of the logits at `prompt.predicting_positions`.
        prompt: what `make_needle_prompt` returned.

    Returns:
        for each question, whether its whole answer is right.

    Raises:
        ValueError: if the shapes differ.
    """
    if predicted_tokens.shape != prompt.answer_tokens.shape:
        raise ValueError(
            f"{predicted_tokens.shape=} must equal {prompt.answer_tokens.shape}, the prompt's "
            "answers; take the argmax at prompt.predicting_positions"
        )
    right = (predicted_tokens == prompt.answer_tokens) | (prompt.answer_positions == NO_POSITION)
    return right.all(axis=1)


def accuracy_by_depth(
    correct: Bool[np.ndarray, " questions"], depths: Float[np.ndarray, " questions"], buckets: int
) -> Float[np.ndarray, " buckets"]:
    """Average right answers over equal parts of the depth: the share right in each.

    Args:
        correct: from `score_answers`, of one prompt or of many laid end to end.
        depths: the questions' depths, 0 … 1.
        buckets: how many parts.

    Returns:
        share right, 0 … 1, from the start of the text to its end; NaN in a part without questions.

    Raises:
        ValueError: if there are not as many depths as answers.

    Example:
        >>> accuracy_by_depth(np.array([True, False, True]), np.array([0.1, 0.2, 0.9]), 2).tolist()
        [0.5, 1.0]
    """
    if correct.shape != depths.shape:
        raise ValueError(f"{correct.shape=} must equal {depths.shape=}")
    bucket = np.minimum((depths * buckets).astype(np.int64), buckets - 1)
    asked = np.bincount(bucket, minlength=buckets).astype(np.float64)
    right = np.bincount(bucket, weights=correct.astype(np.float64), minlength=buckets)
    return np.where(asked > 0, right / np.maximum(asked, 1.0), np.nan)


def _wanted_depths(
    rng: np.random.Generator, needles: int, depths: Sequence[float] | None
) -> Float[np.ndarray, " needles"]:
    """The depth asked for each needle; drawn if none is given."""
    if depths is None:
        return rng.permutation((np.arange(needles) + rng.random(needles)) / needles)
    if len(depths) != needles:
        raise ValueError(f"{len(depths)=} must equal {needles=}; give one depth to each needle")
    wanted = np.asarray(depths, np.float64)
    if wanted.min() < 0 or wanted.max() > 1:
        raise ValueError(f"depths from {wanted.min()} to {wanted.max()} must lie between 0 and 1")
    return wanted


def _encode_needle(
    tokenizer: Tokenizer, key: str, value: str
) -> tuple[list[int], list[int], list[int]]:
    """The tokens of the question, of the value, and of the line end after it."""
    return (
        tokenizer.encode(question_text(key)),
        tokenizer.encode(value),
        tokenizer.encode("\n"),
    )


def _encode_haystack(
    tokenizer: Tokenizer, haystack: str | bytes, room: int
) -> tuple[list[int], Int[np.ndarray, " line_ends"]]:
    """The first `room` tokens, and the positions where a line ends, 0 included."""
    if isinstance(haystack, bytes):
        try:
            haystack = haystack.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"the haystack of {len(haystack)} bytes is not UTF-8: byte {error.start} cannot be "
                "read; give text"
            ) from error
    text: list[int] = []
    line_ends = [0]
    for line in haystack.splitlines(keepends=True):
        if len(text) >= room:
            break
        text += tokenizer.encode(line)
        if line.endswith("\n"):
            line_ends.append(len(text))
    if len(text) < room:
        raise DataError(
            f"the haystack has {len(text)} tokens, fewer than the {room} needed beside needles "
            "and questions; give a longer text or a shorter total_tokens"
        )
    return text[:room], np.array([end for end in line_ends if end <= room], np.int64)
