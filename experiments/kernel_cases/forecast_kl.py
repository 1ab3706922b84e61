# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`forecast_kl`: the loss of a whole layer at MiniCPM4.1-8B's shapes, and its parts on one tile."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.kernel_cases.base import Case
from pallas_kernels.forecast_kl import forecast_kl_and_gradient, teacher_mass
from pallas_kernels.forecast_kl.config import layer_work, loss_work, teacher_work
from sparda_jax.config import SparseConfig
from sparda_jax.pooling import pool_keys
from sparda_jax.training.attend import map_spans, mark_blocks
from sparda_jax.training.loss import counted_rows, forecast_kl, supervised_cells
from sparda_jax.training.teacher import align_mass, fine_keys, fine_mass

_CHECKED = 64
"""Last queries that are compared with the plain program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
    """One sequence of one layer."""

    tokens: int
    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 128
    dtype: str = "bfloat16"
    sparse: SparseConfig = dataclasses.field(default_factory=SparseConfig)

    @property
    def cells(self) -> int:
        return self.sparse.pooled(self.tokens)

    @property
    def width(self) -> int:
        return min(self.sparse.selected_blocks, self.sparse.blocks(self.tokens))

    def teacher_options(self) -> dict[str, Any]:
        sparse = self.sparse
        return {
            "num_cells": self.cells,
            "pool_stride": sparse.pool_stride,
            "teacher_pool_size": sparse.teacher_pool_size,
            "teacher_pool_stride": sparse.teacher_pool_stride,
            "alignment": sparse.teacher_alignment,
        }

    def loss_options(self) -> dict[str, Any]:
        names = ("block_size", "pool_size", "pool_stride", "sink_blocks", "local_blocks")
        return {name: getattr(self.sparse, name) for name in names}

    def work_sizes(self) -> dict[str, int]:
        names = ("kv_heads", "head_dim")
        itemsize = jnp.dtype(self.dtype).itemsize
        return {"batch": 1, "itemsize": itemsize} | {n: getattr(self, n) for n in names}


def _layer(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    forecast: Float[Array, "B T K H"],
    ids: Int[Array, "B T K J"],
    *,
    shape: _Shape,
    implementation: str,
    tile: int,
    spans: int | None,
) -> tuple[Float[Array, "B T K"], Float[Array, "B T K H"]]:
    """Compute KL and gradient of every row, tile by tile."""
    sparse = shape.sparse
    fine, pooled = fine_keys(k, sparse), pool_keys(k, sparse.pool_size, sparse.pool_stride)
    lengths = jnp.full(q.shape[:1], q.shape[1], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32)[None], q.shape[:2])

    def label(rows: tuple[Array, Array, Array, Array], end: int) -> tuple[Array, Array]:
        q, forecast, ids, at = rows
        held = fine[:, : -(-end // sparse.teacher_pool_stride)]
        options = shape.teacher_options() | {"implementation": implementation}
        cells = teacher_mass(q, held, at, lengths, **options)
        counted = counted_rows(cells, at, keep_empty=False)
        options = shape.loss_options() | {"implementation": implementation}
        return forecast_kl_and_gradient(
            forecast, pooled, cells, ids, counted, at, lengths, **options
        )

    return map_spans(label, (q, forecast, ids, positions), tile, (0, 0, -1, -1), spans=spans)


@functools.partial(jax.jit, static_argnames="shape")
def _operands(seed: int | Int[Array, ""], *, shape: _Shape) -> tuple[Array, Array, Array, Array]:
    """q, k, forecast and the blocks of each query: the pinned and others at random."""
    parts = jax.random.split(jax.random.key(seed), 4)
    rows = (1, shape.tokens, shape.kv_heads)
    q = jax.random.normal(parts[0], (*rows[:2], shape.heads, shape.head_dim), shape.dtype)
    k = jax.random.normal(parts[1], (*rows, shape.head_dim), shape.dtype)
    forecast = jax.random.normal(parts[2], (*rows, shape.head_dim), shape.dtype)
    blocks = shape.sparse.blocks(shape.tokens)

    def choose(rows: tuple[Array, Array], end: int) -> Array:
        at, seeds = rows
        own = at[:, :, None, None] // shape.sparse.block_size
        block = jnp.arange(blocks)[None, None, None, :]
        keys = jax.vmap(jax.random.key)(seeds.reshape(-1))
        draw = jax.vmap(lambda key: jax.random.uniform(key, (shape.kv_heads, blocks)))(keys)
        draw = draw.reshape(*at.shape, shape.kv_heads, blocks)
        near = (block >= own - shape.sparse.local_blocks) | (block < shape.sparse.sink_blocks)
        rank = jnp.where(block <= own, jnp.where(near, 2.0, draw), -1.0)
        best, ids = jax.lax.top_k(rank, shape.width)
        ids = jnp.sort(jnp.where(best >= 0.0, ids, blocks), axis=-1)
        return jnp.where(ids < blocks, ids, -1).astype(jnp.int32)

    at = jnp.arange(shape.tokens)[None]
    seeds = jax.random.bits(parts[3], (1, shape.tokens), "uint32")
    return q, k, forecast, map_spans(choose, (at, seeds), 2048, (0, 0), spans=1)


def _check(
    found: tuple[Array, Array], operands: tuple[Array, ...], *, shape: _Shape, slack: float
) -> None:
    """Compare the last queries with the plain program in f32."""
    sparse, first = shape.sparse, shape.tokens - min(_CHECKED, shape.tokens)
    q, k, forecast, ids = operands

    @jax.jit
    def plain(q: Array, k: Array, forecast: Array, ids: Array) -> tuple[Array, Array]:
        f32 = lambda x: x.astype(jnp.float32)
        fine, pooled = fine_keys(k, sparse), pool_keys(k, sparse.pool_size, sparse.pool_stride)
        lengths = jnp.array([shape.tokens])
        at = jnp.arange(first, shape.tokens)[None]
        mass = fine_mass(f32(q[:, first:]), f32(fine), at, lengths, sparse)
        cells = align_mass(mass, shape.cells, sparse)
        listed = mark_blocks(ids[:, first:], sparse.blocks(shape.tokens))
        kept = supervised_cells(listed, at, shape.cells, sparse)
        counted = counted_rows(cells, at, keep_empty=False)
        late = f32(forecast[:, first:])
        return forecast_kl(
            late, f32(pooled), cells, kept, counted, at, lengths, sparse, width=shape.width
        )

    with jax.default_matmul_precision("highest"):
        wanted = plain(q, k, forecast, ids)
    for got, want in zip(found, wanted, strict=True):
        got, want = np.asarray(got)[:, first:], np.asarray(want)
        np.testing.assert_allclose(got, want, rtol=slack, atol=slack * np.abs(want).max())


def _layer_case(name: str, shape: _Shape, implementation: str, tile: int) -> Case:
    """Make the case of a whole layer; the plain program is cut into spans, as training does."""
    spans = None if implementation == "reference" else 1
    static = {"shape": shape, "implementation": implementation, "tile": tile, "spans": spans}
    sparse = shape.sparse
    work = layer_work(
        tokens=shape.tokens,
        heads=shape.heads,
        pool_size=sparse.pool_size,
        pool_stride=sparse.pool_stride,
        teacher_pool_size=sparse.teacher_pool_size,
        teacher_pool_stride=sparse.teacher_pool_stride,
        **shape.work_sizes(),
    )
    # Off the highest precision, XLA multiplies f32 by TF32: the plain gradient has 11 bits.
    slack = 5e-3 if implementation == "reference" else 2e-4
    return Case(
        op="forecast_kl",
        shape=name,
        implementation=implementation,
        operands=functools.partial(_operands, shape=shape),
        call=functools.partial(_layer, **static),
        work=work,
        check=functools.partial(_check, shape=shape, slack=slack),
    )


def _tile_cases(name: str, shape: _Shape, queries: int) -> list[Case]:
    """Make the cases of the two halves on the last queries of a sequence, kernels only."""
    first = shape.tokens - queries
    sparse = shape.sparse
    at = jnp.arange(first, shape.tokens)[None]
    lengths = jnp.array([shape.tokens])

    def teacher(seed: int) -> tuple[Array, Array]:
        q, k, _, _ = _operands(seed, shape=shape)
        return q[:, first:], fine_keys(k, sparse)

    def loss(seed: int) -> tuple[Array, ...]:
        _, k, forecast, ids = _operands(seed, shape=shape)
        cells = jax.random.uniform(jax.random.key(seed), (*forecast.shape[:3], shape.cells))
        start = jnp.arange(shape.cells)[None, None, None, :] * sparse.pool_stride
        cells = jnp.where(start <= at[:, :, None, None], cells[:, first:], 0.0)
        pooled = pool_keys(k, sparse.pool_size, sparse.pool_stride)
        return forecast[:, first:], pooled, cells, ids[:, first:]

    def run_teacher(q: Array, fine: Array) -> Array:
        options = shape.teacher_options()
        return teacher_mass(q, fine, at, lengths, **options, implementation="triton")

    def run_loss(forecast: Array, pooled: Array, cells: Array, ids: Array) -> tuple[Array, Array]:
        counted = jnp.ones(forecast.shape[:3], bool)
        operands = (forecast, pooled, cells, ids, counted, at, lengths)
        return forecast_kl_and_gradient(*operands, **shape.loss_options(), implementation="triton")

    sizes = shape.work_sizes() | {
        "first": first,
        "queries": queries,
        "num_cells": shape.cells,
    }
    fine = (shape.tokens - sparse.teacher_pool_size) // sparse.teacher_pool_stride + 1
    return [
        Case(
            op="forecast_kl",
            shape=f"{name} last {queries}",
            implementation="triton[teacher alone]",
            operands=teacher,
            call=run_teacher,
            work=teacher_work(
                heads=shape.heads,
                fine=fine,
                teacher_pool_stride=sparse.teacher_pool_stride,
                **sizes,
            ),
        ),
        Case(
            op="forecast_kl",
            shape=f"{name} last {queries}",
            implementation="triton[loss alone]",
            operands=loss,
            call=run_loss,
            work=loss_work(pool_stride=sparse.pool_stride, **sizes),
        ),
    ]


def cases(*, tiny: bool = False) -> list[Case]:
    """List the measurements of this op.

    Args:
        tiny: shapes that the reference runs on a CPU in seconds.
    """
    if tiny:
        sparse = SparseConfig(
            block_size=16, pool_size=8, pool_stride=4, local_blocks=2, selected_blocks=6
        )
        sizes = {"heads": 4, "head_dim": 16, "dtype": "float32", "sparse": sparse}
        shape = _Shape(tokens=200, **sizes)
        return [_layer_case("B1 S200", shape, "reference", 64)]
    layers = [
        *((32768, "triton", 4096), (8192, "triton", 4096), (8192, "reference", 512)),
        # The plain program's logits, f32, fill the gigabyte that training gives a tile.
        *((32768, "reference", 128), (131072, "triton", 4096)),
    ]
    listed = [
        _layer_case(f"B1 S{tokens // 1024}K J96", _Shape(tokens=tokens), name, tile)
        for tokens, name, tile in layers
    ]
    return listed + _tile_cases("B1 S32K J96", _Shape(tokens=32768), 4096)
