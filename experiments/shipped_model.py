# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""How good the shipped model is: bits per byte, needles, recall, offloading, in every mode.

On a GPU, over 512 questions and 50 documents of 8,192 bytes that the backbone never saw:

    python -m experiments.corpus --out runs/corpus
    python -m experiments.shipped_model --corpus runs/corpus

The record is `experiments/results/shipped_model.<device>.json`. `make demo` measures the same on a
CPU with fewer of everything, through the same functions.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import corpus, records
from experiments.exam import Answers, measure_recall, needle_exam, plain_exam, take_exam
from experiments.report import Tell, progress
from sparda_jax.errors import DataError
from sparda_jax.evaluation.needles import accuracy_by_depth
from sparda_jax.generate import Progress, generate
from sparda_jax.layers import ForecastParam, init_forecast
from sparda_jax.model import SpardaLM
from sparda_jax.shapes import Mode
from sparda_jax.shipped import heldout_texts, load_shipped
from sparda_jax.tokenizer import ByteTokenizer
from sparda_jax.training.data import PackedWindows, TokenDocuments
from sparda_jax.training.layer import LayerPlan, default_attention, default_tile_bytes
from sparda_jax.training.loop import LoopConfig, train_heads
from sparda_jax.training.state import OptimizerConfig, heads_from, put_heads

DEPTHS = 4
"""Into how many parts a document is cut when needles are counted by depth."""

