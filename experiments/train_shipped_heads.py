# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Train the Forecast heads that are shipped beside the small backbone, on its own mixture.

    python -m experiments.corpus --out runs/corpus
    python -m experiments.train_shipped_heads --corpus runs/corpus

The loss and the optimiser are those of `experiments.train_forecast`; the text is the mixture that
the backbone was trained on, because plain text asks for few blocks far away. Heads may start from a
training-free guess: the forecast of layer l is the mean, over the query heads of a group, of layer
l + 1's query projection, brought to layer l's norm. Training then has to improve on it only.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.backbone_data import BackboneBatches
from experiments.train_backbone import RETRIEVAL_MIXTURE
from sparda_jax.model import SpardaLM
from sparda_jax.shipped import FOLDER, load_shipped, save_heads
from sparda_jax.tracking import JsonlTracker
from sparda_jax.training.checkpoint import ForecastCheckpoints
from sparda_jax.training.data import TokenBatch
from sparda_jax.training.layer import LayerPlan, Routing, default_attention, default_tile_bytes
from sparda_jax.training.loop import LoopConfig, train_heads
from sparda_jax.training.state import Heads, OptimizerConfig, heads_from, init_state, put_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the shipped heads are trained.

    Attributes:
        corpus: folder that `experiments.corpus` packed.
        out: folder for the log and the checkpoints.
        shipped: folder in the shipped layout whose backbone is used, and which gets the heads.
        start: `query` for the guess from the next layer's query projection, `fresh` for random,
            `shipped` to go on from the heads that are there.
        dtype: of the backbone.
        seq_len: tokens in a sequence.
        batch: sequences in a step.
        steps: optimiser steps.
        learning_rate: of AdamW.
        routing: whose blocks the layers read while training.
        heldout_batches: batches of held-out text for recall.
        evaluate_every: steps between evaluations, and between checkpoints.
        seed: of the data.
        resume: go on from the newest checkpoint in `out`.
    """

    corpus: Path
    out: Path = Path("runs/shipped_heads")
    shipped: Path = FOLDER
    start: Literal["query", "fresh", "shipped"] = "query"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seq_len: int = 8704
    batch: int = 8
    steps: int = 300
    learning_rate: float = 1e-3
    routing: Routing = "teacher"
    heldout_batches: int = 1
    evaluate_every: int = 50
    seed: int = 1000
    resume: bool = False


@dataclasses.dataclass
class MixtureBatches:
    """The backbone's mixture as a source for Forecast training: nothing is weighted.

    Attributes:
        source: makes the sequences.
        micro_batches: per optimiser step.
    """

    source: BackboneBatches
    micro_batches: int = 1

    def batch_at(self, step: int, micro: int = 0) -> TokenBatch:
        """Make one micro-batch of a step."""
        tokens = self.source.batch_at(step * self.micro_batches + micro).tokens
        rows = len(tokens)
        return TokenBatch(
            tokens=tokens,
            lengths=np.full(rows, tokens.shape[1], np.int32),
            segments=np.zeros_like(tokens),
            first_documents=np.zeros(rows, np.int64),
            first_offsets=np.zeros(rows, np.int64),
        )


def heads_from_queries(model: SpardaLM) -> Heads:
    """Guess the heads: forecast_l = mean over G of W_q of layer l + 1 · (norm_{l+1} / norm_l).

    Both norms scale the same normalised residual stream, as far as what layer l adds is small
    beside it. The entry forecast is the mean of layer 0's own queries.
    """
    kv_heads = model.config.kv_heads

    def mean_query(target: int, layer: int) -> Float[Array, "D K H"]:
        weight = model.layers[target].attention.q_proj[...].astype(jnp.float32)
        width, _, dim = weight.shape
        mean = weight.reshape(width, kv_heads, -1, dim).mean(axis=2)
        wanted, given = (
            model.layers[i].input_norm.scale[...].astype(jnp.float32) for i in (target, layer)
        )
        return mean * (wanted / given)[:, None, None]

    forecast = [mean_query(layer + 1, layer) for layer in range(model.config.layers - 1)]
    return Heads(forecast=tuple(forecast), entry=mean_query(0, 0))


def main(config: Config) -> dict[str, Any]:
    """Train the heads and write them into the shipped folder.

    Returns:
        Steps, seconds, and held-out recall by layer at the start and at the end.
    """
    model = load_shipped(config.dtype, heads=config.start == "shipped", folder=config.shipped)
    heads = heads_from_queries(model) if config.start == "query" else heads_from(model)
    plan = LayerPlan(
        config=model.config,
        routing=config.routing,
        attention=default_attention(),
        tile_bytes=default_tile_bytes(),
        has_metrics=False,
    )
    optimizer = OptimizerConfig(learning_rate=config.learning_rate)
    source = BackboneBatches(
        config.corpus, config.seed, config.batch, config.seq_len, RETRIEVAL_MIXTURE
    )
    held = MixtureBatches(dataclasses.replace(source, split="heldout"))
    state = init_state(heads, optimizer)
    config.out.mkdir(parents=True, exist_ok=True)
    history: list[dict[str, float]] = []
    with ForecastCheckpoints(config.out / "checkpoints") as checkpoints:
        if config.resume:
            state = checkpoints.restore(model.config, optimizer)
        tracker = JsonlTracker(config.out, start_step=int(state.step))

        def tell(step: int, numbers: Any) -> None:
            history.append({"step": step} | dict(numbers))
            shown = {k: round(v, 4) for k, v in numbers.items() if "/" not in k or k.count("/") < 2}
            print(step, json.dumps(shown), flush=True)

        result = train_heads(
            model,
            MixtureBatches(source),
            plan=plan,
            optimizer=optimizer,
            loop=LoopConfig(
                steps=config.steps,
                evaluate_every=config.evaluate_every,
                save_every=config.evaluate_every,
            ),
            state=state,
            heldout=[held.batch_at(step) for step in range(config.heldout_batches)],
            tracker=tracker,
            checkpoints=checkpoints,
            on_step=tell,
            progress=False,
        )
        tracker.finish()
    put_heads(model, result.state.heads)
    save_heads(config.shipped, model, step=int(result.state.step))
    looked = [numbers for numbers in history if "heldout/recall" in numbers]
    return {"steps": int(result.state.step), "seconds": result.seconds, "heldout": looked}


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
