# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What crosses the host link, how fast, and how much of it hides beside matmuls.

    python -m experiments.bench_transfer

Tables in one record: the link's ceilings in both directions; `gather_blocks` by size; for fetches
of 10 to 80 % of the compute of a decode step with the matmuls of an 8B model, what share of the
fetch is hidden: 1 − (both − compute) / fetch; `write_blocks` by size; and both by CTAs and
transfers in flight. All are wall times of programs that repeat the thing, issued ahead so that
dispatch is hidden. A row is printed once it is measured, the record written after every table.
"""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from experiments import records
from pallas_kernels.gather_blocks import Tiles, gather_blocks
from pallas_kernels.gather_blocks.config import record_bytes
from pallas_kernels.write_blocks import write_blocks
from sparda_jax.kv.overlap import compiler_options, fetch_first
from sparda_jax.kv.page_lock import HostBuffer

DTYPE = jnp.dtype(jnp.bfloat16)
Row = dict[str, Any]
_WAYS = {"gather": "h2d", "write": "d2h"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured.

    Attributes:
        pool_mib: of records in host memory, from which scattered ones are taken.
        moved_mib: sizes of one gather or write.
        spread_mib: the size at which ways to spread the moves are tried.
        spreads: thread blocks, and pieces of half a record that each has under way, to try.
        block_size: W.
        head_dim: H.
        layers: of the decode step.
        batch: rows of its matmuls.
        width: D.
        kv_width: K · H.
        mlp_width: F.
        shares: fetch of a layer as a share of its compute.
        fetch_ctas: thread blocks of the fetch in the step; the first also in sequence.
        repeats: samples; the median counts.
        tiny: sizes that run on any CPU in seconds, and say nothing.
        commit: hash of the commit that runs; `None` asks git.
        dirty: whether the tree differs from it; `None` asks git.
        date: day of the run, ISO 8601; `None` is today.
        out: folder of the record; `None` writes none.
    """

    pool_mib: int = 512
    moved_mib: tuple[int, ...] = (1, 4, 16, 64)
    spread_mib: int = 4
    spreads: tuple[tuple[int, int], ...] = ((1, 12), (2, 12), (8, 12), (4, 4), (4, 8))
    block_size: int = 64
    head_dim: int = 128
    layers: int = 8
    batch: int = 16
    width: int = 4096
    kv_width: int = 256
    mlp_width: int = 16384
    shares: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6, 0.8)
    fetch_ctas: tuple[int, ...] = (4, 2, 8)
    repeats: int = 15
    tiny: bool = False
    commit: str | None = None
    dirty: bool | None = None
    date: str | None = None
    out: pathlib.Path | None = records.RESULTS

    @property
    def record(self) -> tuple[int, int, int]:
        """Give [2 W H]."""
        return (2, self.block_size, self.head_dim)

    @property
    def record_bytes(self) -> int:
        """Count the bytes of a record."""
        return record_bytes(self.block_size, self.head_dim, DTYPE.itemsize)

    @property
    def pool(self) -> int:
        """Count the records in host memory."""
        return (self.pool_mib << 20) // self.record_bytes


def shrink(config: Config) -> Config:
    """Make everything small enough for a CPU."""
    small = {"pool_mib": 1, "moved_mib": (1,), "spread_mib": 1, "spreads": ((2, 4),)}
    step = {
        "block_size": 16,
        "head_dim": 16,
        "layers": 2,
        "batch": 2,
        "width": 64,
        "kv_width": 16,
        "mlp_width": 96,
    }
    few = {"shares": (0.5,), "fetch_ctas": (2,), "repeats": 2}
    return dataclasses.replace(config, **small, **step, **few)


def seconds_each(run: Callable[[], Any], repeats: int, runs: int = 8) -> tuple[float, float]:
    """Time a run among several that follow each other: median and spread of some samples.

    Args:
        run: issues the work and gives an array that is ready when it is done.
        repeats: samples.
        runs: in a sample.
    """
    for _ in range(2):  # compile, then record the graphs
        jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        last = None
        for _ in range(runs):
            last = run()
        jax.block_until_ready(last)
        found.append((time.perf_counter() - begun) / runs)
    return float(np.median(found)), float(np.ptp(found))


