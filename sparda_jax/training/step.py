# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""One step of Forecast training as a pure function: walk the frozen layers, add up, update.

Each layer's loss reaches one weight only: the Forecast of the layer before it, or the entry
forecast for layer 0. So there is no backward pass through the model. A walk gives sums over
queries, which add up over micro-batches and devices; they are divided once, at the end.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from sparda_jax.attention import attend_chosen
from sparda_jax.config import ModelConfig
from sparda_jax.model import SpardaLM
from sparda_jax.rope import Rope, apply_rope, make_rope
from sparda_jax.training.attend import attend_listed
from sparda_jax.training.layer import LayerLabels, LayerPlan, label_layer, selector_of
from sparda_jax.training.state import Heads, OptimizerConfig, TrainState


@typing.no_type_check
@struct.dataclass
class Totals:
    """Sums over the queries of a walk, by layer.

    Attributes:
        kl: sum of the KL of all rows that count.
        counted: how many count.
        recall: teacher mass on the forecast's choice, and on the best, by KV head.
        overlap: blocks in both choices, and in either, by KV head.
        tokens: real tokens.
    """

    kl: Float[Array, " L"]
    counted: Float[Array, " L"]
    recall: tuple[Float[Array, "L K"], Float[Array, "L K"]]
    overlap: tuple[Float[Array, "L K"], Float[Array, "L K"]]
    tokens: Float[Array, ""]


@typing.no_type_check
@struct.dataclass
class StepMetrics:
    """What a step reports; recall and overlap are not a number where no query had a choice.

    Attributes:
        kl: mean KL in nats over (query, KV head), by layer; their mean is the loss.
        recall: teacher mass on the forecast's non-pinned blocks ÷ on the best, by layer.
        overlap: intersection over union with the own-query choice, pinned blocks left out.
        grad_norm: L2 norm of the gradient of each layer's loss, before clipping.
        tokens: real tokens read.
    """

    kl: Float[Array, " L"]
    recall: Float[Array, " L"]
    overlap: Float[Array, " L"]
    grad_norm: Float[Array, " L"]
    tokens: Float[Array, ""]

    def as_numbers(self, prefix: str) -> dict[str, float]:
        """Name all numbers for a tracker: means over layers, then every layer."""
        host = jax.device_get(self)
        numbers = {
            f"{prefix}/loss": float(host.kl.mean()),
            f"{prefix}/recall": float(host.recall.mean()),
            f"{prefix}/overlap": float(host.overlap.mean()),
            f"{prefix}/grad_norm": float((host.grad_norm**2).sum() ** 0.5),
        }
        for name in ("kl", "recall", "overlap", "grad_norm"):
            values = getattr(host, name)
            numbers |= {f"{prefix}/{name}/layer_{i}": float(x) for i, x in enumerate(values)}
        return numbers


def project_forecast(
    weight: Float[Array, "D K H"], a: Float[Array, "B T D"], rope: Rope, config: ModelConfig
) -> Float[Array, "B T K H"]:
    """Project and rotate: RoPE(W a), in the dtype of the normalised input `a`."""
    forecast = jnp.einsum("btd,dkh->btkh", a, weight.astype(a.dtype))
    return apply_rope(forecast, rope, config.rope)


def weight_gradient(
    gradient: Float[Array, "B T K H"], a: Float[Array, "B T D"], rope: Rope, config: ModelConfig
) -> Float[Array, "D K H"]:
    """Pull a gradient of rotated forecasts back to the weight, in f32."""
    shape = jax.ShapeDtypeStruct((a.shape[-1], *gradient.shape[2:]), jnp.float32)
    wide = a.astype(jnp.float32)
    pull = jax.linear_transpose(lambda weight: project_forecast(weight, wide, rope, config), shape)
    return pull(gradient)[0]


Inspect = Callable[[int, Float[Array, "B T D"], LayerLabels], None]
"""Is told (layer, its input, its labels) while a walk is traced: for tests and notebooks."""


