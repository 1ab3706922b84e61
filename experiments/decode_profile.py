# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Where the time of a decode step goes, by category: kernels on the device, one after another.

    python -m experiments.decode_profile --cells "B16 128K" "B4 32K"

The step runs without command buffers, so that the profiler sees every kernel: nothing overlaps, and
what a fetch costs stands there in full. Idle is the time between the first kernel and the last in
which none ran, dispatch included. `python_ms` is what a call takes outside the runtime's own
execution of the program: arguments, results, and everything that Python does for a step.
"""

import collections
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any

import jax
import jax.profiler

from experiments import records
from experiments.decode_categories import CATEGORIES, IDLE, category_of
from experiments.decode_cells import METHODS, Method, parse_cell
from experiments.decode_process import Bench, Wanted
from experiments.decode_timing import Effort, Runner

Event = tuple[str, float, float]
"""A kernel, or a span on the host: its name, and when it began and ended, in ns."""

_CALL = "advance"
_RUNTIME = "LoadedExecutable::Execute"

_NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is profiled.

    Attributes:
        cells: as `decode_cells.parse_cell` reads them.
        methods: of each cell.
        new_blocks: per step.
        steps: profiled.
        tiny: a model that runs on any CPU, where no kernel is seen.
        commit: hash of the commit that runs; `None` asks git.
        dirty: whether the tree differs from it; `None` asks git.
        date: day of the run, ISO 8601; `None` is today.
        out: folder of the record; `None` writes none.
    """

    cells: tuple[str, ...] = ("B16 128K", "B4 32K")
    methods: tuple[str, ...] = ("sparda_offload", "sparse_offload")
    new_blocks: int = 4
    steps: int = 8
    tiny: bool = False
    commit: str | None = None
    dirty: bool | None = None
    date: str | None = None
    out: pathlib.Path | None = records.RESULTS


def summarise(events: Iterable[Event], steps: int) -> dict[str, tuple[float, float]]:
    """Add up kernels by category.

    Args:
        events: of several steps, in any order.
        steps: how many.

    Returns:
        For each category that occurs, and for `idle`: ms and kernels of one step.
    """
    found: dict[str, list[float]] = {what: [0.0, 0.0] for what in CATEGORIES}
    covered = idle = 0.0
    for number, (name, begin, end) in enumerate(sorted(events, key=lambda event: event[1])):
        place = found[category_of(name)]
        place[0] += end - begin
        place[1] += 1
        if number and begin > covered:
            idle += begin - covered
        covered = max(covered, end)
    per_step = {
        what: (ns / steps * 1e-6, count / steps) for what, (ns, count) in found.items() if count
    }
    return per_step | {IDLE: (idle / steps * 1e-6, 0.0)}


def read_events(folder: str | os.PathLike[str]) -> tuple[list[Event], list[Event]]:
    """Read a trace.

    Args:
        folder: that `jax.profiler.trace` wrote to.

    Returns:
        The kernels that ran on the streams of GPUs, and the spans of the thread that called.
    """
    (path,) = pathlib.Path(folder).glob("**/*.xplane.pb")
    kernels: list[Event] = []
    caller: list[Event] = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            events = [(e.name, e.start_ns, e.start_ns + e.duration_ns) for e in line.events]
            if "GPU" in plane.name and "Stream" in line.name:
                kernels += events
            elif any(name == _CALL for name, *_ in events):
                caller += events
    return kernels, caller


def largest(events: Iterable[Event], steps: int, count: int) -> list[tuple[str, float]]:
    """List the names that took longest, and their µs a step, nested ones counted each."""
    total: dict[str, float] = collections.defaultdict(float)
    for name, begin, end in events:
        total[name] += (end - begin) / steps * 1e-3
    return sorted(total.items(), key=lambda item: -item[1])[:count]


