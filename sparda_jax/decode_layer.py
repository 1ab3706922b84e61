# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The two halves of a layer in a decode step, shared by every program that decodes.

`begin_layer` projects, ranks and chooses; `finish_layer` appends, attends and runs the MLP. Between
them the blocks that a layer chose become resident: `decode.py` runs all layers as one program and
fetches inside it, `decode_staged.py` runs the halves layer by layer and moves blocks in between.

A choice for a later layer is made before that layer knows the new token: the summary ends one token
earlier. The windows that the new token completes lie in pinned blocks, so the choice is the same,
provided the local blocks reach as far back as a window (`scores_early`). Where they do not, the
probe waits and the later layer chooses for itself.
"""

import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from sparda_jax.chunk import Plan, make_probes, targets_of
from sparda_jax.kv.plan import Places
from sparda_jax.kv.state import LayerKV, append_tokens
from sparda_jax.model import DecoderLayer, SpardaLM
from sparda_jax.rope import Rope, make_rope
from sparda_jax.selection import select_blocks
from sparda_jax.selectors import KeySummary, Probe
from sparda_jax.shapes import NO_BLOCK, NO_SLOT


@typing.no_type_check
@struct.dataclass
class Now:
    """What all layers of one step share.

    Attributes:
        rope: rotations of the new tokens; position −1 for a row that does nothing.
        lengths: tokens held of each sequence before this step.
        own: the block that the new token falls into; `NO_BLOCK` for a row that does nothing.
        attend_all: sequences that attend to all their blocks.
        step: number of the step, from 1.
    """

    rope: Rope
    lengths: Int[Array, " B"]
    own: Int[Array, " B"]
    attend_all: Bool[Array, " B"]
    step: Int[Array, ""]

    @property
    def positions(self) -> Int[Array, " B"]:
        """Positions of the new tokens; −1 for a row that does nothing."""
        return self.rope.positions[:, 0]


@typing.no_type_check
@struct.dataclass
class Begun:
    """The first half of a layer: heads of the new tokens.

    Attributes:
        q: rotated queries.
        k: rotated keys.
        v: values.
        importance: NOSA's bias of the new keys; `None` for other models.
    """

    q: Float[Array, "B 1 N H"]
    k: Float[Array, "B 1 K H"]
    v: Float[Array, "B 1 K H"]
    importance: Float[Array, "B 1 K"] | None


def open_step(
    model: SpardaLM,
    tokens: Int[Array, " B"],
    active: Bool[Array, " B"],
    lengths: Int[Array, " B"],
    reach: Int[Array, " B"],
    step: Int[Array, ""],
) -> tuple[Float[Array, "B 1 D"], Now]:
    """Embed one token of each sequence and make what all layers share.

    Args:
        model: the decoder.
        tokens: the next token of each sequence.
        active: rows that take part; the others neither read nor write.
        lengths: tokens held of each sequence.
        reach: length that each may grow to.
        step: number of the step.
    """
    config = model.config
    positions = jnp.where(active, lengths, -1)
    now = Now(
        rope=make_rope(config.rope, config.head_dim, positions[:, None], reach),
        lengths=lengths,
        own=jnp.where(active, lengths // config.sparse.block_size, NO_BLOCK),
        attend_all=lengths + 1 < config.sparse.dense_below,
        step=step,
    )
    return model.embed_tokens(tokens[:, None]), now


def scores_early(plan: Plan) -> bool:
    """Tell whether a later layer's blocks can be chosen before it pools the new key.

    True if every window that ends at a query starts in a pinned block: W · local_blocks ≥
    pool_size − 1.
    """
    sparse = plan.config.sparse
    return sparse.block_size * sparse.local_blocks >= sparse.pool_size - 1


def choices_made_at(plan: Plan, layer: int) -> tuple[int, ...]:
    """List the layers whose blocks are chosen while `layer` begins."""
    if plan.selector is None:
        return ()
    return targets_of(plan, layer) if scores_early(plan) else (layer,)


def choose(
    plan: Plan,
    probe: Probe,
    summary: KeySummary,
    now: Now,
    lengths: Int[Array, " B"],
    num_blocks: int,
) -> Int[Array, "B K J"]:
    """Choose the blocks of one layer for the new tokens.

    Args:
        plan: the rule.
        probe: of the new tokens.
        summary: of the layer whose blocks are ranked.
        now: the step.
        lengths: tokens that the summary holds of each sequence.
        num_blocks: M.
    """
    assert plan.selector is not None  # a plan without one never chooses
    positions = now.rope.positions
    with jax.named_scope("score_blocks"):
        scores = plan.selector.score_blocks(probe, summary, positions, lengths, num_blocks)
    with jax.named_scope("select_blocks"):
        choice = select_blocks(
            scores,
            positions,
            plan.config.sparse,
            attend_all=now.attend_all,
            width=plan.width,
            parity=plan.parity,
        )
    return choice.ids[:, 0]


def begin_layer(
    model: SpardaLM,
    plan: Plan,
    layer: int,
    x: Float[Array, "B 1 D"],
    now: Now,
    num_blocks: int,
    summaries: Mapping[int, KeySummary],
    probe: Probe | None,
) -> tuple[Begun, KeySummary, dict[int, Int[Array, "B K J"]], dict[int, Probe]]:
    """Run the first half of a layer: heads, the longer summary, choices.

    Args:
        model: the decoder.
        plan: the rule.
        layer: which layer.
        x: its input.
        now: the step.
        num_blocks: M.
        summaries: of this layer and of those whose blocks are chosen here, all before this step;
            empty in dense mode.
        probe: made for this layer by an earlier one, if that one could not choose yet.

    Returns:
        The heads, the layer's longer summary, the choices made here by layer, and the probes whose
        layers choose for themselves.
    """
    block = model.layers[layer]
    q, k, v = block.attention.project(block.input_norm(x), now.rope)
    begun = Begun(q=q, k=k, v=v, importance=block.attention.importance(v))
    if plan.selector is None:
        return begun, None, {}, {}
    positions = now.rope.positions
    summary = plan.selector.extend_summary(summaries[layer], k, positions, begun.importance)
    probes = make_probes(model, plan, layer, x, q, now.rope)
    if probe is not None:
        probes[layer] = probe
    held = jnp.where(now.positions >= 0, now.lengths + 1, now.lengths)
    choices = {}
    for target in choices_made_at(plan, layer):
        own = target == layer
        known, lengths = (summary, held) if own else (summaries[target], now.lengths)
        choices[target] = choose(plan, probes.pop(target), known, now, lengths, num_blocks)
    return begun, summary, choices, probes


def finish_layer(
    block: DecoderLayer,
    plan: Plan,
    x: Float[Array, "B 1 D"],
    begun: Begun,
    kv: LayerKV,
    places: Places,
    now: Now,
) -> tuple[Float[Array, "B 1 D"], LayerKV]:
    """Run the second half of a layer: append to the tail, attend, output, MLP.

    Args:
        block: the layer.
        plan: the rule.
        x: the layer's input.
        begun: its first half.
        kv: its state; every chosen block stands in its slot.
        places: where the chosen blocks stand.
        now: the step.
    """
    with jax.named_scope("append_kv"):
        kv = append_tokens(kv, begun.k, begun.v, begun.importance, places.tail, now.positions)
    bias = kv.importance
    if bias is not None and plan.parity is not None:  # the original drops it in dense attention
        dense = now.attend_all[:, None, None, None] | (plan.selector is None)
        bias = jnp.where(dense, 0.0, bias)
        if plan.parity == "reference_fast_engine":  # it scales q · k + bias instead of q · k
            bias = bias * plan.config.head_dim**-0.5
    with jax.named_scope("sparse_decode"):
        q = begun.q[:, 0]
        y = pallas_kernels.sparse_decode(
            q, kv.slots, places.slots, places.ids, now.positions, bias=bias, bias_order="block"
        )[:, None]
    return block.finish(x, y), kv


def resident_places(
    plan: Plan, ids: Int[Array, "B K J"] | None, now: Now, num_blocks: int
) -> Places:
    """Say where blocks stand when slot m holds block m.

    Args:
        plan: the rule.
        ids: the chosen blocks; `None` reads every block up to the query's own.
        now: the step.
        num_blocks: M.
    """
    rows = (now.own.shape[0], plan.config.kv_heads)
    tail = jnp.where(now.own >= 0, now.own, NO_SLOT)[:, None]
    if ids is None:
        block = jnp.arange(num_blocks, dtype=jnp.int32)[None, :]
        every = jnp.where(block <= now.own[:, None], block, NO_BLOCK)
        ids = jnp.broadcast_to(every[:, None, :], (*rows, num_blocks))
    return Places(ids=ids, slots=ids, tail=jnp.broadcast_to(tail, rows))
