# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Compiles the steps of a cell's methods side by side, before any of them is measured.

A step of 32 layers takes half a minute to compile, mostly on one core, and a row a few seconds.
Arguments are shapes here, committed as a `Decoder` commits them: its program would be another one
otherwise, and what was compiled here is found again by JAX only if it is the same.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.decode_cells import Method, Setting, make_state
from sparda_jax.decode import draw_program
from sparda_jax.decode_blocks import Way
from sparda_jax.kv.overlap import graphs_of_step
from sparda_jax.model import SpardaLM
from sparda_jax.parts import Layout, Parts, cut
from sparda_jax.sampling import Draw, Rows

_THREADS = 8


def abstract_step(setting: Setting, method: Method) -> tuple[Any, tuple[Any, ...]]:
    """Give the program of a step, and its arguments as shapes.

    Args:
        setting: the sizes.
        method: who chooses, and where K and V live.
    """
    config, batch = setting.config, setting.batch
    layouts: list[Layout] = []

    def make() -> Parts:
        layout, parts = cut(SpardaLM(config, rngs=nnx.Rngs(0)))
        layouts.append(layout)
        return parts

    parts = jax.eval_shape(make)
    state: Any = jax.eval_shape(lambda: make_state(setting, method))
    writes_host = method.is_offloaded and jax.default_backend() != "cpu"
    if writes_host:
        state = dataclasses.replace(state, receipt=jax.ShapeDtypeStruct((1,), jnp.int32))
    ints: Any = jax.ShapeDtypeStruct((batch,), jnp.int32)
    bools: Any = jax.ShapeDtypeStruct((batch,), bool)
    rows = Rows(tokens=ints, active=bools, left=ints, requests=ints)
    shape = (batch, config.kv_heads, setting.num_blocks, 2, config.sparse.block_size)
    dtype = jnp.dtype(setting.host_dtype or config.dtype)
    record = jax.ShapeDtypeStruct((*shape, config.head_dim), dtype)
    records = [record] * (config.layers if method.is_offloaded else 0)
    way = Way(
        plan=setting.plan(method.mode),
        is_offloaded=method.is_offloaded,
        has_lookahead=method.has_lookahead,
        writes_host=writes_host,
        host_dtype=setting.host_dtype if method.is_offloaded else None,
        graphs=graphs_of_step(),
    )
    if method.is_offloaded:  # records have a place, so the state has one; weights are free
        state, rows, records = _commit((state, rows, records))
    return draw_program(layouts[0], way, Draw()), (state, rows, parts, records, None)


def _commit[T](tree: T) -> T:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


class Ahead:
    """Steps being compiled in threads.

    Args:
        setting: the sizes.
        methods: whose steps.
    """

    def __init__(self, setting: Setting, methods: Sequence[Method]) -> None:
        self._threads = ThreadPoolExecutor(_THREADS)
        self._taken: dict[str, Future[float]] = {}
        for method in methods:
            begun = time.perf_counter()
            with contextlib.suppress(Exception):  # whoever runs the method meets the error
                program, arguments = abstract_step(setting, method)
                lowered = program.lower(*arguments)
                self._taken[method.name] = self._threads.submit(_compile, lowered, begun)

    def wait(self) -> dict[str, float]:
        """Wait for all; give the seconds of each that was compiled, others running beside it.

        A step that could not be compiled is left out: whoever runs it meets the error.
        """
        self._threads.shutdown()
        return {
            name: future.result()
            for name, future in self._taken.items()
            if future.exception() is None
        }


def _compile(lowered: jax.stages.Lowered, begun: float) -> float:
    lowered.compile()
    return time.perf_counter() - begun
