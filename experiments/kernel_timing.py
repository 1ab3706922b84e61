# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Device time of an op, and the ceilings it is held to.

A call lasts microseconds and its dispatch tens of them, so one program calls the op on several
operand sets in turn, and on a GPU the program is issued behind a long copy of other memory: the
copy hides the dispatch and leaves nothing of the operands in the caches. The copy's own time, taken
alternately, is subtracted.
"""

import dataclasses
import math
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from experiments.kernel_cases.base import Case
from sparda_jax.kv.page_lock import HostBuffer

_ONE_AFTER_THE_OTHER = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
_TIED_BYTES = 1 << 20  # operands up to this size wait for the call before
_MEMORY_SHARE = 0.4  # of the free device memory that operand sets and their outputs may take
_LONG_ENOUGH_S = 2e-3  # a sample repeats the program until it lasts this long
_MOST_RUNS = 8
_SLOW_S = 1.0  # a program that lasts longer is run once
_SCRUB_BYTES = 1 << 29


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Times of one call.

    Attributes:
        seconds: of a call, one number a sample.
        sets: distinct operand sets in turn.
        operand_bytes: of all sets together, without arrays that they share.
        compile_s: seconds to trace, lower and compile the program.
        temp_bytes: that the program holds beside its operands and outputs, if JAX says.
        check_error: what `Case.check` raised; `None` if it passed or there is none.
    """

    seconds: tuple[float, ...]
    sets: int
    operand_bytes: int
    compile_s: float
    temp_bytes: int | None = None
    check_error: Exception | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is spent on a case.

    Attributes:
        min_operand_bytes: what the operand sets exceed together, unless `max_sets` are fewer.
        max_sets: calls in one program at most, unless a case asks for more.
        repeats: samples wanted.
        seconds: after which no further sample is taken, three at least (one of a program that
            alone lasts longer; that of its first run if it lasts longer than a second too).
    """

    min_operand_bytes: int
    max_sets: int
    repeats: int
    seconds: float


class Scrub:
    """A copy of device memory that no op touches, to stand in front of a measured program.

    Args:
        nbytes: of the memory; it is read and written.

    Attributes:
        seconds: one copy lasts, dispatch included.
    """

    def __init__(self, nbytes: int) -> None:
        self._add = jax.jit(lambda x: x + jnp.ones_like(x), donate_argnums=0)
        self._memory = jax.block_until_ready(jnp.zeros(nbytes // 4, jnp.float32))
        self.seconds = 0.0
        for _ in range(3):  # the first compiles
            begun = time.perf_counter()
            jax.block_until_ready(self())
            self.seconds = time.perf_counter() - begun

    def __call__(self) -> jax.Array:
        """Issue one copy; what is returned dies with the next."""
        self._memory = self._add(self._memory)
        return self._memory


def default_scrub() -> Scrub | None:
    """Make the copy for the default device; a CPU dispatches in no time and has none."""
    return Scrub(_SCRUB_BYTES) if jax.default_backend() == "gpu" else None


class Program:
    """One compiled program that calls an op on every operand set in turn.

    Each call's small operands wait for the call before, so calls neither merge nor overlap.
    Copies of the operands that the op changes in place are donated, and replaced by its outputs of
    the same shapes and dtypes, in their order; `restore` begins again with what the sets hold.

    Args:
        case: the op.
        sets: operands of each call.

    Attributes:
        compile_s: seconds to trace, lower and compile.
        temp_bytes: of device memory beside operands and outputs; `None` if JAX does not say.

    Raises:
        ValueError: an operand changed in place has no output of its shape.
    """

    def __init__(self, case: Case, sets: Sequence[tuple[PyTree, ...]]) -> None:
        self._op = jax.jit(case.call)
        self._outputs = jax.eval_shape(self._op, *sets[0])
        self._places = _changed_places(case, sets[0], self._outputs)
        self._pristine = [{i: operands[i] for i in case.in_place} for operands in sets]
        self._kept = [
            {i: operand for i, operand in enumerate(operands) if i not in case.in_place}
            for operands in sets
        ]
        options = _ONE_AFTER_THE_OTHER if jax.default_backend() == "gpu" else None
        begun = time.perf_counter()
        program = jax.jit(self._call_all, donate_argnums=0, compiler_options=options)
        self._compiled = program.lower(self._pristine, self._kept).compile()
        self.compile_s = time.perf_counter() - begun
        memory = self._compiled.memory_analysis()
        self.temp_bytes = None if memory is None else int(memory.temp_size_in_bytes)
        self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
        self.restore()

    def _call_all(
        self, changed: list[dict[int, PyTree]], kept: list[dict[int, PyTree]]
    ) -> tuple[list[dict[int, PyTree]], list[list[jax.Array]]]:
        after, others = [], []
        last = None
        for mine, rest in zip(changed, kept, strict=True):
            operands = mine | (rest if last is None else _tie(rest, last))
            leaves = jax.tree.leaves(self._op(*(operands[i] for i in range(len(operands)))))
            last = min(leaves, key=lambda leaf: leaf.size)
            # Donated buffers are matched with outputs by shape, in order: the changed come first.
            after.append(
                jax.tree.unflatten(jax.tree.structure(mine), [leaves[i] for i in self._places])
            )
            others.append([x for i, x in enumerate(leaves) if i not in self._places])
        return after, others

    def restore(self) -> None:
        """Give the op again what it changed in place."""
        self._changed: list[dict[int, PyTree]] = jax.block_until_ready(self._copy(self._pristine))

    def __call__(self) -> jax.Array:
        """Issue the program and give an array that is ready when it is done."""
        self._changed, others = self._compiled(self._changed, self._kept)
        return jax.tree.leaves((others, self._changed))[0]

    def first_output(self) -> PyTree:
        """Issue the program and give what the op returned for the first set."""
        self._changed, others = self._compiled(self._changed, self._kept)
        changed, rest = iter(jax.tree.leaves(self._changed[0])), iter(others[0])
        order = dict(zip(self._places, changed, strict=True))
        count = len(order) + len(others[0])
        leaves = [order[i] if i in order else next(rest) for i in range(count)]
        return jax.tree.unflatten(jax.tree.structure(self._outputs), leaves)


def make_sets(case: Case, effort: Effort) -> tuple[list[tuple[PyTree, ...]], int]:
    """Make the operand sets that a program takes in turn, and count their bytes.

    Args:
        case: the op and its shape.
        effort: how many bytes and sets.

    Returns:
        at least one set, fewer than asked for where the device has no room; their bytes together,
        without arrays that they share. One is enough where it exceeds what is asked for: its end
        has driven its beginning out of the caches.

    Raises:
        ValueError: different seeds give the same arrays.
    """
    sets = [case.operands(0), case.operands(1)]
    first = {id(leaf): leaf for leaf in jax.tree.leaves(sets[0])}
    fresh = sum(_nbytes(x) for x in jax.tree.leaves(sets[1]) if id(x) not in first)
    if fresh == 0:
        raise ValueError(
            f"{case.op} {case.shape}: operands(0) and operands(1) share all {len(first)} arrays, "
            "so 0 bytes differ between calls; make them from the seed"
        )
    count = min(math.ceil(effort.min_operand_bytes / fresh), effort.max_sets)
    count = max(count, case.least_sets)
    free = _free_bytes()
    if free is not None:
        output = jax.eval_shape(jax.jit(case.call), *sets[0])
        # Two sets exist already, their outputs do not.
        room = _MEMORY_SHARE * (free + 2 * fresh)
        count = min(count, int(room / (fresh + sum(map(_nbytes, jax.tree.leaves(output))))))
    sets = sets[: max(count, 1)]
    sets += [case.operands(seed) for seed in range(2, count)]
    jax.block_until_ready(sets)
    return sets, len(sets) * fresh


def measure(case: Case, effort: Effort, scrub: Scrub | None) -> Measured:
    """Check a case once, then time it.

    Args:
        case: what to call.
        effort: how much to spend.
        scrub: what runs in front of each sample; `None` times the bare calls.

    Returns:
        the times; those of a wrong result too, with what the check raised.

    Raises:
        ValueError: the operand sets do not fit the case, or the op is too short to time.
        Exception: whatever making the operands, compiling or running the op raised.
    """
    sets, operand_bytes = make_sets(case, effort)
    program = Program(case, sets)
    error = _check(case, program, sets[0])
    count = len(sets)
    can_repeat = operand_bytes >= effort.min_operand_bytes and not case.in_place
    samples = _sample(program, effort, scrub, most_runs=_MOST_RUNS if can_repeat else 1)
    seconds = tuple(sample / count for sample in samples)
    if np.median(seconds) <= 0.0:
        raise ValueError(
            f"{count} calls took {count * np.median(seconds):.1e} s more than none, within the "
            f"spread of {np.ptp(samples):.1e} s; raise max_sets"
        )
    return Measured(
        seconds=seconds,
        sets=count,
        operand_bytes=operand_bytes,
        compile_s=program.compile_s,
        temp_bytes=program.temp_bytes,
        check_error=error,
    )


def _check(case: Case, program: Program, operands: tuple[PyTree, ...]) -> Exception | None:
    """Run the program once, and the case's check on its first output if it has one."""
    output = jax.block_until_ready(program.first_output())
    if case.check is None:
        return None
    try:
        with jax.default_matmul_precision("highest"):
            case.check(output, operands)
    except Exception as error:  # whatever an oracle raises becomes a row
        return error.with_traceback(None)  # the frames hold arrays
    return None


