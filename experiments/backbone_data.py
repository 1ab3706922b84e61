# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What the shipped backbone is trained on: source text mixed with tasks of long range.

Plain text hardly asks a small model to look back thousands of bytes, so five kinds of sequence are
mixed: plain windows; text with needles asked for in the middle and at the end; long lists of
needles asked for in another order; variables assigned from variables; text with repeated spans.
Every number is uniform and new to its sequence, so it can only be read, never guessed.

The kind of a sequence, like everything in it, is a pure function of (seed, step, row). Training
resumes at any step without replay, and worker processes may make batches in any order.
"""

import collections
import dataclasses
import functools
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8

from experiments.corpus import PackedCorpus, Split, load_packed
from sparda_jax.evaluation.needles import random_keys, random_values

NEWLINE = 10
BOS = 256
SEPARATOR = 258
MINIMUM_TOKENS = 256
"""The shortest sequence in which every kind has room for a few needles and some text."""

_Lines = tuple[UInt8[np.ndarray, "lines width"], int]  # rows of bytes; where the answer begins


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Shares of the five kinds of sequence, and the weights of their tokens in the loss.

    Attributes:
        text: share of plain windows of the corpus.
        needles: share of text with needles and questions, in the middle and at the end.
        recall: share of lists of needles followed by their questions in another order.
        tracing: share of text with variables assigned from variables, asked for at the end.
        copies: share of text in which earlier spans are repeated.
        answer_weight: weight of an answer's tokens.
        new_value_weight: weight of the digits that say a number for the first time. They cannot be
            predicted, so a value below 1 takes noise out of the gradient.
        bos_share: share of sequences, of any kind, that open with BOS: the model must read text
            with and without it.
        needle_spacing: least and greatest mean distance, in bytes, between the needles and
            questions of a sequence; its logarithm is uniform.
    """

    text: float = 0.35
    needles: float = 0.3
    recall: float = 0.15
    tracing: float = 0.1
    copies: float = 0.1
    answer_weight: float = 4.0
    new_value_weight: float = 1.0
    bos_share: float = 0.5
    needle_spacing: tuple[float, float] = (100.0, 800.0)

    def __post_init__(self) -> None:
        if min(self.shares) < 0 or not math.isclose(sum(self.shares), 1.0, abs_tol=1e-6):
            raise ValueError(
                f"the shares of a Mixture must be at least 0 and sum to 1, not {self.shares} with "
                f"sum {sum(self.shares)}"
            )
        least, greatest = self.needle_spacing
        if not 0 < least <= greatest:
            raise ValueError(f"{self.needle_spacing=} must hold 0 < least <= greatest, in bytes")

    @property
    def shares(self) -> tuple[float, float, float, float, float]:
        """The five shares, in the order of `KINDS`."""
        return self.text, self.needles, self.recall, self.tracing, self.copies


@dataclasses.dataclass(frozen=True, eq=False)
class WeightedBatch:
    """Sequences to train on.

    Attributes:
        tokens: the ids of `sparda_jax.tokenizer.ByteTokenizer`: bytes, BOS in front of some
            sequences, the separator where one document ends and another begins.
        loss_weights: weight of each token as something to be predicted; 0 for the first of a
            sequence, which nothing predicts.
    """

    tokens: Int32[np.ndarray, "B T"]
    loss_weights: Float32[np.ndarray, "B T"]


