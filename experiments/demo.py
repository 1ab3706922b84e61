# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What `make demo` runs: train Forecast heads, compare the modes, generate with KV on the host.

    python -m experiments.demo
    python -m experiments.demo --text mine.txt --context 4096

It takes at most five minutes on two cores and writes `report.md`, `report.json` and figures to
`runs/demo`.
"""

import dataclasses
import importlib.metadata
import json
import platform
import sys
import time
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.corpus import training_documents
from experiments.exam import (
    CHOICE_STRIDE,
    Answers,
    Exam,
    measure_recall,
    needle_exam,
    take_exam,
)
from experiments.records import ROOT
from experiments.report import (
    Tell,
    draw_choices,
    draw_memory,
    draw_training,
    print_tables,
    progress,
    write_report,
)
from experiments.shipped_model import (
    Trained,
    Training,
    exam_report,
    measure_offload,
    recall_report,
    train_fresh,
)
from sparda_jax.config import ModelConfig
from sparda_jax.errors import CapacityError, DataError, SpardaError
from sparda_jax.model import SpardaLM
from sparda_jax.shapes import Mode
from sparda_jax.shipped import heldout_texts, load_shipped
from sparda_jax.tokenizer import ByteTokenizer

VERSIONED = ("jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True)
class Config:
    """What the demo reads, and how much it does.

    Attributes:
        text: a text file of your own; None takes a document that comes with the package.
        context: bytes of it that the model reads.
        out: folder for the report and the figures.
        weights: a folder in the layout of `sparda_jax/shipped`; None takes that one.
        questions: needles that are hidden in the text and asked for.
        steps: training steps of the fresh heads.
        train_tokens: length of the text that one such step reads.
        recall_tokens: bytes of the text that recall is measured on.
        new_tokens: tokens that are generated.
        seed: of needles, heads and the order of training text.
    """

    text: Path | None = None
    context: int = 8192
    out: Path = Path("runs/demo")
    weights: Path | None = None
    questions: int = 24
    steps: int = 32
    train_tokens: int = 2048
    recall_tokens: int = 4096
    new_tokens: int = 96
    seed: int = 0


def read_text(path: Path, context: int) -> bytes:
    """Read a text of at least `context` bytes.

    Raises:
        DataError: the file is missing, empty, binary, or too short; in one line.
    """
    if not path.is_file():
        raise DataError(f"{str(path)!r} is not a file (0 of 1 texts found); give --text a file")
    data = path.read_bytes()
    if not data:
        raise DataError(f"{path.name!r} is empty: 0 bytes, but --context asks for {context}")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name!r} is binary: byte {error.start} of {len(data)} is not UTF-8; give a text"
        ) from None
    if b"\0" in data:
        raise DataError(
            f"{path.name!r} is binary: byte {data.index(0)} of {len(data)} is zero; give a text"
        )
    if len(data) < context:
        raise DataError(
            f"{path.name!r} is too short: {len(data)} bytes, but --context asks for {context}; "
            f"give a longer text, or --context {len(data)} or less"
        )
    return data


def check_sizes(config: Config, model_config: ModelConfig) -> None:
    """Refuse a context that the model cannot read, or that leaves it nothing to choose.

    Raises:
        CapacityError: it is too long.
        DataError: it is too short.
    """
    longest = model_config.max_context - config.new_tokens
    if config.context > longest:
        raise CapacityError(
            f"--context {config.context} is too long: the model holds {model_config.max_context} "
            f"tokens and generates {config.new_tokens}; ask for {longest} or less"
        )
    sparse = model_config.sparse
    shortest = 2 * sparse.selected_blocks * sparse.block_size
    for name in ("context", "train_tokens", "recall_tokens"):
        if getattr(config, name) < shortest:
            raise DataError(
                f"--{name.replace('_', '-')} {getattr(config, name)} is too short: a query reads "
                f"{shortest // 2} tokens, so {shortest} are the least that leave it a choice"
            )


def choose_document(config: Config) -> tuple[str, bytes]:
    """Take the user's text, or documents that the backbone never saw, enough for the context."""
    if config.text is not None:
        return config.text.name, read_text(config.text, config.context)
    folder = None if config.weights is None else config.weights / "heldout"
    texts = heldout_texts(folder)
    data = b"\n".join(text.data for text in texts)
    if len(data) < config.context:
        raise DataError(
            f"the held-out documents hold {len(data)} bytes, but --context asks for "
            f"{config.context}; give --text a longer text"
        )
    return texts[0].name, data


def examine(model: SpardaLM, fresh: SpardaLM, exam: Exam, tell: Tell) -> dict[str, Answers]:
    """Take the exam in every mode, once each."""
    takers: dict[str, tuple[SpardaLM, Mode]] = {
        "dense": (model, "dense"),
        "sparse": (model, "sparse"),
        "sparda": (model, "sparda"),
        "sparda_fresh": (fresh, "sparda"),
    }
    answers = {}
    for number, (name, (taker, mode)) in enumerate(takers.items()):
        tell("comparing the modes", number, len(takers))
        answers[name] = take_exam(taker, exam, mode, batch=1, has_choices=mode == "sparda")
    tell("comparing the modes", len(takers), len(takers))
    return answers