def python_time(events: Iterable[Event]) -> float | None:
    """Give the ms that a call takes outside the runtime; `None` if no call or no runtime is seen.

    Args:
        events: of the thread that called, in any order.
    """
    calls, total = 0, 0.0
    covered, has_runtime = 0.0, False
    for name, begin, end in sorted(events, key=lambda event: (event[1], -event[2])):
        if name == _CALL:
            calls += 1
            total += end - begin
        elif _RUNTIME in name and calls:
            has_runtime = True
            total -= max(end - max(begin, covered), 0.0)
            covered = max(covered, end)
    return total / calls * 1e-6 if has_runtime else None


def trace_steps(runner: Runner, steps: int, *, has_waits: bool) -> tuple[list[Event], list[Event]]:
    """Trace steps; give what `read_events` finds.

    Args:
        runner: warm.
        steps: how many.
        has_waits: whether each step is over before the next call, so that no call waits.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow down what is measured
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(steps):
                with jax.profiler.TraceAnnotation(_CALL):
                    runner.advance()
                if has_waits:
                    runner.wait()
            runner.wait()
        return read_events(folder)


def profile(bench: Bench, method: Method, config: Config, batch: int) -> list[dict[str, Any]]:
    """Profile one method in a cell into a row per category.

    Args:
        bench: of the cell.
        method: which.
        config: of the run.
        batch: B.
    """
    setting = bench.setting(batch)
    runner = bench.start(method, setting)
    try:
        bench.say(f"{method.name}: first step after {runner.compile():.1f} s")
        runner.restart(config.new_blocks)
        for _ in range(8):
            runner.advance()
        runner.wait()
        events, _ = trace_steps(runner, config.steps, has_waits=False)
        _, caller = trace_steps(runner, config.steps, has_waits=True)
    finally:
        runner.decoder.close()
    for name, us in largest(events, config.steps, 25):
        print(f"  {us:9.1f} us a step  {category_of(name):16}  {name[:90]}")
    for name, us in largest(caller, config.steps, 12):
        print(f"  {us:9.1f} us a call  {'(host)':16}  {name[:90]}")
    parts = summarise(events, config.steps)
    whole = sum(ms for ms, _ in parts.values())
    named = {"method": method.name, "context": setting.context, "batch": batch}
    named |= {"python_ms": python_time(caller)}
    return [
        named
        | {"new_blocks_per_step": config.new_blocks, "category": what, "ms": ms, "kernels": count}
        | {"share": ms / whole if whole else 0.0}
        for what, (ms, count) in parts.items()
    ]


def main(config: Config) -> records.Record:
    """Profile every method in every cell, print the tables, write record and figure.

    Args:
        config: what to profile.

    Returns:
        The record.

    Raises:
        ValueError: a cell or method is unknown, or a cell leaves its batch open.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.default_backend() == "gpu" and _NO_COMMAND_BUFFERS not in flags:
        raise ValueError(
            f"XLA_FLAGS={flags!r} lets the step run as command buffers, whose kernels a profile "
            f"does not tell apart; set XLA_FLAGS={_NO_COMMAND_BUFFERS}"
        )
    rows: list[dict[str, Any]] = []
    effort = Effort(steps=config.steps, repeats=1)
    for text in config.cells:
        cell = parse_cell(text, config.methods)
        if cell.batch is None:
            raise ValueError(f"{text!r} leaves the batch open; name one, such as 'B16 128K'")
        bench = Bench(cell, Wanted(effort=effort, is_tiny=config.tiny))
        try:
            for name in cell.methods:
                found = profile(bench, METHODS[name], config, cell.batch)
                for row in found:
                    print(f"{row['category']:16} {row['ms']:8.3f} ms {row['share']:6.1%}")
                print(f"{'Python side':16} {found[0]['python_ms'] or float('nan'):8.3f} ms a call")
                rows += [{"model": cell.model} | row for row in found]
        finally:
            bench.close()
    record = records.collect(
        "decode_profile",
        f"XLA_FLAGS={_NO_COMMAND_BUFFERS} python -m experiments.decode_profile --cells "
        + " ".join(map(repr, config.cells)),
        {"steps": config.steps, "tiny": config.tiny},
        rows,
        commit=config.commit,
        dirty=config.dirty,
        date=config.date,
        devices=1,
    )
    if config.out is not None:
        records.write(record, config.out)
    return record


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
