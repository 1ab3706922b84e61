# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Every kernel, its reference and its peers: milliseconds, rate, and share of the ceiling.

    python -m experiments.bench_kernels
    python -m experiments.bench_kernels --ops sparse_decode block_scores --variants

The ceilings (device copy, host to device, bf16 matmul) are measured in the same run. A case that
fails is a row with its status. The cases run in a process of their own: a kernel that hangs or
breaks the device costs its row and a restart, not the run. The record is written after every op and
keeps the rows of ops that did not run.
"""

import dataclasses
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import pathlib
import pkgutil
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import collect, kernel_cases, records
from experiments.kernel_cases.base import Case
from experiments.kernel_timing import (
    Effort,
    Scrub,
    default_scrub,
    is_healthy,
    measure,
    measure_ceilings,
)

__all__ = ["Config", "main"]  # for `from experiments.bench_kernels import *`

_ERROR_LETTERS = 400
_TRACE_LETTERS = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured, how long, and where the record goes.

    Attributes:
        ops: folders of `pallas_kernels`; empty takes all that have cases.
        match: regular expression on `op shape implementation`; only these cases run.
        variants: also the cases whose implementation names its tiles: `mosaic_gpu[tile_q=8]`.
        tiny: shapes that run on any CPU in seconds, to try the harness.
        repeats: samples of each case.
        case_seconds: after which a case takes no further sample.
        case_limit_s: after which a case counts as hung, compilation and check included.
        run_seconds: after which the case that runs is stopped, and no other starts.
        min_operand_bytes: what the distinct operands of a case exceed together.
        max_sets: distinct operand sets of a case at most, unless it asks for more.
        cases: package with one module of cases an op.
        commit: hash of the commit that runs; `None` asks git.
        dirty: whether the tree differs from it; `None` asks git.
        date: day of the run, ISO 8601; `None` is today.
        out: folder of the record; `None` writes none.
        earlier: folder whose record's rows of other ops are kept; `None` is `out`.
    """

    ops: tuple[str, ...] = ()
    match: str = ""
    variants: bool = False
    tiny: bool = False
    repeats: int = 50
    case_seconds: float = 2.0
    case_limit_s: float = 90.0
    run_seconds: float = 540.0
    min_operand_bytes: int = 256 << 20
    max_sets: int = 16
    cases: str = kernel_cases.__name__
    commit: str | None = None
    dirty: bool | None = None
    date: str | None = None
    out: pathlib.Path | None = records.RESULTS
    earlier: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Message:
    """What the measuring process tells.

    Attributes:
        kind: `head`, `case`, `row`, `broken`, `refused` or `end`.
        number: of the case in the run; of the one to go on with, if the device is `broken`.
        row: of the case, or its names before it runs; why the run was `refused`.
        head: the record without rows.
    """

    kind: str
    number: int = -1
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    head: records.Record | None = None


def known_ops(package: str) -> tuple[str, ...]:
    """List the ops that have cases.

    Args:
        package: dotted name, as `Config.cases`.
    """
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return tuple(sorted(module.name for module in found if module.name != "base"))


def load_cases(config: Config) -> list[Case | dict[str, Any]]:
    """Load the cases of a run in order; an op whose cases cannot be made gives a row instead.

    Args:
        config: which ops and cases.

    Raises:
        ValueError: an op has no cases, or none is left to run.
    """
    known = known_ops(config.cases)
    unknown = [op for op in config.ops if op not in known]
    if unknown:
        raise ValueError(f"ops={unknown} have no cases in {config.cases}; known: {list(known)}")
    found: list[Case | dict[str, Any]] = []
    for op in config.ops or known:
        try:
            cases = importlib.import_module(f"{config.cases}.{op}").cases(tiny=config.tiny)
        except Exception as error:  # one op that cannot be imported must not end the run
            stub = {"op": op, "shape": "none", "implementation": "none"}
            found.append(stub | {"status": "failed", "error": error_text(error)})
            continue
        for case in cases:
            is_wanted = config.variants or "[" not in case.implementation
            if is_wanted and re.search(config.match, " ".join(_name(case).values())):
                found.append(case)
    if not found:
        raise ValueError(
            f"0 cases of {len(config.ops or known)} ops are left by match={config.match!r} and "
            f"variants={config.variants}; name other ops or a wider match"
        )
    return found


