# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""An exam of a byte model: documents, needles hidden in them, and what a mode makes of both.

One pass over a row gives everything: the nats of its text, and the answers to the questions at its
end. A mode is compiled once, for one shape, and only sums and the likeliest bytes come back to the
host.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.evaluation.needles import NeedlePrompt, make_needle_prompt, score_answers
from sparda_jax.evaluation.recall import add_totals, recall_totals
from sparda_jax.model import SpardaLM, forward
from sparda_jax.rope import Rope
from sparda_jax.selectors.forecast import ForecastSelector
from sparda_jax.shapes import Mode
from sparda_jax.tokenizer import ByteTokenizer

NEEDLE_LINE = re.compile(rb"^# note [a-z]+ = \d*\n?", re.MULTILINE)
"""What is not text in a document with needles."""

CHOICE_STRIDE = 16
"""Of this many queries, one has its choice recorded."""


@dataclasses.dataclass(frozen=True, eq=False)
class Exam:
    """Rows that a model is examined on, all of one length.

    Attributes:
        tokens: bytes.
        is_text: which of them count in bits per byte.
        prompts: the questions of each row; None where there are none.
    """

    tokens: Int[np.ndarray, "rows T"]
    is_text: Bool[np.ndarray, "rows T"]
    prompts: tuple[NeedlePrompt | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What a model gave in an exam.

    Attributes:
        bits_per_byte: over the bytes that count; not a number if none does.
        correct: of each question.
        depths: of each question's needle.
        choices: chosen block ids of the first row's every `CHOICE_STRIDE`-th query, if asked for.
        seconds: of all batches but the first, which compiles; of that one if there is no other.
        rows: that these seconds were spent on.
    """

    bits_per_byte: float
    correct: Bool[np.ndarray, " questions"]
    depths: Float[np.ndarray, " questions"]
    choices: Int[np.ndarray, "L T K J"] | None
    seconds: float
    rows: int

    @property
    def needle_accuracy(self) -> float:
        """Share of questions whose six digits are all right."""
        return float(self.correct.mean())


def plain_exam(documents: Sequence[bytes]) -> Exam:
    """Make an exam of documents alone, for bits per byte."""
    tokens = np.stack([np.frombuffer(data, np.uint8) for data in documents]).astype(np.int32)
    return Exam(tokens, np.ones(tokens.shape, bool), (None,) * len(documents))


def needle_exam(
    documents: Sequence[bytes], *, prompts: int, questions: int, context: int, seed: int
) -> Exam:
    """Hide needles in documents and ask for all of them; the text between counts in bits per byte.

    Args:
        documents: haystacks, used in turn.
        prompts: rows of the exam.
        questions: needles in each, spread uniformly over its depth.
        context: tokens of each row.
        seed: of needles.

    Raises:
        DataError: a document is too short or not text.
    """
    rng, tokenizer = np.random.default_rng(seed), ByteTokenizer()
    made = [
        make_needle_prompt(
            rng,
            documents[row % len(documents)],
            total_tokens=context,
            needles=questions,
            questions=questions,
            tokenizer=tokenizer,
        )
        for row in range(prompts)
    ]
    tokens = np.stack([prompt.tokens for prompt in made])
    is_text = np.ones(tokens.shape, bool)
    for row, counted in zip(tokens, is_text, strict=True):
        for line in NEEDLE_LINE.finditer(row.astype(np.uint8).tobytes()):
            counted[line.start() : line.end()] = False
    return Exam(tokens, is_text, tuple(made))


@partial(jax.jit, static_argnames=("mode", "has_choices"))
def _read(
    model: SpardaLM, tokens: Array, is_text: Array, *, mode: Mode, has_choices: bool
) -> tuple[Array, Array, Array | None]:
    """Give the summed nats of the bytes that count, the likeliest next bytes, and the choices."""
    logits, choices = forward(model, tokens, mode=mode, return_choices=True)
    said = jnp.argmax(logits, axis=-1)
    right = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits[:, :-1], axis=-1) - right
    nats = jnp.sum(jnp.where(is_text[:, 1:], nats, 0.0), axis=1)
    return nats, said, choices[:, 0, ::CHOICE_STRIDE] if has_choices else None


def take_exam(
    model: SpardaLM,
    exam: Exam,
    mode: Mode,
    *,
    batch: int,
    has_choices: bool = False,
    tell: Callable[[int, int], None] | None = None,
) -> Answers:
    """Run an exam in one mode: one compiled function, of one shape, whatever the number of rows.

    Args:
        model: the decoder.
        exam: what it reads.
        mode: as in `forward`.
        batch: rows at once; a short last batch is filled up with rows that are not counted.
        has_choices: keep the chosen blocks of the first row.
        tell: told the rows done and the rows in all.
    """
    rows = len(exam.tokens)
    nats, said, choices, seconds = [], [], None, []
    for first in range(0, rows, batch):
        at = np.minimum(np.arange(first, first + batch), rows - 1)
        begin = time.perf_counter()
        found = _read(model, exam.tokens[at], exam.is_text[at], mode=mode, has_choices=has_choices)
        found = jax.device_get(found)
        seconds.append(time.perf_counter() - begin)
        nats.append(found[0])
        said.append(found[1])
        choices = found[2] if choices is None else choices
        if tell is not None:
            tell(min(first + batch, rows), rows)
    total = float(np.concatenate(nats)[:rows].sum(dtype=np.float64))
    size = int(exam.is_text[:, 1:].sum())
    asked = [
        (score_answers(row[prompt.predicting_positions], prompt), prompt.depths)
        for row, prompt in zip(np.concatenate(said)[:rows], exam.prompts, strict=True)
        if prompt is not None
    ]
    counted = seconds[1:] or seconds
    return Answers(
        bits_per_byte=total / size / np.log(2.0) if size else float("nan"),
        correct=np.concatenate([right for right, _ in asked]) if asked else np.zeros(0, bool),
        depths=np.concatenate([depths for _, depths in asked]) if asked else np.zeros(0),
        choices=choices,
        seconds=sum(counted),
        rows=len(counted) * batch,
    )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class OtherHeads(ForecastSelector):
    """Ranks like `forecast`, by the heads of another model with the same backbone.

    Attributes:
        other: whose heads rank.
    """

    other: SpardaLM

    def probe(
        self, model: nnx.Module, layer: int, target: int, x: Array, q: Array, rope: Rope
    ) -> Array:
        """Project by the other model's head."""
        return ForecastSelector.probe(self, self.other, layer, target, x, q, rope)


def measure_recall(
    model: SpardaLM,
    documents: Sequence[bytes],
    *,
    batch: int,
    selectors: Sequence[str] = ("forecast", "previous_query"),
    fresh: SpardaLM | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Measure the recall of selectors on the states of the sparse mode.

    Args:
        model: the decoder.
        documents: of one length; a multiple of `batch`.
        batch: rows at once.
        selectors: by name.
        fresh: the same backbone with other heads, which rank as `forecast_fresh`.
        tell: told the rows done and the rows in all.

    Returns:
        recall by selector and layer.

    Raises:
        ValueError: the documents do not fill their batches.
    """
    if len(documents) % batch:
        raise ValueError(f"{len(documents)} documents must be a multiple of {batch=}")
    tokens = plain_exam(documents).tokens

    @jax.jit
    def run(model: SpardaLM, fresh: SpardaLM | None, tokens: Array) -> dict[str, Any]:
        others = [] if fresh is None else [OtherHeads(model.config, other=fresh)]
        return recall_totals(model, tokens, selectors=[*selectors, *others])

    totals: dict[str, Any] = {}
    for first in range(0, len(tokens), batch):
        found = jax.device_get(run(model, fresh, tokens[first : first + batch]))
        if totals:
            found = {name: add_totals(totals[name], new) for name, new in found.items()}
        totals = found
        if tell is not None:
            tell(first + batch, len(tokens))
    names = {OtherHeads.__name__: "forecast_fresh"}
    return {names.get(k, k): total.recall_of_layers().tolist() for k, total in totals.items()}
