# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`append_kv` as one Triton kernel, a program for each (sequence, KV head).

Why: a decode layer has about 60 µs outside its GEMMs at batch 8, and this is ten small XLA fusions:
three rotations, two scatters into the slots, a shift, a mean and a scatter. All of it together
moves less than 1 MB at batch 16, so only the number of launches counts: here it is one. Slots,
pooled keys, recent keys and bias are changed in place; of the slots and the pooled keys one row is
touched.

Numerics: rotations run in f32, or round after each operation to the dtype of the heads, as asked;
on a GPU the compiler may fuse a multiplication and an addition in f32. The mean adds the stored,
rounded keys in f32 in token order and multiplies with 1 / P, which is exact for a power of two, so
given the same keys it has the bits of pooling the whole sequence at once.

Backend: Triton, compute capability 8.0 or newer; no tensor cores. Needs powers of two for the head
dim and the pool size. A program reads all recent keys of its KV head before a barrier and writes
them one place up after it: no other program touches them. Offsets are 64-bit where an array passes
2³² bytes (the lowering looks at the whole array).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import _backend
from pallas_kernels.append_kv.config import Tiles
from pallas_kernels.append_kv.reference import Appended

Shaped = jax.Array | jax.ShapeDtypeStruct

_FLOATS = ("bfloat16", "float16", "float32")


def unsupported_reason(q: Shaped, slots: Shaped, recent: Shaped | None) -> str | None:
    """Say why the Triton kernel cannot take these arguments here; `None` if it can.

    Args:
        q: shape and dtype of the queries, [B N H].
        slots: of the slots, [B K R 2 W H].
        recent: of the recent keys, [B P K H]; `None` without a summary.
    """
    return _backend.triton_reason() or shape_reason(q, slots, recent)


def shape_reason(q: Shaped, slots: Shaped, recent: Shaped | None) -> str | None:
    """Say what about the shapes the kernel cannot take, wherever it runs; `None` if nothing."""
    for name, array in (("queries", q), ("slots", slots), ("recent keys", recent)):
        if array is not None and str(array.dtype) not in _FLOATS:
            return f"needs {name} of {', '.join(_FLOATS)}, not {array.dtype}"
    dim = q.shape[-1]
    if dim not in (16, 32, 64, 128, 256):
        return f"needs a head dim that is a power of two from 16 to 256, not {dim}"
    if recent is not None and (recent.shape[1] & (recent.shape[1] - 1) or recent.shape[1] > 256):
        return f"needs a pool size that is a power of two up to 256, not {recent.shape[1]}"
    return None


def _rotated(x, partner, cos, sin, is_first, dtype, rotate_in):
    """Rotate x, whose other half is `partner`: x · cos ∓ partner · sin; in f32, rounded."""

    def rounded(y):
        return y if rotate_in == "float32" else y.astype(dtype).astype(jnp.float32)

    x, partner = x.astype(jnp.float32), partner.astype(jnp.float32)
    cos, sin = rounded(cos), rounded(sin)
    straight, crossed = rounded(x * cos), rounded(partner * sin)
    return jnp.where(is_first, straight - crossed, straight + crossed).astype(dtype)


