# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of Forecast training: heads, optimiser, step, and what they were trained with.

Never the backbone. A checkpoint appears whole or not at all, and one that cannot be read is left
where it is: nothing here deletes a file that a newer, complete checkpoint has not replaced.
"""

import dataclasses
import json
import pathlib
import typing
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from sparda_jax.config import ModelConfig
from sparda_jax.errors import CheckpointError
from sparda_jax.training.state import Heads, OptimizerConfig, TrainState, init_state

FORMAT = 1
"""Of the files; another number is refused."""


class ForecastCheckpoints:
    """The checkpoints of one training run: a folder with one folder per step.

    A context manager; leaving it waits for nothing, because a save returns when it is on the disk.

    Args:
        folder: made when something is saved.
        keep_latest: how many of the newest stay.
        keep_best: how many stay beside them for their held-out recall.

    Raises:
        ValueError: `keep_latest` < 1 or `keep_best` < 0.
    """

    def __init__(
        self, folder: str | pathlib.Path, *, keep_latest: int = 5, keep_best: int = 3
    ) -> None:
        if keep_latest < 1 or keep_best < 0:
            raise ValueError(f"{keep_latest=} must be at least 1 and {keep_best=} at least 0")
        self._folder = pathlib.Path(folder).absolute()
        self._keep = (keep_latest, keep_best)
        self._open: Any = None

    def __enter__(self) -> "ForecastCheckpoints":
        """Give itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Let go of the folder; twice is once."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def steps(self) -> list[int]:
        """List the steps of the complete checkpoints, ascending."""
        if not self._folder.is_dir():
            return []
        return sorted(int(checkpoint.step) for checkpoint in self._checkpointer().checkpoints)

    def save(
        self,
        state: TrainState,
        config: ModelConfig,
        *,
        settings: Mapping[str, Any] | None = None,
        recall: float | None = None,
    ) -> None:
        """Save a state under its step; then drop what is neither new nor good enough.

        Args:
            state: heads, optimiser, step.
            config: of the backbone: its shapes and its sparse rule are noted.
            settings: plain values that a resumed run must share, such as the learning rate.
            recall: held-out recall, by which the best are kept; `None` or not a number if unknown.

        Raises:
            CheckpointError: there is a checkpoint of this step already.
        """
        step = int(state.step)
        if step in self.steps():
            raise CheckpointError(
                f"{self._folder} holds step {step} already, so step {step} cannot be saved; give "
                "a new folder, or resume"
            )
        known = recall is not None and recall == recall
        self._checkpointer().save(
            step,
            _flatten(state),
            metrics={"recall": float(recall)} if known else None,
            custom_metadata={
                "format": FORMAT,
                "model": _model_of(config),
                "settings": _plain(settings or {}),
            },
        )

    def restore(
        self,
        config: ModelConfig,
        optimizer: OptimizerConfig,
        *,
        step: int | None = None,
        settings: Mapping[str, Any] | None = None,
        sharding: Sharding | None = None,
    ) -> TrainState:
        """Load a state, bit for bit as it was saved.

        Args:
            config: of the backbone that it must belong to.
            optimizer: that it was trained with: it says what the moments look like.
            step: which; the newest if left out.
            settings: what was given to `save`; a value that differs is an error.
            sharding: where the arrays shall lie; on the default device if left out.

        Raises:
            CheckpointError: there is none, it cannot be read, it has another format, or it is of
                another model or of other settings.
        """
        held = self.steps()
        if not held:
            raise CheckpointError(f"{self._folder} holds 0 checkpoints, at least 1 is needed")
        step = held[-1] if step is None else step
        if step not in held:
            raise CheckpointError(f"{self._folder} holds no step {step}, only {held}")
        others = f"other steps here: {[other for other in held if other != step] or 'none'}"
        notes = self._notes(step, others)
        if notes["format"] != FORMAT:
            raise CheckpointError(
                f"step {step} has format {notes['format']}, this version reads {FORMAT}; {others}"
            )
        self._check_model(step, notes["model"], _model_of(config))
        wanted = _plain(settings or {})
        differing = [
            f"{name}: {notes['settings'].get(name)!r} there, {wanted.get(name)!r} here"
            for name in sorted({*notes["settings"], *wanted})
            if notes["settings"].get(name) != wanted.get(name)
        ]
        if settings is not None and differing:
            raise CheckpointError(
                f"step {step} was trained with other settings ({'; '.join(differing)}); use the "
                "same, or start a new run from its heads"
            )
        place = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        template = jax.eval_shape(lambda: init_state(_empty_heads(config), optimizer))
        leaves = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
            for name, leaf in _flatten(template).items()
        }
        try:
            loaded = self._checkpointer().load(step, leaves)
        except Exception as error:  # orbax and its storage share no base class
            raise CheckpointError(
                f"step {step} in {self._folder} cannot be read ({_first_line(error)}): the files "
                f"are damaged or incomplete; {others}"
            ) from error
        tree = jax.tree.structure(template)
        return jax.tree.unflatten(tree, [loaded[name] for name in leaves])

    def recall_of(self, step: int) -> float | None:
        """Give the held-out recall that a step was saved with, if any."""
        metrics = self._checkpointer().metadata(step).metrics
        return None if metrics is None else float(metrics["recall"])

    def _notes(self, step: int, others: str) -> Mapping[str, Any]:
        """Read what was noted beside the arrays; refuse a folder that is not ours."""
        try:
            notes = self._checkpointer().metadata(step).custom_metadata
        except Exception as error:  # orbax and its storage share no base class
            raise CheckpointError(
                f"step {step} in {self._folder} is no complete checkpoint ({_first_line(error)}); "
                f"{others}"
            ) from error
        if not isinstance(notes, Mapping) or not {"format", "model", "settings"} <= set(notes):
            raise CheckpointError(
                f"step {step} in {self._folder} is not a checkpoint of Forecast heads; {others}"
            )
        return notes

    def _check_model(self, step: int, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        """Refuse heads of another shape, or of another sparse rule."""
        shapes = [
            f"{model['layers']} heads of {[model[n] for n in ('width', 'kv_heads', 'head_dim')]}"
            for model in (there, here)
        ]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"step {step} has {shapes[0]}, this model needs {shapes[1]}; resume with the model "
                "that it was trained on"
            )
        rules = [
            f"{name}: {there['sparse'].get(name)!r} there, {value!r} here"
            for name, value in here["sparse"].items()
            if there["sparse"].get(name) != value
        ]
        if rules:
            raise CheckpointError(
                f"step {step} was trained for another sparse rule ({'; '.join(rules)}); resume "
                "with the same"
            )

    def _checkpointer(self) -> Any:
        """Open the folder with orbax, once."""
        if self._open is None:
            from orbax.checkpoint import v1 as ocp

            policies = ocp.training.preservation_policies
            latest, best = self._keep
            keep: list[Any] = [policies.LatestN(latest)]
            if best:
                keep.append(
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics["recall"],
                        n=best,
                        keep_checkpoints_without_metrics=False,
                    )
                )
            policy: Any = policies.AnyPreservationPolicy(keep)
            self._open = ocp.training.Checkpointer(str(self._folder), preservation_policy=policy)
        return self._open


def _flatten(state: TrainState) -> dict[str, Any]:
    """Name every leaf by its path: a file then does not depend on the classes of the tree."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _empty_heads(config: ModelConfig) -> Heads:
    """Make heads of the right shapes; to be traced, not filled."""
    head = jnp.zeros((config.width, config.kv_heads, config.head_dim), jnp.float32)
    return Heads(forecast=(head,) * (config.layers - 1), entry=head)


def _model_of(config: ModelConfig) -> dict[str, Any]:
    """Note the shapes of the heads and the sparse rule; `dense_below` does not touch training."""
    sparse = dataclasses.asdict(config.sparse).items()
    return {
        "layers": config.layers,
        "width": config.width,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "sparse": {name: value for name, value in sparse if name != "dense_below"},
    }


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turn settings into what JSON gives back."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(dict(settings))))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__
