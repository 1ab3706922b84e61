# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`sparse_attention` for NVIDIA GPUs through Pallas-Triton.

**Why.** XLA gathers the chosen blocks of every (query, KV head) first, 3 MB of them at 96 blocks of
64 tokens, and then multiplies them with the few rows of one query's group. Here a tile of
neighbouring queries walks the union of their blocks once (see `union.py`), each block one load that
serves all rows; which rows see it comes from the bits of the list.

**Numerics.** Scores, softmax and the accumulator are f32; probabilities are rounded to the dtype of
`v` before the second product, as in the reference. f32 operands are multiplied in full f32. The
softmax runs in base 2 with the scale folded in. A row that did not choose a block takes no part:
its maximum ignores the block, and its exponents are shifted out of range, which gives exact zeros.
Only blocks that end after some query are compared with positions key by key.

**Backend.** Triton on compute capability 8.0 and newer. It is the second choice on Hopper, where
the Mosaic GPU kernel feeds `wgmma` from a memory warpgroup. Offsets: Pallas-Triton switches to
64-bit ones for arrays of more than 2³² bytes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import _backend
from pallas_kernels.sparse_attention.config import Tiles, padded_group
from pallas_kernels.sparse_attention.reference import LOWEST
from pallas_kernels.sparse_attention.union import Union

_DTYPES = ("bfloat16", "float16", "float32")
_SHARED_BYTES = 160 * 1024
"""What a program may ask for: compute capability 8.0 has 163 KiB."""


def unsupported_reason(
    *, group: int, head_dim: int, block_size: int, dtype: jax.typing.DTypeLike, tiles: Tiles
) -> str | None:
    """Say why the kernel cannot run here on such arguments; `None` if it can.

    Args:
        group: G, query heads per KV head.
        head_dim: H.
        block_size: W.
        dtype: of q, k and v.
        tiles: of the kernel.
    """
    return _backend.triton_reason() or argument_reason(
        group=group, head_dim=head_dim, block_size=block_size, dtype=dtype, tiles=tiles
    )


def argument_reason(
    *, group: int, head_dim: int, block_size: int, dtype: jax.typing.DTypeLike, tiles: Tiles
) -> str | None:
    """Say why the kernel cannot take such arguments on any device; `None` if it can."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in _DTYPES:
        return f"takes {', '.join(_DTYPES)}, not {dtype.name}"
    for name, size in (("head_dim", head_dim), ("block_size", block_size)):
        if size & (size - 1) or not 16 <= size <= 128:
            return f"takes a {name} that is a power of two from 16 to 128, not {size}"
    if tiles.rows & (tiles.rows - 1) or tiles.rows < padded_group(group):
        return f"takes a power of two of rows that holds a group of {group}, not {tiles.rows=}"
    shared = dtype.itemsize * head_dim * (tiles.rows + 2 * block_size * tiles.stages)
    if shared > _SHARED_BYTES:
        return f"may use {_SHARED_BYTES} bytes of shared memory, but {tiles} would take {shared}"
    return None


def parts(tiles: Tiles) -> int:
    """Count the parts of a tile that skip blocks on their own: one program walks them all."""
    del tiles
    return 1


def _dot(a, b, precision):
    return lax.dot_general(
        a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _kernel(
    ids_ref, bits_ref, counts_ref, positions_ref, q_ref, k_ref, v_ref, *rest: Any, scale, words
):
    bias_ref, out_ref = rest if len(rest) == 2 else (None, rest[0])
    tile, kv_head, batch = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    tile_q, group, dim = q_ref.shape
    rows, block_size = tile_q * group, k_ref.shape[1] // ids_ref.shape[3]
    precision = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    q = q_ref[...].reshape(rows, dim)
    query = lax.div(lax.iota(jnp.int32, rows), group)  # of each row, within the tile
    at = plt.load(positions_ref.at[batch, tile * tile_q + query])  # [rows]
    lane = lax.iota(jnp.int32, block_size)

    def step(entry, carry, *, is_cut):
        top, total, out = carry
        block = ids_ref[batch, kv_head, tile, entry]
        place = pl.ds(pl.multiple_of(block * block_size, block_size), block_size)
        bits = jnp.full((rows,), bits_ref[batch, kv_head, tile, 0, entry], jnp.int32)
        for word in range(1, words):
            other = bits_ref[batch, kv_head, tile, word, entry]
            bits = jnp.where(query >> 5 == word, other, bits)
        marked = ((bits >> (query & 31)) & 1) != 0  # [rows]

        keys = plt.load(k_ref.at[batch, place, kv_head, :])
        logits = _dot(q, keys.T, precision) * scale  # [rows W], in base 2
        if bias_ref is not None:
            logits = logits + plt.load(bias_ref.at[batch, kv_head, place])[None, :]
        if is_cut:
            token = block * block_size + lane
            logits = jnp.where(token[None, :] <= at[:, None], logits, LOWEST)
        best = jnp.where(marked, jnp.max(logits, axis=1), LOWEST)
        new_top = jnp.maximum(top, best)
        shift = jnp.where(marked, new_top, -LOWEST)  # −LOWEST: no mass from this row
        mass = jnp.exp2(logits - shift[:, None])
        fade = jnp.exp2(top - new_top)
        values = plt.load(v_ref.at[batch, place, kv_head, :])
        out = out * fade[:, None] + _dot(mass.astype(values.dtype), values, precision)
        return new_top, total * fade + jnp.sum(mass, axis=1), out

    cut, count = counts_ref[batch, kv_head, tile, 0], counts_ref[batch, kv_head, tile, 1]
    carry = (
        jnp.full((rows,), LOWEST, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, dim), jnp.float32),
    )
    carry = lax.fori_loop(0, cut, functools.partial(step, is_cut=True), carry)
    _, total, out = lax.fori_loop(cut, count, functools.partial(step, is_cut=False), carry)
    out = out / jnp.where(total > 0.0, total, 1.0)[:, None]
    out_ref[...] = out.astype(out_ref.dtype).reshape(tile_q, group, dim)


def attend(
    union: Union,
    positions: Int32[Array, "B T"],
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    bias: Float32[Array, "B K S"] | None,
    *,
    scale: float,
    tiles: Tiles,
    interpret: bool = False,
) -> Float[Array, "B T K G H"]:
    """Attend to the union of each tile, rows masked by who chose what.

    Args:
        union: the lists of blocks, of tiles of `tiles.rows / G` queries.
        positions: of the queries; −1 gives zeros.
        q: queries; T is a multiple of the tile, G a power of two.
        k: keys; S is M · W.
        v: values.
        bias: added to the logits, times log2(e).
        scale: of the logits, times log2(e).
        tiles: of the kernel.
        interpret: run it in the interpreter.
    """
    batch, queries, kv_heads, group, dim = q.shape
    tile_q = tiles.rows // group
    q_spec = pl.BlockSpec((None, tile_q, None, group, dim), lambda i, h, b: (b, i, h, 0, 0))
    operands = [union.ids, union.bits, union.counts, positions, q, k, v]
    operands += [] if bias is None else [bias]
    whole = pl.BlockSpec()
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale, words=union.bits.shape[3]),
        grid=(queries // tile_q, kv_heads, batch),
        in_specs=[whole] * 4 + [q_spec] + [whole] * (len(operands) - 5),
        out_specs=q_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.stages),
        interpret=interpret,
        name="sparse_attention_triton",
    )(*operands)