SETTINGS = (
    "dtype",
    "context",
    "batch",
    "documents",
    "prompts",
    "questions",
    "recall_documents",
    "fresh_steps",
    "fresh_batch",
    "fresh_tokens",
    "new_tokens",
    "seed",
)
"""The fields of `Config` that a record repeats."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and on how much.

    Attributes:
        corpus: a packed corpus (`experiments.corpus`); None takes the documents that are shipped
            with the package, and trains fresh heads on the running Python's library.
        weights: a folder in the shipped layout; None takes the shipped one.
        dtype: of parameters and KV. Offloading is always compared in f32.
        context: bytes of a document, and of a prompt with its questions.
        batch: rows in a batch.
        documents: documents for bits per byte.
        prompts: documents with needles.
        questions: needles in each, all of them asked for.
        recall_documents: documents for recall, a multiple of `batch`.
        fresh_steps: training steps of heads that start at random; 0 leaves them out.
        fresh_batch: rows in such a step.
        fresh_tokens: length of these rows.
        new_tokens: tokens generated to compare offloaded with resident KV; 0 leaves that out.
        seed: of needles, fresh heads and the order of training text.
        commit: hash of the commit that runs; None asks git.
        dirty: whether the tree differs from it; None asks git.
        date: of the run; None asks the clock.
        out: folder for the record.
    """

    corpus: Path | None = None
    weights: Path | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    context: int = 8192
    batch: int = 8
    documents: int = 50
    prompts: int = 64
    questions: int = 8
    recall_documents: int = 16
    fresh_steps: int = 200
    fresh_batch: int = 8
    fresh_tokens: int = 2048
    new_tokens: int = 128
    seed: int = 0
    commit: str | None = None
    dirty: bool | None = None
    date: str | None = None
    out: Path = records.RESULTS

    def __post_init__(self) -> None:
        """Refuse counts that measure nothing."""
        for name in ("context", "batch", "documents", "prompts", "questions", "recall_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.recall_documents > self.documents:
            raise ValueError(f"{self.recall_documents=} must not exceed {self.documents=}")


@dataclasses.dataclass(frozen=True)
class Training:
    """How heads that start at random are trained.

    Attributes:
        steps: optimiser steps.
        batch: rows in each.
        tokens: length of these rows.
        seed: of the heads, and of the order of text.
        learning_rate: of AdamW, whose other settings are the paper's.
    """

    steps: int
    batch: int
    tokens: int
    seed: int = 0
    learning_rate: float = 2e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """Heads trained from scratch.

    Attributes:
        model: the backbone with these heads.
        history: of each step: `step`, `loss` in nats, `recall`, `overlap`.
        seconds: of all steps, compilation included.
    """

    model: SpardaLM
    history: list[dict[str, float]]
    seconds: float


def with_fresh_heads(model: SpardaLM, seed: int) -> SpardaLM:
    """Copy a model and draw its Forecast heads anew."""
    copy = nnx.clone(model)
    slots = [slot for _, slot in nnx.to_flat_state(nnx.state(copy, ForecastParam))]
    keys = jax.random.split(jax.random.key(seed), len(slots))
    heads = heads_from(copy)
    drawn = [init_forecast(key, model.config)[...].astype(jnp.float32) for key in keys]
    put_heads(copy, dataclasses.replace(heads, forecast=tuple(drawn[1:]), entry=drawn[0]))
    return copy


def pack_documents(documents: Sequence[bytes]) -> TokenDocuments:
    """Lay documents end to end as byte tokens."""
    lengths = np.array([len(data) for data in documents], np.int64)
    return TokenDocuments(
        shards=(np.frombuffer(b"".join(documents), np.uint8).astype(np.int32),),
        shard_of=np.zeros(len(documents), np.int64),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        separator_id=ByteTokenizer.separator_id,
        vocab_size=ByteTokenizer.vocab_size,
    )


def train_fresh(
    model: SpardaLM,
    documents: Sequence[bytes],
    training: Training,
    *,
    tell: Callable[[dict[str, float]], None] | None = None,
) -> Trained:
    """Train Forecast heads from scratch on a frozen backbone.

    Args:
        model: the backbone; it is left as it is.
        documents: training text.
        training: how long, and on how much at once.
        tell: told the numbers of every step.
    """
    copy = with_fresh_heads(model, training.seed)
    windows = PackedWindows(
        pack_documents(documents),
        seq_len=training.tokens,
        batch_size=training.batch,
        seed=training.seed,
    )
    history: list[dict[str, float]] = []

    def on_step(step: int, numbers: Mapping[str, float]) -> None:
        row = {name: numbers[f"train/{name}"] for name in ("loss", "recall", "overlap")}
        history.append({"step": step, **row})
        if tell is not None:
            tell(history[-1])

    result = train_heads(
        copy,
        windows,
        plan=LayerPlan(
            config=model.config, attention=default_attention(), tile_bytes=default_tile_bytes()
        ),
        optimizer=OptimizerConfig(learning_rate=training.learning_rate),
        loop=LoopConfig(steps=training.steps),
        on_step=on_step,
        progress=False,
    )
    put_heads(copy, result.state.heads)
    return Trained(copy, history, result.seconds)


def measure_offload(
    model: SpardaLM,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    tell: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Generate with K and V on the device, then with K and V on the host, and compare.

    Args:
        model: the decoder, f32.
        prompts: token ids; lengths may differ.
        new_tokens: to generate for each, at least 3.
        tell: told the steps done and the steps in all, of both runs together.

    Returns:
        `offload`, the numbers of the offloaded run, and its `seconds`: of the prefill, and of
        decoding without the step that compiles. `fetched` holds blocks by step and layer.
    """
    clock: list[float] = []
    done = 0

    def on_step(progress: Progress) -> None:
        nonlocal done
        done += 1
        clock.append(time.perf_counter())
        if tell is not None:
            tell(done, 2 * new_tokens)

    with jax.default_matmul_precision("highest"):
        run = partial(generate, model, prompts, max_new_tokens=new_tokens, on_step=on_step)
        resident = run(kv="resident")
        clock.clear()
        moved = run(kv="offload")
    traffic = moved.traffic
    steps = len(traffic.fetched)
    seconds = clock[-1] - clock[1]
    rows = len(prompts)
    return {
        "offload": {
            "device_kv_bytes": sum(moved.device_kv_bytes.values()),
            "device_kv_parts": dict(moved.device_kv_bytes),
            "full_kv_bytes": moved.full_kv_bytes,
            "fetched_blocks_per_step": float(traffic.fetched.sum() / steps / rows),
            "fetched_bytes_per_step": float(traffic.fetched_bytes.sum() / steps / rows),
            "chosen_blocks_per_step": float(
                (traffic.fetched.sum() + traffic.resident.sum()) / steps / rows
            ),
            "hit_rate": traffic.hit_rate,
            "equal_tokens": moved.tokens == resident.tokens,
            "tokens": sum(len(tokens) for tokens in moved.tokens),
            "prompts": rows,
            "tokens_per_s": rows * (len(clock) - 2) / seconds,
        },
        "seconds": {"prefill": moved.prefill_seconds, "decode": seconds},
        "fetched": traffic.fetched,
        "generated": moved.tokens,
    }


def read_documents(config: Config) -> tuple[list[bytes], list[bytes]]:
    """Read held-out documents of `config.context` bytes, and whole documents to train on.

    Returns:
        at least `config.documents` held-out documents, and the training documents.

    Raises:
        DataError: there are too few.
    """
    if config.corpus is None:
        held = [corpus.Document(text.name, text.data) for text in heldout_texts()]
        training = [document.data for document in corpus.training_documents()]
    else:
        packed = corpus.load_packed(config.corpus, split="heldout")
        held = [corpus.Document(str(i), packed[i]) for i in range(len(packed))]
        packed = corpus.load_packed(config.corpus, split="training")
        training = [packed[i] for i in range(len(packed))]
    pieces = corpus.cut_documents(held, count=None, document_bytes=config.context)
    if len(pieces) < config.documents:
        raise DataError(
            f"{len(pieces)} held-out documents of {config.context} bytes, but "
            f"{config.documents=}; ask for fewer, or give --corpus with a packed corpus"
        )
    return [piece.data for piece in pieces], training


def exam_report(answers: Mapping[str, Answers]) -> dict[str, Any]:
    """Name the answers of an exam with needles as the report does."""
    any_answers = next(iter(answers.values()))
    depths = {
        name: [
            None if np.isnan(share) else float(share)
            for share in accuracy_by_depth(given.correct, given.depths, DEPTHS)
        ]
        for name, given in answers.items()
    }
    return {
        "needle_accuracy": {name: given.needle_accuracy for name, given in answers.items()},
        "needle_accuracy_by_depth": depths,
        "needle_samples": len(any_answers.correct),
        "forward_seconds_per_row": {name: a.seconds / a.rows for name, a in answers.items()},
    }


def recall_report(recall: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Name recalls as the report does: means over layers from 1 on, and every layer.

    Layer 0 is left out of the means: there `previous_query` ranks with the layer's own queries, so
    it forecasts nothing.
    """
    return {
        "recall": {name: float(np.mean(layers[1:])) for name, layers in recall.items()},
        "recall_by_layer": {name: list(layers) for name, layers in recall.items()},
    }


def measure(
    model: SpardaLM,
    config: Config,
    *,
    heldout: Sequence[bytes],
    training: Sequence[bytes],
    tell: Tell = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure a byte model with trained heads in every mode.

    Args:
        model: with the heads that `sparda` names.
        config: how much of everything.
        heldout: documents of `config.context` bytes.
        training: text for fresh heads.
        tell: told how far it is.

    Returns:
        the keys of the demo's `report.json`, but for `config` and `versions`; without fresh heads
        or generation, without theirs.
    """
    models: dict[str, tuple[SpardaLM, Mode]] = {
        "dense": (model, "dense"),
        "sparse": (model, "sparse"),
        "sparda": (model, "sparda"),
    }
    report: dict[str, Any] = {"seconds": {}}
    if config.fresh_steps:
        steps = config.fresh_steps
        how = Training(steps, config.fresh_batch, config.fresh_tokens, config.seed)
        trained = train_fresh(
            model,
            training,
            how,
            tell=lambda row: tell("training fresh heads", int(row["step"]) + 1, steps),
        )
        models["sparda_fresh"] = (trained.model, "sparda")
        report["seconds"]["train"] = trained.seconds
        report["training"] = [trained.history[0], trained.history[-1]]
    plain = plain_exam(heldout[: config.documents])
    needles = needle_exam(
        heldout,
        prompts=config.prompts,
        questions=config.questions,
        context=config.context,
        seed=config.seed,
    )
    bits, answers = {}, {}
    for name, (examined, mode) in models.items():
        take = partial(take_exam, examined, mode=mode, batch=config.batch)
        bits[name] = take(plain, tell=partial(tell, f"{name}: documents")).bits_per_byte
        answers[name] = take(needles, tell=partial(tell, f"{name}: needles"))
    report |= {"bits_per_byte": bits, "documents": config.documents, **exam_report(answers)}
    recall = measure_recall(
        model,
        heldout[: config.recall_documents],
        batch=config.batch,
        selectors=("forecast", "previous_query", "query", "random"),
        fresh=models["sparda_fresh"][0] if "sparda_fresh" in models else None,
        tell=partial(tell, "recall"),
    )
    report |= recall_report(recall)
    if config.new_tokens:
        room = model.config.max_context - config.new_tokens
        prompts = [
            list(text[: min(room, len(text) - 97 * i)]) for i, text in enumerate(heldout[:3])
        ]
        wide = model if model.config.dtype == "float32" else _in_float32(model)
        found = measure_offload(
            wide, prompts, config.new_tokens, tell=partial(tell, "resident and offloaded")
        )
        report["offload"] = found["offload"]
        report["seconds"] |= found["seconds"]
    return report


def _in_float32(model: SpardaLM) -> SpardaLM:
    """Copy a model to f32."""
    config = dataclasses.replace(model.config, dtype="float32")
    wide = nnx.eval_shape(lambda: SpardaLM(config, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model))
    return nnx.merge(nnx.graphdef(wide), state)


def main(config: Config) -> Path:
    """Measure the shipped model and write the record.

    Returns:
        the record's path.

    Raises:
        ValueError: the tree differs from the commit.
    """
    begin = time.perf_counter()
    head = records.head_of("shipped_model", config, SETTINGS)
    model = load_shipped(config.dtype, folder=config.weights)
    heldout, training = read_documents(config)
    with progress() as tell:
        report = measure(model, config, heldout=heldout, training=training, tell=tell)
    report["seconds"]["all"] = time.perf_counter() - begin
    return records.write(dataclasses.replace(head, rows=[report]), config.out)


if __name__ == "__main__":
    import tyro

    print(main(tyro.cli(Config)))
