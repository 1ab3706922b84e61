# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`sparse_decode` as two Triton kernels: attend to a share of the blocks, then join the shares.

Why: XLA gathers the chosen records into a copy, reads that copy twice and writes the logits: about
five passes over what has to be read once. Here each program walks its share of the slots and reads
K and V of each block once, straight from the slot. The blocks of one (sequence, KV head) are dealt
to several programs in turn, entry j to program j mod P, so that a batch of 4 already fills the chip
and a short row, whose ids stand in front, is spread as evenly as a long one. All query heads of a
KV head are the rows of one dot, so nothing is read twice.

Numerics: the dots take q, k, v in their dtype and accumulate in f32 (f32 operands are not rounded
to TF32); the softmax runs in f32 with a running maximum in base 2; its mass is rounded to the dtype
of v in front of the second dot. Shares are joined in f32 by their logarithm of the mass, always in
the same order, so two calls give the same bits. A tile's rows after the query's position are never
read. Offsets are 64-bit where the slots pass 2³² bytes (the lowering looks at the whole array).

Backend: Triton, compute capability 8.0 or newer; cp.async loads through a software pipeline and
mma of 16 rows, which one group of 16 heads fills exactly. Needs powers of two for the block size
(16 or more) and the head dim. A Hopper wgmma has 64 rows, of which three quarters would be padding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import _backend
from pallas_kernels.sparse_decode.config import Tiles
from pallas_kernels.sparse_decode.reference import LOWEST

Shaped = jax.Array | jax.ShapeDtypeStruct

_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453
_ROWS = 16
"""The least rows of a dot."""


def unsupported_reason(q: Shaped, slots: Shaped, tiles: Tiles) -> str | None:
    """Say why the Triton kernel cannot take these arguments here; `None` if it can.

    Args:
        q: shape and dtype of the queries, [B N H].
        slots: of the slots, [B K R 2 W H].
        tiles: the cut.
    """
    return _backend.triton_reason() or shape_reason(q, slots, tiles)


def shape_reason(q: Shaped, slots: Shaped, tiles: Tiles) -> str | None:
    """Say what about the shapes the kernel cannot take, wherever it runs; `None` if nothing."""
    block_size, dim = slots.shape[4:]
    if slots.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"needs slots of bfloat16, float16 or float32, not {slots.dtype}"
    if q.dtype != slots.dtype:
        return f"needs queries and slots of one dtype, but has {q.dtype} and {slots.dtype}"
    if dim not in (16, 32, 64, 128, 256):
        return f"needs a head dim that is a power of two from 16 to 256, not {dim}"
    if block_size < 16 or block_size & (block_size - 1):
        return f"needs a block size that is a power of two, at least 16, not {block_size}"
    if block_size % tiles.tile_kv:
        return f"needs blocks of whole tiles, but {block_size=} and {tiles.tile_kv=}"
    held = 2 * max(tiles.stages - 1, 1) * tiles.tile_kv * dim * slots.dtype.itemsize
    if held > 200 * 1024:
        return f"holds {held} bytes of tiles in shared memory, at most {200 * 1024}; fewer stages"
    return None


def _split_kernel(*refs: Any, scale, group, splits, each, tile_kv, has_bias, bias_by_slot, whole):
    """Attend to entries j ≡ s (mod splits) of one (sequence, KV head)."""
    q_ref, kv_ref, slot_ids_ref, block_ids_ref, positions_ref = refs[:5]
    bias_ref = refs[5] if has_bias else None
    out_ref, lse_ref = refs[-2:]
    split, head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    block_size, dim = kv_ref.shape[3:]
    width = slot_ids_ref.shape[2]
    parts = block_size // tile_kv
    position = positions_ref[row]

    # Which of its entries hold something, and how many steps that makes.
    turn = jnp.arange(pl.next_power_of_2(each), dtype=jnp.int32)
    entry = split + turn * splits
    held = entry < width
    slot_of = plt.load(slot_ids_ref.at[row, head, entry], mask=held, other=-1)
    block_of = plt.load(block_ids_ref.at[row, head, entry], mask=held, other=-1)
    visible = (slot_of >= 0) & (block_of >= 0) & (block_of * block_size <= position)
    turns = jnp.max(jnp.where(visible, turn + 1, 0), axis=0)

    rows = jnp.arange(max(_ROWS, pl.next_power_of_2(group)), dtype=jnp.int32)
    columns = jnp.arange(dim, dtype=jnp.int32)
    real = rows < group
    heads = head * group + rows  # those past the group are not stored
    last = head * group + group - 1
    q = plt.load(q_ref.at[row, jnp.minimum(heads, last)[:, None], columns[None, :]])
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    lane = jnp.arange(tile_kv, dtype=jnp.int32)

    def step(i, carry):
        top, total, out = carry
        turn, part = jax.lax.div(i, jnp.int32(parts)), jax.lax.rem(i, jnp.int32(parts))
        j = split + turn * splits
        slot, block = slot_ids_ref[row, head, j], block_ids_ref[row, head, j]
        start = part * tile_kv
        count = jnp.where((slot >= 0) & (block >= 0), position + 1 - block * block_size - start, 0)
        slot = jnp.maximum(slot, 0)
        seen = lane < count
        mask = jnp.broadcast_to(seen[:, None], (tile_kv, dim))
        inside = pl.ds(start, tile_kv)
        k = plt.load(kv_ref.at[row, head, 2 * slot, inside, :], mask=mask, other=0.0)
        v = plt.load(kv_ref.at[row, head, 2 * slot + 1, inside, :], mask=mask, other=0.0)
        logits = plt.dot(q, k, trans_b=True, precision=precision) * (scale * _LOG2_E)
        if bias_ref is not None:
            at = slot if bias_by_slot else jnp.maximum(block, 0)
            bias = plt.load(bias_ref.at[row, head, at, inside], mask=seen, other=0.0)
            logits = logits + (bias * _LOG2_E)[None, :]
        logits = jnp.where(seen[None, :], logits, LOWEST)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        mass = jnp.where(seen[None, :], jnp.exp2(logits - new_top[:, None]), 0.0)
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + jnp.sum(mass, axis=1)
        added = plt.dot(mass.astype(v.dtype), v, precision=precision)
        return new_top, total, out * shrink[:, None] + added

    shape = (rows.shape[0],)
    start = (
        jnp.full(shape, LOWEST, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, dim), jnp.float32),
    )
    top, total, out = jax.lax.fori_loop(0, turns * parts, step, start)
    is_empty = total == 0.0
    total = jnp.where(is_empty, 1.0, total)
    out = out / total[:, None]
    lse = jnp.where(is_empty, LOWEST, top * _LN_2 + jnp.log(total))
    mask = jnp.broadcast_to(real[:, None], out.shape)
    if whole:
        to = out_ref.at[row, heads[:, None], columns[None, :]]
        plt.store(to, out.astype(out_ref.dtype), mask=mask)
        plt.store(lse_ref.at[row, heads], lse, mask=real)
    else:
        to = out_ref.at[row, heads[:, None], split, columns[None, :]]
        plt.store(to, out, mask=mask)
        plt.store(lse_ref.at[row, heads, split], lse, mask=real)


