# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Q, K, V and Forecast projections, and attention over all blocks or over the chosen ones.

Three functions attend. `attend_dense` walks key tiles up to the causal bound with a running
softmax. `attend_chosen` gathers the chosen blocks of each query. `attend_masked` computes whole
score tiles under a block mask: more arithmetic, but its gradient needs no scatter, so training the
backbone uses it. All take positions (−1 marks padding, which yields zeros) and an optional additive
bias per key, and run softmax in f32.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

import pallas_kernels
from sparda_jax.config import ModelConfig
from sparda_jax.layers import init_forecast, init_weight
from sparda_jax.pooling import LOWEST
from sparda_jax.rope import Rope, apply_rope


class Attention(nnx.Module):
    """The projections of one layer.

    `forecast_proj` exists in all layers but the last, whose forecast nobody would read;
    `entry_forecast_proj` in layer 0 only; the importance weights (NOSA's A and Δ) where the
    configuration asks for token importance.
    """

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs) -> None:
        width, heads, kv, dim = config.width, config.heads, config.kv_heads, config.head_dim
        dtype = config.dtype
        self.config = config
        self.q_proj = init_weight(rngs.params(), (width, heads, dim), "DNH", width, dtype)
        self.k_proj = init_weight(rngs.params(), (width, kv, dim), "DKH", width, dtype)
        self.v_proj = init_weight(rngs.params(), (width, kv, dim), "DKH", width, dtype)
        self.o_proj = init_weight(rngs.params(), (heads, dim, width), "NHD", heads * dim, dtype)
        is_last, is_first = layer == config.layers - 1, layer == 0
        self.forecast_proj = None if is_last else init_forecast(rngs.params(), config)
        self.entry_forecast_proj = init_forecast(rngs.params(), config) if is_first else None
        if config.token_importance:
            self.importance_scale = nnx.Param(jnp.zeros((kv,), dtype), axes="K")
            self.importance_proj = init_weight(rngs.params(), (kv, dim, kv), "KHK", kv * dim, dtype)
        else:
            self.importance_scale = None
            self.importance_proj = None

    @jax.named_scope("qkv")
    def project(
        self, a: Float[Array, "B T D"], rope: Rope
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Project and rotate: queries, keys and values of a normalised input."""
        q = jnp.einsum("btd,dnh->btnh", a, self.q_proj[...])
        k = jnp.einsum("btd,dkh->btkh", a, self.k_proj[...])
        v = jnp.einsum("btd,dkh->btkh", a, self.v_proj[...])
        return apply_rope(q, rope, self.config.rope), apply_rope(k, rope, self.config.rope), v

    def importance(self, v: Float[Array, "B T K H"]) -> Float[Array, "B T K"] | None:
        """Compute NOSA's token importance A · softplus(Δ v) in f32; `None` without weights.

        References:
            NOSA, arXiv:2510.13602.
        """
        if self.importance_proj is None or self.importance_scale is None:
            return None
        weight = self.importance_proj[...].astype(jnp.float32)
        raw = jnp.einsum("btkh,khj->btj", v.astype(jnp.float32), weight)
        scale = self.importance_scale[...].astype(jnp.float32)[None, None, :]
        return scale * jax.nn.softplus(raw)

    @jax.named_scope("output")
    def output(self, y: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Project the heads back to the width."""
        return jnp.einsum("btnh,nhd->btd", y, self.o_proj[...])


def map_tiles(f: Callable[[Any], Any], arrays: Any, tile: int, padding: Any) -> Any:
    """Apply `f` to tiles of the T axis, one after the other, and join the results.

    Args:
        f: maps a pytree of [B tile ...] to a pytree of [B tile ...].
        arrays: pytree of [B T ...].
        tile: queries in one tile.
        padding: pytree of scalars like `arrays`: what fills the last tile.

    Returns:
        A pytree of [B T ...].
    """
    queries = jax.tree.leaves(arrays)[0].shape[1]
    if queries <= tile:
        return f(arrays)
    tiles = -(-queries // tile)

    def split(x: Array, fill: float | int) -> Array:
        width = [(0, 0)] * x.ndim
        width[1] = (0, tiles * tile - queries)
        x = jnp.pad(x, width, constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], tiles, tile, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], tiles * tile, *x.shape[3:])[:, :queries]

    return jax.tree.map(join, jax.lax.map(f, jax.tree.map(split, arrays, padding)))


