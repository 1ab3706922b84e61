# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Where training metrics go: a JSONL file by default, other places by name.

A tracker is told where its run starts. A run that resumes at step s will log s again, so what an
earlier, interrupted run logged from s on is dropped: each step appears once.
"""

import importlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol, SupportsFloat, runtime_checkable

_PIP_NAMES = {
    "tensorboard": "'sparda-jax[train]'",
    "trackio": "trackio",
    "wandb": "wandb",
}


@runtime_checkable
class Tracker(Protocol):
    """Takes the metrics of one run, step by step."""

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Note the settings of the run, once, before the first `log`."""

    def log(self, metrics: Mapping[str, SupportsFloat], *, step: int) -> None:
        """Note numbers by name at a step; steps grow."""

    def finish(self) -> None:
        """Write what is pending and close; twice is once."""


class NoTracker:
    """Takes everything and keeps nothing."""

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Ignore the settings."""

    def log(self, metrics: Mapping[str, SupportsFloat], *, step: int) -> None:
        """Ignore the numbers."""

    def finish(self) -> None:
        """Do nothing."""


class JsonlTracker:
    """Appends one JSON object per step to `metrics.jsonl`; settings go to `hyperparameters.json`.

    A number that is not finite is written as the string `"nan"`, `"inf"` or `"-inf"`, which
    `float` reads back, because JSON has no such numbers. Every line reaches the file before `log`
    returns, so a killed run loses at most the line it was writing, and a later start drops that
    torn line.

    Args:
        folder: made if it is missing.
        start_step: the first step of this run; earlier lines stay, the others are dropped.
    """

    def __init__(self, folder: str | os.PathLike[str], *, start_step: int = 0) -> None:
        self._folder = pathlib.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "metrics.jsonl"
        _drop_lines_from(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Write the settings; what JSON has no word for is written as its `str`."""
        path = self._folder / "hyperparameters.json"
        _replace(path, json.dumps(dict(hyperparameters), indent=2, default=str) + "\n")

    def log(self, metrics: Mapping[str, SupportsFloat], *, step: int) -> None:
        """Append a line: the step, the wall time in seconds, the numbers.

        Args:
            metrics: numbers by name.
            step: the training step.

        Raises:
            ValueError: if a metric is named `step` or `wall_time`, or the tracker has finished.
        """
        taken = {"step", "wall_time"} & set(metrics)
        if taken:
            raise ValueError(f"metrics must not be named {sorted(taken)}: each line has these")
        numbers = {name: _finite_or_name(float(value)) for name, value in metrics.items()}
        line = {"step": step, "wall_time": round(time.time(), 3)} | numbers
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardTracker:
    """Writes a TensorBoard event file with the `tensorboard` package alone.

    The file opens with a session start at `start_step`: TensorBoard then hides what earlier files
    of the folder hold from that step on.

    Args:
        folder: made if it is missing; one event file per run.
        start_step: the first step of this run.

    Raises:
        ModuleNotFoundError: if `tensorboard` is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, start_step: int = 0) -> None:
        _require("tensorboard")
        # Generated modules: their classes appear at import, so a type checker cannot see them.
        self._event, self._summary, self._tensor = (
            importlib.import_module(f"tensorboard.compat.proto.{name}_pb2")
            for name in ("event", "summary", "tensor")
        )
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("xb"))
        self._is_open = True
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._write(file_version="brain.Event:2")
        self._write(step=start_step, session_log=start)

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Write the settings as a table in the text tab."""
        rows = [f"| {name} | {value} |" for name, value in hyperparameters.items()]
        table = "\n".join(["| setting | value |", "| --- | --- |", *rows])
        tensor = self._tensor.TensorProto(dtype="DT_STRING", string_val=[table.encode()])
        tensor.tensor_shape.dim.add(size=1)
        value = self._summary.Summary.Value(tag="hyperparameters", tensor=tensor)
        value.metadata.plugin_data.plugin_name = "text"
        self._write_summary([value], step=0)

    def log(self, metrics: Mapping[str, SupportsFloat], *, step: int) -> None:
        """Write one scalar per metric."""
        value = self._summary.Summary.Value
        self._write_summary(
            [value(tag=name, simple_value=float(number)) for name, number in metrics.items()],
            step=step,
        )

    def finish(self) -> None:
        """Write what is pending and close the file."""
        if self._is_open:
            self._is_open = False
            self._writer.close()

    def _write_summary(self, values: Sequence[Any], *, step: int) -> None:
        self._write(step=step, summary=self._summary.Summary(value=values))

    def _write(self, **fields: Any) -> None:
        event = self._event.Event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())
        self._writer.flush()