def _merge_kernel(shares_ref, logs_ref, out_ref, lse_ref, *, splits):
    """Join the shares of one head: Σ exp(lse_s) out_s / Σ exp(lse_s)."""
    head, row = pl.program_id(0), pl.program_id(1)
    dim = out_ref.shape[2]
    share = jnp.arange(pl.next_power_of_2(splits), dtype=jnp.int32)
    held = share < splits
    share = jnp.minimum(share, splits - 1)
    columns = jnp.arange(dim, dtype=jnp.int32)
    logs = plt.load(logs_ref.at[row, head, share], mask=held, other=LOWEST)
    parts = plt.load(
        shares_ref.at[row, head, share[:, None], columns[None, :]],
        mask=jnp.broadcast_to(held[:, None], (share.shape[0], dim)),
        other=0.0,
    )
    top = jnp.max(logs, axis=0)
    weights = jnp.where(held, jnp.exp2((logs - top) * _LOG2_E), 0.0)
    total = jnp.sum(weights, axis=0)  # at least one: that of the greatest
    out = jnp.sum(parts * weights[:, None], axis=0) / total
    out_ref[row, head, :] = out.astype(out_ref.dtype)
    lse_ref[row, head] = top + jnp.log(total)


@functools.partial(jax.jit, static_argnames=("scale", "bias_order", "tiles", "interpret"))
def sparse_decode_triton(
    q: Float[Array, "B N H"],
    slots: Float[Array, "B K R 2 W H"],
    slot_ids: Int[Array, "B K J"],
    block_ids: Int[Array, "B K J"],
    positions: Int[Array, " B"],
    bias: Float32[Array, "B K X W"] | None,
    *,
    scale: float,
    bias_order: str,
    tiles: Tiles,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
    """Run the kernels. The arguments are those of `api.sparse_decode`, settled.

    Args:
        q: rotated queries.
        slots: records.
        slot_ids: chosen slots.
        block_ids: the blocks in them.
        positions: of the queries.
        bias: added to the logits.
        scale: multiplies q · k.
        bias_order: `slot` or `block`.
        tiles: the cut.
        interpret: whether to run the bodies in the interpreter.
    """
    batch, heads, dim = q.shape
    kv_heads, width = slot_ids.shape[1:]
    splits = tiles.splits(batch * kv_heads, width)
    whole = splits == 1
    kernel = functools.partial(
        _split_kernel,
        scale=scale,
        group=heads // kv_heads,
        splits=splits,
        each=-(-width // splits),
        tile_kv=tiles.tile_kv,
        has_bias=bias is not None,
        bias_by_slot=bias_order == "slot",
        whole=whole,
    )
    final = (
        jax.ShapeDtypeStruct((batch, heads, dim), q.dtype),
        jax.ShapeDtypeStruct((batch, heads), jnp.float32),
    )
    shares = (
        jax.ShapeDtypeStruct((batch, heads, splits, dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, splits), jnp.float32),
    )
    kv = slots.reshape(batch, kv_heads, -1, *slots.shape[4:])  # K of slot r at 2r, V at 2r + 1
    operands = (q, kv, slot_ids, block_ids, positions, *(() if bias is None else (bias,)))
    out, lse = pl.pallas_call(
        kernel,
        grid=(splits, kv_heads, batch),
        out_shape=final if whole else shares,
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="sparse_decode_split",
    )(*operands)
    if whole:
        return out, lse
    held = pl.next_power_of_2(splits) * dim
    out, lse = pl.pallas_call(
        functools.partial(_merge_kernel, splits=splits),
        grid=(heads, batch),
        out_shape=final,
        compiler_params=plt.CompilerParams(num_warps=min(max(held // 1024, 1), 8), num_stages=1),
        interpret=interpret,
        name="sparse_decode_merge",
    )(out, lse)
    return out, lse