@jax.named_scope("attend_dense")
def attend_dense(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    positions: Int[Array, "B T"],
    key_bias: Float[Array, "B S K"] | None = None,
    *,
    tile_q: int = 256,
    tile_kv: int = 512,
) -> Float[Array, "B T N H"]:
    """Attend causally to all keys: softmax(q · k / √H + bias) v over s ≤ t.

    Key tiles after the last query of a query tile are never touched. Not differentiable in reverse
    (the number of key tiles is data); `attend_masked` is.

    Args:
        q: rotated queries.
        k: rotated keys; those after a query's position are never read.
        v: values.
        positions: of the queries; −1 gives zeros.
        key_bias: added to the logits, per key and KV head, f32.
        tile_q: queries in one tile.
        tile_kv: keys in one tile.

    Returns:
        The attended values in the dtype of `q`.
    """
    batch, _, heads, dim = q.shape
    length, kv_heads = k.shape[1], k.shape[2]
    group = heads // kv_heads
    tile_kv = min(tile_kv, length)
    padded = -(-length // tile_kv) * tile_kv - length
    keys = jnp.pad(k, ((0, 0), (0, padded), (0, 0), (0, 0))).transpose(0, 2, 3, 1)  # [B K H S]
    values = jnp.pad(v, ((0, 0), (0, padded), (0, 0), (0, 0))).transpose(0, 2, 1, 3)  # [B K S H]
    bias = None
    if key_bias is not None:
        bias = jnp.pad(key_bias, ((0, 0), (0, padded), (0, 0))).transpose(0, 2, 1)  # [B K S]

    def one_tile(tile: tuple[Array, Array]) -> Array:
        queries, at = tile
        size = queries.shape[1]
        rows = queries.reshape(batch, size, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
        rows = rows.reshape(batch, kv_heads, group * size, dim)
        row_at = jnp.tile(at[:, None, :], (1, group, 1)).reshape(batch, 1, group * size, 1)

        def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            start = i * tile_kv
            part = jax.lax.dynamic_slice_in_dim(keys, start, tile_kv, axis=3)
            logits = jnp.einsum(
                "bkrh,bkhs->bkrs", rows, part, preferred_element_type=jnp.float32
            ) * (dim**-0.5)
            if bias is not None:
                logits = logits + jax.lax.dynamic_slice_in_dim(bias, start, tile_kv, 2)[:, :, None]
            at_key = (start + jnp.arange(tile_kv))[None, None, None, :]
            logits = jnp.where(at_key <= row_at, logits, LOWEST)
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True))
            mass = jnp.where(at_key <= row_at, jnp.exp(logits - new_top), 0.0)
            scale = jnp.exp(top - new_top)
            part = jax.lax.dynamic_slice_in_dim(values, start, tile_kv, axis=2)
            added = jnp.einsum(
                "bkrs,bksh->bkrh", mass.astype(v.dtype), part, preferred_element_type=jnp.float32
            )
            total = total * scale + jnp.sum(mass, axis=-1, keepdims=True)
            return new_top, total, out * scale + added

        shape = (batch, kv_heads, group * size)
        first = (jnp.full((*shape, 1), LOWEST), jnp.zeros((*shape, 1)), jnp.zeros((*shape, dim)))
        steps = (jnp.max(at) + tile_kv) // tile_kv
        _, total, out = jax.lax.fori_loop(
            0, jnp.minimum(steps, keys.shape[3] // tile_kv), step, first
        )
        out = out / jnp.where(total > 0.0, total, 1.0)
        out = out.reshape(batch, kv_heads, group, size, dim).transpose(0, 3, 1, 2, 4)
        return out.reshape(batch, size, heads, dim).astype(q.dtype)

    return map_tiles(one_tile, (q, positions), tile_q, (0, -1))


def block_records(
    k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], block_size: int
) -> Float[Array, "B K M 2 W H"]:
    """Cut keys and values into records, one per block and KV head: K, then V, contiguous."""
    batch, length, kv_heads, dim = k.shape
    blocks = -(-length // block_size)
    kv = jnp.stack([k, v], axis=1)  # [B 2 S K H]
    kv = jnp.pad(kv, ((0, 0), (0, 0), (0, blocks * block_size - length), (0, 0), (0, 0)))
    kv = kv.reshape(batch, 2, blocks, block_size, kv_heads, dim)
    return kv.transpose(0, 4, 2, 1, 3, 5)


def attend_records(
    q: Float[Array, "B T N H"],
    records: Float[Array, "B K R 2 W H"],
    slots: Int[Array, "B T K J"],
    block_ids: Int[Array, "B T K J"],
    positions: Int[Array, "B T"],
    bias: Float[Array, "B K M W"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attend to chosen records: softmax(q · k / √H + bias) v over their tokens s ≤ t.

    Args:
        q: rotated queries.
        records: blocks in any order.
        slots: where each chosen block stands in `records`; negative where there is none.
        block_ids: which block that is; negative where there is none.
        positions: of the queries; −1 gives zeros.
        bias: added to the logits, f32, by block and token.

    Returns:
        The attended values in the dtype of `q`; zeros where nothing is visible.
    """
    batch, queries, heads, dim = q.shape
    kv_heads, block_size = records.shape[1], records.shape[4]
    group, width = heads // kv_heads, slots.shape[-1]
    by_head = jnp.maximum(slots, 0).transpose(0, 2, 1, 3)  # [B K T J]
    chosen = jax.vmap(jax.vmap(lambda r, i: r[i]))(records, by_head)  # [B K T J 2 W H]
    tokens = (batch, kv_heads, queries, width * block_size)
    keys = chosen[:, :, :, :, 0].reshape(*tokens, dim)
    values = chosen[:, :, :, :, 1].reshape(*tokens, dim)
    grouped = q.reshape(batch, queries, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
    logits = jnp.einsum("bktgh,bktsh->bktgs", grouped, keys, preferred_element_type=jnp.float32)
    logits = logits * dim**-0.5
    ids = block_ids.transpose(0, 2, 1, 3)
    if bias is not None:
        extra = jax.vmap(jax.vmap(lambda r, i: r[i]))(bias, jnp.maximum(ids, 0))  # [B K T J W]
        logits = logits + extra.reshape(tokens)[:, :, :, None, :]
    token = ids[..., None] * block_size + jnp.arange(block_size)[None, None, None, None, :]
    seen = (token <= positions[:, None, :, None, None]) & (ids >= 0)[..., None]
    seen = seen.reshape(tokens)[:, :, :, None, :]
    logits = jnp.where(seen, logits, LOWEST)
    mass = jnp.where(seen, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0.0)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    out = jnp.einsum(
        "bktgs,bktsh->bktgh", mass.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    out = out / jnp.where(total > 0.0, total, 1.0)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, queries, heads, dim).astype(q.dtype)


@jax.named_scope("attend_chosen")
def attend_chosen(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_ids: Int[Array, "B T K J"],
    positions: Int[Array, "B T"],
    key_bias: Float[Array, "B S K"] | None = None,
    *,
    block_size: int,
    tile_q: int = 64,
) -> Float[Array, "B T N H"]:
    """Attend to the chosen blocks with an exact causal tail.

    On a GPU neighbouring queries share a kernel's tile; elsewhere blocks are gathered per query.

    Args:
        q: rotated queries.
        k: rotated keys.
        v: values.
        block_ids: chosen blocks, distinct; negative where there is none.
        positions: of the queries; −1 gives zeros.
        key_bias: added to the logits, per key and KV head, f32.
        block_size: W.
        tile_q: queries whose blocks are gathered at once.

    Returns:
        The attended values in the dtype of `q`; zeros for a row with nothing chosen.

    References:
        InfLLM-V2, arXiv:2509.24663; SparDA, arXiv:2606.04511, section 3.
    """
    if jax.default_backend() == "gpu":
        mask = pack_blocks(block_ids, -(-k.shape[1] // block_size))
        return pallas_kernels.sparse_attention(
            q, k, v, mask, positions, block_size=block_size, key_bias=key_bias
        )
    records = block_records(k, v, block_size)
    bias = None if key_bias is None else block_bias(key_bias, block_size)

    def one_tile(tile: tuple[Array, Array, Array]) -> Array:
        queries, ids, at = tile
        return attend_records(queries, records, ids, ids, at, bias)

    return map_tiles(one_tile, (q, block_ids, positions), tile_q, (0, -1, -1))


def pack_blocks(
    block_ids: Int[Array, "B T K J"], num_blocks: int
) -> UInt32[Array, "B T K maskwords"]:
    """Pack a choice into bits: bit m % 32 of word m // 32 marks block m.

    Args:
        block_ids: distinct; negative where there is none.
        num_blocks: M.

    Example:
        >>> pack_blocks(jnp.array([[[[0, 2, 33, -1]]]]), 40).tolist()
        [[[[5, 2]]]]
    """
    words = -(-num_blocks // 32)
    word = jnp.arange(words, dtype=jnp.int32)[None, None, None, None, :]
    bit = jnp.uint32(1) << (block_ids % 32).astype(jnp.uint32)
    here = (block_ids // 32)[..., None] == word  # −1 // 32 is −1: no word
    return jnp.sum(jnp.where(here, bit[..., None], jnp.uint32(0)), axis=-2, dtype=jnp.uint32)


def block_bias(key_bias: Float[Array, "B S K"], block_size: int) -> Float[Array, "B K M W"]:
    """Cut a bias per key into blocks."""
    batch, length, kv_heads = key_bias.shape
    blocks = -(-length // block_size)
    bias = jnp.pad(key_bias, ((0, 0), (0, blocks * block_size - length), (0, 0)))
    return bias.reshape(batch, blocks, block_size, kv_heads).transpose(0, 3, 1, 2)


def attend_masked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    blocks: Bool[Array, "B T K M"] | None,
    positions: Int[Array, "B T"],
    key_bias: Float[Array, "B S K"] | None = None,
    *,
    block_size: int,
    tile_q: int = 1024,
) -> Float[Array, "B T N H"]:
    """Attend to the marked blocks under a mask: the same result as `attend_chosen`.

    For whole sequences only, T = S with query t at position t: tile i of the queries sees a static
    prefix of the keys. Each tile is recomputed in the backward pass.

    Args:
        q: rotated queries.
        k: rotated keys.
        v: values.
        blocks: which blocks each (query, KV head) reads, see `selection.block_mask`; `None` for
            all of them.
        positions: of the queries; −1 gives zeros.
        key_bias: added to the logits, per key and KV head, f32.
        block_size: W.
        tile_q: queries in one tile.

    Returns:
        The attended values in the dtype of `q`; zeros for a row that sees nothing.
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads

    def one_tile(
        queries: Array,
        keys: Array,
        values: Array,
        marked: Array | None,
        at: Array,
        bias: Array | None,
    ) -> Array:
        count, end = queries.shape[1], keys.shape[1]
        grouped = queries.reshape(batch, count, kv_heads, group, dim)
        logits = jnp.einsum(
            "btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32
        ) * (dim**-0.5)
        if bias is not None:
            logits = logits + bias.transpose(0, 2, 1)[:, :, None, None, :]
        seen = jnp.arange(end)[None, None, :] <= at[:, :, None]
        seen = seen[:, None, None]  # [B 1 1 T S]
        if marked is not None:
            tokens = jnp.repeat(marked, block_size, axis=-1)[..., :end]
            seen = seen & tokens.transpose(0, 2, 1, 3)[:, :, None]
        logits = jnp.where(seen, logits, LOWEST)
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        mass = jnp.where(seen, jnp.exp(logits - top), 0.0)
        total = jnp.sum(mass, axis=-1, keepdims=True)
        probs = (mass / jnp.where(total > 0.0, total, 1.0)).astype(values.dtype)
        out = jnp.einsum("bkgts,bskh->btkgh", probs, values, preferred_element_type=jnp.float32)
        return out.reshape(batch, count, heads, dim).astype(queries.dtype)

    tile_fn = jax.checkpoint(one_tile)
    outs = []
    for start in range(0, length, tile_q):
        end = min(start + tile_q, length)
        now, past = slice(start, end), slice(0, end)
        bias = None if key_bias is None else key_bias[:, past]
        marked = None if blocks is None else blocks[:, now, :, : -(-end // block_size)]
        outs.append(tile_fn(q[:, now], k[:, past], v[:, past], marked, positions[:, now], bias))
    return jnp.concatenate(outs, axis=1)


def attend_fused(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    blocks: Bool[Array, "B T K M"] | None,
    *,
    block_size: int,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Attend as `attend_masked`, with a fused kernel that reads the mask as a bias.

    For whole sequences, T = S; rows of padding hold what a causal row holds, not zeros. Each KV
    head has its own mask, so KV heads join the batch.

    Args:
        q: rotated queries.
        k: rotated keys.
        v: values.
        blocks: which blocks each (query, KV head) reads; `None` for all of them.
        block_size: W.
        implementation: `cudnn` (bf16 on an NVIDIA GPU) or `xla`, the same function anywhere.
    """
    if blocks is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    queries = q.reshape(batch, length, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
    queries = queries.reshape(batch * kv_heads, length, group, dim)
    keys = k.transpose(0, 2, 1, 3).reshape(batch * kv_heads, length, 1, dim)
    values = v.transpose(0, 2, 1, 3).reshape(batch * kv_heads, length, 1, dim)
    mask = blocks.transpose(0, 2, 1, 3).reshape(batch * kv_heads, 1, length, blocks.shape[3])
    mask = jnp.repeat(mask, block_size, axis=-1)[..., :length]
    past = jnp.arange(length)[None, :] <= jnp.arange(length)[:, None]
    out = jax.nn.dot_product_attention(
        queries, keys, values, mask=mask & past[None, None], implementation=implementation
    )
    out = out.reshape(batch, kv_heads, length, group, dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, length, heads, dim)