def status_of(error: Exception) -> str:
    """Name how a case failed.

    Example:
        >>> status_of(NotImplementedError("needs compute capability 9.0"))
        'unsupported'
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        return "out of memory"
    return "unsupported" if isinstance(error, NotImplementedError) else "failed"


def error_text(error: Exception) -> str:
    r"""Say what an error said: its beginning, in one line, without the folders of this machine.

    Example:
        >>> error_text(ValueError("no tile in /a/b/c.py\nfits"))
        'ValueError: no tile in c.py fits'
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return re.sub(r"(?<![\w.:/])/(?:[^/\s'\"]+/)+", "", text)[:_ERROR_LETTERS]


def measure_row(
    case: Case, config: Config, ceilings: Mapping[str, float], scrub: Scrub | None
) -> dict[str, Any]:
    """Measure one case into a row; an error of the case gives a row too.

    Args:
        case: what to measure.
        config: how thoroughly.
        ceilings: bytes/s or FLOP/s by name.
        scrub: what runs in front of each sample, or `None`.

    Returns:
        `op, shape, implementation, ms, bytes, flops, rate, ceiling, share, status` and what the
        numbers rest on; without the numbers where there are none.
    """
    effort = Effort(
        min_operand_bytes=config.min_operand_bytes,
        max_sets=config.max_sets,
        repeats=config.repeats,
        seconds=config.case_seconds,
    )
    row: dict[str, Any] = _name(case)
    try:
        found = measure(case, effort, scrub)
    except Exception as error:  # of whatever kind: it becomes the row
        print(traceback.format_exc()[-_TRACE_LETTERS:], file=sys.stderr, flush=True)
        return row | {"status": status_of(error), "error": error_text(error)}
    low, ms, high = (1e3 * np.percentile(found.seconds, [10, 50, 90])).tolist()
    row |= {
        "ms": ms,
        "bytes": case.work.bytes,
        "flops": case.work.flops,
        "rate": case.work.rate(ms),
        "ceiling": ceilings[case.work.ceiling],
        "share": case.work.share(ms, ceilings),
        "status": "ok",
        "bound": case.work.ceiling,
        "p10_ms": low,
        "p90_ms": high,
        "samples": len(found.seconds),
        "sets": found.sets,
        "operand_bytes": found.operand_bytes,
        "compile_s": round(found.compile_s, 2),
        "temp_bytes": found.temp_bytes,
        "is_checked": case.check is not None,
    }
    error = found.check_error
    if error is not None:
        status = "wrong result" if isinstance(error, AssertionError) else "check failed"
        row |= {"status": status, "error": error_text(error)}
    return row


def ceiling_rows(*, is_tiny: bool) -> list[dict[str, Any]]:
    """Measure the ceilings, as rows of the op `ceiling`."""
    return [
        {
            "op": "ceiling",
            "shape": shape,
            "implementation": name,
            "ms": 1e3 * seconds,
            "bytes": size,
            "flops": flops,
            "rate": (flops or size) / seconds,
            "ceiling": (flops or size) / seconds,
            "share": 1.0,
            "status": "ok",
            "bound": name,
        }
        for name, (shape, seconds, size, flops) in measure_ceilings(is_tiny=is_tiny).items()
    ]


def measure_all(
    config: Config, first: int, ceilings: Sequence[Mapping[str, Any]]
) -> Iterator[_Message]:
    """Measure the cases from number `first` on, and tell of each before and after.

    Args:
        config: of the run.
        first: number of the first case.
        ceilings: rows that were measured before a restart; empty measures them.
    """
    cases = load_cases(config)
    yield _Message("head", head=_head(config))
    if not ceilings:
        ceilings = ceiling_rows(is_tiny=config.tiny)
        for row in ceilings:
            yield _Message("row", row=dict(row))
    rates = {row["implementation"]: row["rate"] for row in ceilings}
    scrub = default_scrub()
    for number, case in enumerate(cases[first:], first):
        if isinstance(case, dict):
            yield _Message("row", number, case)
            continue
        yield _Message("case", number, _name(case))
        row = measure_row(case, config, rates, scrub)
        yield _Message("row", number, row)
        if row["status"] != "ok" and not is_healthy():
            yield _Message("broken", number + 1)
            return
        gc.collect()
    yield _Message("end")


def main(config: Config) -> records.Record:
    """Measure, print each row and at last the table, and write the record.

    Args:
        config: what to measure.

    Returns:
        the record as written, with the rows that were kept.

    Raises:
        ValueError: an op is unknown, no case is left, or the record could not be written.
        RuntimeError: the measuring process ended outside any case.
    """
    run = _Run(config)
    first: int | None = 0
    try:
        while first is not None:
            first = run.supervise(first)
    finally:
        if run.head is not None and run.rows:
            run.write()
    collect.print_kernels(run.rows)
    return run.record()


