# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What `append_kv` computes, in plain JAX: rotate, write the record, pool."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


class Appended(NamedTuple):
    """What a layer holds and offers once the new token is in.

    Attributes:
        q: rotated queries, [B N H].
        k: rotated keys, [B K H].
        forecast: the other heads rotated, [B F H]; `None` if there were none.
        slots: with the new token in its tail slot, [B K R 2 W H].
        pooled: with the window that the new key completes, [B C K H]; `None` without a summary.
        recent: the last P keys, oldest first, [B P K H]; `None` without a summary.
        bias: with the new token's importance, [B K M W]; `None` for models without.
    """

    q: Float[Array, "B N H"]
    k: Float[Array, "B K H"]
    forecast: Float[Array, "B F H"] | None
    slots: Float[Array, "B K R 2 W H"]
    pooled: Float[Array, "B C K H"] | None
    recent: Float[Array, "B P K H"] | None
    bias: Float32[Array, "B K M W"] | None


def rotate(
    x: Float[Array, "B A H"],
    cos: Float32[Array, "B H//2"],
    sin: Float32[Array, "B H//2"],
    rotate_in: str,
) -> Float[Array, "B A H"]:
    """Rotate halves: [x₁ · cos − x₂ · sin, x₂ · cos + x₁ · sin], in f32 or in the dtype of `x`."""
    dtype = jnp.dtype("float32") if rotate_in == "float32" else x.dtype
    cos, sin = cos[:, None, :].astype(dtype), sin[:, None, :].astype(dtype)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def write_record(
    slots: Float[Array, "B K R 2 W H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    tail: Int[Array, "B K"],
    positions: Int[Array, " B"],
) -> Float[Array, "B K R 2 W H"]:
    """Write K and V of one token into the tail slot, at offset position mod W."""
    active = positions >= 0
    rows, heads = jnp.arange(tail.shape[0])[:, None], jnp.arange(tail.shape[1])[None, :]
    slot = jnp.where(active[:, None] & (tail >= 0), tail, slots.shape[2])
    offset = jnp.where(active, positions % slots.shape[4], 0)[:, None]
    slots = slots.at[rows, heads, slot, 0, offset].set(k.astype(slots.dtype), mode="drop")
    return slots.at[rows, heads, slot, 1, offset].set(v.astype(slots.dtype), mode="drop")


def pool_newest(
    pooled: Float[Array, "B C K H"],
    recent: Float[Array, "B P K H"],
    k: Float[Array, "B K H"],
    positions: Int[Array, " B"],
    pool_stride: int,
) -> tuple[Float[Array, "B C K H"], Float[Array, "B P K H"]]:
    """Pool the window that ends at the new key, if one does; keep the last P keys."""
    size = recent.shape[1]
    keys = jnp.concatenate([recent[:, 1:], k.astype(recent.dtype)[:, None]], axis=1)
    total = keys[:, 0].astype(jnp.float32)
    for token in range(1, size):  # in token order: the bits of pooling the sequence at once
        total = total + keys[:, token].astype(jnp.float32)
    begin = positions + 1 - size
    ends = (positions >= 0) & (begin >= 0) & (begin % pool_stride == 0)
    place = jnp.where(ends, begin // pool_stride, pooled.shape[1])
    mean = (total / size).astype(pooled.dtype)
    pooled = pooled.at[jnp.arange(begin.shape[0]), place].set(mean, mode="drop")
    return pooled, jnp.where((positions >= 0)[:, None, None, None], keys, recent)


def reference(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    forecast: Float[Array, "B F H"] | None,
    cos: Float32[Array, "B H//2"],
    sin: Float32[Array, "B H//2"],
    positions: Int[Array, " B"],
    tail: Int[Array, "B K"],
    slots: Float[Array, "B K R 2 W H"],
    pooled: Float[Array, "B C K H"] | None,
    recent: Float[Array, "B P K H"] | None,
    importance: Float32[Array, "B K"] | None,
    bias: Float32[Array, "B K M W"] | None,
    *,
    pool_stride: int,
    rotate_in: str,
) -> Appended:
    """Rotate, write and pool. The arguments are those of `api.append_kv`, settled."""
    k = rotate(k, cos, sin, rotate_in)
    if pooled is not None and recent is not None:
        pooled, recent = pool_newest(pooled, recent, k, positions, pool_stride)
    if bias is not None and importance is not None:
        rows, heads = jnp.arange(tail.shape[0])[:, None], jnp.arange(tail.shape[1])[None, :]
        own = jnp.where(positions >= 0, positions // bias.shape[3], bias.shape[2])[:, None]
        offset = jnp.where(positions >= 0, positions % bias.shape[3], 0)[:, None]
        bias = bias.at[rows, heads, own, offset].set(importance, mode="drop")
    return Appended(
        q=rotate(q, cos, sin, rotate_in),
        k=k,
        forecast=None if forecast is None else rotate(forecast, cos, sin, rotate_in),
        slots=write_record(slots, k, v, tail, positions),
        pooled=pooled,
        recent=recent,
        bias=bias,
    )