class ServiceTracker:
    """Sends metrics to a service whose package has `init`, `log` and `finish`: wandb, trackio.

    The run starts at the first call, so that the settings travel with its start. A resumed run is
    a run of its own, named after the step it starts at: services cannot take logged steps back.

    Args:
        package: `"wandb"` or `"trackio"`.
        folder: its name becomes the run's name.
        start_step: the first step of this run.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """

    def __init__(
        self, package: str, folder: str | os.PathLike[str], *, start_step: int = 0
    ) -> None:
        self._module = _require(package)
        name = pathlib.Path(folder).absolute().name
        self._name = f"{name}-from-step-{start_step}" if start_step else name
        self._is_open = False

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Start the run with these settings."""
        self._start(dict(hyperparameters))

    def log(self, metrics: Mapping[str, SupportsFloat], *, step: int) -> None:
        """Send the numbers."""
        self._start({})
        self._module.log({name: float(value) for name, value in metrics.items()}, step=step)

    def finish(self) -> None:
        """Tell the service that the run is over."""
        if self._is_open:
            self._is_open = False
            self._module.finish()

    def _start(self, config: dict[str, Any]) -> None:
        if not self._is_open:
            self._is_open = True
            self._module.init(project="sparda_jax", name=self._name, config=config)


class CompositeTracker:
    """Passes everything on to several trackers.

    Args:
        trackers: in the order in which they are told.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Note the settings everywhere."""
        for tracker in self._trackers:
            tracker.log_hyperparameters(hyperparameters)

    def log(self, metrics: Mapping[str, SupportsFloat], *, step: int) -> None:
        """Note the numbers everywhere; a device array is read once."""
        numbers = {name: float(value) for name, value in metrics.items()}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def finish(self) -> None:
        """Finish all, also when one of them fails; the first failure is raised at the end."""
        failures = []
        for tracker in self._trackers:
            try:
                tracker.finish()
            except Exception as failure:  # the others must still be closed
                failures.append(failure)
        if failures:
            raise failures[0]


def make_tracker(
    names: Sequence[str], folder: str | os.PathLike[str], *, start_step: int = 0
) -> Tracker:
    """Make the trackers of the given names as one.

    Args:
        names: from `tracker_names()`; empty, or `["none"]`, keeps nothing.
        folder: where files go; its name is the run's name elsewhere.
        start_step: the first step of this run, above 0 when it resumes.

    Returns:
        one tracker that tells all of them.

    Raises:
        ValueError: if a name is unknown, appears twice, or stands beside `"none"`.
        ModuleNotFoundError: if the package of a named tracker is not installed.

    Example:
        >>> tracker = make_tracker(["none"], "runs/mine")
        >>> tracker.log({"loss": 0.5}, step=0)
        >>> tracker.finish()
    """
    unknown = [name for name in names if name not in _MAKERS]
    if unknown:
        raise ValueError(f"unknown trackers {unknown}; known are {tracker_names()}")
    if len(set(names)) != len(names) or ("none" in names and len(names) > 1):
        raise ValueError(f"{list(names)} must name each tracker once, and 'none' alone")
    made: list[Tracker] = []
    try:
        for name in names:
            made.append(_MAKERS[name](folder, start_step))
    except BaseException:
        CompositeTracker(made).finish()
        raise
    return made[0] if len(made) == 1 else CompositeTracker(made)


def tracker_names() -> list[str]:
    """Name the trackers that `make_tracker` knows.

    Example:
        >>> tracker_names()
        ['jsonl', 'none', 'tensorboard', 'trackio', 'wandb']
    """
    return sorted(_MAKERS)


_MAKERS: dict[str, Callable[[str | os.PathLike[str], int], Tracker]] = {
    "none": lambda folder, start: NoTracker(),
    "jsonl": lambda folder, start: JsonlTracker(folder, start_step=start),
    "tensorboard": lambda folder, start: TensorBoardTracker(folder, start_step=start),
    "trackio": lambda folder, start: ServiceTracker("trackio", folder, start_step=start),
    "wandb": lambda folder, start: ServiceTracker("wandb", folder, start_step=start),
}


def _require(package: str) -> ModuleType:
    """Import a package that is not a dependency, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        message = f"tracker {package!r} needs a package: pip install {_PIP_NAMES[package]}"
        raise ModuleNotFoundError(message, name=package) from error


def _finite_or_name(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)


def _drop_lines_from(path: pathlib.Path, step: int) -> None:
    """Keep the lines of earlier steps; a torn or foreign line, and all after it, go."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            is_earlier = line.endswith("\n") and json.loads(line)["step"] < step
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        if is_earlier:
            kept.append(line)
    _replace(path, "".join(kept))


def _replace(path: pathlib.Path, text: str) -> None:
    """Write a file whole or not at all."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
