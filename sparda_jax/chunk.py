# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""One chunk of prefill through all layers: what `forward`, chunked prefill and generation share.

A `Plan` says which rule chooses blocks and how they are read, a `LayerCache` holds the keys so far.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.attention import (
    attend_chosen,
    attend_dense,
    attend_fused,
    attend_masked,
    map_tiles,
)
from sparda_jax.config import ModelConfig
from sparda_jax.rope import Rope
from sparda_jax.selection import BlockChoice, block_mask, choice_width, select_blocks
from sparda_jax.selectors import Decoder, KeySummary, Probe, Selector, resolve
from sparda_jax.shapes import Mode, Parity

AttentionPath = Literal["gather", "mask", "cudnn"]
"""How blocks are read: `gather` the chosen ones only; `mask` all of them under a mask, which is
differentiable; `cudnn` the same by cuDNN's fused kernel, in bf16 on an NVIDIA GPU."""

Observer = Callable[[str, int, object], None]
"""Is told (name, layer, value) while a program is traced: for tests, recall and notebooks."""


@typing.no_type_check
@struct.dataclass
class LayerCache:
    """Keys and values of one layer in token order, and what its selector knows of them.

    Attributes:
        k: rotated keys.
        v: values.
        importance: NOSA's bias per key, f32; `None` for other models.
        summary: the selector's; `None` in dense mode.
    """

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    importance: Float[Array, "B S K"] | None
    summary: KeySummary | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The static part of a run: which rule, which attention, how wide the choices.

    Attributes:
        config: of the model.
        selector: ranks the blocks; `None` attends to everything.
        width: ids in a choice.
        attention: how blocks are read.
        parity: `None` for the correct rules.
        remat: recompute each layer in the backward pass.
        tile_bytes: bound on what one tile of queries may gather or score.
    """

    config: ModelConfig
    selector: Selector | None
    width: int
    attention: AttentionPath = "gather"
    parity: Parity = None
    remat: bool = False
    tile_bytes: int = 64 << 20

    def tile(self, batch: int, keys: int) -> int:
        """Choose how many queries to score and gather at once within `tile_bytes`."""
        config = self.config
        gathered = 2 * self.width * config.sparse.block_size * config.kv_heads * config.head_dim
        scored = config.sparse.pooled(keys) * config.heads * 2
        per_query = batch * max(gathered, scored, 1) * 4
        return max(8, min(1024, self.tile_bytes // per_query))


def make_plan(
    config: ModelConfig,
    mode: Mode,
    *,
    max_length: int,
    shortest: int | None = None,
    selector: str | Selector | None = None,
    attention: AttentionPath = "gather",
    parity: Parity = None,
    remat: bool = False,
    tile_bytes: int | None = None,
) -> Plan:
    """Resolve a mode to a plan for sequences of up to `max_length` tokens.

    Args:
        config: of the model.
        mode: `dense`, `sparse` or `sparda`.
        max_length: tokens that the longest sequence may reach.
        shortest: tokens of the shortest one, if some may be below `dense_below`.
        selector: overrides what ranks the blocks.
        attention: `gather` or `mask`.
        parity: as in `forward`.
        remat: as in `forward`.
        tile_bytes: bound on what one tile of queries may gather or score; `None` takes 1 GiB on a
            GPU and 64 MiB on a CPU.
    """
    if tile_bytes is None:
        tile_bytes = 64 << 20 if jax.default_backend() == "cpu" else 1 << 30
    sparse = config.sparse
    chosen = resolve(mode, config, selector, parity)
    return Plan(
        config=config,
        selector=None if max_length < sparse.dense_below else chosen,
        width=choice_width(sparse, sparse.blocks(max_length), shortest=shortest),
        attention=attention,
        parity=parity,
        remat=remat,
        tile_bytes=tile_bytes,
    )


def init_cache(plan: Plan, batch: int, capacity: int) -> LayerCache:
    """Make the empty cache of one layer for `capacity` tokens a sequence."""
    config = plan.config
    shape = (batch, capacity, config.kv_heads, config.head_dim)
    importance = jnp.zeros(shape[:3], jnp.float32) if config.token_importance else None
    summary = None
    if plan.selector is not None:
        summary = plan.selector.init_summary(batch, capacity, config.dtype)
    return LayerCache(
        k=jnp.zeros(shape, config.dtype),
        v=jnp.zeros(shape, config.dtype),
        importance=importance,
        summary=summary,
    )


def targets_of(plan: Plan, layer: int) -> tuple[int, ...]:
    """List the layers whose blocks are ranked by a probe that `layer` makes."""
    if plan.selector is None:
        return ()
    layers = range(layer, plan.config.layers)
    return tuple(t for t in layers if plan.selector.source(t).probe_layer == layer)


def make_probes(
    model: Decoder, plan: Plan, layer: int, x: Array, q: Array, rope: Rope
) -> dict[int, Probe]:
    """Make the probes of all layers that `layer` ranks for."""
    if plan.selector is None:
        return {}
    with jax.named_scope("probe"):
        return {
            target: plan.selector.probe(model, layer, target, x, q, rope)
            for target in targets_of(plan, layer)
        }


@typing.overload
def _write(held: Array, new: Array, start: Int[Array, ""]) -> Array: ...


@typing.overload
def _write(held: Array | None, new: Array | None, start: Int[Array, ""]) -> Array | None: ...


def _write(held: Array | None, new: Array | None, start: Int[Array, ""]) -> Array | None:
    """Write a chunk into a cache at token `start`; nothing into nothing."""
    if held is None or new is None:
        return None
    return jax.lax.dynamic_update_slice_in_dim(held, new.astype(held.dtype), start, axis=1)


def attend_chunk(
    plan: Plan,
    q: Float[Array, "B T N H"],
    cache: LayerCache,
    probe: Probe | None,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    attend_all: Bool[Array, " B"],
) -> tuple[Float[Array, "B T N H"], BlockChoice | None]:
    """Attend with the queries of a chunk: to everything, or tile by tile to what they choose.

    Args:
        plan: the rule.
        q: rotated queries.
        cache: keys up to and including the chunk.
        probe: ranks this layer's blocks; `None` attends to everything.
        positions: of the queries; −1 for padding.
        lengths: tokens held of each sequence.
        attend_all: sequences that attend to all their blocks.

    Returns:
        Attended heads, and the choice (`None` when everything was read).
    """
    sparse = plan.config.sparse
    bias = cache.importance
    if bias is not None and plan.parity is not None:  # the original drops it in dense attention
        bias = jnp.where(attend_all[:, None, None] | (plan.selector is None), 0.0, bias)
    whole = functools.partial(
        attend_masked,
        q,
        cache.k,
        cache.v,
        block_size=sparse.block_size,
        tile_q=max(1024, -(-q.shape[1] // 4)),
    )
    if plan.attention == "cudnn":
        if bias is not None:
            raise ValueError("attention='cudnn' has no bias per key; use 'mask' or 'gather'")
        whole = lambda blocks, positions, key_bias: attend_fused(
            q, cache.k, cache.v, blocks, block_size=sparse.block_size
        )
    if plan.selector is None:
        if plan.attention != "gather":
            return whole(blocks=None, positions=positions, key_bias=bias), None
        return attend_dense(q, cache.k, cache.v, positions, bias), None

    num_blocks = sparse.blocks(cache.k.shape[1])
    summary = cache.summary if plan.attention == "gather" else jax.lax.stop_gradient(cache.summary)

    def choose(probe: Probe, at: Array) -> BlockChoice:
        with jax.named_scope("score_blocks"):
            scores = plan.selector.score_blocks(probe, summary, at, lengths, num_blocks)
        with jax.named_scope("select_blocks"):
            return select_blocks(
                scores,
                at,
                sparse,
                attend_all=attend_all,
                width=plan.width,
                parity=plan.parity,
            )

    tile = plan.tile(q.shape[0], cache.k.shape[1])
    fill = jax.tree.map(lambda _: 0, probe)
    if plan.attention != "gather":

        def choose_and_mark(args: tuple[Probe, Array]) -> tuple[BlockChoice, Array]:
            choice = choose(*args)
            return choice, block_mask(choice.ids, num_blocks)

        frozen = jax.lax.stop_gradient((probe, positions))
        choice, marked = map_tiles(choose_and_mark, frozen, tile, (fill, -1))
        return whole(blocks=marked, positions=positions, key_bias=bias), choice
    choice = map_tiles(lambda a: choose(*a), (probe, positions), tile, (fill, -1))
    y = attend_chosen(
        q,
        cache.k,
        cache.v,
        choice.ids,
        positions,
        bias,
        block_size=sparse.block_size,
        tile_q=tile,
    )
    return y, choice


def run_chunk(
    model: Decoder,
    plan: Plan,
    x: Float[Array, "B T D"],
    caches: list[LayerCache],
    rope: Rope,
    start: Int[Array, ""],
    attend_all: Bool[Array, " B"],
    observe: Observer | None = None,
) -> tuple[Float[Array, "B T D"], list[LayerCache], list[BlockChoice | None]]:
    """Run all layers over one chunk of prefill.

    Args:
        model: the decoder.
        plan: the rule.
        x: embedded tokens of the chunk.
        caches: of all layers, holding the tokens before the chunk.
        rope: rotations of the chunk's positions; −1 marks padding at the end of a row.
        start: position of the chunk's first token, the same for all rows.
        attend_all: sequences that attend to all their blocks.
        observe: told about inputs, queries, probes and summaries while tracing.

    Returns:
        Hidden states before the final norm, the longer caches, and the choices.
    """
    held = jnp.max(rope.positions, axis=1)
    lengths = jnp.where(held >= 0, held + 1, start)
    probes: dict[int, Probe] = {}
    new_caches, choices = [], []
    for layer, block in enumerate(model.layers):

        def run(
            x: Array,
            cache: LayerCache,
            probe: Probe | None,
            block: Decoder,
            layer: int = layer,
        ) -> tuple[Array, LayerCache, dict[int, Probe], BlockChoice | None]:
            q, k, v = block.attention.project(block.input_norm(x), rope)
            importance = block.attention.importance(v)
            summary = cache.summary
            if plan.selector is not None:
                summary = plan.selector.extend_summary(
                    summary,
                    jax.lax.stop_gradient(k) if plan.remat else k,
                    rope.positions,
                    importance,
                )
            made = make_probes(model, plan, layer, x, q, rope)
            cache = LayerCache(
                k=_write(cache.k, k, start),
                v=_write(cache.v, v, start),
                importance=_write(cache.importance, importance, start),
                summary=summary,
            )
            mine = made.pop(layer, probe)
            y, choice = attend_chunk(plan, q, cache, mine, rope.positions, lengths, attend_all)
            if observe is not None:
                observe("input", layer, x)
                observe("q", layer, q)
                observe("probe", layer, mine)
                observe("cache", layer, cache)
            return block.finish(x, y), cache, made, choice

        step = jax.checkpoint(run) if plan.remat and observe is None else run
        with jax.named_scope(f"layer_{layer}"):
            x, cache, made, choice = step(x, caches[layer], probes.pop(layer, None), block)
        probes.update(made)
        new_caches.append(cache)
        choices.append(choice)
    return x, new_caches, choices
