# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""One cell of `bench_decode`, measured in the process that calls: rows, method after method.

Weights and the host's records are made once for all methods. A method that fails is a row that says
why, and the next one runs.
"""

import contextlib
import dataclasses
import gc
import pathlib
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from experiments.bench_kernels import error_text, status_of
from experiments.decode_cells import (
    METHODS,
    Cell,
    Method,
    Setting,
    fill_host,
    host_bytes,
    largest_batch,
    make_setting,
    make_state,
    make_weights,
    model_config,
    state_bytes,
)
from experiments.decode_compile import Ahead
from experiments.decode_drift import DriftSelector
from experiments.decode_timing import (
    Drift,
    Effort,
    FetchAlone,
    Floor,
    Runner,
    Steps,
    copy_rate_from_host,
    device_bytes,
    measure_floor,
    read_bytes,
)
from experiments.decode_trace import load_trace, spread
from sparda_jax.capacity import free_device_bytes
from sparda_jax.decode import Decoder
from sparda_jax.kv.host import HostKV, record_bytes
from sparda_jax.kv.host_pool import HostPool
from sparda_jax.kv.pack import HostDtype
from sparda_jax.parts import Layout, Parts

Row = dict[str, Any]

_RESERVE = 768 << 20  # bytes of the device left to what a step needs besides weights and state
_CPU_ROOM = 64 << 20  # bytes that stand for a device's memory where there is none
_TRACE_LETTERS = 2000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is measured of a cell.

    Attributes:
        effort: steps of a row.
        new_blocks: drifts of the offloaded methods, in their order; resident ones take the first.
        slots: R; `None` takes a third more than a choice.
        host_dtype: of K and V on the host; `None` takes the model's.
        host_gb: records that the host has room for.
        is_tiny: a model that runs on any CPU.
        trace: new blocks on real text, which offloaded methods are also measured with.
    """

    effort: Effort = dataclasses.field(default_factory=Effort)
    new_blocks: tuple[int, ...] = (4, 8, 1, 2, 16)
    slots: int | None = None
    host_dtype: HostDtype | None = None
    host_gb: float = 100.0
    is_tiny: bool = False
    trace: pathlib.Path | None = None


