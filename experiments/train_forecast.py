# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Train Forecast heads on a frozen backbone.

    python -m experiments.train_forecast --data texts --output runs/forecast
    python -m experiments.train_forecast --data texts --output runs/forecast --resume

Writes to the output folder: `metrics.jsonl` and TensorBoard events (KL, recall, overlap and
gradient norm, by layer; the same on held-out text), `checkpoints/`, and at the end
`heads.safetensors`, which `sparda_jax.weights.load_forecast_heads` reads. A run that was stopped
goes on with `--resume`, and on a CPU it ends with the same bits as one that was not.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from sparda_jax.errors import CheckpointError, DataError
from sparda_jax.model import SpardaLM
from sparda_jax.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from sparda_jax.tracking import make_tracker
from sparda_jax.training.checkpoint import ForecastCheckpoints
from sparda_jax.training.data import (
    MANIFEST,
    PackedWindows,
    TokenDocuments,
    open_shards,
    split_heldout,
    tokenize_source,
)
from sparda_jax.training.layer import LayerPlan, Routing, default_tile_bytes
from sparda_jax.training.loop import LoopConfig, TrainResult, train_heads
from sparda_jax.training.state import OptimizerConfig, heads_from, init_heads, init_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to train on what, and how. The defaults of the optimiser are the paper's.

    Attributes:
        data: text: a file, a JSONL file or a folder of them; or a folder of token shards that
            `experiments.prepare_data` made.
        output: folder of this run; a new one unless `resume`.
        model: the backbone: `shipped`, a checkpoint folder, or `owner/name` on a hub.
        tokenizer: `bytes`, or the path of a `tokenizer.json`; left out, bytes for the shipped
            model and the tokenizer of the folder for others. Token shards need none.
        heads: `fresh` draws the heads; `model` goes on from those that the model has.
        dtype: of the backbone; heads and moments are f32 always.
        seq_len: tokens of a sequence.
        batch_size: sequences of a micro-batch, over all devices.
        micro_batches: micro-batches whose gradients are added up in a step.
        steps: optimiser steps in all.
        learning_rate: of AdamW, constant after the warm-up.
        warmup_steps: steps over which it rises from zero.
        weight_decay: of AdamW.
        clip_norm: bound on the global norm of the gradient; 0 does not clip.
        routing: whose blocks the layers read while training: the teacher's, as the paper does, or
            the forecast's, as in use.
        seed: of fresh heads, of the order of the data, and of what is held out.
        heldout_share: share of the documents that is never trained on.
        heldout_batches: batches of it that are evaluated; 0 evaluates nothing.
        evaluate_every: steps between evaluations.
        save_every: steps between checkpoints.
        keep_latest: newest checkpoints that stay.
        keep_best: checkpoints that stay for their held-out recall.
        metrics_every_step: measure recall and overlap in every training step too. They cost about
            a quarter of a step; held-out ones are measured regardless.
        resume: go on from the newest checkpoint in `output`.
        trackers: where metrics go: jsonl, tensorboard, wandb, trackio, none.
        devices: how many devices share a micro-batch.
        tile_mb: bound on the largest array of a tile, in MiB; 0 takes what suits the device.
        progress: draw a bar on a terminal.
    """

    data: Path
    output: Path = Path("runs/forecast")
    model: str = "shipped"
    tokenizer: str | None = None
    heads: Literal["fresh", "model"] = "fresh"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seq_len: int = 8192
    batch_size: int = 1
    micro_batches: int = 1
    steps: int = 2000
    learning_rate: float = 5e-4
    warmup_steps: int = 0
    weight_decay: float = 0.01
    clip_norm: float = 0.5
    routing: Routing = "teacher"
    seed: int = 0
    heldout_share: float = 0.05
    heldout_batches: int = 4
    evaluate_every: int = 50
    save_every: int = 50
    keep_latest: int = 5
    keep_best: int = 3
    metrics_every_step: bool = True
    resume: bool = False
    trackers: tuple[str, ...] = ("jsonl", "tensorboard")
    devices: int = 1
    tile_mb: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse what would fail later."""
        if self.devices < 1 or self.batch_size % self.devices:
            raise ValueError(f"{self.batch_size=} must be a multiple of {self.devices=}")
        if self.heldout_batches < 0 or self.tile_mb < 0:
            raise ValueError(f"{self.heldout_batches=} and {self.tile_mb=} must be at least 0")