def walk_layers(
    plan: LayerPlan,
    model: SpardaLM,
    heads: Heads,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    inspect: Inspect | None = None,
) -> tuple[Heads, Totals]:
    """Walk the frozen layers over whole sequences; sum losses, gradients and metrics.

    Layer l reads the blocks that `plan.routing` names, always sparsely. Its loss compares its own
    queries with the forecast for it: that of layer l − 1, or the entry forecast.

    Args:
        plan: the static part.
        model: the backbone; its own heads are not used.
        heads: the heads in training.
        tokens: right-padded rows.
        lengths: real tokens of each row.
        inspect: told about every layer.

    Returns:
        The gradient of each layer's summed loss with respect to its weight (zeros where the plan
        asks for none), and the sums by layer.
    """
    config = plan.config
    batch, queries = tokens.shape
    at = jnp.broadcast_to(jnp.arange(queries)[None, :], (batch, queries))
    at = jnp.where(at < lengths[:, None], at, -1)
    rope = make_rope(config.rope, config.head_dim, at, lengths)
    selector = selector_of("sparda", config, plan.parity)
    x = model.embed_tokens(tokens)
    before = None  # normalised input of the layer whose forecast is due
    labels: LayerLabels | None = None
    gradients, sums = [], []
    for layer, block in enumerate(model.layers):
        with jax.named_scope(f"layer_{layer}"):
            a = block.input_norm(x)
            q, k, v = block.attention.project(a, rope)
            importance = block.attention.importance(v)
            summary = selector.init_summary(batch, queries, config.dtype)
            summary = selector.extend_summary(summary, k, at, importance)
            source = a if before is None else before
            forecast = project_forecast(heads.of(layer), source, rope, config)
            labels = label_layer(plan, q, k, forecast, summary, at, lengths)
            if inspect is not None:
                inspect(layer, x, labels)
            if plan.has_gradient:
                gradients.append(weight_gradient(labels.gradient, source, rope, config))
            sums.append(_sum_rows(labels))
            y = _attend(plan, q, k, v, labels, at, importance)
            x, before = block.finish(x, y), a
    if inspect is not None:
        assert labels is not None  # a model has layers
        inspect(config.layers, x, labels)
    kl, counted, recall, overlap = jax.tree.map(lambda *rows: jnp.stack(rows), *sums)
    totals = Totals(
        kl=kl,
        counted=counted,
        recall=recall,
        overlap=overlap,
        tokens=jnp.sum(lengths).astype(jnp.float32),
    )
    if not plan.has_gradient:
        return jax.tree.map(jnp.zeros_like, heads), totals
    return Heads(forecast=tuple(gradients[1:]), entry=gradients[0]), totals


def _sum_rows(labels: LayerLabels) -> tuple[Array, Array, Any, Any]:
    """Sum rows over batch and queries; recall and overlap by KV head."""
    by_head = lambda rows: jnp.sum(rows, axis=(0, 1))
    return (
        jnp.sum(labels.kl),
        jnp.sum(labels.counted).astype(jnp.float32),
        jax.tree.map(by_head, labels.recall),
        jax.tree.map(by_head, labels.overlap),
    )


def _attend(
    plan: LayerPlan,
    q: Array,
    k: Array,
    v: Array,
    labels: LayerLabels,
    at: Array,
    bias: Array | None,
) -> Array:
    """Read the chosen blocks."""
    size = plan.config.sparse.block_size
    tile = plan.attention_tile(*at.shape)
    if plan.attention == "mask":
        return attend_listed(q, k, v, labels.ids, at, bias, block_size=size, tile=tile)
    return attend_chosen(q, k, v, labels.ids, at, bias, block_size=size, tile_q=tile)


def divide_totals(gradients: Heads, totals: Totals) -> tuple[Heads, StepMetrics]:
    """Turn sums into means: the gradient of Σ over layers of the mean KL, and the metrics."""
    rows = jnp.maximum(totals.counted, 1.0)
    mean = Heads(
        forecast=tuple(g / rows[layer + 1] for layer, g in enumerate(gradients.forecast)),
        entry=gradients.entry / rows[0],
    )
    norms = [jnp.linalg.norm(mean.of(layer)) for layer in range(len(mean.forecast) + 1)]

    def share(pair: tuple[Array, Array]) -> Array:
        part, whole = (jnp.sum(x, axis=-1) for x in pair)
        return jnp.where(whole > 0.0, part / jnp.where(whole > 0.0, whole, 1.0), jnp.nan)

    return mean, StepMetrics(
        kl=totals.kl / rows,
        recall=share(totals.recall),
        overlap=share(totals.overlap),
        grad_norm=jnp.stack(norms),
        tokens=totals.tokens,
    )


