# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The loop around a step: batches in, metrics and checkpoints out, the same after a resume.

Everything that happens depends on the step number and the state alone, so a run that was killed and
resumed from a checkpoint writes the same numbers as one that was not.
"""

import contextlib
import dataclasses
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from sparda_jax.model import SpardaLM
from sparda_jax.tracking import NoTracker, Tracker
from sparda_jax.training.checkpoint import ForecastCheckpoints
from sparda_jax.training.data import TokenBatch
from sparda_jax.training.layer import LayerPlan
from sparda_jax.training.state import Heads, OptimizerConfig, TrainState, heads_from, init_state
from sparda_jax.training.step import StepMetrics, divide_totals, make_evaluate, make_step


@runtime_checkable
class BatchSource(Protocol):
    """Gives the batch of any step: `training.data.PackedWindows` does."""

    micro_batches: int

    def batch_at(self, step: int, micro: int = 0) -> TokenBatch:
        """Read one micro-batch of a step."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """How long, and how often to look and to save.

    Attributes:
        steps: optimiser steps in all, those before a resume included.
        evaluate_every: steps between evaluations on held-out batches; the state after the last
            step, and the one that a run starts with, are evaluated too.
        save_every: steps between checkpoints; the last state is always saved.
    """

    steps: int = 2000
    evaluate_every: int = 50
    save_every: int = 50

    def __post_init__(self) -> None:
        """Refuse a loop that would never turn."""
        for name in ("steps", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclasses.dataclass(frozen=True, eq=False)
class TrainResult:
    """What a run ends with.

    Attributes:
        state: heads, optimiser and step.
        heldout: metrics of the last state on the held-out batches, if there were any.
        seconds: wall time of the loop.
    """

    state: TrainState
    heldout: StepMetrics | None
    seconds: float


OnStep = Callable[[int, Mapping[str, float]], None]
"""Is told (step, numbers) after every step, as the tracker is."""


def train_heads(
    model: SpardaLM,
    batches: BatchSource,
    *,
    plan: LayerPlan,
    optimizer: OptimizerConfig,
    loop: LoopConfig,
    state: TrainState | None = None,
    heldout: Sequence[TokenBatch] = (),
    tracker: Tracker | None = None,
    checkpoints: ForecastCheckpoints | None = None,
    settings: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    on_step: OnStep | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train Forecast heads on a frozen model.

    Training numbers are logged under the steps 0 … `steps` − 1, held-out ones (`heldout/...`, with
    the forecast routing the layers, as it is deployed) beside them and under `steps` at the end.

    Args:
        model: the backbone; unchanged, see `put_heads`.
        batches: what to read at each step and micro-batch.
        plan: how a layer is labelled and routed.
        optimizer: AdamW's settings.
        loop: lengths and intervals.
        state: where to go on; the model's own heads and step 0 if left out.
        heldout: batches of equal shape, for recall that training has not seen.
        tracker: takes the numbers; the caller finishes it.
        checkpoints: where states are saved, with their held-out recall.
        settings: noted in every checkpoint, see `ForecastCheckpoints.save`.
        mesh: devices along its axis `data` share each micro-batch.
        on_step: is told the numbers too.
        progress: draw a bar with the time that is left; `None` draws one on a terminal if rich is
            installed.

    Returns:
        The last state.

    Raises:
        ValueError: the state has as many steps behind it as the loop asks for in all, or more.
        ModuleNotFoundError: `progress` is true and rich is not installed.
    """
    state = init_state(heads_from(model), optimizer) if state is None else state
    first = int(state.step)
    if first >= loop.steps:
        raise ValueError(f"{first} steps are done and {loop.steps=}; ask for more steps")
    if mesh is not None:
        model, state = jax.device_put((model, state), NamedSharding(mesh, P()))
    tracker = NoTracker() if tracker is None else tracker
    step_fn = make_step(plan, optimizer, mesh=mesh)
    look = _HeldOut(plan, model, heldout, mesh)
    pending: _Pending | None = None
    started = time.perf_counter()
    with _progress(progress, loop.steps, first) as advance:
        for step in range(first, loop.steps):
            extra: dict[str, float] = {}
            is_looking = step == first or step % loop.evaluate_every == 0
            is_saving = step > first and step % loop.save_every == 0
            if pending is not None and (is_looking or is_saving):  # keep its time to itself
                advance(pending.report(tracker, on_step))
                pending = None
            if is_looking:
                extra = look.numbers(state.heads)
            if is_saving and checkpoints is not None:
                checkpoints.save(
                    state, plan.config, settings=settings, recall=extra.get("heldout/recall")
                )
            tokens, lengths = _read(batches, step)
            begun = time.perf_counter()
            state, metrics = step_fn(state, model, tokens, lengths)
            if pending is not None:  # while the device works on this step, report the last one
                advance(pending.report(tracker, on_step))
            pending = _Pending(step, metrics, extra, begun)
        if pending is not None:
            advance(pending.report(tracker, on_step))
    last = look.metrics(state.heads)
    if last is not None:
        numbers = last.as_numbers("heldout")
        tracker.log(numbers, step=loop.steps)
        if on_step is not None:
            on_step(loop.steps, numbers)
    if checkpoints is not None:
        recall = None if last is None else last.as_numbers("heldout")["heldout/recall"]
        checkpoints.save(state, plan.config, settings=settings, recall=recall)
    return TrainResult(state=state, heldout=last, seconds=time.perf_counter() - started)


