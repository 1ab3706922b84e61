# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`block_scores` at the shapes of MiniCPM4.1-8B: decode steps, and the chunks of a prefill."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.kernel_cases.base import Case
from pallas_kernels.block_scores import Tiles, block_scores
from pallas_kernels.block_scores.config import work

_CHECKED = 64
"""First and last queries that are compared with the reference."""

FAR = -1e29
"""Below it a score is that of a block without a visible cell."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call: the last T queries of sequences of `tokens` tokens."""

    batch: int
    queries: int
    tokens: int = 131072
    kv_heads: int = 2
    head_dim: int = 128
    block_size: int = 64
    pool_size: int = 32
    pool_stride: int = 16
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """Name the case in words."""
        return f"B{self.batch} T{self.queries} S{self.tokens // 1024}K"

    @property
    def cells(self) -> int:
        """Count the full windows."""
        return (self.tokens - self.pool_size) // self.pool_stride + 1

    @property
    def rule(self) -> dict[str, Any]:
        """Collect the sizes that the op takes."""
        names = ("block_size", "pool_size", "pool_stride")
        return {"num_blocks": self.tokens // self.block_size} | {n: getattr(self, n) for n in names}

    def positions(self) -> np.ndarray:
        """Place the queries, [B T]."""
        last = np.arange(self.tokens - self.queries, self.tokens, dtype=np.int32)
        return np.broadcast_to(last, (self.batch, self.queries))

    def pairs(self) -> int:
        """Count the visible (query, pooled key) pairs of one KV head."""
        past = self.positions().astype(np.int64) - self.pool_size + 1
        return int(np.sum(np.where(past >= 0, past // self.pool_stride + 1, 0)))


@functools.partial(jax.jit, static_argnames="shape")
def operands(seed: int | Int[Array, ""], *, shape: Shape) -> tuple[Array, ...]:
    """Forecasts and pooled keys of unit scale; every pooled key is valid."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 2)
    rest = (shape.kv_heads, shape.head_dim)
    forecast = jax.random.normal(keys[0], (shape.batch, shape.queries, *rest), shape.dtype)
    pooled = jax.random.normal(keys[1], (shape.batch, shape.cells, *rest), shape.dtype)
    counts = jnp.full((shape.batch,), shape.cells, jnp.int32)
    return forecast, pooled, jnp.asarray(shape.positions()), counts


def checked_parts(queries: int, count: int) -> list[slice]:
    """Give the first and the last `count` of all queries, once if they are the same.

    Example:
        >>> checked_parts(1, 64), checked_parts(99, 64)
        ([slice(None, None, None)], [slice(None, 64, None), slice(-64, None, None)])
    """
    if queries <= count:
        return [slice(None)]
    return [slice(None, count), slice(-count, None)]


def _check(output: Array, operands: tuple[Array, ...], *, shape: Shape) -> None:
    """Hold the first and the last queries to the reference in f32, within 2e-5 of the greatest."""
    forecast, pooled, positions, counts = operands
    oracle = jax.jit(functools.partial(block_scores, **shape.rule, implementation="reference"))
    for part in checked_parts(shape.queries, _CHECKED):
        with jax.default_matmul_precision("highest"):
            want = np.asarray(
                oracle(
                    forecast[:, part].astype(jnp.float32),
                    pooled.astype(jnp.float32),
                    positions[:, part],
                    counts,
                )
            )
        got = np.asarray(output[:, part])
        np.testing.assert_array_equal(got < FAR, want < FAR)
        known = want[want > FAR]
        bound = 2e-5 * np.abs(known).max()
        np.testing.assert_allclose(got[want > FAR], known, rtol=2e-5, atol=bound)


def _case(shape: Shape, implementation: str, tiles: Tiles | None = None, label: str = "") -> Case:
    options: dict[str, Any] = {"implementation": implementation, "tiles": tiles}
    return Case(
        op="block_scores",
        shape=shape.name,
        implementation=implementation + label,
        operands=functools.partial(operands, shape=shape),
        call=functools.partial(block_scores, **shape.rule, **options),
        work=work(
            batch=shape.batch,
            queries=shape.queries,
            cells=shape.cells,
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
        small = Shape(batch=2, queries=3, tokens=2048, head_dim=16, dtype="float32")
        return [_case(small, "reference")]
    decode = [Shape(batch=batch, queries=1) for batch in (16, 4, 64)]
    chunk, few = Shape(batch=1, queries=8192), Shape(batch=1, queries=1024)
    made = [_case(shape, "triton") for shape in (*decode, chunk, few)]
    made += [_case(shape, "reference") for shape in (decode[0], few)]
    for tile_m, num_warps in ((8, 2), (8, 4), (16, 2), (32, 4), (32, 8), (64, 8)):
        tiles = Tiles(tile_q=1, tile_m=tile_m, num_warps=num_warps)
        label = f"[tile_m={tile_m} warps={num_warps}]"
        made += [_case(shape, "triton", tiles, label) for shape in decode[:2]]
    for tile_q, tile_m, num_warps, stages in (
        (64, 32, 4, 1),
        (64, 16, 4, 3),
        (128, 32, 4, 2),
        (128, 32, 8, 2),
        (128, 32, 8, 3),
        (128, 64, 8, 2),
    ):
        tiles = Tiles(
            tile_q=tile_q,
            tile_m=tile_m,
            span=512 // tile_m,
            num_warps=num_warps,
            num_stages=stages,
        )
        label = f"[tile_q={tile_q} tile_m={tile_m} warps={num_warps} stages={stages}]"
        made.append(_case(chunk, "triton", tiles, label))
    return made
