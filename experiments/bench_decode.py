# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Decode throughput of 8B models with random weights: methods × context × batch.

    python -m experiments.bench_decode
    python -m experiments.bench_decode --cells "B16 128K" "nosa_8b B16 128K" --cache runs/cache

One process per cell makes weights and host records once for all of its methods. Contexts are filled
with random numbers instead of running a prompt. Choices drift by a stated number of new blocks a
step (`decode_drift`). Rows with `selections="trace"` follow how many new blocks the shipped model
chose on text that it never saw (`decode_trace`), and those of the model `shipped` count them. The
record is written after every row and keeps the rows of cells that did not run.
"""

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import subprocess
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from experiments import records
from experiments.decode_cells import Cell, parse_cell
from experiments.decode_process import Row, Wanted, measure_cell
from experiments.decode_timing import Effort
from experiments.decode_trace import trace_rows
from experiments.kernel_timing import is_healthy
from sparda_jax.kv.pack import HostDtype

__all__ = ["CELLS", "Config", "main"]  # for `from experiments.bench_decode import *`

TRACE = "trace"
"""The cell that is the shipped model on its own text."""

CELLS = (
    *("B16 128K", "B4 128K", "B4 32K", "B16 32K", "B8 128K", "B32 32K", "B32 64K"),
    *("B8 32K", "B4 64K", "B8 64K", "B16 64K", "Bmax 64K 24GiB", "Bmax 128K 24GiB"),
    *("nosa_8b B16 128K", "nosa_8b B4 32K", "nosa_8b B32 32K", TRACE),
)
"""What a run measures, what matters most first."""

KEY = (
    *("model", "method", "context", "batch", "slots", "new_blocks_per_step"),
    *("selections", "device_gib", "kv_dtype"),
)
"""The columns that identify a row."""

_SHOWN = {
    "model": "model",
    "method": "method",
    "context": "context",
    "batch": "batch",
    "new_blocks_per_step": "new",
    "tokens_per_s": "tok/s",
    "ms_per_step": "ms",
    "p99_ms": "p99",
    "host_ms": "host ms",
    "misses": "misses",
    "h2d_gb_per_s": "GB/s",
    "hidden_share": "hidden",
    "floor_ratio": "/ floor",
    "status": "status",
}
_FRACTION = 0.94  # of the device memory that XLA may take in a cell without a cap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured, how long, and where the record goes.

    Attributes:
        cells: as `decode_cells.parse_cell` reads them, or `trace`.
        methods: of every cell; empty takes what each cell is for.
        new_blocks: drifts of the offloaded methods, after none, which is always measured for the
            hidden share; resident methods take the first.
        slots: R; `None` takes a third more than a choice.
        host_dtype: of K and V on the host of offloaded methods; `None` takes the model's.
        trace: what `decode_trace` recorded; a row more of each offloaded method follows it.
        steps: timed in one sample.
        repeats: samples of a row; the median counts.
        warm_up: steps before the first timed one.
        host_gb: records that the host has room for; larger cells are left out.
        run_seconds: after which the cell that runs is stopped, and no other starts.
        cache: folder of compiled programs, kept between runs; `None` keeps none.
        tiny: a model that runs on any CPU, and says nothing.
        commit: hash of the commit that runs; `None` asks git.
        dirty: whether the tree differs from it; `None` asks git.
        date: day of the run, ISO 8601; `None` is today.
        out: folder of the record; `None` writes none.
        earlier: folder whose record's rows of other cells are kept; `None` is `out`.
    """

    cells: tuple[str, ...] = CELLS
    methods: tuple[str, ...] = ()
    new_blocks: tuple[int, ...] = (4, 8, 1, 2, 16)
    slots: int | None = None
    host_dtype: HostDtype | None = None
    trace: pathlib.Path | None = None
    steps: int = 64
    repeats: int = 3
    warm_up: int = 8
    host_gb: float = 100.0
    run_seconds: float = 540.0
    cache: pathlib.Path | None = None
    tiny: bool = False
    commit: str | None = None
    dirty: bool | None = None
    date: str | None = None
    out: pathlib.Path | None = records.RESULTS
    earlier: pathlib.Path | None = None

    @property
    def wanted(self) -> Wanted:
        """Give what is measured of each cell."""
        return Wanted(
            effort=Effort(warm_up=self.warm_up, steps=self.steps, repeats=self.repeats),
            new_blocks=self.new_blocks,
            slots=self.slots,
            host_dtype=self.host_dtype,
            host_gb=self.host_gb,
            is_tiny=self.tiny,
            trace=self.trace,
        )


def main(config: Config) -> records.Record:
    """Measure every cell, print each row and at last the table, and write the record.

    Args:
        config: what to measure.

    Returns:
        The record as written, with the rows that were kept.

    Raises:
        ValueError: a cell or method is unknown, no cell gave a row, or the record could not be
            written.
    """
    cells = [None if text == TRACE else parse_cell(text, config.methods) for text in config.cells]
    run = _Run(config)
    for cell in cells:
        if not run.measure(cell):
            break
    if not run.rows:
        raise ValueError(f"0 rows came of {len(cells)} cells; what was printed above says why")
    print_rows(run.rows)
    return run.record()


