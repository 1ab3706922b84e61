# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The door of `sparse_attention`: arguments are checked and laid out here, once."""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt32

from pallas_kernels import _backend
from pallas_kernels.sparse_attention import mosaic_gpu, reference, triton
from pallas_kernels.sparse_attention.config import Tiles, padded_group
from pallas_kernels.sparse_attention.union import unite

Implementation = Literal["mosaic_gpu", "triton", "reference"]

PREFERRED: tuple[Implementation, ...] = ("mosaic_gpu", "triton")

_KERNELS = {"mosaic_gpu": mosaic_gpu, "triton": triton}


def sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_mask: UInt32[Array, "B T K maskwords"],
    positions: Int32[Array, "B T"],
    *,
    block_size: int,
    scale: float | None = None,
    key_bias: Float32[Array, "B S K"] | None = None,
    implementation: Implementation | Sequence[Implementation] | None = None,
    tiles: Tiles | None = None,
) -> Float[Array, "B T N H"]:
    """Attend to the marked blocks: softmax(scale · q · k + bias) v over the marked keys s ≤ t.

    Each (query, KV head) has its own set of blocks; the G query heads of a KV head share it. Blocks
    after a query's position count as not marked, its own block is read up to its position. Speed
    comes from neighbours that choose alike: a tile reads the union of its queries' sets.

    Args:
        q: rotated queries.
        k: rotated keys.
        v: values.
        block_mask: bit m % 32 of word m // 32 marks block m, as `select_blocks` gives it; the words
            cover M = ⌈S / block_size⌉ blocks.
        positions: of the queries in their sequence, in tokens from 0; −1 gives zeros. Any order,
            T may differ from S.
        block_size: W, tokens of a block.
        scale: of the logits, positive; 1 / √H by default.
        key_bias: added to the logits, per key and KV head.
        implementation: a name, several in order of preference, or `None` for the best that runs.
        tiles: of the kernel.

    Returns:
        The attended values in the dtype of `q`; zeros for a row that sees nothing.

    Raises:
        ValueError: shapes or dtypes disagree, N is not a multiple of K, an axis is empty,
            `block_size` < 1, `scale` ≤ 0.
        NotImplementedError: the named implementation cannot take these arguments.

    References:
        InfLLM-V2, arXiv:2509.24663; SparDA, arXiv:2606.04511, section 3.

    Example:
        Two blocks of two tokens; the query at position 2 marks both, its own one in part.

        >>> import jax.numpy as jnp
        >>> k = jnp.zeros((1, 4, 1, 8))
        >>> v = jnp.arange(4.0)[None, :, None, None] * jnp.ones((1, 1, 1, 8))
        >>> mask = jnp.full((1, 1, 1, 1), 3, jnp.uint32)
        >>> at = jnp.full((1, 1), 2, jnp.int32)
        >>> sparse_attention(k[:, :1], k, v, mask, at, block_size=2)[0, 0, 0, 0].item()
        1.0
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    _check(q, k, v, block_mask, positions, key_bias, block_size, scale)
    group = q.shape[2] // k.shape[2]

    def tiles_of(name: str) -> Tiles:
        return tiles or Tiles.default(
            name,
            group=group,
            head_dim=q.shape[3],
            block_size=block_size,
            itemsize=k.dtype.itemsize,
        )

    name = _backend.resolve(
        "sparse_attention",
        implementation,
        PREFERRED,
        lambda name: _KERNELS[name].unsupported_reason(
            group=group,
            head_dim=q.shape[3],
            block_size=block_size,
            dtype=q.dtype,
            tiles=tiles_of(name),
        ),
    )
    if name == _backend.REFERENCE:
        return reference.sparse_attention(
            q, k, v, block_mask, positions, block_size=block_size, scale=scale, key_bias=key_bias
        )
    return run_kernel(
        name, q, k, v, block_mask, positions, key_bias,
        block_size=block_size, scale=scale, tiles=tiles_of(name),
    )  # fmt: skip


def _check(
    q: Array,
    k: Array,
    v: Array,
    block_mask: Array,
    positions: Array,
    key_bias: Array | None,
    block_size: int,
    scale: float,
) -> None:
    batch, queries, heads, _ = q.shape
    length, kv_heads = k.shape[1:3]
    if block_size < 1:
        raise ValueError(f"{block_size=} must be at least 1")
    if not scale > 0.0:
        raise ValueError(f"{scale=} must be greater than 0.0")
    if min(q.size, k.size) == 0:
        raise ValueError(f"{q.shape=} and {k.shape=} must have no axis of length 0")
    if k.shape != v.shape:
        raise ValueError(f"{k.shape=} must equal {v.shape=}")
    if (batch, q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"{k.shape=} must agree with {q.shape=} in B and H")
    if heads % kv_heads:
        raise ValueError(f"N of {q.shape=} must be a multiple of K of {k.shape=}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{q.dtype=}, {k.dtype=} and {v.dtype=} must be equal")
    words = -(-length // block_size // 32)
    if block_mask.shape != (batch, queries, kv_heads, words):
        raise ValueError(
            f"{block_mask.shape=} must be {(batch, queries, kv_heads, words)}: [B T K] and a bit "
            f"for each block of {block_size} keys in {k.shape=}"
        )
    if positions.shape != (batch, queries):
        raise ValueError(f"{positions.shape=} must equal [B T] of {q.shape=}")
    if key_bias is not None and key_bias.shape != (batch, length, kv_heads):
        raise ValueError(f"{key_bias.shape=} must equal [B S K] of {k.shape=}")


def _pad(x: Array, axis: int, size: int, value: int = 0) -> Array:
    """Lengthen an axis to `size`; the array itself where it has that length."""
    if x.shape[axis] == size:
        return x
    width = [(0, 0)] * x.ndim
    width[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, width, constant_values=value)


@functools.partial(jax.jit, static_argnames=("name", "block_size", "scale", "tiles", "interpret"))
def run_kernel(
    name: str,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_mask: UInt32[Array, "B T K maskwords"],
    positions: Int32[Array, "B T"],
    key_bias: Float32[Array, "B S K"] | None,
    *,
    block_size: int,
    scale: float,
    tiles: Tiles,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Pad to tiles, unite the blocks of each tile, and attend with the kernel `name`.

    Nothing is copied where S is a multiple of the block size, T of the tile, and G a power of two.

    Args:
        name: `mosaic_gpu` or `triton`.
        q: as for `sparse_attention`, with the arguments that follow.
        k: keys.
        v: values.
        block_mask: bits of the marked blocks.
        positions: of the queries.
        key_bias: added to the logits.
        block_size: W.
        scale: of the logits.
        tiles: of the kernel.
        interpret: run all kernels in the interpreter.
    """
    batch, queries, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    padded = padded_group(group)
    tile_q = tiles.rows // padded
    num_blocks = -(-k.shape[1] // block_size)
    padded_queries = -(-queries // tile_q) * tile_q
    k, v = (_pad(x, 1, num_blocks * block_size) for x in (k, v))
    q = _pad(q.reshape(batch, queries, kv_heads, group, dim), 3, padded)
    q = _pad(q, 1, padded_queries)
    bias = None
    if key_bias is not None:
        bias = (key_bias * math.log2(math.e)).transpose(0, 2, 1)
        bias = _pad(bias, 2, num_blocks * block_size)
    union = unite(
        block_mask,
        positions,
        num_blocks=num_blocks,
        block_size=block_size,
        tile_q=tile_q,
        parts=_KERNELS[name].parts(tiles),
        interpret=interpret,
    )
    out = _KERNELS[name].attend(
        union, _pad(positions, 1, padded_queries, -1), q, k, v, bias,
        scale=scale * math.log2(math.e), tiles=tiles, interpret=interpret,
    )  # fmt: skip
    return out[:, :queries, :, :group].reshape(batch, queries, heads, dim)