class _Sequence:
    """Pieces of one sequence with the weights of their tokens, in order."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self._tokens: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []

    def text(self, tokens: Int[np.ndarray, " T"]) -> None:
        """Append text, of weight 1."""
        self._tokens.append(tokens)
        self._weights.append(np.ones(len(tokens), np.float32))

    def line(self, line: UInt8[np.ndarray, " width"], answer: int, *, asked: bool) -> None:
        """Append a line whose answer runs from column `answer` to before its line end."""
        weights = np.ones(len(line), np.float32)
        weights[answer:-1] = self.mixture.answer_weight if asked else self.mixture.new_value_weight
        self._tokens.append(line)
        self._weights.append(weights)

    def finish(self, seq_len: int) -> tuple[Int32[np.ndarray, " T"], Float32[np.ndarray, " T"]]:
        """Join the pieces; they must fill `seq_len` exactly."""
        tokens = np.concatenate(self._tokens).astype(np.int32)
        weights = np.concatenate(self._weights)
        assert len(tokens) == seq_len, (len(tokens), seq_len)
        weights[0] = 0.0
        return tokens, weights


def text_window(
    rng: np.random.Generator, corpus: PackedCorpus, length: int
) -> Int32[np.ndarray, " T"]:
    """Cut a window from the corpus: every byte is as likely as any other to be its middle.

    A quarter of the windows begin where a document does. Where a document ends before the window
    does, a separator follows and then another document from its start.

    Args:
        rng: the source of randomness.
        corpus: the documents.
        length: tokens in the window.
    """
    start = int(rng.integers(len(corpus.data)))
    document = int(np.searchsorted(corpus.offsets, start, side="right")) - 1
    if rng.random() < 0.25:
        start = int(corpus.offsets[document])
    window = np.empty(length, np.int32)
    filled = 0
    while filled < length:
        taken = min(length - filled, int(corpus.offsets[document + 1]) - start)
        window[filled : filled + taken] = corpus.data[start : start + taken]
        filled += taken
        if filled < length:
            window[filled] = SEPARATOR
            filled += 1
            chosen = int(rng.integers(len(corpus.data)))
            document = int(np.searchsorted(corpus.offsets, chosen, side="right")) - 1
            start = int(corpus.offsets[document])
    return window


def training_mixture(
    rng: np.random.Generator,
    documents: PackedCorpus,
    seq_len: int,
    *,
    mixture: Mixture | None = None,
) -> tuple[Int32[np.ndarray, " T"], Float32[np.ndarray, " T"]]:
    """Make one training sequence: its kind is drawn by the mixture's shares.

    Args:
        rng: the source of randomness: the same state gives the same sequence.
        documents: the corpus that text is cut from.
        seq_len: length, in tokens.
        mixture: shares and weights; None takes `Mixture()`.

    Returns:
        tokens [T], and the weight [T] of each as something to be predicted.

    Raises:
        ValueError: if `seq_len < MINIMUM_TOKENS`.
    """
    if seq_len < MINIMUM_TOKENS:
        raise ValueError(f"{seq_len=} must be at least {MINIMUM_TOKENS}")
    mixture = mixture or Mixture()
    kind = int(np.searchsorted(np.cumsum(mixture.shares), rng.random(), side="right"))
    sequence = _Sequence(mixture)
    has_bos = rng.random() < mixture.bos_share
    if has_bos:
        sequence.text(np.array([BOS], np.int32))
    tuple(KINDS.values())[min(kind, len(KINDS) - 1)](rng, documents, seq_len - has_bos, sequence)
    return sequence.finish(seq_len)


def _make_text(
    rng: np.random.Generator, corpus: PackedCorpus, seq_len: int, sequence: _Sequence
) -> None:
    """A plain window."""
    sequence.text(text_window(rng, corpus, seq_len))


def _make_needles(
    rng: np.random.Generator, corpus: PackedCorpus, seq_len: int, sequence: _Sequence
) -> None:
    """Text with a needle or a question every `needle_spacing` bytes, then a run of questions.

    In the middle, half of the questions ask for one of all needles so far, the others for one of
    the last few. The run at the end asks for different ones in random order.
    """
    events = max(2, int(seq_len / _log_uniform(rng, *sequence.mixture.needle_spacing)))
    asks_at = rng.random(events) < rng.choice([0.2, 0.5, 0.7])
    asks_at[0] = False
    number = int(np.count_nonzero(~asks_at))
    lines, answer = _note_lines(rng, number)
    closing = rng.permutation(number)[: int(_log_uniform(rng, 4, 64))]
    room = seq_len - (events + len(closing)) * lines.shape[1]
    text = text_window(rng, corpus, room)
    previous, said = 0, 0
    for asked, place in zip(asks_at, _line_ends(rng, text, events), strict=True):
        sequence.text(text[previous:place])
        previous = place
        if asked:
            back = rng.integers(said) if rng.random() < 0.5 else min(rng.geometric(0.4), said) - 1
            sequence.line(lines[said - 1 - back], answer, asked=True)
        else:
            sequence.line(lines[said], answer, asked=False)
            said += 1
    sequence.text(text[previous:])
    for i in closing:
        sequence.line(lines[i], answer, asked=True)


def _make_recall(
    rng: np.random.Generator, corpus: PackedCorpus, seq_len: int, sequence: _Sequence
) -> None:
    """Rounds of many needles, then questions about each in another order; text fills the rest.

    A round has 4 needles or up to half of the sequence; one question in eight asks for a needle of
    any earlier round.
    """
    lines, answer = _note_lines(rng, seq_len // 48)
    width, said, used = lines.shape[1], 0, 0
    while said < len(lines) and used + 2 * width <= seq_len:
        size = int(_log_uniform(rng, 4, max(5, len(lines))))
        size = min(size, len(lines) - said, (seq_len - used) // (2 * width))
        for i in range(said, said + size):
            sequence.line(lines[i], answer, asked=False)
        asked = said + rng.permutation(size)
        said += size
        older = rng.random(size) < 0.125
        asked = np.where(older, rng.integers(said, size=size), asked)
        for i in asked:
            sequence.line(lines[i], answer, asked=True)
        used += 2 * size * width
    sequence.text(text_window(rng, corpus, seq_len - used))


def _make_tracing(
    rng: np.random.Generator, corpus: PackedCorpus, seq_len: int, sequence: _Sequence
) -> None:
    """Variables set to numbers or to other variables, then asked for by value.

    `# let bacedo = 012345` and `# let rimopu = bacedo` give `# value rimopu = 012345`.
    """
    number = max(2, int(seq_len / _log_uniform(rng, 100, 800)))
    keys = _columns(random_keys(rng, number))
    values = _columns(random_values(rng, number)).copy()
    stated = values.copy()  # what a line says; `values` becomes what it amounts to
    is_alias = rng.random(number) < rng.choice([0.2, 0.5, 0.7])
    is_alias[0] = False
    for i in np.flatnonzero(is_alias):
        source = i - 1 - (rng.integers(i) if rng.random() < 0.5 else 0)
        values[i] = values[source]
        stated[i] = keys[source]
    lets, let_answer = _assignments("let", keys, stated)
    queries, query_answer = _assignments("value", keys, values)
    asked = rng.permutation(number)[: int(_log_uniform(rng, 2, 40))]
    text = text_window(rng, corpus, seq_len - lets.size - len(asked) * queries.shape[1])
    previous = 0
    for i, place in enumerate(_line_ends(rng, text, number)):
        sequence.text(text[previous:place])
        previous = place
        sequence.line(lets[i], let_answer, asked=False)
    sequence.text(text[previous:])
    for i in asked:
        sequence.line(queries[i], query_answer, asked=True)


def _make_copies(
    rng: np.random.Generator, corpus: PackedCorpus, seq_len: int, sequence: _Sequence
) -> None:
    """Text in which spans of 32 to 512 bytes come again, up to the whole sequence later."""
    longest = min(512, seq_len // 8)
    count = min(int(seq_len / _log_uniform(rng, 400, 2000)), seq_len // (2 * longest))
    lengths = [int(_log_uniform(rng, longest / 16, longest)) for _ in range(max(1, count))]
    text = text_window(rng, corpus, seq_len - sum(lengths))  # at least half of the sequence
    places = np.sort(rng.integers(len(text) // 4, len(text), len(lengths)))  # past any one span
    previous = 0
    for length, place in zip(lengths, places.tolist(), strict=True):
        sequence.text(text[previous:place])
        start = int(rng.integers(place - length + 1))
        sequence.text(text[start : start + length])
        previous = place
    sequence.text(text[previous:])


KINDS: dict[str, Callable[[np.random.Generator, PackedCorpus, int, _Sequence], None]] = {
    "text": _make_text,
    "needles": _make_needles,
    "recall": _make_recall,
    "tracing": _make_tracing,
    "copies": _make_copies,
}
"""The kinds of sequence, by the name of their share in `Mixture`."""


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number from `low` to `high`, its logarithm uniform."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _columns(words: list[str]) -> UInt8[np.ndarray, "lines width"]:
    """Words of one length as rows of bytes."""
    return np.frombuffer("".join(words).encode("ascii"), np.uint8).reshape(len(words), -1)


def _assignments(
    verb: str, keys: UInt8[np.ndarray, "lines letters"], values: UInt8[np.ndarray, "lines digits"]
) -> _Lines:
    """Rows of an empty line and `# <verb> <key> = <value>`; the column where the value begins."""
    parts = (_repeat(f"\n# {verb} ", len(keys)), keys, _repeat(" = ", len(keys)))
    rows = np.concatenate([*parts, values, _repeat("\n", len(keys))], axis=1)
    return rows, sum(part.shape[1] for part in parts)


def _note_lines(rng: np.random.Generator, count: int) -> _Lines:
    """Needles with keys and values of their own, as `sparda_jax.evaluation.needles` writes them."""
    return _assignments(
        "note", _columns(random_keys(rng, count)), _columns(random_values(rng, count))
    )


def _repeat(text: str, count: int) -> UInt8[np.ndarray, "lines width"]:
    """The same text on each of `count` rows."""
    return np.tile(np.frombuffer(text.encode("ascii"), np.uint8), (count, 1))


def _line_ends(rng: np.random.Generator, text: Int32[np.ndarray, " T"], count: int) -> list[int]:
    """Places after line ends in `text`, ascending; spread evenly, some may coincide."""
    ends = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(text == NEWLINE) + 1])
    wanted = np.sort(rng.integers(len(text) + 1, size=count))
    return ends[np.searchsorted(ends, wanted, side="right") - 1].tolist()


@dataclasses.dataclass(frozen=True)
class BackboneBatches:
    """Batches of training sequences: a pure function of (seed, step), cheap to send to a process.

    Attributes:
        folder: what `experiments.corpus.pack` wrote.
        seed: of the whole run.
        batch_size: sequences in a batch.
        seq_len: tokens in a sequence.
        mixture: shares of the kinds and weights of the tokens.
        split: the documents read from.
    """

    folder: Path
    seed: int
    batch_size: int
    seq_len: int
    mixture: Mixture = Mixture()
    split: Split = "training"

    def batch_at(self, step: int) -> WeightedBatch:
        """Make the batch of a step: row `r` is drawn from the random state (seed, step, r).

        Args:
            step: from 0.
        """
        corpus = _open_corpus(self.folder, self.split)
        rows = [
            training_mixture(
                np.random.default_rng([self.seed, step, row]),
                corpus,
                self.seq_len,
                mixture=self.mixture,
            )
            for row in range(self.batch_size)
        ]
        return WeightedBatch(np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows]))


class PrefetchBatches:
    """Iterate over (step, batch), made ahead of time by worker processes.

    The order and the content are those of `source.batch_at(first_step)`, `first_step + 1` and so
    on, whatever the number of workers; to resume, start at the next step. Workers are spawned, not
    forked, because the parent holds threads of the runtime; so the script that uses this must
    guard its entry with `if __name__ == "__main__"`. Use it in a `with` statement: leaving it stops
    the workers and waits for them.

    A core makes over a thousand sequences of 8,192 tokens a second, so a few workers are enough.
    """

    def __init__(
        self, source: BackboneBatches, *, first_step: int = 0, workers: int = 4, ahead: int = 16
    ) -> None:
        """Start the workers and ask for the first batches.

        Args:
            source: makes the batches.
            first_step: the step to begin with.
            workers: processes, at least 1.
            ahead: batches asked for before they are needed, at least 1.

        Raises:
            ValueError: if `workers < 1` or `ahead < 1`.
        """
        if min(workers, ahead) < 1:
            raise ValueError(f"{workers=} and {ahead=} must both be at least 1")
        self.next_step = first_step
        self._source = source
        self._pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        self._pending: collections.deque[Future[WeightedBatch]] = collections.deque()
        self._closed = False
        for step in range(first_step, first_step + ahead):
            self._pending.append(self._pool.submit(source.batch_at, step))

    def __iter__(self) -> Iterator[tuple[int, WeightedBatch]]:
        return self

    def __next__(self) -> tuple[int, WeightedBatch]:
        """Return the next step and its batch; an error in a worker is raised here."""
        if self._closed:
            raise ValueError(
                f"closed before step {self.next_step}; make a new PrefetchBatches with first_step="
                f"{self.next_step}"
            )
        batch = self._pending.popleft().result()
        step = self.next_step
        self._pending.append(
            self._pool.submit(self._source.batch_at, step + 1 + len(self._pending))
        )
        self.next_step += 1
        return step, batch

    def close(self) -> None:
        """Stop the workers and wait for them; a second call does nothing."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@functools.cache
def _open_corpus(folder: Path, split: Split) -> PackedCorpus:
    """The packed corpus, opened once in each process."""
    return load_packed(folder, split=split)