@dataclasses.dataclass(eq=False)
class _Pending:
    """A step whose numbers are not read yet."""

    step: int
    metrics: StepMetrics
    extra: dict[str, float]
    begun: float

    def report(self, tracker: Tracker, on_step: OnStep | None) -> dict[str, float]:
        """Wait for the numbers and pass them on."""
        numbers = self.metrics.as_numbers("train")
        seconds = time.perf_counter() - self.begun
        numbers["train/tokens_per_s"] = float(self.metrics.tokens) / seconds
        numbers |= self.extra
        tracker.log(numbers, step=self.step)
        if on_step is not None:
            on_step(self.step, numbers)
        return numbers


class _HeldOut:
    """Evaluates heads on batches that stay the same."""

    def __init__(
        self, plan: LayerPlan, model: SpardaLM, heldout: Sequence[TokenBatch], mesh: Mesh | None
    ) -> None:
        self._model = model
        self._batches = [
            (jnp.asarray(b.tokens)[None], jnp.asarray(b.lengths)[None]) for b in heldout
        ]
        deployed = dataclasses.replace(plan, routing="forecast")
        self._evaluate = make_evaluate(deployed, mesh=mesh)

    def metrics(self, heads: Heads) -> StepMetrics | None:
        """Evaluate, if there is anything to evaluate on."""
        totals = None
        for tokens, lengths in self._batches:
            found = self._evaluate(heads, self._model, tokens, lengths)
            totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
        if totals is None:
            return None
        return divide_totals(jax.tree.map(jnp.zeros_like, heads), totals)[1]

    def numbers(self, heads: Heads) -> dict[str, float]:
        """Name the metrics for a tracker; empty without batches."""
        found = self.metrics(heads)
        return {} if found is None else found.as_numbers("heldout")


def _read(batches: BatchSource, step: int) -> tuple[Array, Array]:
    """Read all micro-batches of a step: tokens [A B T], lengths [A B]."""
    micro = [batches.batch_at(step, number) for number in range(batches.micro_batches)]
    tokens, lengths = ([getattr(b, name) for b in micro] for name in ("tokens", "lengths"))
    return jnp.asarray(np.stack(tokens)), jnp.asarray(np.stack(lengths))


@contextlib.contextmanager
def _progress(
    wanted: bool | None, steps: int, first: int
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Draw a bar with the remaining time on standard error, or nothing."""
    if wanted is None:
        wanted = sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
    if not wanted:
        yield lambda numbers: None
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "progress=True needs rich: pip install 'sparda-jax[demo]'", name="rich"
        ) from error
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=steps, completed=first, numbers="")

        def advance(numbers: Mapping[str, float]) -> None:
            shown = f"KL {numbers['train/loss']:.4f}  recall {numbers['train/recall']:.3f}"
            bar.update(task, advance=1, numbers=shown)

        yield advance