def main(config: Config, *, model: SpardaLM | None = None) -> TrainResult:
    """Train, or go on training; see the module's text for what is written.

    Args:
        config: of the run.
        model: used instead of loading `config.model`.

    Returns:
        The last state, with the trained heads.

    Raises:
        CheckpointError: `output` holds checkpoints and `resume` is false, or holds none and it is
            true; or the newest is damaged, of another model or of other settings.
        DataError: the text cannot be used, or its ids do not fit the model.
    """
    model = load_model(config) if model is None else model
    training, heldout = load_data(config, model)
    batches = PackedWindows(
        training,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        seed=config.seed,
    )
    optimizer = OptimizerConfig(
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    plan = LayerPlan(
        config=model.config,
        routing=config.routing,
        tile_bytes=(config.tile_mb << 20) or default_tile_bytes(),
        has_metrics=config.metrics_every_step,
    )
    settings = trajectory(config, training)
    folder = config.output / "checkpoints"
    with ForecastCheckpoints(
        folder, keep_latest=config.keep_latest, keep_best=config.keep_best
    ) as checkpoints:
        if config.resume:
            state = checkpoints.restore(model.config, optimizer, settings=settings)
        elif done := checkpoints.steps():
            raise CheckpointError(
                f"{folder} holds {len(done)} checkpoints up to step {done[-1]}; pass --resume to "
                "go on from there, or another --output"
            )
        elif config.heads == "fresh":
            state = init_state(init_heads(model.config, jax.random.key(config.seed)), optimizer)
        else:
            state = init_state(heads_from(model), optimizer)
        tracker = make_tracker(config.trackers, config.output, start_step=int(state.step))
        try:
            tracker.log_hyperparameters(dataclasses.asdict(config))
            result = train_heads(
                model,
                batches,
                plan=plan,
                optimizer=optimizer,
                loop=LoopConfig(
                    steps=config.steps,
                    evaluate_every=config.evaluate_every,
                    save_every=config.save_every,
                ),
                state=state,
                heldout=heldout,
                tracker=tracker,
                checkpoints=checkpoints,
                settings=settings,
                mesh=make_mesh(config.devices),
                progress=None if config.progress else False,
            )
        finally:
            tracker.finish()
    write_heads(config, model, result)
    return result


def load_model(config: Config) -> SpardaLM:
    """Load the backbone that the run names."""
    if config.model == "shipped":
        from sparda_jax.shipped import load_shipped

        return load_shipped(dtype=config.dtype, heads=config.heads == "model")
    from sparda_jax.weights import load_pretrained

    return load_pretrained(config.model, dtype=config.dtype)


def load_data(config: Config, model: SpardaLM) -> tuple[TokenDocuments, list[Any]]:
    """Read the documents: those to train on, and batches of those held out.

    Raises:
        DataError: the text cannot be used, is too short, or has ids that the model lacks.
    """
    if config.data.is_dir() and (config.data / MANIFEST).is_file():
        documents = open_shards(config.data)
    else:
        documents = tokenize_source(config.data, _tokenizer(config))
    if documents.vocab_size > model.config.vocab_size:
        raise DataError(
            f"the tokenizer has {documents.vocab_size} ids, the model {model.config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    if not config.heldout_batches:
        return documents, []
    training, kept = split_heldout(documents, share=config.heldout_share, seed=config.seed)
    windows = PackedWindows(
        kept, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed
    )
    count = min(config.heldout_batches, max(1, int(windows.steps_per_epoch)))
    return training, [windows.batch_at(step) for step in range(count)]


def _tokenizer(config: Config) -> Tokenizer:
    """Find the tokenizer of the text."""
    name = config.tokenizer
    if name is None and config.model != "shipped":
        from sparda_jax.weights.folder import resolve_folder

        return HuggingFaceTokenizer(resolve_folder(config.model))
    return ByteTokenizer() if name in (None, "bytes") else HuggingFaceTokenizer(Path(name))


def trajectory(config: Config, training: TokenDocuments) -> dict[str, Any]:
    """List what decides every step: a resumed run must agree on all of it."""
    names = (
        "model heads dtype seq_len batch_size micro_batches learning_rate warmup_steps "
        "weight_decay clip_norm routing seed"
    ).split()
    return {name: getattr(config, name) for name in names} | {
        "training_tokens": training.token_count
    }


def make_mesh(devices: int) -> jax.sharding.Mesh | None:
    """Make the mesh with the axis `data`; none for one device.

    Raises:
        ValueError: there are fewer devices.
    """
    if devices == 1:
        return None
    there = jax.devices()
    if devices > len(there):
        raise ValueError(f"{devices=} were asked for, {len(there)} are there; ask for fewer")
    return jax.sharding.Mesh(np.array(there[:devices]), ("data",))


def write_heads(config: Config, model: SpardaLM, result: TrainResult) -> None:
    """Write the trained heads as safetensors, f32, with step and sparse rule."""
    from sparda_jax.weights import ForecastHeads, heads_of, save_forecast_heads

    heads = ForecastHeads(
        forecast=result.state.heads.forecast,
        entry=result.state.heads.entry,
        step=int(result.state.step),
        sparse_config=heads_of(model).sparse_config,
        model=config.model,
    )
    save_forecast_heads(config.output / "heads.safetensors", heads)


if __name__ == "__main__":
    import tyro

    done = main(tyro.cli(Config))
    print(f"{int(done.state.step)} steps, {done.seconds:.0f} s in this run")