@contextlib.contextmanager
def host_memory(config: Config) -> Iterator[tuple[np.ndarray, Array]]:
    """Give records in host memory, page-locked on a GPU: NumPy's view and the kernels'."""
    is_gpu = jax.default_backend() == "gpu"
    shape = (config.pool, *config.record)
    lock = "require" if is_gpu else "never"
    buffer = HostBuffer(math.prod(shape) * DTYPE.itemsize, page_lock=lock)
    try:
        memory = buffer.array(shape, DTYPE)
        memory[...] = 1.0
        yield memory, buffer.device_view(shape, DTYPE).array
    finally:
        buffer.close()


def row(what: str, nbytes: int, timed: tuple[float, float], **more: Any) -> Row:
    """Make a row of a transfer."""
    seconds, spread = timed
    rate = nbytes / seconds / 1e9
    mib = nbytes / 2**20
    return {"what": what, "mib": mib, "ms": seconds * 1e3, "spread_ms": spread * 1e3} | {
        "gb_per_s": rate,
        **more,
    }


def measure_ceilings(config: Config, memory: np.ndarray, view: Array) -> list[Row]:
    """Measure what the link can do: by the copy engine, and by one copy of the whole view."""
    device = jax.local_devices()[0]
    on_host = SingleDeviceSharding(device, memory_kind="pinned_host")
    copy = jax.jit(jnp.copy)
    there = jax.block_until_ready(jnp.ones(view.shape, DTYPE))
    runs = {
        "h2d: device_put of registered memory": lambda: jax.device_put(memory, device),
        "h2d: copy of the view": lambda: copy(view),
        "d2h: device_put to pinned memory": lambda: jax.device_put(there, on_host),
    }
    return [
        row(name, memory.nbytes, seconds_each(run, config.repeats, runs=2))
        for name, run in runs.items()
    ]


def moves(config: Config, n: int, seed: int) -> tuple[Int32[Array, " n"], Int32[Array, " n"]]:
    """List n scattered records, and n places in another order."""
    rng = np.random.default_rng(seed)
    source = rng.choice(config.pool, n, replace=False).astype(np.int32)
    return jnp.asarray(source), jnp.asarray(rng.permutation(n).astype(np.int32))