class _Run:
    """What a run found so far, and the process that finds it.

    Attributes:
        rows: one a case, those of the ceilings first.
        head: the record without rows; `None` until the process has told it.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._deadline = time.monotonic() + config.run_seconds
        self._begun = time.monotonic()
        self._case: _Message | None = None
        self._earlier: records.Record | None = None
        self.rows: list[dict[str, Any]] = []
        self.head: records.Record | None = None

    def supervise(self, first: int) -> int | None:
        """Measure in a new process from case `first`; give the case to go on with, or `None`."""
        spawn = multiprocessing.get_context("spawn")
        receiver, sender = spawn.Pipe(duplex=False)
        ceilings = [row for row in self.rows if row["op"] == "ceiling"]
        arguments = (sender, self._config, first, ceilings, jax.config.jax_platforms)
        process = spawn.Process(target=_work, args=arguments, daemon=True)
        process.start()
        sender.close()
        try:
            while True:
                left = self._deadline - time.monotonic()
                if not receiver.poll(max(min(left, self._config.case_limit_s), 0.0)):
                    if left > self._config.case_limit_s:
                        return self._lose("hung", f"no result in {self._config.case_limit_s} s")
                    if self._case is not None:
                        self._lose("out of time", f"{self._config.run_seconds} s of the run are up")
                    return None
                try:
                    message = receiver.recv()
                except EOFError:
                    process.join()
                    return self._lose("crashed", f"exit code {process.exitcode}")
                if message.kind == "end":
                    return None
                if message.kind == "broken":
                    return message.number
                if message.kind == "refused":
                    raise ValueError(message.row["error"])
                self._take(message)
        finally:
            process.kill()
            process.join()
            receiver.close()

    def _take(self, message: _Message) -> None:
        if message.kind == "head":
            assert message.head is not None  # the one message that has it
            self.head = message.head
            self._read_earlier()
        elif message.kind == "case":
            self._case = message
        else:
            self._add(message.row)
            self._case = None

    def _add(self, row: dict[str, Any]) -> None:
        if self.rows and self.rows[-1]["op"] != row["op"]:
            self.write()
        self.rows.append(row)
        took, self._begun = time.monotonic() - self._begun, time.monotonic()
        print("  ".join(collect.kernel_cells(row)), f"[{took:.1f} s]", flush=True)

    def _lose(self, status: str, why: str) -> int:
        """Note that the running case will give nothing, and give the number of the next."""
        if self._case is None:
            raise RuntimeError(
                f"the measuring process was lost outside any case, after {len(self.rows)} rows: "
                f"{status}, {why}; its own message stands above"
            )
        self._add(self._case.row | {"status": status, "error": why})
        following, self._case = self._case.number + 1, None
        return following

    def _read_earlier(self) -> None:
        folder = self._config.earlier or self._config.out
        assert self.head is not None  # the caller has just set it
        if folder is not None and records.path_of(self.head, folder).is_file():
            self._earlier = records.read(records.path_of(self.head, folder))

    def record(self) -> records.Record:
        """Join the rows of this run with the earlier ones of other ops, or of other cases."""
        assert self.head is not None  # no process ends well without it
        record = dataclasses.replace(self.head, rows=list(self.rows))
        if self._earlier is None:
            return record
        columns = ("op", "shape", "implementation") if self._config.match else ("op",)
        return records.append(self._earlier, record, replace_by=columns)

    def write(self) -> None:
        """Write the record, if it is to be written."""
        if self._config.out is not None:
            records.write(self.record(), self._config.out)


def _work(
    sender: multiprocessing.connection.Connection,
    config: Config,
    first: int,
    ceilings: list[dict[str, Any]],
    platforms: str | None,
) -> None:
    """Measure in a process of its own and send what is found."""
    jax.config.update("jax_platforms", platforms)
    try:
        for message in measure_all(config, first, ceilings):
            sender.send(message)
    except ValueError as error:  # the caller's mistake: an unknown op, a tree that is not clean
        sender.send(_Message("refused", row={"error": str(error)}))
    sender.close()


def _head(config: Config) -> records.Record:
    """Collect the record without its rows, and refuse one that could not be written."""
    settings = ("tiny", "repeats", "case_seconds", "min_operand_bytes", "max_sets")
    return records.head_of("bench_kernels", config, settings)


def _name(case: Case) -> dict[str, str]:
    return {"op": case.op, "shape": case.shape, "implementation": case.implementation}


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
