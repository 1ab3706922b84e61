# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The backbone's training mixture: lengths, weights, answers that the text gives, and workers."""

import re

import numpy as np
import pytest

from experiments.backbone_data import (
    BOS,
    KINDS,
    MINIMUM_TOKENS,
    SEPARATOR,
    BackboneBatches,
    Mixture,
    PrefetchBatches,
    text_window,
    training_mixture,
)
from experiments.corpus import PackedCorpus

ANSWER_WEIGHT = 4.0
NONE = dict.fromkeys(KINDS, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three documents of made-up source text, packed as `experiments.corpus.pack` would."""
    made = tmp_path_factory.mktemp("packed")
    texts = [
        "".join(f"{word}_{i} = {i * 7919 % 1000}  # {word}\n" for i in range(900))
        for word in ("alpha", "beta", "gamma")
    ]
    data = "".join(texts).encode()
    np.save(made / "training.npy", np.frombuffer(data, np.uint8))
    np.save(made / "training_offsets.npy", np.cumsum([0, *map(len, texts)], dtype=np.int64))
    return made


@pytest.fixture(scope="module")
def corpus(folder):
    return PackedCorpus(np.load(folder / "training.npy"), np.load(folder / "training_offsets.npy"))


def only(kind, **changes):
    return Mixture(**(NONE | {kind: 1.0}), **({"bos_share": 0.0} | changes))


def sequence_of(corpus, kind, seed, seq_len=2048, **changes):
    rng = np.random.default_rng(seed)
    return training_mixture(rng, corpus, seq_len, mixture=only(kind, **changes))


def text_of(tokens):
    return "".join(chr(t) if t < 256 else "|" for t in tokens)


def weighted_spans(text, weights):
    """Runs of tokens that weigh as answers: where each begins, and its text."""
    bounds = np.flatnonzero(np.diff(np.pad(weights == ANSWER_WEIGHT, 1).astype(np.int8)))
    return [(int(a), text[a:b]) for a, b in bounds.reshape(-1, 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seq_len", [MINIMUM_TOKENS, 777, 4096])
def test_a_sequence_of_any_kind_is_exactly_as_long_as_asked(corpus, kind, seq_len):
    for seed in range(25):
        tokens, weights = sequence_of(corpus, kind, seed, seq_len, bos_share=0.5)
        assert tokens.shape == weights.shape == (seq_len,)
        assert tokens.dtype == np.int32
        assert weights.dtype == np.float32
        assert tokens.min() >= 0
        assert tokens.max() <= SEPARATOR
        assert weights[0] == 0.0
        assert set(weights[1:].tolist()) <= {1.0, ANSWER_WEIGHT}


@pytest.mark.parametrize("kind", ["needles", "recall"])
def test_every_answer_of_a_needle_was_said_before(corpus, kind):
    asked = 0
    for seed in range(20):
        tokens, weights = sequence_of(corpus, kind, seed)
        text = text_of(tokens)
        for start, answer in weighted_spans(text, weights):
            question = re.search(r"\n# note (\w{6}) = $", text[:start])[0]
            assert re.fullmatch(r"\d{6}", answer)
            assert text[start + 6] == "\n"
            assert f"{question}{answer}\n" in text[: start - len(question)]
            asked += 1
    assert asked > 50


def test_every_traced_value_follows_from_the_assignments(corpus):
    asked, indirect = 0, 0
    for seed in range(20):
        tokens, weights = sequence_of(corpus, "tracing", seed)
        text = text_of(tokens)
        stated = dict(re.findall(r"# let (\w{6}) = (\w{6})\n", text))
        for start, answer in weighted_spans(text, weights):
            name = re.search(r"\n# value (\w{6}) = $", text[:start])[1]
            steps = 0
            while name in stated:
                name, steps = stated[name], steps + 1
            assert name == answer
            asked += 1
            indirect += steps > 1
    assert asked > 50
    assert indirect > 20


def test_questions_come_both_shortly_after_and_far_after_their_needle(corpus):
    distances = []
    for seed in range(30):
        tokens, weights = sequence_of(corpus, "needles", seed, 4096)
        text = text_of(tokens)
        for start, answer in weighted_spans(text, weights):
            key = re.search(r"# note (\w{6}) = $", text[:start])[1]
            distances.append(start - text.index(f"# note {key} = {answer}"))
    assert np.quantile(distances, 0.05) < 500
    assert np.quantile(distances, 0.9) > 2000


def test_a_new_value_weighs_what_the_mixture_says(corpus):
    tokens, weights = sequence_of(corpus, "recall", 0, new_value_weight=0.25)
    text = text_of(tokens)
    first = text.index(" = ") + 3
    assert weights[first : first + 6].tolist() == [0.25] * 6
    assert weights[first + 6] == 1.0


def test_a_span_comes_again_in_the_copies(corpus):
    rng = np.random.default_rng(0)
    noise = PackedCorpus(rng.integers(256, size=100_000, dtype=np.uint8), np.array([0, 100_000]))
    for seed in range(20):
        tokens, _ = sequence_of(noise, "copies", seed)
        pieces = [tokens[i : i + 8].tobytes() for i in range(len(tokens) - 7)]
        assert len(set(pieces)) <= len(pieces) - 8


def test_plain_text_is_cut_from_the_corpus_with_separators_between_documents(corpus):
    whole = corpus.data.tobytes().decode()
    for seed in range(20):
        window = text_window(np.random.default_rng(seed), corpus, 3000)
        first, *others = text_of(window).split("|")
        assert first in whole
        assert all(whole[corpus.offsets[0] :].count(other) for other in others)
        starts = {whole[start : start + 20] for start in corpus.offsets[:-1]}
        assert all(other[:20] in {s[: len(other)] for s in starts} for other in others)


def test_half_of_the_sequences_open_with_bos(corpus):
    opened = [sequence_of(corpus, "text", seed, bos_share=0.5)[0][0] == BOS for seed in range(200)]
    assert 70 < sum(opened) < 130


def test_kinds_are_mixed_by_their_shares(corpus):
    mixture = Mixture(text=0.5, needles=0.0, recall=0.5, tracing=0.0, copies=0.0, bos_share=0.0)
    notes = 0
    for seed in range(200):
        tokens, _ = training_mixture(np.random.default_rng(seed), corpus, 512, mixture=mixture)
        notes += text_of(tokens).startswith("\n# note ")
    assert 70 < notes < 130


@pytest.mark.parametrize("shares", [{"text": 0.5}, {"text": -0.1, "needles": 0.75}])
def test_shares_that_are_no_shares_are_refused(shares):
    with pytest.raises(ValueError, match=r"at least 0 and sum to 1, not \(.*\) with sum 1\."):
        Mixture(**shares)


def test_a_sequence_too_short_is_refused(corpus):
    with pytest.raises(ValueError, match="seq_len=255 must be at least 256"):
        training_mixture(np.random.default_rng(0), corpus, 255)


def test_a_batch_depends_on_seed_and_step_and_its_rows_on_nothing_else(folder):
    source = BackboneBatches(folder, seed=1, batch_size=4, seq_len=512)
    batch = source.batch_at(7)
    assert batch.tokens.shape == batch.loss_weights.shape == (4, 512)
    smaller = BackboneBatches(folder, seed=1, batch_size=2, seq_len=512).batch_at(7)
    np.testing.assert_array_equal(smaller.tokens, batch.tokens[:2])
    np.testing.assert_array_equal(source.batch_at(7).loss_weights, batch.loss_weights)
    assert len({row.tobytes() for row in batch.tokens}) == 4
    other_seed = BackboneBatches(folder, seed=2, batch_size=4, seq_len=512)
    for other in (source.batch_at(8), other_seed.batch_at(7)):
        assert not np.array_equal(other.tokens, batch.tokens)


def test_workers_give_the_batches_of_one_process_in_order(folder):
    source = BackboneBatches(folder, seed=1, batch_size=2, seq_len=512)
    with PrefetchBatches(source, first_step=5, workers=2, ahead=3) as batches:
        for step in (5, 6, 7, 8):
            assert batches.next_step == step
            got, batch = next(batches)
            assert got == step
            np.testing.assert_array_equal(batch.tokens, source.batch_at(step).tokens)
            np.testing.assert_array_equal(batch.loss_weights, source.batch_at(step).loss_weights)
    batches.close()
    with pytest.raises(ValueError, match=r"closed before step 9; .* first_step=9"):
        next(batches)


def test_an_error_in_a_worker_reaches_the_caller(tmp_path):
    source = BackboneBatches(tmp_path, seed=1, batch_size=2, seq_len=512)
    with (
        PrefetchBatches(source, workers=1, ahead=1) as batches,
        pytest.raises(ValueError, match=r"2 of 2 files of the packed corpus are missing"),
    ):
        next(batches)


@pytest.mark.parametrize(("workers", "ahead"), [(0, 1), (1, 0)])
def test_prefetching_needs_a_worker_and_a_batch_ahead(folder, workers, ahead):
    source = BackboneBatches(folder, seed=1, batch_size=2, seq_len=512)
    with pytest.raises(ValueError, match=f"{workers=} and {ahead=} must both be at least 1"):
        PrefetchBatches(source, workers=workers, ahead=ahead)
