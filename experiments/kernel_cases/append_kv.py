# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`append_kv` at the shapes of MiniCPM4.1-8B: one launch for what a decode layer appends."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from experiments.kernel_cases.base import Case
from pallas_kernels.append_kv import Appended, append_kv
from pallas_kernels.append_kv.api import Implementation
from pallas_kernels.append_kv.config import work

_IN_PLACE = (8, 9, 10)
"""Operands that a call changes: slots, pooled and recent keys."""


@functools.partial(
    jax.jit,
    static_argnames=(
        *("batch", "heads", "kv_heads", "extra_heads", "head_dim", "slots", "block_size"),
        *("pool_size", "pool_stride", "windows", "dtype"),
    ),
)
def _operands(
    seed: int | Int[Array, ""],
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    extra_heads: int,
    head_dim: int,
    slots: int,
    block_size: int,
    pool_size: int,
    pool_stride: int,
    windows: int,
    dtype: str,
) -> tuple[PyTree, ...]:
    """Make one call's operands: row 0 completes a window, the others stand anywhere."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 10)
    vectors = {0: (heads,), 1: (kv_heads,), 2: (kv_heads,), 3: (extra_heads,)}
    rows = [
        jax.random.normal(keys[i], (batch, *many, head_dim), dtype) for i, many in vectors.items()
    ]
    angle = jax.random.uniform(keys[4], (batch, head_dim // 2), maxval=6.0)
    held = (windows - 1) * pool_stride + pool_size
    positions = jax.random.randint(keys[5], (batch,), 0, held).at[0].set(held - 1)
    tail = jax.random.randint(keys[6], (batch, kv_heads), 0, slots)
    record = (2, block_size, head_dim)
    return (
        *rows,
        jnp.cos(angle),
        jnp.sin(angle),
        positions,
        tail,
        jax.random.normal(keys[7], (batch, kv_heads, slots, *record), dtype),
        jax.random.normal(keys[8], (batch, windows, kv_heads, head_dim), dtype),
        jax.random.normal(keys[9], (batch, pool_size, kv_heads, head_dim), dtype),
    )


def _call(*operands: PyTree, implementation: Implementation, pool_stride: int) -> Appended:
    return append_kv(
        *operands[:9],
        pooled=operands[9],
        recent=operands[10],
        pool_stride=pool_stride,
        implementation=implementation,
    )


def _check(out: Any, operands: tuple[PyTree, ...], *, pool_stride: int) -> None:
    """Compare with the reference: within the last bit of what was rounded."""
    want = jax.jit(functools.partial(_call, implementation="reference", pool_stride=pool_stride))(
        *operands
    )
    for name in ("q", "k", "forecast", "slots", "pooled", "recent"):
        got, expected = (np.asarray(getattr(x, name), np.float32) for x in (out, want))
        bits = 2**-7 if operands[0].dtype == jnp.bfloat16 else 2e-5
        error = np.max(np.abs(got - expected) - bits * np.abs(expected))
        assert error <= bits * 1e-1, f"{name}: {error=} must be at most {bits * 1e-1}"


def _case(name: str, implementation: Implementation, *, least_sets: int = 1, **sizes: Any) -> Case:
    fields: dict[str, Any] = {
        "heads": 32,
        "kv_heads": 2,
        "extra_heads": 2,
        "head_dim": 128,
        "slots": 16,  # a call touches one of them; few make room for many calls
        "block_size": 64,
        "pool_size": 32,
        "pool_stride": 16,
        "windows": 511,
        "dtype": "bfloat16",
    } | sizes
    stride = fields["pool_stride"]
    counted = ("batch", "heads", "kv_heads", "extra_heads", "head_dim", "pool_size", "pool_stride")
    return Case(
        op="append_kv",
        shape=name,
        implementation=implementation,
        operands=functools.partial(_operands, **fields),
        call=functools.partial(_call, implementation=implementation, pool_stride=stride),
        work=work(itemsize=jnp.dtype(fields["dtype"]).itemsize, **{x: fields[x] for x in counted}),
        check=functools.partial(_check, pool_stride=stride),
        in_place=_IN_PLACE,
        least_sets=least_sets,
    )


def cases(*, tiny: bool = False) -> list[Case]:
    """List the measurements.

    Args:
        tiny: shapes that the reference computes on a CPU in seconds.
    """
    if tiny:
        small: dict[str, Any] = {
            "heads": 4,
            "head_dim": 16,
            "slots": 3,
            "block_size": 8,
            "dtype": "float32",
        }
        small |= {"pool_size": 4, "pool_stride": 2, "windows": 5}
        return [_case("tiny", "reference", batch=2, **small)]
    chosen: tuple[Implementation, ...] = ("triton", "reference")
    return [
        _case(f"B{batch}", x, batch=batch, least_sets=64 if x == "triton" else 16)
        for batch in (4, 16, 64)
        for x in chosen
    ]
