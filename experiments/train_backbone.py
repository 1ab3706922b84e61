# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Train the shipped backbone: short sequences densely first, then long ones by the sparse rule.

    python -m experiments.corpus --out runs/corpus          # packs the training text
    python -m experiments.train_backbone --corpus runs/corpus --out runs/backbone

A run is a list of phases, each with its own length, batch, attention and learning rate; weights
go from one phase to the next, optimiser moments do not. A run that is stopped (`--time-limit-s`,
or killed) goes on where it last saved: the state is split into files below 16 MB, so that it can
travel between machines.

The optimiser sees f32 masters, the model runs in bf16. In the sparse phases every layer chooses its
blocks by its own queries (InfLLM-V2), under `stop_gradient`, and attends under a mask.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from experiments.alignment import alignment_loss, choose_queries
from experiments.backbone_data import BackboneBatches, Mixture, PrefetchBatches
from experiments.backbone_state import flatten, load_state, save_arrays, save_state
from experiments.corpus import Document, cut_documents, load_packed
from sparda_jax.chunk import AttentionPath
from sparda_jax.config import ModelConfig
from sparda_jax.evaluation.needles import make_needle_prompt, score_answers
from sparda_jax.layers import ForecastParam
from sparda_jax.model import SpardaLM, forward
from sparda_jax.shapes import Mode
from sparda_jax.shipped import load_shipped
from sparda_jax.tokenizer import ByteTokenizer
from sparda_jax.tracking import JsonlTracker

