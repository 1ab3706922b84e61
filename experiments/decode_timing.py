# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Times of decode steps, and of what they are held to.

A step is timed among many, each issued while the one before runs and its tokens read one step late,
as `generate` does. The floor is made of parts measured in the same process: all matmuls as one
program, the copy bandwidth of the device, and the gathers of a step alone.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.decode_cells import Setting
from experiments.decode_drift import DriftSelector, DriftSummary
from experiments.kernel_timing import copy_seconds, seconds_each
from pallas_kernels import gather_blocks
from sparda_jax.decode import Decoder
from sparda_jax.kv.host import HostKV, record_bytes
from sparda_jax.kv.state import LayerKV
from sparda_jax.parts import Layout, Parts, commit
from sparda_jax.sampling import Draw, Rows

Drift = int | Int[np.ndarray, "steps L B K"]
"""New blocks: so many in every step, or these in each step, layer, row and head."""

_COPIED = 1 << 28  # bytes of the array that measures the copy bandwidth
_HOST_STEPS = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long a row is measured.

    Attributes:
        warm_up: steps before the first timed one of a sample.
        steps: steps of one sample.
        repeats: samples of a row; the median counts.
    """

    warm_up: int = 8
    steps: int = 64
    repeats: int = 3

    @property
    def total(self) -> int:
        """Count the tokens that a sample feeds."""
        return self.warm_up + self.steps + 2 + _HOST_STEPS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What the steps of a row took.

    Attributes:
        seconds: of a step among many, one number a sample; those of rows that were measured
            together are of the same rounds.
        each: of single steps, by when their tokens came to the host, one step late.
        host_seconds: what Python needs for a call while the device is idle.
        fetched: blocks that a step fetched, mean over the timed steps.
    """

    seconds: tuple[float, ...]
    each: tuple[float, ...]
    host_seconds: float
    fetched: float


class Runner:
    """Drives a decoder from its context on, again and again, with a chosen drift.

    Args:
        decoder: at `setting.context`.
        setting: the sizes.
        drifting: what its plan chooses by; `None` in dense mode.
    """

    def __init__(self, decoder: Decoder, setting: Setting, drifting: DriftSelector | None) -> None:
        self.decoder = decoder
        self._setting, self._drifting = setting, drifting
        batch, config = setting.batch, setting.config
        steps = setting.capacity - setting.context
        self._window = np.zeros((steps, config.layers, batch, config.kv_heads), np.int64)
        self._done = 0
        self._tokens: Int[Array, " B"] = jnp.zeros((batch,), jnp.int32)  # the last that were drawn
        self._rows = Rows(
            tokens=jnp.zeros((batch,), jnp.int32),
            active=jnp.ones((batch,), bool),
            left=jnp.full((batch,), 1 << 30, jnp.int32),
            requests=jnp.arange(batch, dtype=jnp.int32),
        )

    def restart(self, drift: Drift) -> None:
        """Go back to the first position; the window stays where it is and drifts on.

        Args:
            drift: new blocks, from the second step on.

        Raises:
            ValueError: more than a choice has, or of fewer steps than the rows have room for.
        """
        state, batch = self.decoder.state, self._setting.batch
        layers = state.layers
        if self._drifting is not None:
            window = self._window
            steps = window.shape[0] - 1
            if (most := int(np.max(drift))) > self._drifting.hot:
                raise ValueError(f"{most} new blocks must be at most {self._drifting.hot}")
            if isinstance(drift, np.ndarray) and drift.shape[0] < steps:
                raise ValueError(f"{drift.shape[0]=} must be at least {steps}, the room for steps")
            new = np.broadcast_to(
                drift if isinstance(drift, int) else drift[:steps], window[1:].shape
            )
            stands = window[min(self._done, steps)] % self._drifting.turn
            self._window = np.concatenate([stands[None], stands + np.cumsum(new, axis=0)])
            layers = [redirect(kv, self._window[:, layer]) for layer, kv in enumerate(layers)]
        self._done = 0
        lengths = jnp.full((batch,), self._setting.context, jnp.int32)
        fresh = dataclasses.replace(state, layers=layers, lengths=lengths)
        self.decoder.state = commit(fresh, state)  # else the step would be compiled again

    def advance(self) -> Int[Array, "L 3"]:
        """Issue one step; give its counts of blocks resident, fetched and evicted."""
        self._rows, drawn, counts = self.decoder.advance(self._rows, None, Draw())
        self._tokens = drawn.tokens
        self._done += 1
        return counts

    def wait(self) -> None:
        """Wait for all that was issued."""
        jax.block_until_ready((self._tokens, self.decoder.state.lengths))

    def compile(self) -> float:
        """Run the first step; give the seconds that it took, compilation included."""
        begun = time.perf_counter()
        self.advance()
        self.wait()
        return time.perf_counter() - begun

    def measure(self, drifts: Sequence[Drift], effort: Effort) -> list[Steps]:
        """Time steps with every drift, each sample from the first position on.

        A round takes one sample of each drift, so that a machine that is slow for some seconds
        spoils a round and not a drift.

        Args:
            drifts: new blocks.
            effort: how many steps and rounds.
        """
        seconds: list[list[list[float]]] = [[] for _ in drifts]
        counts: list[list[np.ndarray]] = [[] for _ in drifts]
        calls: list[list[float]] = [[] for _ in drifts]
        for _ in range(effort.repeats):
            for row, drift in enumerate(drifts):
                self.restart(drift)
                for _ in range(effort.warm_up):
                    self.advance()
                self.wait()
                seconds[row].append(self._time_each(effort.steps, counts[row]))
                calls[row].append(self._time_calls())
        return [
            Steps(
                seconds=tuple(float(np.mean(sample)) for sample in samples),
                each=tuple(np.concatenate(samples).tolist()),
                host_seconds=float(np.median(called)),
                fetched=float(np.stack(found)[:, :, 1].astype(np.int64).sum(axis=1).mean()),
            )
            for samples, called, found in zip(seconds, calls, counts, strict=True)
        ]

    def _time_each(self, steps: int, counts: list[np.ndarray]) -> list[float]:
        """Take the times between the arrivals of tokens, each read while the next step runs.

        That is how `generate` and the batcher run. Nothing that a step returns stays on the device:
        it would move the buffers of those that follow, and XLA would record their commands anew.
        """
        arrived, last = [], None
        for _ in range(steps + 2):
            newest = (self.advance(), self._tokens)
            for array in newest:
                array.copy_to_host_async()
            if last is not None:
                counts.append(np.array(last[0]))
                np.asarray(last[1])
                arrived.append(time.perf_counter())
            last = newest
        self.wait()
        return np.diff(arrived).tolist()

    def _time_calls(self) -> float:
        found = []
        for _ in range(_HOST_STEPS):
            begun = time.perf_counter()
            self.advance()
            found.append(time.perf_counter() - begun)
            self.wait()
        return float(np.median(found))


