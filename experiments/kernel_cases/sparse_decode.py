# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`sparse_decode` at the shapes of MiniCPM4.1-8B: 96 of 128 slots, and every block of a context."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from experiments.kernel_cases.base import Case
from pallas_kernels.sparse_decode import sparse_decode
from pallas_kernels.sparse_decode.config import work

_ROWS_AT_ONCE = 4
"""Sequences that the oracle computes at once: it gathers their records in f32."""


@functools.partial(
    jax.jit,
    static_argnames=(
        *("batch", "heads", "kv_heads", "slots", "block_size", "head_dim", "width", "dtype"),
    ),
)
def _operands(
    seed: int | Int[Array, ""],
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    slots: int,
    block_size: int,
    head_dim: int,
    width: int,
    dtype: str,
) -> tuple[PyTree, ...]:
    """Make one call's operands: distinct slots in random order, the own block half full."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 3)
    q = jax.random.normal(keys[0], (batch, heads, head_dim), dtype)
    kv = jax.random.normal(keys[1], (batch, kv_heads, slots, 2, block_size, head_dim), dtype)
    order = jax.random.uniform(keys[2], (batch, kv_heads, slots))
    slot_ids = jnp.argsort(order, axis=-1)[..., :width].astype(jnp.int32)
    block_ids = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), slot_ids.shape)
    positions = jnp.full((batch,), (width - 1) * block_size + block_size // 2, jnp.int32)
    return q, kv, slot_ids, block_ids, positions


def _check(out: Any, operands: tuple[PyTree, ...]) -> None:
    """Compare with the reference in f32: bf16 within 4e-2, f32 within 2e-5 of the greatest."""
    q, slots, *places = operands
    oracle = jax.jit(functools.partial(sparse_decode, implementation="reference"))
    want = []
    for start in range(0, q.shape[0], _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        wide = q[part].astype(jnp.float32), slots[part].astype(jnp.float32)
        want.append(np.asarray(oracle(*wide, *(x[part] for x in places))))
    expected = np.concatenate(want)
    error = np.max(np.abs(np.asarray(out, np.float32) - expected))
    bound = 4e-2 if q.dtype == jnp.bfloat16 else 2e-5 * float(np.max(np.abs(expected)))
    assert error <= bound, f"{error=} must be at most {bound=}"


def _case(
    name: str, implementation: str, *, batch: int, width: int, slots: int, **sizes: Any
) -> Case:
    fields: dict[str, Any] = {
        "heads": 32,
        "kv_heads": 2,
        "block_size": 64,
        "head_dim": 128,
        "dtype": "bfloat16",
    }
    fields |= sizes
    make = functools.partial(_operands, batch=batch, width=width, slots=slots, **fields)
    itemsize = jnp.dtype(fields.pop("dtype")).itemsize
    return Case(
        op="sparse_decode",
        shape=name,
        implementation=implementation,
        operands=make,
        call=functools.partial(sparse_decode, implementation=implementation),
        work=work(batch=batch, width=width, itemsize=itemsize, **fields),
        check=_check,
    )


def cases(*, tiny: bool = False) -> list[Case]:
    """List the measurements.

    Args:
        tiny: shapes that the reference computes on a CPU in seconds.
    """
    if tiny:
        small = {"heads": 4, "block_size": 16, "head_dim": 16, "dtype": "float32"}
        return [_case("tiny", "reference", batch=2, width=3, slots=5, **small)]
    chosen = [
        _case(f"B{batch} J96", name, batch=batch, width=96, slots=128)
        for batch, name in ((16, "triton"), (64, "triton"), (4, "triton"), (16, "reference"))
    ]  # at B64 the reference gathers a copy of the records, in f32
    chosen.append(_case("B4 dense S128K", "triton", batch=4, width=2048, slots=2048))
    return chosen