FIT_FROM, FIT_TO = 5, 25  # steps between which a phase is timed
BACKBONE_MIXTURE = Mixture(new_value_weight=0.2)
RETRIEVAL_MIXTURE = Mixture(
    text=0.25, needles=0.55, recall=0.1, tracing=0.03, copies=0.07, new_value_weight=0.2
)
FAR_MIXTURE = Mixture(
    text=0.22,
    needles=0.6,
    recall=0.08,
    tracing=0.03,
    copies=0.07,
    new_value_weight=0.2,
    needle_spacing=(150.0, 1500.0),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training at one length.

    Attributes:
        name: for logs.
        seq_len: tokens in a sequence.
        batch: sequences in a step.
        steps: optimiser steps.
        learning_rate: at the end of the warm-up; falls by a cosine to `final_share` of it.
        final_share: what is left of it at the end.
        stop_after: leave the phase after this step, before its schedule ends; `None` runs it all.
        warm_up: steps from 0 to `learning_rate`.
        mode: `dense`, or `sparse` for the model's own rule.
        mixture: shares of the kinds of sequence.
        alignment: weight of `alignment_loss` in the loss.
        alignment_sharpness: multiplies the pooled logits in it. A pooled key holds a lone matching
            key divided by `pool_size`; at 1 the model makes up for that by inflating all logits,
            which ruins its attention. Choosing blocks needs their order only.
        alignment_queries: queries of each sequence that it looks at.
    """

    name: str
    seq_len: int
    batch: int
    steps: int
    learning_rate: float
    final_share: float = 0.1
    stop_after: int | None = None
    warm_up: int = 100
    mode: Literal["dense", "sparse"] = "sparse"
    mixture: Mixture = BACKBONE_MIXTURE
    alignment: float = 0.0
    alignment_sharpness: float = 4.0
    alignment_queries: int = 256


PHASES = (
    Phase(
        name="short",
        seq_len=512,
        batch=128,
        steps=5000,
        learning_rate=3e-3,
        final_share=0.2,
        stop_after=3550,
        warm_up=300,
        mode="dense",
    ),
    Phase(name="middle", seq_len=2048, batch=32, steps=250, learning_rate=1e-3, warm_up=50),
    Phase(name="long", seq_len=8704, batch=8, steps=332, learning_rate=1e-3, final_share=0.02),
    Phase(
        name="retrieval",
        seq_len=8704,
        batch=8,
        steps=598,
        learning_rate=6e-4,
        final_share=0.02,
        warm_up=30,
        mixture=RETRIEVAL_MIXTURE,
        alignment=0.5,
        alignment_queries=512,
    ),
    Phase(
        name="far",
        seq_len=8704,
        batch=8,
        steps=883,
        learning_rate=6e-4,
        final_share=0.02,
        warm_up=30,
        mixture=FAR_MIXTURE,
        alignment=0.5,
        alignment_queries=512,
    ),
    Phase(
        name="far again",
        seq_len=8704,
        batch=8,
        steps=346,
        learning_rate=4e-4,
        final_share=0.02,
        warm_up=20,
        mixture=FAR_MIXTURE,
        alignment=0.5,
        alignment_queries=512,
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How to train the shipped backbone.

    Attributes:
        corpus: folder that `experiments.corpus` packed.
        out: where the log, the state and the weights go.
        phases: what to train, in order.
        seed: of weights and data.
        weight_decay: AdamW's.
        clip: bound on the gradient's global norm.
        time_limit_s: stop and save after this many seconds; 0 for never.
        fit_s: choose the steps of the last phase so that it takes this many seconds, from the speed
            of its first steps; 0 keeps the number it has.
        init: folder in the shipped layout whose weights to begin with, instead of random ones.
        save_every_s: seconds between saves.
        log_every: steps between log lines.
        workers: processes that make batches.
        attention: `cudnn` on a GPU, `mask` elsewhere.
        evaluate: measure needles and text at the end of each phase.
        questions: needle questions per evaluation.
    """

    corpus: Path
    out: Path = Path("runs/backbone")
    phases: tuple[Phase, ...] = PHASES
    seed: int = 0
    weight_decay: float = 0.05
    clip: float = 1.0
    time_limit_s: float = 0.0
    fit_s: float = 0.0
    init: Path | None = None
    save_every_s: float = 120.0
    log_every: int = 50
    workers: int = 8
    attention: AttentionPath = "mask"
    evaluate: bool = True
    questions: int = 64


def train(config: Config, model_config: ModelConfig | None = None) -> dict[str, Any]:
    """Train, or go on training, and save the weights.

    Args:
        config: of the run.
        model_config: of the model; `ModelConfig.shipped()` if left out.

    Returns:
        A summary: whether the run is finished, tokens seen, and the evaluations.
    """
    started = time.monotonic()
    model_config = model_config or ModelConfig.shipped()
    model_config = dataclasses.replace(model_config, dtype="float32")
    model = SpardaLM(model_config, rngs=nnx.Rngs(config.seed))
    graph, heads, rest = nnx.split(model, ForecastParam, ...)
    params = nnx.to_pure_dict(cast(nnx.State, rest))
    if config.init is not None:
        earlier = load_shipped("float32", heads=False, folder=config.init)
        params = nnx.to_pure_dict(cast(nnx.State, nnx.split(earlier, ForecastParam, ...)[2]))
    config.out.mkdir(parents=True, exist_ok=True)
    state = {"phase": 0, "step": 0, "params": params, "moments": None}
    state = load_state(config.out, state)
    done = _global_step(config, state)  # a line's step counts the steps that are behind it
    tracker = JsonlTracker(config.out, start_step=done + 1 if done else 0)
    tracker.log_hyperparameters(_plain(dataclasses.asdict(config)))
    summary: dict[str, Any] = {"finished": True, "evaluations": {}}

    try:
        for index in range(state["phase"], len(config.phases)):
            phase = config.phases[index]
            finished = _train_phase(config, index, graph, heads, state, tracker, started)
            if not finished:
                summary["finished"] = False
                break
            if config.evaluate:
                merged = merge_weights(graph, heads, state["params"], "bfloat16")
                result = evaluate(merged, config, max_tokens=phase.seq_len, mode=phase.mode)
                summary["evaluations"][phase.name] = result
                tracker.log(result, step=_global_step(config, state))
                print(json.dumps({"phase": phase.name} | result), flush=True)
            state |= {"phase": index + 1, "step": 0, "moments": None}
            save_state(config.out, state)
    finally:
        tracker.finish()
    save_arrays(config.out / "weights.npz", flatten(state["params"], np.dtype(jnp.bfloat16)))
    summary["seconds"] = time.monotonic() - started
    (config.out / "summary.json").write_text(json.dumps(_plain(summary), indent=1))
    return summary


def _train_phase(
    config: Config,
    index: int,
    graph: nnx.GraphDef,
    heads: Any,
    state: dict[str, Any],
    tracker: JsonlTracker,
    started: float,
) -> bool:
    """Train one phase from where `state` stands; returns whether it came to its end."""
    phase = config.phases[index]
    tx = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)
        ),
        optax.scale(-1.0),
    )
    if state["moments"] is None:
        state["moments"] = tx.init(state["params"])
    else:
        shape = jax.eval_shape(tx.init, state["params"])
        state["moments"] = jax.tree.unflatten(jax.tree.structure(shape), state["moments"])
    step_fn = make_step(graph, heads, tx, phase, config.attention)
    source = BackboneBatches(
        config.corpus, config.seed + index, phase.batch, phase.seq_len, phase.mixture
    )
    steps, fit = phase.steps, config.fit_s > 0 and index == len(config.phases) - 1
    entered = fit_from = saved = last = time.monotonic()
    first = logged = state["step"]
    with PrefetchBatches(source, first_step=first, workers=config.workers) as batches:
        for step, batch in batches:
            if step >= min(steps, phase.stop_after or steps):
                break
            if fit and step - first == FIT_FROM:
                fit_from = time.monotonic()
            if fit and step - first == FIT_TO:
                jax.block_until_ready(state["params"])
                each = (time.monotonic() - fit_from) / (FIT_TO - FIT_FROM)
                steps = step + int((config.fit_s - (time.monotonic() - entered)) / each)
                print(f"{phase.name}: {each:.3f} s a step, so {steps} steps fit", flush=True)
            state["params"], state["moments"], metrics = step_fn(
                state["params"],
                state["moments"],
                batch.tokens,
                batch.loss_weights,
                choose_queries(batch, phase.alignment_queries, config.seed, step),
                np.float32(learning_rate(phase, step, steps)),
            )
            state["step"] = step + 1
            if (step + 1) % config.log_every == 0:
                values = {name: float(value) for name, value in metrics.items()}
                now = time.monotonic()
                tokens = (step + 1 - logged) * phase.batch * phase.seq_len
                values["tokens_per_s"] = tokens / (now - last)
                values["learning_rate"] = learning_rate(phase, step, steps)
                logged, last = step + 1, now
                tracker.log(values, step=_global_step(config, state))
                shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
                print(f"{phase.name} {step + 1}/{steps} {shown}", flush=True)
                out_of_time = 0 < config.time_limit_s < now - started
                if out_of_time or now - saved > config.save_every_s:
                    save_state(config.out, state)
                    saved = now
                if out_of_time:
                    return False
    return True


