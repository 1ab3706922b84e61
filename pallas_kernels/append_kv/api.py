# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The door of `append_kv`: checks its arguments once and settles who computes."""

from collections.abc import Sequence
from typing import Literal

import jax
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import _backend
from pallas_kernels.append_kv import triton
from pallas_kernels.append_kv.config import Tiles
from pallas_kernels.append_kv.reference import Appended, reference

Implementation = Literal["triton", "reference"]

_PREFERRED = ("triton",)


def append_kv(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    forecast: Float[Array, "B F H"] | None,
    cos: Float32[Array, "B H//2"],
    sin: Float32[Array, "B H//2"],
    positions: Int[Array, " B"],
    tail: Int[Array, "B K"],
    slots: Float[Array, "B K R 2 W H"],
    *,
    pooled: Float[Array, "B C K H"] | None = None,
    recent: Float[Array, "B P K H"] | None = None,
    pool_stride: int = 1,
    importance: Float32[Array, "B K"] | None = None,
    bias: Float32[Array, "B K M W"] | None = None,
    rotate_in: Literal["float32", "model"] = "float32",
    implementation: Implementation | Sequence[Implementation] | None = None,
    tiles: Tiles | None = None,
) -> Appended:
    """Append one token of each sequence: x · cos + rotate_half(x) · sin, the record, the mean.

    Rotates queries, keys and the other heads; writes the rotated key and the value into the tail
    slot, at offset position mod W; pools the window of P keys that the new key completes, if it
    completes one; moves the recent keys up by one. A kernel changes `slots`, `pooled`, `recent` and
    `bias` in place if their buffers are donated or die here, and copies them otherwise.

    Args:
        q: queries, not rotated.
        k: keys, not rotated.
        v: values.
        forecast: any other heads to rotate, or `None`.
        cos: cosines of the new positions.
        sin: their sines.
        positions: of the new tokens; −1 changes nothing of that row, whose heads are rotated all
            the same.
        tail: slot of the block being filled; no record is written if it is negative.
        slots: records of K and V.
        pooled: means of the windows; window c starts at token `pool_stride` · c. One past the end
            is dropped.
        recent: the last P keys, oldest first; P is the size of a window.
        pool_stride: tokens between the starts of neighbouring windows.
        importance: written into `bias` at the new token's block and offset.
        bias: of every token, by block, f32.
        rotate_in: whether rotations run in f32 or round to the dtype of the heads at each step.
        implementation: which one computes; `None` takes the fastest that can.
        tiles: the cut; `None` for the default.

    Returns:
        The rotated heads and everything that changed; see `Appended`.

    Raises:
        ValueError: shapes disagree, or only one of a pair is given.
        NotImplementedError: the named implementation cannot take these arguments here.

    Example:
        Token 1 of a block in slot 0; at angle 0 nothing turns.

        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 1, 16))
        >>> table = jnp.ones((1, 8)), jnp.zeros((1, 8))
        >>> slots = jnp.zeros((1, 1, 2, 2, 4, 16))
        >>> new = append_kv(x, x, 2 * x, None, *table, jnp.array([1]), jnp.array([[0]]), slots)
        >>> new.slots[0, 0, 0, :, :, 0].tolist()
        [[0.0, 1.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]
    """
    _check_heads(q, k, v, forecast, cos, sin, positions, tail, slots)
    _check_state(k, slots, pooled, recent, pool_stride, importance, bias, rotate_in)
    chosen = _backend.resolve(
        "append_kv",
        implementation,
        _PREFERRED,
        lambda name: triton.unsupported_reason(q, slots, recent),
    )
    operands = (q, k, v, forecast, cos, sin, positions, tail, slots)
    operands = (*operands, pooled, recent, importance, bias)
    with jax.named_scope("append_kv"):
        if chosen == "triton":
            return triton.append_kv_triton(
                *operands, pool_stride=pool_stride, rotate_in=rotate_in, tiles=tiles or Tiles()
            )
        return reference(*operands, pool_stride=pool_stride, rotate_in=rotate_in)


def _check_heads(
    q: Array,
    k: Array,
    v: Array,
    forecast: Array | None,
    cos: Array,
    sin: Array,
    positions: Array,
    tail: Array,
    slots: Array,
) -> None:
    """Refuse heads that disagree with the slots."""
    if slots.ndim != 6 or slots.shape[3] != 2:
        raise ValueError(f"{slots.shape=} must be [B K R 2 W H]")
    batch, kv_heads, _, _, _, dim = slots.shape
    for name, x in (("q", q), ("forecast", forecast)):
        if x is not None and (x.ndim != 3 or (x.shape[0], x.shape[2]) != (batch, dim)):
            raise ValueError(f"{name}.shape={x.shape} must be [B heads H], B H of {slots.shape=}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != (batch, kv_heads, dim):
            raise ValueError(f"{name}.shape={x.shape} must be [B K H] of {slots.shape=}")
    for name, x in (("cos", cos), ("sin", sin)):
        if x.shape != (batch, dim // 2):
            raise ValueError(f"{name}.shape={x.shape} must be [B H/2] of {slots.shape=}")
    if positions.shape != (batch,) or tail.shape != (batch, kv_heads):
        raise ValueError(
            f"{positions.shape=} must be [B] and {tail.shape=} [B K] of {slots.shape=}"
        )


def _check_state(
    k: Array,
    slots: Array,
    pooled: Array | None,
    recent: Array | None,
    pool_stride: int,
    importance: Array | None,
    bias: Array | None,
    rotate_in: str,
) -> None:
    """Refuse a summary or a bias that does not fit the keys."""
    if rotate_in not in ("float32", "model"):
        raise ValueError(f"{rotate_in=} must be 'float32' or 'model'")
    if pool_stride < 1:
        raise ValueError(f"{pool_stride=} must be at least 1")
    if (pooled is None) != (recent is None):
        raise ValueError(f"{pooled is None=} but {recent is None=}: give both or neither")
    if (importance is None) != (bias is None):
        raise ValueError(f"{importance is None=} but {bias is None=}: give both or neither")
    if pooled is not None and recent is not None:
        for name, x in (("pooled", pooled), ("recent", recent)):
            if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != k.shape:
                raise ValueError(f"{name}.shape={x.shape} must be [B n K H], B K H of {k.shape=}")
        if pooled.dtype != recent.dtype:
            raise ValueError(f"{pooled.dtype=} must equal {recent.dtype=}")
    if importance is not None and bias is not None:
        if importance.shape != k.shape[:2]:
            raise ValueError(f"{importance.shape=} must be [B K] of {k.shape=}")
        if bias.ndim != 4 or (*bias.shape[:2], bias.shape[3]) != (*k.shape[:2], slots.shape[4]):
            raise ValueError(f"{bias.shape=} must be [B K M W], with B K W of {slots.shape=}")