class _Run:
    """What a run found so far, and the processes that find it.

    Attributes:
        rows: of all cells that ran.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._deadline = time.monotonic() + config.run_seconds
        self._head: records.Record | None = None
        self.rows: list[Row] = []

    def measure(self, cell: Cell | None) -> bool:
        """Measure a cell, `None` for the traces; tell whether there is time for another.

        A method that takes its process down is a row, and those after it get a new one.
        """
        while True:
            lost = self._supervise(cell)
            if not isinstance(lost, str) or cell is None:
                return lost != ""
            self._take(_lost_row(cell, lost))
            left = cell.methods[cell.methods.index(lost) + 1 :]
            if not left:
                return True
            cell = dataclasses.replace(cell, methods=left)

    def _supervise(self, cell: Cell | None) -> str | bool:
        """Run one process; give the method that took it down, or whether there is time left."""
        spawn = multiprocessing.get_context("spawn")
        receiver, sender = spawn.Pipe(duplex=False)
        arguments = (sender, self._config, cell, jax.config.jax_platforms)
        process = spawn.Process(target=_work, args=arguments, daemon=True)
        process.start()
        sender.close()
        method = ""
        try:
            while receiver.poll(max(self._deadline - time.monotonic(), 0.0)):
                try:
                    kind, content = receiver.recv()
                except EOFError:
                    process.join()
                    return method if process.exitcode and method else not process.exitcode
                if kind == "refused":
                    raise ValueError(content)
                if kind == "method":
                    method = content
                elif kind == "head":
                    self._head = content
                else:
                    self._take(content)
            print(f"{self._config.run_seconds} s of the run are up", flush=True)
            return False
        finally:
            process.kill()
            process.join()
            receiver.close()

    def _take(self, row: Row) -> None:
        self.rows.append(row)
        print_rows([row], has_header=False)
        if self._config.out is not None:
            records.write(self.record(), self._config.out)

    def record(self) -> records.Record:
        """Join the rows of this run with the earlier ones of other cells."""
        assert self._head is not None  # it comes before any row
        record = dataclasses.replace(self._head, rows=list(self.rows))
        folder = self._config.earlier or self._config.out
        if folder is None or not records.path_of(record, folder).is_file():
            return record
        return records.append(records.read(records.path_of(record, folder)), record, replace_by=KEY)


def _lost_row(cell: Cell, method: str) -> Row:
    """Make the row of a method that took its process down."""
    lost = {"model": cell.model, "method": method, "context": cell.context, "batch": cell.batch}
    unknown = {"slots": None, "new_blocks_per_step": None, "selections": "drift", "kv_dtype": None}
    return lost | unknown | {"device_gib": cell.device_gib, "status": "crashed"}


def _work(
    sender: multiprocessing.connection.Connection,
    config: Config,
    cell: Cell | None,
    platforms: str | None,
) -> None:
    """Measure a cell in a process of its own and send what is found."""
    jax.config.update("jax_platforms", platforms)
    set_memory_fraction(None if cell is None else cell.device_gib)
    if config.cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(config.cache.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        sender.send(("head", head_of(config)))
        for method, row in _measure(config, cell):
            sender.send(("method", method) if row is None else ("row", row))
            if row is not None and row["status"] == "failed" and not is_healthy():
                sender.close()
                os._exit(3)  # the device is lost: the rest needs a new process
    except ValueError as error:  # the caller's mistake: a tree that is not clean
        traceback.print_exc()
        sender.send(("refused", str(error)))
    sender.close()


def _measure(config: Config, cell: Cell | None) -> Iterator[tuple[str, Row | None]]:
    if cell is not None:
        yield from measure_cell(cell, config.wanted)
        return
    for row in trace_rows(is_tiny=config.tiny):
        yield TRACE, row


def set_memory_fraction(device_gib: float | None) -> None:
    """Tell XLA how much of the device it may take, before it asks.

    Args:
        device_gib: a cap; `None` leaves it nearly all.
    """
    fraction = _FRACTION
    if device_gib is not None:
        try:
            asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
            answer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return  # no such device: nothing to cap
        fraction = device_gib * 1024 / float(answer.split()[0])
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{fraction:.4f}"


def head_of(config: Config) -> records.Record:
    """Collect the record without its rows, and refuse one that could not be written."""
    settings = ("tiny", "steps", "repeats", "warm_up", "host_gb")
    return records.head_of("bench_decode", config, settings, unnamed=("cache", "run_seconds"))


def print_rows(rows: Sequence[Mapping[str, Any]], *, has_header: bool = True) -> None:
    """Print rows as a plain table."""

    def show(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [[show(row.get(name)) for name in _SHOWN] for row in rows]
    widths = [max(len(title), 7) for title in _SHOWN.values()]
    widths[:2] = [14, 27]
    for line in [list(_SHOWN.values())] * has_header + lines:
        print("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip(), flush=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