class Bench:
    """One process: the weights of a model, the host's records, and the methods that use them.

    Args:
        cell: where.
        wanted: what is measured there.
    """

    def __init__(self, cell: Cell, wanted: Wanted) -> None:
        self._cell, self._wanted = cell, wanted
        self._begun = time.perf_counter()
        self.model = model_config(cell.model, is_tiny=wanted.is_tiny)
        self._pool = HostPool(page_lock="auto" if jax.default_backend() == "cpu" else "require")
        self._host: tuple[Setting, HostKV] | None = None
        self._floors: dict[int, Floor] = {}
        self._h2d = 0.0
        self._weights: tuple[Layout, Parts] | None = None
        self._compile_seconds: dict[str, float] = {}

    def say(self, what: str) -> None:
        """Print what was done, and when."""
        took = time.perf_counter() - self._begun
        print(f"[{took:6.1f} s] {self._cell.name}: {what}", flush=True)

    def weights(self) -> tuple[Layout, Parts]:
        """Make the weights, once."""
        if self._weights is None:
            self._weights = make_weights(self.model)
            self.say("weights made")
        return self._weights

    def setting(self, batch: int) -> Setting:
        """Settle the sizes for a batch."""
        return make_setting(self.model, batch=batch, **self._sizes())

    def _sizes(self) -> dict[str, Any]:
        steps = self._wanted.effort.total + 1
        return {
            "context": self._cell.context,
            "steps": steps,
            "slots": self._wanted.slots,
            "host_dtype": self._wanted.host_dtype,
        }

    def host(self, setting: Setting) -> HostKV:
        """Lend the host's records of a batch, filled; those of another batch are given back."""
        if self._host is not None and self._host[0] == setting:
            return self._host[1]
        self._close_host()
        fresh = host_bytes(setting) > self._pool.size
        host = HostKV(
            setting.config,
            setting.batch,
            setting.capacity,
            pool=self._pool,
            host_dtype=setting.host_dtype,
        )
        self._host = (setting, host)
        if fresh:
            self.say(f"{host.nbytes / 1e9:.1f} GB of host memory locked")
            fill_host(host, setting.config)
            self.say("and filled")
        return host

    def floor(self, setting: Setting) -> Floor:
        """Measure the parts of the floor, once a batch."""
        if setting.batch not in self._floors:
            self._floors[setting.batch] = measure_floor(*self.weights(), setting)
            found = self._floors[setting.batch]
            rate = found.copy_bytes_per_s / 1e9
            self.say(f"matmuls alone {found.matmul_seconds * 1e3:.2f} ms, copy {rate:.0f} GB/s")
        return self._floors[setting.batch]

    def prepare(self, methods: Sequence[Method]) -> None:
        """Compile the steps of a cell whose batch is known, the host's records made beside that.

        Args:
            methods: of the cell; those that cannot run are left out.
        """
        if self._cell.batch is None:
            return
        setting = self.setting(self._cell.batch)
        fitting = [method for method in methods if self._refuse(method, setting) is None]
        self.weights()
        ahead = Ahead(setting, fitting)
        with contextlib.suppress(Exception):  # whoever needs the host's records meets the error
            if any(method.is_offloaded for method in fitting):
                self.host(setting)
        self._compile_seconds = ahead.wait()
        self.say(f"{len(self._compile_seconds)} of {len(methods)} steps compiled")

    def batches(self, method: Method) -> list[int]:
        """List the batches to try, the largest that may fit first."""
        if self._cell.batch is not None:
            return [self._cell.batch]
        self.weights()
        free = free_device_bytes()
        room = _CPU_ROOM if free is None else int((free - _RESERVE) * 0.98)
        most = largest_batch(
            self.model, method, room, int(self._wanted.host_gb * 1e9), **self._sizes()
        )
        self.say(f"{method.name}: at most {most} rows by arithmetic")
        return sorted({max(most - round(most * step / 32), 1) for step in range(8)}, reverse=True)

    def rows(self, method: Method) -> Iterator[Row]:
        """Measure one method: a row per drift, or one that says why there is none."""
        failed: Row = {}
        for batch in self.batches(method):
            setting = self.setting(batch)
            first = self.name_row(method, setting)
            refusal = self._refuse(method, setting)
            if refusal is not None:
                yield first | refusal
                return
            try:
                yield from self._measure(method, setting, first)
                return
            except Exception as error:  # of whatever kind: it becomes the row
                failed = first | {"status": status_of(error), "error": error_text(error)}
                text = traceback.format_exc()[-_TRACE_LETTERS:]
            gc.collect()
            if failed["status"] != "out of memory":
                print(text, file=sys.stderr, flush=True)
                break
            self.say(f"{method.name}: out of memory at {batch} rows")
        yield failed

    def name_row(self, method: Method, setting: Setting) -> Row:
        """Make the columns that identify a row, and what is known before it is measured."""
        return {
            "model": self._cell.model,
            "method": method.name,
            "context": self._cell.context,
            "batch": setting.batch,
            "slots": setting.slots if method.is_offloaded else setting.num_blocks,
            "new_blocks_per_step": drifts_of(method, self._wanted.new_blocks)[-1],
            "selections": "all" if method.mode == "dense" else "drift",
            "device_gib": self._cell.device_gib,
            "kv_dtype": (method.is_offloaded and setting.host_dtype) or setting.config.dtype,
            "host_bytes": host_bytes(setting) if method.is_offloaded else 0,
        }

    def _refuse(self, method: Method, setting: Setting) -> Row | None:
        """Say why a method is not tried: what it needs is more than there is."""
        needed = host_bytes(setting) / 1e9
        if method.is_offloaded and needed > self._wanted.host_gb:
            return {"status": f"skipped: needs {needed:.0f} GB of host memory"}
        self.weights()
        free, needed = free_device_bytes(), state_bytes(setting, method)
        if free is not None and needed > free:
            return {"status": "out of memory", "needs_bytes": needed, "free_bytes": free}
        return None

    def _measure(self, method: Method, setting: Setting, first: Row) -> Iterator[Row]:
        floor = self.floor(setting)
        host = self.host(setting) if method.is_offloaded else None
        if host is not None and self._h2d == 0.0:
            self._h2d = copy_rate_from_host(host)
            self.say(f"copy engine: {self._h2d / 1e9:.1f} GB/s from the host")
        runner = self.start(method, setting)
        try:
            began = runner.compile() + self._compile_seconds.get(method.name, 0.0)
            first = first | {"compile_s": round(began, 1)}
            self.say(f"{method.name}: first step after {first['compile_s']} s")
            drifts: list[Drift] = [*drifts_of(method, self._wanted.new_blocks)]
            if method.is_offloaded and self._wanted.trace is not None:
                drifts.append(self._trace(method, setting, self._wanted.trace))
            found = runner.measure(drifts, self._wanted.effort)
            layers, pools = setting.config.layers, setting.batch * setting.config.kv_heads
            blocks = [round(steps.fetched / layers) for steps in found]
            most = -(-max(blocks) // pools)
            alone = FetchAlone(host, setting, most) if host is not None else None
            for drift, steps, fetched in zip(drifts, found, blocks, strict=True):
                row = first | {"new_blocks_per_step": drift}
                if not isinstance(drift, int):
                    row = first | {"new_blocks_per_step": None, "selections": "trace"}
                row |= self._numbers(method, setting, floor, steps)
                if alone is not None:
                    row |= self._fetch_numbers(steps, found[0], alone.seconds(runner, fetched))
                held = device_bytes(self.weights()[1], runner.decoder.state)
                yield row | {"device_bytes": held, "status": "ok"}
        finally:
            runner.decoder.close()

    def _trace(self, method: Method, setting: Setting, path: pathlib.Path) -> Drift:
        config = setting.config
        return spread(
            load_trace(path, method.mode),
            layers=config.layers,
            batch=setting.batch,
            kv_heads=config.kv_heads,
            steps=setting.capacity - setting.context,
        )

    def start(self, method: Method, setting: Setting) -> Runner:
        """Make a decoder at the end of the context; whoever asks closes it."""
        host = self.host(setting) if method.is_offloaded else None
        plan = setting.plan(method.mode)
        drifting = plan.selector if isinstance(plan.selector, DriftSelector) else None
        state = make_state(setting, method)
        decoder = Decoder(*self.weights(), plan, state, host, has_lookahead=method.has_lookahead)
        return Runner(decoder, setting, drifting)

    def _numbers(self, method: Method, setting: Setting, floor: Floor, found: Steps) -> Row:
        """Put what was measured into columns, beside the floor."""
        seconds = float(np.median(found.seconds))
        lanes = setting.config.layers * setting.batch * setting.config.kv_heads
        moved = found.fetched * record_bytes(setting.config, setting.host_dtype)
        read = read_bytes(setting, reads_all=method.mode == "dense") / floor.copy_bytes_per_s
        link = moved / self._h2d if moved and self._h2d else 0.0
        least = max(floor.matmul_seconds + read, link)
        return {
            "tokens_per_s": setting.batch / seconds,
            "ms_per_step": seconds * 1e3,
            "spread_ms": float(np.ptp(found.seconds)) * 1e3,
            "p99_ms": float(np.percentile(found.each, 99)) * 1e3,
            "host_ms": found.host_seconds * 1e3,
            "misses": found.fetched / lanes,
            "fetched_bytes": moved,
            "h2d_gb_per_s": moved / seconds / 1e9,
            "matmul_ms": floor.matmul_seconds * 1e3,
            "read_ms": read * 1e3,
            "link_ms": link * 1e3,
            "floor_ms": least * 1e3,
            "floor_ratio": seconds / least,
        }

    def _fetch_numbers(self, found: Steps, without: Steps, alone: float) -> Row:
        """Say how much of the fetch is hidden: 1 − (t_with − t_without) / t_fetch_alone.

        The difference is the median over the rounds of what the two took in the same round.
        """
        least = float(np.median(without.seconds))
        numbers = {
            "fetch_ms": alone * 1e3,
            "fetch_share": alone / least,
            "h2d_ceiling_gb_per_s": self._h2d / 1e9,
        }
        if alone == 0.0:
            return numbers
        more = float(np.median(np.subtract(found.seconds, without.seconds)))
        return numbers | {"hidden_share": 1.0 - more / alone}

    def _close_host(self) -> None:
        if self._host is not None:
            self._host[1].close()
            self._host = None

    def close(self) -> None:
        """Give the host memory back."""
        self._close_host()
        self._pool.close()


def drifts_of(method: Method, wanted: Sequence[int]) -> list[int]:
    """List the drifts that a method is measured with: none first, then in the order given.

    Without lookahead two say enough. A resident method fetches nothing: any drift will do.

    Example:
        >>> drifts_of(METHODS["sparse_offload"], (8, 4, 2))
        [0, 8, 4, 2]
        >>> drifts_of(METHODS["sparse_resident"], (8, 4, 2))
        [8]
    """
    if method.mode == "dense":
        return [0]
    if not method.is_offloaded:
        return [wanted[0]]
    drifts = [0, *(new for new in wanted if new > 0)]
    return drifts if method.has_lookahead else drifts[:3]


def measure_cell(cell: Cell, wanted: Wanted) -> Iterator[tuple[str, Row | None]]:
    """Measure a cell, method by method.

    Args:
        cell: where.
        wanted: what.

    Yields:
        The name of the method and nothing before it begins, then with each of its rows.
    """
    bench = Bench(cell, wanted)
    try:
        bench.prepare([METHODS[name] for name in cell.methods])
        for name in cell.methods:
            yield name, None
            for row in bench.rows(METHODS[name]):
                yield name, row
            gc.collect()
    finally:
        bench.close()