def _sample(
    program: Program, effort: Effort, scrub: Scrub | None, *, most_runs: int
) -> list[float]:
    """Take the seconds of one run of `program`, several times, each from restored operands."""
    issued = took = 0.0
    for _ in range(2):  # the first warms up
        program.restore()
        begun = time.perf_counter()
        last = program()
        issued = time.perf_counter() - begun
        jax.block_until_ready(last)
        took = time.perf_counter() - begun
        if took > max(effort.seconds, _SLOW_S):
            return [took]
    runs = min(max(math.ceil(_LONG_ENOUGH_S / took), 1), most_runs)
    # Twice the time that the host needs, so that the device never waits for it.
    leads = 0 if scrub is None else min(max(math.ceil(2 * runs * issued / scrub.seconds), 1), 16)

    def elapsed(runs: int) -> float:
        last = None
        program.restore()
        begun = time.perf_counter()
        for _ in range(leads):
            last = scrub() if scrub is not None else None
        for _ in range(runs):
            last = program()
        jax.block_until_ready(last)
        return time.perf_counter() - begun

    empty, full = [], []
    least = 3 if took < effort.seconds else 1
    end = time.perf_counter() + effort.seconds
    while len(full) < least or (len(full) < effort.repeats and time.perf_counter() < end):
        empty.append(elapsed(0))
        full.append(elapsed(runs))
    return [(sample - float(np.median(empty))) / runs for sample in full]