def _kernel(*refs: Any, names, outputs, pool_stride, block_size, rotate_in, interpret):
    """Append one token of one (sequence, KV head). All loads but a window's stand in front."""
    given = dict(zip(names, refs[: len(names)], strict=True))
    made = dict(zip(outputs, refs[len(names) :], strict=True))
    head, row = pl.program_id(0), pl.program_id(1)
    kv_heads, dim = given["k"].shape[1:]
    position, slot = given["positions"][row], given["tail"][row, head]
    importance = given["importance"][row, head] if "bias" in given else None

    column = jnp.arange(dim, dtype=jnp.int32)
    is_first = column < dim // 2
    other = jnp.where(is_first, column + dim // 2, column - dim // 2)
    angle = jnp.where(is_first, column, column - dim // 2)
    cos, sin = plt.load(given["cos"].at[row, angle]), plt.load(given["sin"].at[row, angle])
    k, k_other = given["k"][row, head, :], plt.load(given["k"].at[row, head, other])
    v = given["v"][row, head, :]
    recent = None
    size = given["recent"].shape[1] if "recent" in given else 1
    place = jnp.arange(size, dtype=jnp.int32)
    if "recent" in given:
        after = jnp.minimum(place + 1, size - 1)
        recent = plt.load(given["recent"].at[row, after[:, None], head, column[None, :]])
    turning = []
    for name in ("q", "forecast"):
        if name in given:
            count = given[name].shape[1]
            share = -(-count // kv_heads)  # heads of each program
            lane = jnp.arange(pl.next_power_of_2(share), dtype=jnp.int32)
            at = head * share + lane
            mask = jnp.broadcast_to(((lane < share) & (at < count))[:, None], (lane.size, dim))
            here = (row, at[:, None], column[None, :])
            x = plt.load(given[name].at[here], mask=mask, other=0.0)
            there = (row, at[:, None], other[None, :])
            partner = plt.load(given[name].at[there], mask=mask, other=0.0)
            turning.append((made[name], here, mask, x, partner))

    k = _rotated(k, k_other, cos, sin, is_first, k.dtype, rotate_in)
    if recent is not None:
        newest = k.astype(recent.dtype)
        recent = jnp.where((place == size - 1)[:, None], newest[None, :], recent)
        begin = position + 1 - size
        window = jax.lax.div(begin, jnp.int32(pool_stride))
        ends = (begin >= 0) & (window * pool_stride == begin)

        @pl.when(ends & (window < given["pooled"].shape[1]))
        def _pool():
            keys = [given["recent"][row, token, head, :] for token in range(1, size)] + [newest]
            total = keys[0].astype(jnp.float32)
            for key in keys[1:]:  # in token order
                total = total + key.astype(jnp.float32)
            made["pooled"][row, window, head, :] = (total * (1.0 / size)).astype(newest.dtype)

        if not interpret:  # there, one thread does it all
            plt.debug_barrier()

    made["k"][row, head, :] = k
    for to, here, mask, x, partner in turning:
        tables = cos[None, :], sin[None, :], is_first[None, :]
        plt.store(to.at[here], _rotated(x, partner, *tables, x.dtype, rotate_in), mask=mask)

    @pl.when(position >= 0)
    def _write():
        own = jax.lax.div(position, jnp.int32(block_size))
        offset = position - own * block_size
        kv_ref = made["slots"]
        if recent is not None:
            made["recent"][row, :, head, :] = recent

        @pl.when((slot >= 0) & (slot * 2 < kv_ref.shape[2]))
        def _write_record():
            kv_ref[row, head, 2 * slot, offset, :] = k.astype(kv_ref.dtype)
            kv_ref[row, head, 2 * slot + 1, offset, :] = v.astype(kv_ref.dtype)

        if importance is not None:

            @pl.when(own < given["bias"].shape[2])
            def _write_bias():
                made["bias"][row, head, own, offset] = importance


@functools.partial(jax.jit, static_argnames=("pool_stride", "rotate_in", "tiles", "interpret"))
def append_kv_triton(
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
    tiles: Tiles,
    interpret: bool = False,
) -> Appended:
    """Run the kernel. The arguments are those of `api.append_kv`, settled.

    Args:
        q: queries.
        k: keys.
        v: values.
        forecast: other heads to rotate.
        cos: cosines.
        sin: sines.
        positions: of the new tokens.
        tail: slots being filled.
        slots: records, changed in place.
        pooled: pooled keys, changed in place.
        recent: the last P keys, changed in place.
        importance: of the new keys.
        bias: of all keys, changed in place.
        pool_stride: tokens between the starts of neighbouring windows.
        rotate_in: `float32` or `model`.
        tiles: the cut.
        interpret: whether to run the body in the interpreter.
    """
    batch, kv_heads = tail.shape
    kv = slots.reshape(batch, kv_heads, -1, *slots.shape[4:])  # K of slot r at 2r, V at 2r + 1
    operands = {
        "q": q,
        "forecast": forecast,
        "k": k,
        "v": v,
        "cos": cos,
        "sin": sin,
        "positions": positions,
        "tail": tail,
        "importance": importance,
        "slots": kv,
        "pooled": pooled,
        "recent": recent,
        "bias": bias,
    }
    operands = {name: x for name, x in operands.items() if x is not None}
    names = tuple(operands)
    in_place = [name for name in ("slots", "pooled", "recent", "bias") if name in operands]
    outputs = [name for name in ("q", "forecast", "k") if name in operands] + in_place
    made = pl.pallas_call(
        functools.partial(
            _kernel,
            names=names,
            outputs=tuple(outputs),
            pool_stride=pool_stride,
            block_size=slots.shape[4],
            rotate_in=rotate_in,
            interpret=interpret,
        ),
        grid=(kv_heads, batch),
        out_shape=[jax.ShapeDtypeStruct(operands[x].shape, operands[x].dtype) for x in outputs],
        input_output_aliases={names.index(x): outputs.index(x) for x in in_place},
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=interpret,
        name="append_kv",
    )(*operands.values())
    result = dict(zip(outputs, made, strict=True))
    result["slots"] = result["slots"].reshape(slots.shape)
    return Appended(
        q=result["q"],
        k=result["k"],
        forecast=result.get("forecast"),
        slots=result["slots"],
        pooled=result.get("pooled"),
        recent=result.get("recent"),
        bias=result.get("bias"),
    )
