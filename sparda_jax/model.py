# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The decoder: layers that read all blocks, their own choice, or the choice of a forecast.

`forward` is the whole model as a function of tokens, for evaluation under `jax.jit`, for tests and
for training. It is one chunk of prefill from an empty cache: chunked prefill (`prefill.py`) and
generation run the same `run_chunk`.
"""

import dataclasses
import functools
import pathlib
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.attention import (
    Attention,
    attend_chosen,
    attend_dense,
    attend_fused,
    attend_masked,
    map_tiles,
)
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.layers import MLP, RMSNorm, init_weight
from sparda_jax.rope import Rope, make_rope
from sparda_jax.selection import BlockChoice, block_mask, choice_width, select_blocks
from sparda_jax.selectors import KeySummary, Probe, Selector, resolve
from sparda_jax.shapes import NO_BLOCK, Mode, Parity

AttentionPath = Literal["gather", "mask", "cudnn"]
"""How blocks are read: `gather` the chosen ones only; `mask` all of them under a mask, which is
differentiable; `cudnn` the same by cuDNN's fused kernel, in bf16 on an NVIDIA GPU."""

Observer = Callable[[str, int, object], None]
"""Is told (name, layer, value) while a program is traced: for tests, recall and notebooks."""


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP; what they add is scaled by `residual_scale`."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.input_norm = RMSNorm(config.width, config.rms_norm_eps, config.dtype)
        self.attention = Attention(config, layer, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.rms_norm_eps, config.dtype)
        self.mlp = MLP(config, rngs=rngs)

    def finish(self, x: Float[Array, "B T D"], y: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Add the output projection of the attended heads, then the MLP."""
        scale = jnp.asarray(self.config.residual_scale, x.dtype)
        x = x + scale * self.attention.output(y)
        return x + scale * self.mlp(self.mlp_norm(x))


class SpardaLM(nnx.Module):
    """A decoder-only language model with Forecast heads.

    Args:
        config: sizes, scalings, positions and the sparse rule.
        rngs: where initial weights come from.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = init_weight(
            rngs.params(), (config.vocab_size, config.width), "VD", config.width, config.dtype
        )
        self.layers = nnx.List(
            [DecoderLayer(config, layer, rngs=rngs) for layer in range(config.layers)]
        )
        self.final_norm = RMSNorm(config.width, config.rms_norm_eps, config.dtype)
        shape = (config.width, config.vocab_size)
        self.lm_head = (
            None
            if config.tie_embeddings
            else init_weight(rngs.params(), shape, "DV", config.width, config.dtype)
        )

    @jax.named_scope("embed")
    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look tokens up and scale them."""
        x = self.embed[...][tokens]
        return x * jnp.asarray(self.config.embed_scale, x.dtype)

    @jax.named_scope("lm_head")
    def logits(self, x: Float[Array, "B P D"]) -> Float[Array, "B P V"]:
        """Turn final hidden states into logits, f32."""
        x = self.final_norm(x)
        x = x / jnp.asarray(self.config.logit_divisor, x.dtype)
        if self.lm_head is None:
            weight, formula = self.embed[...], "bpd,vd->bpv"
        else:
            weight, formula = self.lm_head[...], "bpd,dv->bpv"
        return jnp.einsum(formula, x, weight, preferred_element_type=jnp.float32)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | pathlib.Path,
        *,
        dtype: Literal["float32", "bfloat16"] | None = None,
        mesh: jax.sharding.Mesh | None = None,
        sparse: SparseConfig | None = None,
        heads: str | pathlib.Path | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | Literal["bar"] | None = "bar",
    ) -> "SpardaLM":
        """Load a model from a Hugging Face folder or hub id: `sparda_jax.weights.load_pretrained`.

        What ranks the blocks is no part of a model: `forward` and `generate` take it as `mode` and
        `selector` with each call, and one loaded model serves them all.

        Args:
            path_or_id: a folder with config.json and safetensors, or a hub id `owner/name`.
            dtype: of the parameters; `None` takes the checkpoint's.
            mesh: devices with an axis `model` to spread the parameters over; `None` puts all of
                them on the default device.
            sparse: the rule that chooses blocks; `None` reads `sparse_config` of config.json.
            heads: Forecast heads, `.pt` of the original's trainer or safetensors; `None` takes
                those of the folder, or draws them at random and says so.
            seed: of heads drawn at random.
            progress: told the bytes done and in all; `bar` draws a bar on a terminal.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or another model's.
            ValueError: a mesh without an axis `model`.
        """
        from sparda_jax.weights import load_pretrained

        return load_pretrained(
            path_or_id,
            dtype=dtype,
            mesh=mesh,
            sparse=sparse,
            heads=heads,
            seed=seed,
            progress=progress,
        )

    def save_pretrained(
        self,
        folder: str | pathlib.Path,
        *,
        tokenizer_files: str | pathlib.Path | Iterable[str | pathlib.Path] = (),
        eos_ids: Sequence[int] = (),
        step: int | None = None,
        name: str | None = None,
        max_shard_bytes: int = 4_000_000_000,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | Literal["bar"] | None = "bar",
    ) -> None:
        """Save the model as a Hugging Face folder: `sparda_jax.weights.save_pretrained`.

        Args:
            folder: to be made; config.json holds the sparse rule, heads.safetensors the heads.
            tokenizer_files: files to copy beside the model, or a folder whose tokenizer to copy.
            eos_ids: ids that end a text, for config.json.
            step: optimiser steps that the heads have seen, for their metadata.
            name: of the backbone, for the same.
            max_shard_bytes: a larger backbone is split into files of at most this size.
            overwrite: replace a folder that exists.
            progress: as in `from_pretrained`.

        Raises:
            ValueError: the folder exists and `overwrite` is false, a tokenizer file is missing, or
                `max_shard_bytes` < 1.
        """
        from sparda_jax.weights import save_pretrained

        save_pretrained(
            self,
            folder,
            tokenizer_files=tokenizer_files,
            eos_ids=eos_ids,
            step=step,
            name=name,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            progress=progress,
        )


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
    model: SpardaLM, plan: Plan, layer: int, x: Array, q: Array, rope: Rope
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
    model: SpardaLM,
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
            block: DecoderLayer,
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


# Both overloads stand for all other options at once, which the checker takes for too many.
@typing.overload
def forward(  # pyrefly: ignore[inconsistent-overload]
    model: SpardaLM,
    tokens: Int[Array, "B T"],
    *,
    return_choices: Literal[False] = False,
    **options: Any,
) -> Float[Array, "B P V"]: ...


@typing.overload
def forward(  # pyrefly: ignore[inconsistent-overload]
    model: SpardaLM, tokens: Int[Array, "B T"], *, return_choices: Literal[True], **options: Any
) -> tuple[Float[Array, "B P V"], Int[Array, "L B T K J"]]: ...


def forward(
    model: SpardaLM,
    tokens: Int[Array, "B T"],
    *,
    lengths: Int[Array, " B"] | None = None,
    mode: Mode = "sparda",
    selector: str | Selector | None = None,
    logits: Literal["all", "last"] | Int[Array, "B P"] = "all",
    return_choices: bool = False,
    attention: AttentionPath = "gather",
    remat: bool = False,
    parity: Parity = None,
    observe: Observer | None = None,
) -> Float[Array, "B P V"] | tuple[Float[Array, "B P V"], Int[Array, "L B T K J"]]:
    """Run the model over whole sequences.

    Args:
        model: the decoder.
        tokens: right-padded rows.
        lengths: real tokens of each row; all of T if left out.
        mode: `dense` reads every block, `sparse` the model's own choice, `sparda` the forecast's.
        selector: overrides what ranks the blocks in the sparse modes, by name or as an object.
        logits: for `all` positions, for the `last` real one of each row, or for given positions.
        return_choices: return the chosen block ids of every layer as well.
        attention: `gather` reads chosen blocks only; `mask` computes all scores and is
            differentiable; `cudnn` the same by a fused kernel, in bf16 on an NVIDIA GPU.
        remat: recompute each layer in the backward pass.
        parity: `"reference"` repeats the original's deviations, for comparison.
        observe: told about inputs, queries, probes and caches while tracing.

    Returns:
        Logits, f32: [B T V], [B 1 V] for `last`, [B P V] for positions. With `return_choices` also
        the block ids, [L B T K J], `NO_BLOCK` at the end of a row; a dense run returns J = 0.

    Raises:
        ValueError: rows and lengths disagree, a mode or selector is unknown.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from sparda_jax.testing import tiny_config
        >>> model = SpardaLM(tiny_config(), rngs=nnx.Rngs(0))
        >>> tokens = jnp.zeros((2, 40), jnp.int32)
        >>> forward(model, tokens, lengths=jnp.array([40, 7]), logits="last").shape
        (2, 1, 64)
    """
    batch, queries = tokens.shape
    config = model.config
    if lengths is None:
        lengths = jnp.full((batch,), queries, jnp.int32)
    if lengths.shape != (batch,):
        raise ValueError(f"{lengths.shape=} must be ({batch},), one per row of {tokens.shape=}")
    plan = make_plan(
        config,
        mode,
        max_length=queries,
        shortest=0 if config.sparse.dense_below > 0 else None,
        selector=selector,
        attention=attention,
        parity=parity,
        remat=remat,
    )
    at = jnp.broadcast_to(jnp.arange(queries)[None, :], (batch, queries))
    at = jnp.where(at < lengths[:, None], at, -1)
    rope = make_rope(config.rope, config.head_dim, at, lengths)
    x = model.embed_tokens(tokens)
    caches = [init_cache(plan, batch, queries) for _ in range(config.layers)]
    attend_all = lengths < config.sparse.dense_below
    x, _, choices = run_chunk(model, plan, x, caches, rope, jnp.int32(0), attend_all, observe)
    if observe is not None:
        observe("output", config.layers, x)
    if isinstance(logits, str):
        if logits == "last":
            x = _take_positions(x, jnp.maximum(lengths - 1, 0)[:, None])
        elif logits != "all":
            raise ValueError(f"{logits=} must be 'all', 'last' or positions [B P]")
    else:
        x = _take_positions(x, logits)
    out = model.logits(x)
    if not return_choices:
        return out
    if plan.selector is None:
        empty = jnp.full((config.layers, batch, queries, config.kv_heads, 0), NO_BLOCK, jnp.int32)
        return out, empty
    return out, jnp.stack([choice.ids for choice in choices if choice is not None])


def _take_positions(x: Float[Array, "B T D"], at: Int[Array, "B P"]) -> Float[Array, "B P D"]:
    """Pick rows of x by position."""
    return jax.vmap(lambda row, index: row[index])(x, at)