def measure_ceilings(*, is_tiny: bool) -> dict[str, tuple[str, float, int, int]]:
    """Measure what the device can do: copy its memory, take from the host, multiply matrices.

    Args:
        is_tiny: at sizes that run anywhere in no time, and say nothing.

    Returns:
        for each `Ceiling` its shape in words, seconds, bytes and floating-point operations.
    """
    copied, sent = (1 << 20, 1 << 20) if is_tiny else (1 << 30, 1 << 29)
    width = 128 if is_tiny else 8192
    h2d_s = min(_seconds_from_registered(sent), _seconds_from_pinned(sent))
    multiplied = 2 * width**3
    return {
        "copy": (f"f32 x + 1 of {copied} bytes", copy_seconds(copied), 2 * copied, 0),
        "h2d": (f"{sent} page-locked bytes", h2d_s, sent, 0),
        "matmul": (f"bf16 {width}^3", _matmul_seconds(width), 3 * 2 * width**2, multiplied),
    }


def copy_seconds(size: int) -> float:
    """Time a copy on the device that reads `size` bytes and writes as many."""
    memory = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + jnp.ones_like(x))
    return seconds_each(lambda: add(memory), runs=16)


def _matmul_seconds(width: int) -> float:
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (width, width), jnp.bfloat16) for key in keys)
    multiply = jax.jit(jnp.dot)
    return seconds_each(lambda: multiply(a, b), runs=8)