def measure_moves(config: Config, view: Array, what: str, tiles: Tiles | None, mib: int) -> Row:
    """Time `gather_blocks` or `write_blocks` of one size, many calls in one program."""
    n = min((mib << 20) // config.record_bytes, config.pool)
    calls = max(2, min(8, 32 // mib))  # they are one function of the program, compiled once
    lists = [moves(config, n, seed) for seed in range(calls)]
    count = jnp.array([n], jnp.int32)

    def gather(slots: Array, records: Array, lists: Sequence[Any]) -> tuple[Array, Array]:
        for source, places in lists:
            slots = gather_blocks(records, source, places, count, slots, tiles=tiles)
        return slots, slots[0, 0, 0, :1]

    def write(slots: Array, records: Array, lists: Sequence[Any]) -> tuple[Array, Array]:
        receipts = [
            write_blocks(slots, records, places, source, count, tiles=tiles).receipt
            for source, places in lists
        ]
        return slots, jnp.concatenate(receipts)

    program = jax.jit(gather if what == "gather" else write, donate_argnums=0)
    slots = [jnp.zeros((n, *config.record), DTYPE)]

    def run() -> Array:
        slots[0], done = program(slots[0], view, lists)
        return done

    seconds, spread = seconds_each(run, config.repeats)
    used = Tiles.default(config.block_size, config.head_dim, DTYPE.itemsize)
    return row(
        what,
        n * config.record_bytes,
        (seconds / calls, spread / calls),
        **dataclasses.asdict(tiles or used),
        records=n,
    )


def make_weights(config: Config, key: PRNGKeyArray) -> list[dict[str, Float[Array, "D E"]]]:
    """Make the matrices of the step, one array each: QKV and forecast, O, gate and up, down."""
    shapes = {
        "qkv": (config.width, config.width + 3 * config.kv_width),
        "o": (config.width, config.width),
        "up": (config.width, 2 * config.mlp_width),
        "down": (config.mlp_width, config.width),
    }
    draw = jax.jit(
        lambda key, shape: jax.random.normal(key, shape, DTYPE) * shape[0] ** -0.5,
        static_argnums=1,
    )
    keys = jax.random.split(key, config.layers * len(shapes)).reshape(config.layers, -1)
    return [
        {name: draw(one, shape) for one, (name, shape) in zip(row, shapes.items(), strict=True)}
        for row in keys
    ]


def make_step(config: Config, *, has_compute: bool, tiles: Tiles | None) -> Callable[..., Any]:
    """Build the step: layer l computes while the slots of l + 1 are filled; `None` fetches nothing.

    The fetched list depends on x, as a forecast does, and layer l reads its slots in its middle.
    """

    def normed(x: Array) -> Array:
        wide = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
        return (wide * scale).astype(DTYPE)

    def step(
        x: Float[Array, "B D"],
        slots: list[Array],
        weights: list[dict[str, Array]],
        view: Array,
        lists: list[tuple[Array, Array]],
        count: Int32[Array, " 1"],
    ) -> tuple[Array, list[Array]]:
        slots = list(slots)
        held = jnp.zeros((), jnp.int32)
        for layer in range(config.layers):
            after = (layer + 1) % config.layers
            told = held >= -1  # always; see `kv.overlap.hold_lists`
            if tiles is not None:
                source, places = lists[after]
                chosen = jnp.where(x[0, 0] > 1e9, 0, source)
                held = chosen[0]
                filled = gather_blocks(view, chosen, places, count, slots[after], tiles=tiles)
                x, slots[after] = fetch_first(x, filled)
            is_read = (slots[layer][0, 0, 0, 0] > 1e4) | ~told  # never: records hold ones
            read = is_read.astype(DTYPE)
            if has_compute:
                w = weights[layer]
                attended = (normed(x) @ w["qkv"])[:, : config.width] + read
                x = x + attended @ w["o"]
                gate, up = jnp.split(normed(x) @ w["up"], 2, axis=-1)
                x = normed(x + (jax.nn.silu(gate) * up) @ w["down"])
            else:
                x = x + read
        return x, slots

    return step


class Steps:
    """The step in variants, on the same weights and lists.

    Args:
        config: sizes.
        view: records in host memory.
        most: records that a layer fetches at most.
    """

    def __init__(self, config: Config, view: Array, most: int) -> None:
        self._config, self._view = config, view
        self._weights = make_weights(config, jax.random.key(0))
        self._lists = [moves(config, most, seed) for seed in range(config.layers)]
        self._state: tuple[Array, list[Array]] = (
            jnp.ones((config.batch, config.width), DTYPE),
            [jnp.zeros((most, *config.record), DTYPE) for _ in range(config.layers)],
        )

    def seconds(
        self, *, has_compute: bool, tiles: Tiles | None, is_concurrent: bool
    ) -> Callable[[int], tuple[float, float]]:
        """Compile a variant, and give its time by the records that a layer fetches."""
        step = make_step(self._config, has_compute=has_compute, tiles=tiles)
        options = compiler_options() if is_concurrent else None
        program = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)

        def timed(records: int) -> tuple[float, float]:
            count = jnp.array([records], jnp.int32)

            def run() -> Array:
                rest = (self._weights, self._view, self._lists, count)
                self._state = program(*self._state, *rest)
                return self._state[0]

            return seconds_each(run, self._config.repeats)

        return timed


def measure_overlap(config: Config, view: Array, gb_per_s: float) -> Iterator[Row]:
    """Measure the hidden share for fetches of several shares of the compute.

    Args:
        config: sizes.
        view: records in host memory.
        gb_per_s: what a gather reaches alone, to choose the sizes.
    """
    # The weights pass once through device memory, at 2 TB/s or more: room for the largest fetch.
    size = weight_bytes(config)
    longest = 1.3 * max(config.shares) * size / 2e12
    most = max(8, min(math.ceil(longest * gb_per_s * 1e9 / config.record_bytes), config.pool))
    steps = Steps(config, view, most)
    compute, _ = steps.seconds(has_compute=True, tiles=None, is_concurrent=True)(0)
    default = Tiles.default(config.block_size, config.head_dim, DTYPE.itemsize)
    for ctas in config.fetch_ctas:
        tiles = dataclasses.replace(default, ctas=ctas)
        alone = steps.seconds(has_compute=False, tiles=tiles, is_concurrent=False)
        both = steps.seconds(has_compute=True, tiles=tiles, is_concurrent=True)
        sequence = None
        if ctas == config.fetch_ctas[0]:
            sequence = steps.seconds(has_compute=True, tiles=tiles, is_concurrent=False)
        nothing, _ = both(0)
        for share in config.shares:
            wanted = share * compute / config.layers * gb_per_s * 1e9 / config.record_bytes
            count = min(max(round(wanted), 1), most)
            fetch, (together, spread) = alone(count)[0], both(count)
            hidden = 1 - (together - compute) / fetch
            in_sequence = None if sequence is None else sequence(count)[0] * 1e3
            yield (
                {"what": "overlap", "ctas": ctas, "records": count, "fetch_share": fetch / compute}
                | {"hidden_share": hidden, "compute_ms": compute * 1e3, "fetch_ms": fetch * 1e3}
                | {"both_ms": together * 1e3, "spread_ms": spread * 1e3}
                | {"no_records_ms": nothing * 1e3, "in_sequence_ms": in_sequence}
            )


def weight_bytes(config: Config) -> int:
    """Count the bytes of the matrices of one layer."""
    one = dataclasses.replace(config, layers=1)
    shapes = jax.eval_shape(lambda: make_weights(one, jax.random.key(0)))
    return sum(math.prod(w.shape) * w.dtype.itemsize for w in jax.tree.leaves(shapes))


def print_row(row: Row) -> None:
    """Print a row as soon as it is there."""
    cells = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()]
    print("  ".join(cells[1:]), f"  ({row['what']})", flush=True)


def measure_all(config: Config) -> Iterator[Iterator[Row]]:
    """Measure one table after another; shares are of the ceiling measured first."""
    with host_memory(config) as (memory, view):
        ceilings = measure_ceilings(config, memory, view)
        yield iter(ceilings)
        best = {
            way: max(r["gb_per_s"] for r in ceilings if way in r["what"]) for way in ("h2d", "d2h")
        }
        rates = []

        def moved(what: str, ways: Sequence[tuple[int, Tiles | None]]) -> Iterator[Row]:
            for mib, tiles in ways:
                found = measure_moves(config, view, what, tiles, mib)
                if what == "gather":
                    rates.append(found["gb_per_s"])
                yield found | {"share": found["gb_per_s"] / best[_WAYS[what]]}

        sizes = [(mib, None) for mib in config.moved_mib]
        spreads = [(config.spread_mib, Tiles(ctas=c, in_flight=n)) for c, n in config.spreads]
        yield moved("gather", sizes)
        yield measure_overlap(config, view, max(rates))
        for what, ways in (("write", sizes), ("gather", spreads), ("write", spreads)):
            yield moved(what, ways)


def main(config: Config) -> records.Record:
    """Measure, print each row, and write the record.

    Returns:
        The record, written if `config.out` names a folder.
    """
    sizes = shrink(config) if config.tiny else config
    rows: list[Row] = []
    for table in measure_all(sizes):
        for found in table:
            print_row(found)
            rows.append(found)
        if config.out is not None:
            records.write(_record(config, sizes, rows), config.out)
    return _record(config, sizes, rows)


def _record(config: Config, sizes: Config, rows: list[Row]) -> records.Record:
    """Collect what was measured so far."""
    unnamed = ("commit", "dirty", "date", "out")
    settings = {k: v for k, v in dataclasses.asdict(sizes).items() if k not in unnamed}
    return records.collect(
        "bench_transfer",
        "python -m experiments.bench_transfer" + (" --tiny" if config.tiny else ""),
        settings,
        rows,
        commit=config.commit,
        dirty=config.dirty,
        date=config.date,
        devices=1,
    )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