def continue_text(
    model: SpardaLM, exam: Exam, new_tokens: int, tell: Tell
) -> tuple[dict[str, Any], str]:
    """Generate from the document up to its first question, resident and offloaded.

    Returns:
        what `measure_offload` gives, and the end of the prompt with what the model wrote.
    """
    prompt = exam.prompts[0]
    assert prompt is not None
    stop = int(prompt.answer_positions[0, 0])
    tokens = prompt.tokens[:stop].tolist()
    found = measure_offload(
        model, [tokens], new_tokens, tell=partial(tell, "generating, resident and offloaded")
    )
    written = ByteTokenizer().decode(tokens[-24:] + found["generated"][0])
    return found, written.strip("\n").replace("```", "'''")


def train(model: SpardaLM, documents: Sequence[bytes], config: Config, tell: Tell) -> Trained:
    """Train heads from scratch for a short while."""
    return train_fresh(
        model,
        documents,
        Training(config.steps, 1, config.train_tokens, config.seed, learning_rate=5e-3),
        tell=lambda row: tell("training Forecast heads", int(row["step"]) + 1, config.steps),
    )


def main(
    config: Config,
    model: SpardaLM | None = None,
    documents: Sequence[bytes] | None = None,
) -> dict[str, Any]:
    """Run the demo and write its report.

    Args:
        config: what to read and how much to do.
        model: another byte model; the shipped one if left out.
        documents: training text; this Python's own library if left out.

    Returns:
        what `report.json` holds.

    Raises:
        DataError: the text cannot be used.
        CapacityError: the context is longer than the model's.
        CheckpointError: the weights are missing or damaged.
    """
    begin = time.perf_counter()
    check_sizes(config, model.config if model is not None else ModelConfig.shipped())
    name, data = choose_document(config)
    if model is None:
        model = load_shipped(folder=config.weights)
    if documents is None:
        documents = [document.data for document in training_documents()]
    exam = needle_exam(
        [data], prompts=1, questions=config.questions, context=config.context, seed=config.seed
    )
    seconds = {"load": time.perf_counter() - begin}
    with progress() as tell:
        trained = train(model, documents, config, tell)
        seconds["train"] = trained.seconds
        mark = time.perf_counter()
        answers = examine(model, trained.model, exam, tell)
        seconds["compare"] = time.perf_counter() - mark
        mark = time.perf_counter()
        tell("measuring recall", 0, 1)
        recall_tokens = min(config.recall_tokens, config.context)
        recall = measure_recall(
            model,
            [data[:recall_tokens]],
            batch=1,
            selectors=("forecast", "previous_query", "random"),
            fresh=trained.model,
            tell=partial(tell, "measuring recall"),
        )
        seconds["recall"] = time.perf_counter() - mark
        mark = time.perf_counter()
        found, generated = continue_text(model, exam, config.new_tokens, tell)
        seconds["generate"] = time.perf_counter() - mark
    seconds |= found["seconds"]
    report = {
        "document": name,
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model))),
        "bits_per_byte": {mode: given.bits_per_byte for mode, given in answers.items()},
        **exam_report(answers),
        **recall_report(recall),
        "recall_tokens": recall_tokens,
        "offload": found["offload"],
        "training": trained.history,
        "answer": next(prompt.answers[0] for prompt in exam.prompts if prompt is not None),
        "generated": generated,
        "seconds": seconds,
        "config": describe(config, model.config),
        "versions": versions(),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    draw(report, answers["sparda"], model.config, config)
    seconds["all"] = time.perf_counter() - begin
    text = json.dumps(report, indent=1, allow_nan=False)
    (config.out / "report.json").write_text(text + "\n", encoding="utf-8")
    write_report(report, config.out)
    print_tables(report)
    print(f"report and figures: {config.out / 'report.md'}  ({seconds['all']:.0f} s)")
    return report


def describe(config: Config, model_config: ModelConfig) -> dict[str, Any]:
    """Note the settings of the run, and those of the model that the report names."""
    settings: dict[str, Any] = {**dataclasses.asdict(config)}
    settings["text"] = None if config.text is None else config.text.name
    del settings["out"], settings["weights"]
    sparse = model_config.sparse
    return settings | {
        "layers": model_config.layers,
        "block_size": sparse.block_size,
        "selected_blocks": sparse.selected_blocks,
        "device": jax.devices()[0].device_kind,
        "dtype": model_config.dtype,
    }


def versions() -> dict[str, str]:
    """Name the versions of Python and of the packages that the numbers depend on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = {name: importlib.metadata.version(name) for name in VERSIONED}
    return {"python": platform.python_version(), **packages, "sparda_jax": project["version"]}


def draw(
    report: dict[str, Any], sparda: Answers, model_config: ModelConfig, config: Config
) -> None:
    """Draw the three figures."""
    draw_training(report["training"], config.out / "training.png")
    assert sparda.choices is not None
    draw_choices(
        np.asarray(sparda.choices),
        stride=CHOICE_STRIDE,
        num_blocks=model_config.sparse.blocks(config.context),
        path=config.out / "choices.png",
    )
    draw_memory(report["offload"], config.out / "memory.png")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config))
    except SpardaError as error:
        sys.exit(f"error: {error}")