def redirect(kv: LayerKV, window: Int[np.ndarray, "steps B K"]) -> LayerKV:
    """Let the choices of a layer drift in another way, as `DriftSummary.window` says."""
    assert isinstance(kv.summary, DriftSummary)  # what a `DriftSelector` keeps
    moved = jnp.asarray(window, jnp.int32)
    return dataclasses.replace(kv, summary=dataclasses.replace(kv.summary, window=moved))


def multiply_all(layout: Layout, parts: Parts, x: Float[Array, "B 1 D"]) -> list[Array]:
    """Run every matmul of a decode step and nothing else: one array a weight, in order.

    Args:
        layout: of the model.
        parts: its weights.
        x: input of the first layer.

    Returns:
        What would otherwise be unused, and the logits.
    """
    model = layout.merge(parts)
    small = jnp.asarray(1e-3, x.dtype)
    out: list[Array] = []
    for block in model.layers:
        attention = block.attention
        q = jnp.einsum("btd,dnh->btnh", x, attention.q_proj[...])
        narrow = (
            attention.k_proj,
            attention.v_proj,
            attention.forecast_proj,
            attention.entry_forecast_proj,
        )
        out += [jnp.einsum("btd,dkh->btkh", x, w[...]) for w in narrow if w is not None]
        x = x + small * attention.output(q)
        x = x + small * block.mlp(x)
    weight = model.embed[...].T if model.lm_head is None else model.lm_head[...]
    return [*out, jnp.einsum("btd,dv->btv", x, weight, preferred_element_type=jnp.float32)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """What a step cannot be faster than, measured here.

    Attributes:
        matmul_seconds: all matmuls as one program.
        copy_bytes_per_s: read and written by a device copy.
    """

    matmul_seconds: float
    copy_bytes_per_s: float


def measure_floor(layout: Layout, parts: Parts, setting: Setting) -> Floor:
    """Measure the matmuls of a step and the copy bandwidth.

    Args:
        layout: of the model.
        parts: its weights.
        setting: for the batch.
    """
    config = setting.config
    x = jax.random.normal(jax.random.key(2), (setting.batch, 1, config.width), config.dtype)
    program = jax.jit(lambda parts, x: multiply_all(layout, parts, x))
    matmul = seconds_each(lambda: program(parts, x)[-1], runs=16)
    size = _COPIED if jax.default_backend() == "gpu" else 1 << 20
    return Floor(
        matmul_seconds=matmul,
        copy_bytes_per_s=2 * size / copy_seconds(size),
    )


def read_bytes(setting: Setting, *, reads_all: bool) -> int:
    """Count the bytes of K, V and pooled keys that a step reads from device memory.

    Args:
        setting: the sizes.
        reads_all: every block instead of the chosen ones, and no pooled keys.
    """
    config = setting.config
    lanes = config.layers * setting.batch * config.kv_heads
    if reads_all:
        return lanes * config.sparse.blocks(setting.context) * record_bytes(config)
    key_bytes = config.head_dim * jnp.dtype(config.dtype).itemsize
    chosen = config.sparse.selected_blocks * record_bytes(config)
    return lanes * (chosen + config.sparse.pooled(setting.context) * key_bytes)


class FetchAlone:
    """The gathers of a step and nothing else, layer after layer, into the slots of a decoder.

    Args:
        host: the records.
        setting: the sizes.
        most: blocks of a layer at most, for each (row, head).
    """

    def __init__(self, host: HostKV, setting: Setting, most: int) -> None:
        config, lanes = setting.config, setting.batch * setting.config.kv_heads
        layers = range(config.layers)
        self._records = [host.operand(layer) for layer in layers]
        rng = np.random.default_rng(3)
        room = lanes * config.sparse.selected_blocks  # as long as the lists of a plan

        def moves(count: int) -> np.ndarray:
            """List distinct places of each lane, lane after lane, then the next of each."""
            found = np.stack([rng.permutation(count)[:most] for _ in range(lanes)], axis=1)
            found = (found + count * np.arange(lanes)).reshape(-1).astype(np.int32)
            return np.pad(found, (0, room - found.size), constant_values=-1)

        self._lists = [
            (jnp.asarray(moves(setting.num_blocks)), jnp.asarray(moves(setting.slots)))
            for _ in layers
        ]

        def run(
            slots: list[Array],
            scales: list[Array | None],
            records: list[Array],
            lists: list[tuple[Array, Array]],
            count: Array,
        ) -> list[Array]:
            return [
                gather_blocks(
                    held.reshape(-1, *held.shape[3:]),
                    source,
                    places,
                    count,
                    into.reshape(-1, *into.shape[3:]),
                    scales=None if scale is None else scale.reshape(-1, 2),
                ).reshape(into.shape)
                for into, scale, held, (source, places) in zip(
                    slots, scales, records, lists, strict=True
                )
            ]

        self._program = jax.jit(run, donate_argnums=0)

    def seconds(self, runner: Runner, blocks: int) -> float:
        """Time the gathers of as many blocks in every layer.

        Args:
            runner: whose slots are filled; what its pools say of them is no longer true.
            blocks: of a layer, all rows and heads; at most `most` for each of them.
        """
        if blocks == 0:
            return 0.0
        count = jnp.array([blocks], jnp.int32)
        decoder = runner.decoder
        slots = [kv.slots for kv in decoder.state.layers]
        scales = [kv.scales for kv in decoder.state.layers]

        def run() -> Array:
            slots[:] = self._program(slots, scales, self._records, self._lists, count)
            return slots[-1]

        try:
            return seconds_each(run, runs=8)
        finally:
            layers = [
                dataclasses.replace(kv, slots=filled)
                for kv, filled in zip(decoder.state.layers, slots, strict=True)
            ]
            decoder.state = dataclasses.replace(decoder.state, layers=layers)


def copy_rate_from_host(host: HostKV) -> float:
    """Measure bytes/s of the copy engine from the host's records to the device."""
    view = host.view(0).reshape(-1)
    part = view[: min(view.size, _COPIED // view.itemsize)]
    return part.nbytes / seconds_each(lambda: jax.device_put(part), runs=4)


def device_bytes(*live: object) -> int:
    """Give the most bytes that this process had on the device; on a CPU those of `live`."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return sum(leaf.nbytes for leaf in jax.tree.leaves(live))