def learning_rate(phase: Phase, step: int, steps: int) -> float:
    """Rise linearly over the warm-up, then fall by a cosine to the final share at `steps`."""
    if step < phase.warm_up:
        return phase.learning_rate * (step + 1) / phase.warm_up
    done = min(1.0, (step - phase.warm_up) / max(1, steps - phase.warm_up))
    share = phase.final_share + (1 - phase.final_share) * 0.5 * (1 + math.cos(math.pi * done))
    return phase.learning_rate * share


def make_step(
    graph: nnx.GraphDef,
    heads: Any,
    tx: optax.GradientTransformation,
    phase: Phase,
    attention: AttentionPath,
) -> Any:
    """Make the jitted step: (params, moments, tokens, weights, rate) → (…)."""

    def loss_fn(
        params: Any,
        tokens: Int[Array, "B T"],
        weights: Float[Array, "B T"],
        looked_at: Int[Array, "B Q"],
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        model = merge_weights(graph, heads, params, "bfloat16")
        seen: dict[str, list[Any]] = {"q": [], "cache": []}
        logits = forward(
            model,
            tokens,
            mode=phase.mode,
            attention=attention,
            observe=lambda name, _, value: seen.get(name, []).append(value),
        )[:, :-1]
        wanted, weight = tokens[:, 1:], weights[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        total = jnp.sum(losses * weight) / jnp.sum(weight)
        right = (jnp.argmax(logits, axis=-1) == wanted).astype(jnp.float32)
        answers = _mean_where(right, weight > 1.0)
        plain = _mean_where(losses, weight == 1.0)
        aligned = recalled = jnp.float32(0.0)
        if phase.alignment > 0:
            for q, cache in zip(seen["q"], seen["cache"], strict=True):
                divergence, recall = alignment_loss(
                    q,
                    cache.k,
                    cache.summary.pooled,
                    looked_at,
                    model.config.sparse,
                    phase.alignment_sharpness,
                )
                aligned += divergence / len(seen["q"])
                recalled += recall / len(seen["q"])
        objective = total + phase.alignment * aligned
        return objective, {
            "loss": total,
            "alignment": aligned,
            "recall": recalled,
            "answer_accuracy": answers,
            "text_bits": plain / jnp.log(2.0),
        }

    @jax.jit
    def step(
        params: Any, moments: Any, tokens: Array, weights: Array, looked_at: Array, rate: Array
    ) -> tuple[Any, Any, Any]:
        (_, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
            params, tokens, weights, looked_at
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = tx.update(gradient, moments, params)
            updates = jax.tree.map(lambda u: u * rate, updates)
            params = optax.apply_updates(params, updates)
        return params, moments, metrics | {"grad_norm": optax.tree.norm(gradient)}

    return step


def _mean_where(x: Float[Array, "B T"], chosen: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Average over the chosen entries; 0 where there are none."""
    count = jnp.sum(chosen, dtype=jnp.float32)
    return jnp.sum(jnp.where(chosen, x, 0.0)) / jnp.maximum(count, 1.0)


def merge_weights(graph: nnx.GraphDef, heads: Any, params: Any, dtype: str) -> SpardaLM:
    """Put f32 masters into a model as `dtype`."""

    def as_dtype(tree: Any) -> Any:
        return jax.tree.map(lambda p: p.astype(dtype), tree)

    model = nnx.merge(graph, as_dtype(heads), nnx.State(as_dtype(params)))
    model.config = dataclasses.replace(model.config, dtype=dtype)
    for layer in model.layers:
        layer.config = model.config
        layer.attention.config = model.config
    return model


def evaluate(
    model: SpardaLM, config: Config, *, max_tokens: int, mode: Mode, lengths: tuple[int, ...] = ()
) -> dict[str, float]:
    """Measure needles at several lengths, and bits per byte of held-out text."""
    run = jax.jit(lambda m, t: forward(m, t, mode=mode))
    held = load_packed(config.corpus, split="heldout")
    files = [Document(str(i), held[i]) for i in range(len(held))]
    texts = [d.data for d in cut_documents(files, count=None, document_bytes=8192)]
    results: dict[str, float] = {}
    rng = np.random.default_rng(1234)
    lengths = lengths or tuple(n for n in (512, 2048, 8192) if n <= max(max_tokens, 512))
    for length in lengths:
        per_prompt = 8 if length > 512 else 4
        right = []
        for i in range(-(-config.questions // per_prompt)):
            prompt = make_needle_prompt(
                rng,
                texts[i % len(texts)],
                total_tokens=length,
                needles=per_prompt,
                questions=per_prompt,
                tokenizer=ByteTokenizer(),
            )
            said = np.asarray(jnp.argmax(run(model, jnp.asarray(prompt.tokens)[None])[0], axis=-1))
            right.append(score_answers(said[prompt.predicting_positions], prompt))
        results[f"needle_accuracy_{length}"] = float(np.mean(np.concatenate(right)))
    size = min(max_tokens, 8192)
    bits = []
    for text in texts[:8]:
        tokens = jnp.asarray(list(text[:size]), jnp.int32)[None]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            run(model, tokens)[:, :-1], tokens[:, 1:]
        )
        bits.append(float(jnp.mean(losses)) / math.log(2.0))
    results["bits_per_byte"] = float(np.mean(bits))
    return results


def _global_step(config: Config, state: Mapping[str, Any]) -> int:
    """Steps of the phases before, plus those of this one."""
    return sum(phase.steps for phase in config.phases[: state["phase"]]) + state["step"]


def _plain(value: Any) -> Any:
    """Make a value that JSON can hold."""
    return json.loads(json.dumps(value, default=str))


def main(config: Config) -> dict[str, Any]:
    """Train the backbone, see `train`."""
    return train(config)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
