# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`query_scores` at the shapes of MiniCPM4.1-8B: decode steps, and the chunks of a prefill."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.kernel_cases.base import Case
from experiments.kernel_cases.block_scores import FAR, Shape, checked_parts
from pallas_kernels.query_scores import Tiles, query_scores
from pallas_kernels.query_scores.config import work

_CHECKED = 16
"""First and last queries that are compared with the reference."""

_ROWS_AT_ONCE = 4
"""Sequences that the oracle computes at once: it holds all heads' logits in f32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape(Shape):
    """One call: the last T queries of sequences of `tokens` tokens, for N heads."""

    heads: int = 32


@functools.partial(jax.jit, static_argnames="shape")
def _operands(seed: int | Int[Array, ""], *, shape: _Shape) -> tuple[Array, ...]:
    """Queries and pooled keys of unit scale; every pooled key is valid."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 2)
    q_shape = (shape.batch, shape.queries, shape.heads, shape.head_dim)
    pooled_shape = (shape.batch, shape.cells, shape.kv_heads, shape.head_dim)
    q = jax.random.normal(keys[0], q_shape, shape.dtype)
    pooled = jax.random.normal(keys[1], pooled_shape, shape.dtype)
    counts = jnp.full((shape.batch,), shape.cells, jnp.int32)
    return q, pooled, jnp.asarray(shape.positions()), counts


def _check(output: Array, operands: tuple[Array, ...], *, shape: _Shape) -> None:
    """Hold the first and the last queries to the reference in f32, within 2e-5 of the greatest."""
    oracle = jax.jit(functools.partial(query_scores, **shape.rule, implementation="reference"))
    for part in checked_parts(shape.queries, _CHECKED):
        for start in range(0, shape.batch, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            q, pooled, positions, counts = (x[rows] for x in operands)
            with jax.default_matmul_precision("highest"):
                want = np.asarray(
                    oracle(
                        q[:, part].astype(jnp.float32),
                        pooled.astype(jnp.float32),
                        positions[:, part],
                        counts,
                    )
                )
            got = np.asarray(output[rows, part])
            np.testing.assert_array_equal(got < FAR, want < FAR)
            known = want[want > FAR]
            bound = 2e-5 * np.abs(known).max()
            np.testing.assert_allclose(got[want > FAR], known, rtol=2e-5, atol=bound)


def _case(shape: _Shape, implementation: str, tiles: Tiles | None = None, label: str = "") -> Case:
    options: dict[str, Any] = {"implementation": implementation, "tiles": tiles}
    return Case(
        op="query_scores",
        shape=shape.name,
        implementation=implementation + label,
        operands=functools.partial(_operands, shape=shape),
        call=functools.partial(query_scores, **shape.rule, **options),
        work=work(
            batch=shape.batch,
            queries=shape.queries,
            cells=shape.cells,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            num_blocks=shape.tokens // shape.block_size,
            itemsize=jnp.dtype(shape.dtype).itemsize,
            pairs=shape.pairs(),
        ),
        check=functools.partial(_check, shape=shape),
    )


def cases(*, tiny: bool = False) -> list[Case]:
    """List the cases.

    Args:
        tiny: shapes that run on a CPU in seconds, by the reference.
    """
    if tiny:
        sizes = {"heads": 4, "head_dim": 16, "dtype": "float32"}
        small = _Shape(batch=2, queries=3, tokens=2048, **sizes)
        return [_case(small, "reference")]
    decode = [_Shape(batch=batch, queries=1) for batch in (16, 4, 64)]
    chunk = _Shape(batch=1, queries=8192)
    some = _Shape(batch=1, queries=512)
    made = [_case(shape, "triton") for shape in (*decode, chunk, some)]
    made += [_case(shape, "reference") for shape in (decode[0], some)]
    for tile_c, span, num_warps, stages in (
        (64, 2, 4, 3),
        (64, 4, 4, 3),
        (64, 8, 4, 4),
        (128, 1, 4, 2),
        (128, 4, 4, 3),
        (128, 4, 8, 3),
    ):
        tiles = Tiles(tile_q=1, tile_c=tile_c, span=span, num_warps=num_warps, num_stages=stages)
        label = f"[tile_c={tile_c} span={span} warps={num_warps} stages={stages}]"
        made += [_case(shape, "triton", tiles, label) for shape in decode[:2]]
    for tile_q, tile_c, tile_m, num_warps in ((4, 128, 32, 4), (4, 64, 16, 4), (8, 64, 32, 8)):
        tiles = Tiles(tile_q=tile_q, tile_c=tile_c, tile_m=tile_m, num_warps=num_warps)
        label = f"[tile_q={tile_q} tile_c={tile_c} tile_m={tile_m} warps={num_warps}]"
        made.append(_case(chunk, "triton", tiles, label))
    return made