def _seconds_from_registered(size: int) -> float:
    """Time `device_put` of host memory that we registered with the driver."""
    buffer = HostBuffer(size)
    try:
        data = buffer.array((size // 4,), np.dtype(np.float32))
        return seconds_each(lambda: jax.device_put(data), runs=4)
    finally:
        buffer.close()


def _seconds_from_pinned(size: int) -> float:
    """Time `device_put` of an array in XLA's own page-locked memory."""
    device = jax.local_devices()[0]
    host = SingleDeviceSharding(device, memory_kind="pinned_host")
    data = jax.block_until_ready(jax.device_put(np.ones(size // 4, np.float32), host))
    there = SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
    return seconds_each(lambda: jax.device_put(data, there), runs=4)


def is_healthy() -> bool:
    """Try whether the device still computes: after a fault in a kernel it does not."""
    try:
        jax.block_until_ready(jnp.ones(8) + jnp.ones(8))
    except Exception:
        traceback.print_exc()
        return False
    return True


def seconds_each(run: Callable[[], jax.Array], *, runs: int, samples: int = 7) -> float:
    """Time a run among several that follow each other; the median of some samples.

    Args:
        run: issues the work and gives an array that is ready when it is done.
        runs: in a sample.
        samples: how many.
    """
    for _ in range(2):  # compile, then record the graphs
        jax.block_until_ready(run())
    found = []
    for _ in range(samples):
        begun = time.perf_counter()
        for _ in range(runs - 1):
            run()
        jax.block_until_ready(run())
        found.append((time.perf_counter() - begun) / runs)
    return float(np.median(found))


def _tie(operands: dict[int, PyTree], last: jax.Array) -> dict[int, PyTree]:
    """Make the small operands of a call, or its smallest, wait for an output of another."""
    leaves, structure = jax.tree.flatten(operands)
    if not leaves:
        return operands
    limit = max(_TIED_BYTES, min(map(_nbytes, leaves)))
    small = [i for i, leaf in enumerate(leaves) if _nbytes(leaf) <= limit]
    *tied, _ = lax.optimization_barrier((*(leaves[i] for i in small), last))
    for i, leaf in zip(small, tied, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def _changed_places(case: Case, operands: tuple[PyTree, ...], outputs: PyTree) -> list[int]:
    """Find the output leaf that replaces each leaf of the operands changed in place."""
    leaves = jax.tree.leaves(outputs)
    places: list[int] = []
    for number in sorted(case.in_place):
        for leaf in jax.tree.leaves(operands[number]):
            kind = (leaf.shape, leaf.dtype)
            fitting = [
                i
                for i, output in enumerate(leaves)
                if (output.shape, output.dtype) == kind and i not in places
            ]
            if not fitting:
                found = [f"{x.dtype}{list(x.shape)}" for x in leaves]
                raise ValueError(
                    f"{case.op} {case.shape}: operand {number} is changed in place, but no output "
                    f"is left of its {leaf.dtype}{list(leaf.shape)}; outputs: {found}"
                )
            places.append(fitting[0])
    return places


def _nbytes(x: Any) -> int:
    """Count the bytes of an array or of a shape; keys and scalars count as nothing."""
    if not hasattr(x, "dtype") or jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
        return 0
    return math.prod(x.shape) * x.dtype.itemsize


def _free_bytes() -> int | None:
    """Count the device memory that is free; `None` where the device does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats["bytes_limit"] - stats["bytes_in_use"]
