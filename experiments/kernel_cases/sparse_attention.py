# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`sparse_attention` at MiniCPM4.1-8B's shapes, a whole prompt at once, beside dense attention.

What a kernel can save depends on how alike neighbours choose. Scores of the blocks beyond the
pinned ones are standard normal, each block's a first-order autoregression over the queries, and the
best are chosen by `select_blocks`. `drifting`: one query's scores correlate with the next one's so
that neighbours share 90 % of the blocks beyond the pinned ones. `independent`: no correlation.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from experiments.kernel_cases.base import Case
from pallas_kernels._roofline import Work
from pallas_kernels.select_blocks import select_blocks
from pallas_kernels.sparse_attention import Tiles, sparse_attention
from pallas_kernels.sparse_attention.api import Implementation
from pallas_kernels.sparse_attention.config import work

CORRELATION = {"drifting": 0.993, "independent": 0.0}
"""Of a block's scores for two neighbouring queries."""

_STEP = 64
"""Queries whose choices are made together."""

_CHECKED = 16
"""Queries that are compared with the reference, in three places."""

_TOLERANCE = 2e-2
"""Greatest RMS error, as a share of the RMS of the f32 result."""

_NAMES: tuple[Implementation, ...] = ("mosaic_gpu", "triton")

_VARIANTS: dict[Implementation, tuple[dict[str, Any], ...]] = {
    "mosaic_gpu": (
        {"rows": 64, "stages": 5},
        {"rows": 128, "stages": 3},
        {"rows": 128, "stages": 5, "queries_in": "shared"},
        {"rows": 192, "stages": 5},
        {"rows": 192, "stages": 5, "queries_in": "shared"},
    ),
    "triton": (
        {"rows": 64, "stages": 3, "num_warps": 4},
        {"rows": 64, "stages": 2, "num_warps": 4},
        {"rows": 128, "stages": 2, "num_warps": 8},
        {"rows": 128, "stages": 3, "num_warps": 4},
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
    """A prompt of T = S tokens."""

    length: int
    overlap: str = "drifting"
    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 128
    block_size: int = 64
    sink_blocks: int = 1
    local_blocks: int = 32
    selected_blocks: int = 96
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"S{self.length // 1024}K J{self.selected_blocks} {self.overlap}"

    @property
    def rule(self) -> dict[str, Any]:
        names = ("block_size", "sink_blocks", "local_blocks", "selected_blocks")
        return {name: getattr(self, name) for name in names}

    def work(self) -> Work:
        """Count the chosen blocks only: a query has at most `selected_blocks`, none after it."""
        own = np.arange(self.length) // self.block_size + 1
        return work(
            queries=self.length,
            keys=self.length,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            chosen=self.kv_heads * int(np.minimum(own, self.selected_blocks).sum()),
            itemsize=jnp.dtype(self.dtype).itemsize,
        )

    def case(self, implementation: Implementation, **tiles: Any) -> Case:
        listed = ",".join(f"{key}={value}" for key, value in tiles.items())
        return Case(
            op="sparse_attention",
            shape=self.name,
            implementation=f"{implementation}[{listed}]" if tiles else implementation,
            operands=functools.partial(_operands, shape=self),
            call=functools.partial(
                sparse_attention,
                block_size=self.block_size,
                implementation=implementation,
                tiles=Tiles(**tiles) if tiles else None,
            ),
            work=self.work(),
            check=functools.partial(_check, block_size=self.block_size),
        )


def draw_masks(
    key: jax.Array,
    *,
    length: int,
    kv_heads: int,
    correlation: float,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    selected_blocks: int,
    first: int = 0,
) -> UInt32[Array, "1 T K maskwords"]:
    """Draw the choices of the last queries of a prompt whose scores drift from query to query.

    Args:
        key: PRNG key.
        length: S, a multiple of 64.
        kv_heads: K, each with scores of its own.
        correlation: of a block's scores for neighbouring queries.
        block_size: as for `select_blocks`, with the counts that follow.
        sink_blocks: pinned.
        local_blocks: pinned.
        selected_blocks: J.
        first: position of the first query, a multiple of 64; T = S − `first`.
    """
    blocks = -(-length // block_size)
    fresh = math.sqrt(1.0 - correlation**2)
    ahead = np.arange(_STEP)
    gap = ahead[:, None] - ahead[None, :]
    decay = np.where(gap >= 0, float(correlation) ** np.abs(gap) * fresh, 0.0)
    mix = jnp.asarray(decay, jnp.float32)
    carried = jnp.asarray(float(correlation) ** (ahead + 1.0), jnp.float32)

    def step(last: Array, start: Array) -> tuple[Array, Array]:
        noise = jax.random.normal(jax.random.fold_in(key, start), (_STEP, kv_heads * blocks))
        scores = mix @ noise + carried[:, None] * last[None, :]
        choice = select_blocks(
            scores.reshape(1, _STEP, kv_heads, blocks),
            (start + jnp.arange(_STEP, dtype=jnp.int32))[None],
            block_size=block_size,
            sink_blocks=sink_blocks,
            local_blocks=local_blocks,
            selected_blocks=selected_blocks,
        )
        return scores[-1], choice.mask[0]

    last = jax.random.normal(jax.random.fold_in(key, length), (kv_heads * blocks,))
    starts = jnp.arange(first, length, _STEP, dtype=jnp.int32)
    _, masks = jax.lax.scan(step, last, starts)
    return masks.reshape(1, length - first, *masks.shape[2:])


@functools.partial(jax.jit, static_argnames="shape")
def _operands(
    seed: int | Int[Array, ""], *, shape: _Shape
) -> tuple[Array, Array, Array, UInt32[Array, "1 T K maskwords"], Int[Array, "1 T"]]:
    """Standard normal q, k and v, and the choices of one prompt."""
    keys = jax.random.split(jax.random.key(seed), 4)
    sizes = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (
        jax.random.normal(key, (1, shape.length, heads, shape.head_dim), shape.dtype)
        for key, heads in zip(keys, sizes, strict=False)
    )
    masks = draw_masks(
        keys[3],
        length=shape.length,
        kv_heads=shape.kv_heads,
        correlation=CORRELATION[shape.overlap],
        **shape.rule,
    )
    return q, k, v, masks, jnp.arange(shape.length, dtype=jnp.int32)[None]


def _check(
    output: Float[Array, "B T N H"], operands: tuple[Array, ...], *, block_size: int
) -> None:
    """Hold the first, the middle and the last queries to the reference in f32."""
    length = output.shape[1]

    @jax.jit  # one program for the three places
    def pair(output: Array, operands: tuple[Array, ...], start: int) -> tuple[Array, Array]:
        q, k, v, masks, positions = operands
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, _CHECKED, axis=1)
        exact_q, exact_k, exact_v = (x.astype(jnp.float32) for x in (part(q), k, v))
        want = sparse_attention(
            exact_q, exact_k, exact_v, part(masks), part(positions),
            block_size=block_size, implementation="reference",
        )  # fmt: skip
        return part(output).astype(jnp.float32), want

    for start in (0, (length - _CHECKED) // 2, length - _CHECKED):
        with jax.default_matmul_precision("highest"):
            got, want = (np.asarray(x) for x in pair(output, operands, start))
        error = got - want
        share = float(np.sqrt(np.mean(error**2) / np.mean(want**2)))
        if not share <= _TOLERANCE:
            raise AssertionError(
                f"queries from {start}: RMS error {share:.3g} of the result, at most {_TOLERANCE}"
            )


def _dense(length: int, implementation: str) -> Case:
    """Make the case of a peer that attends to all keys."""
    shape = _Shape(length=length, dtype="float16" if "mgpu" in implementation else "bfloat16")
    heads, dim = shape.heads, shape.head_dim
    moved = 2 * dim * 2 * length * (heads + shape.kv_heads)
    return Case(
        op="sparse_attention",
        shape=f"S{length // 1024}K dense causal",
        implementation=implementation,
        operands=functools.partial(_dense_operands, shape=shape),
        call=_attend_by_cudnn if implementation == "cudnn" else _attend_by_mgpu,
        work=Work(bytes=moved, flops=2 * dim * heads * length * (length + 1), ceiling="matmul"),
    )


@functools.partial(jax.jit, static_argnames="shape")
def _dense_operands(seed: int | Int[Array, ""], *, shape: _Shape) -> tuple[Array, Array, Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (
        jax.random.normal(key, (1, shape.length, heads, shape.head_dim), shape.dtype)
        for key, heads in zip(keys, sizes, strict=True)
    )
    return q, k, v


def _attend_by_cudnn(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _attend_by_mgpu(q: Array, k: Array, v: Array) -> Array:
    """Attend with JAX's own Mosaic kernel, which takes fp16 and unscaled logits."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu  # brings JAX's test tools along

    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
    )
    return attention_mgpu.attention(q * jnp.float16(q.shape[3] ** -0.5), k, v, config)


def cases(*, tiny: bool = False) -> list[Case]:
    """List the cases.

    Args:
        tiny: shapes that run on a CPU in seconds, by the reference.
    """
    if tiny:
        small = _Shape(
            length=512, heads=4, head_dim=16, block_size=16, local_blocks=2, selected_blocks=6
        )
        wild = dataclasses.replace(small, overlap="independent")
        return [small.case("reference"), wild.case("reference")]
    long, wild = _Shape(length=131072), _Shape(length=131072, overlap="independent")
    made = [long.case("mosaic_gpu"), _dense(131072, "cudnn"), wild.case("mosaic_gpu")]
    made += [_Shape(length=32768).case(name) for name in _NAMES]
    made += [_dense(32768, name) for name in ("cudnn", "attention_mgpu")]
    made += [shape.case("triton") for shape in (long, wild)]
    made += [
        shape.case(name, **tiles)
        for shape in (long, wild)
        for name, variants in _VARIANTS.items()
        for tiles in variants
    ]
    return made