StepFunction = Callable[
    [TrainState, SpardaLM, Int[Array, "A B T"], Int[Array, "A B"]], tuple[TrainState, StepMetrics]
]
EvaluateFunction = Callable[[Heads, SpardaLM, Int[Array, "A B T"], Int[Array, "A B"]], Totals]


@functools.lru_cache(maxsize=8)
def make_step(
    plan: LayerPlan, optimizer: OptimizerConfig, *, mesh: Mesh | None = None
) -> StepFunction:
    """Compile one optimiser step over A micro-batches of B sequences; once for equal arguments.

    Args:
        plan: the static part of the walk.
        optimizer: what turns the gradient into an update.
        mesh: spread the B sequences over its axis `data`; the model, the heads and the result are
            the same on all devices.

    Returns:
        `step(state, model, tokens [A B T], lengths [A B])`, which gives the new state and the
        metrics. The old state is donated.
    """
    transform = optimizer.make()

    def step(
        state: TrainState, model: SpardaLM, tokens: Array, lengths: Array
    ) -> tuple[TrainState, StepMetrics]:
        sums = _accumulate(plan, mesh)(state.heads, model, tokens, lengths)
        mean, metrics = divide_totals(*sums)
        gradients: Any = mean
        with jax.numpy_dtype_promotion("standard"):  # optax counts in int32 and decays in f32
            heads: Any = state.heads  # a pytree like any other to optax
            updates, moments = transform.update(gradients, state.optimizer, heads)
        new: Any = optax.apply_updates(heads, updates)
        return TrainState(heads=new, optimizer=moments, step=state.step + 1), metrics

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    same = NamedSharding(mesh, P())
    return jax.jit(
        step, donate_argnums=0, in_shardings=(same, same, None, None), out_shardings=same
    )


@functools.lru_cache(maxsize=8)
def make_evaluate(plan: LayerPlan, *, mesh: Mesh | None = None) -> EvaluateFunction:
    """Compile a walk without gradient: `evaluate(heads, model, tokens [A B T], lengths [A B])`.

    Arguments as `make_step`. The totals of several calls may be added before `divide_totals`.
    """
    plan = dataclasses.replace(plan, has_gradient=False, has_metrics=True)

    def evaluate(heads: Heads, model: SpardaLM, tokens: Array, lengths: Array) -> Totals:
        return _accumulate(plan, mesh)(heads, model, tokens, lengths)[1]

    if mesh is None:
        return jax.jit(evaluate)
    same = NamedSharding(mesh, P())
    return jax.jit(evaluate, in_shardings=(same, same, None, None), out_shardings=same)


def _accumulate(
    plan: LayerPlan, mesh: Mesh | None
) -> Callable[[Heads, SpardaLM, Array, Array], tuple[Heads, Totals]]:
    """Make the function that adds up walks over micro-batches, and over the mesh axis `data`."""

    def walks(heads: Heads, model: SpardaLM, tokens: Array, lengths: Array) -> tuple[Heads, Totals]:
        def walk(micro: tuple[Array, Array]) -> tuple[Heads, Totals]:
            return walk_layers(plan, model, heads, *micro)

        if tokens.shape[0] == 1:
            return walk((tokens[0], lengths[0]))

        def add(sums: tuple[Heads, Totals], micro: tuple[Array, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, walk(micro)), None

        shapes = jax.eval_shape(walk, (tokens[0], lengths[0]))
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return jax.lax.scan(add, zeros, (tokens, lengths))[0]

    if mesh is None:
        return walks

    def spread(
        heads: Heads, model: SpardaLM, tokens: Array, lengths: Array
    ) -> tuple[Heads, Totals]:
        devices = mesh.shape["data"]
        if tokens.shape[1] % devices:
            raise ValueError(
                f"{tokens.shape[1]} sequences in a micro-batch must be a multiple of the {devices} "
                "devices of mesh axis 'data'; change the batch size"
            )
        rows = P(None, "data")
        return jax.shard_map(
            lambda *local: jax.lax.psum(walks(*local), "data"),
            mesh=mesh,
            in_specs=(P(), P(), rows, rows),
            out_specs=P(),
            check_vma=False,
        )(heads, model, tokens, lengths)

    return spread
