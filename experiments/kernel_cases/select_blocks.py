# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`select_blocks` with MiniCPM4.1-8B's rule: decode steps, and the chunks of a prefill."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.kernel_cases.base import Case
from experiments.kernel_cases.block_scores import checked_parts
from pallas_kernels.select_blocks import Selection, select_blocks
from pallas_kernels.select_blocks.api import Implementation
from pallas_kernels.select_blocks.config import work

_CHECKED = 64
"""First and last queries that are compared with the reference."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
    """The rows of one call: the last T queries of sequences of M blocks."""

    batch: int
    queries: int
    blocks: int = 2048
    kv_heads: int = 2
    block_size: int = 64
    sink_blocks: int = 1
    local_blocks: int = 32
    selected_blocks: int = 96

    @property
    def name(self) -> str:
        return f"B{self.batch} T{self.queries} S{self.blocks * self.block_size // 1024}K"

    @property
    def rule(self) -> dict[str, Any]:
        names = ("block_size", "sink_blocks", "local_blocks", "selected_blocks")
        return {name: getattr(self, name) for name in names}

    def positions(self) -> np.ndarray:
        tokens = self.blocks * self.block_size
        last = np.arange(tokens - self.queries, tokens, dtype=np.int32)
        return np.broadcast_to(last, (self.batch, self.queries))

    def case(self, implementation: Implementation) -> Case:
        rows = self.batch * self.queries * self.kv_heads
        visible = float(np.mean(self.positions() // self.block_size + 1))
        width = min(self.selected_blocks, self.blocks)
        return Case(
            op="select_blocks",
            shape=self.name,
            implementation=implementation,
            operands=functools.partial(_operands, shape=self),
            call=functools.partial(select_blocks, **self.rule, implementation=implementation),
            work=work(rows, self.blocks, width, visible=visible),
            check=functools.partial(_check, shape=self),
            least_sets=64 if self.queries == 1 and implementation == "triton" else 1,
        )


@functools.partial(jax.jit, static_argnames="shape")
def _operands(
    seed: int | Int[Array, ""], *, shape: _Shape
) -> tuple[Float[Array, "B T K M"], Int[Array, "B T"]]:
    """Scores as of a forecast: unscaled logits, no two alike as a rule."""
    size = (shape.batch, shape.queries, shape.kv_heads, shape.blocks)
    scores = 8.0 * jax.random.normal(jax.random.key(seed), size, jnp.float32)
    return scores, jnp.asarray(shape.positions())


def _check(
    output: Selection, operands: tuple[Float[Array, "B T K M"], Int[Array, "B T"]], *, shape: _Shape
) -> None:
    """Hold the choice of the first and of the last queries to the reference."""
    scores, positions = operands
    oracle = jax.jit(functools.partial(select_blocks, **shape.rule, implementation="reference"))
    for part in checked_parts(shape.queries, _CHECKED):
        want = oracle(scores[:, part], positions[:, part])
        for name in ("ids", "count", "mask"):
            got = np.asarray(getattr(output, name)[:, part])
            np.testing.assert_array_equal(got, getattr(want, name), err_msg=name)


def cases(*, tiny: bool = False) -> list[Case]:
    """List the cases.

    Args:
        tiny: shapes that run on a CPU in seconds, by the reference.
    """
    if tiny:
        small = _Shape(batch=2, queries=3, blocks=40, local_blocks=2, selected_blocks=9)
        return [small.case("reference")]
    decode = [_Shape(batch=batch, queries=1) for batch in (4, 16, 64)]
    longer = _Shape(batch=4, queries=1, blocks=16384)
    chunk = _Shape(batch=1, queries=8192)
    prompt = _Shape(batch=1, queries=131072)
    made = [shape.case("triton") for shape in (*decode, chunk, prompt, longer)]
    return made + [shape.case("reference") for shape in (decode[0], chunk)]
