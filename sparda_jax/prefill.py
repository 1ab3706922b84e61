# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Chunked prefill of a ragged batch of prompts.

All rows start at token 0 and run chunk by chunk through all layers; a row that has ended is padding
from then on. One program serves all chunks of all prompts of a batch: its shape is
(rows, chunk, capacity), never a prompt's length. K and V stay on the device until the prompts are
done; meanwhile a listener may copy each chunk's records to the host.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from sparda_jax.attention import block_records
from sparda_jax.chunk import LayerCache, Plan, init_cache, run_chunk
from sparda_jax.kv.pack import HostDtype, pack_records
from sparda_jax.parts import EXACT, HEAD, Layout, Parts, commit, pick
from sparda_jax.rope import make_rope
from sparda_jax.shapes import NO_BLOCK

RecordListener = Callable[[int, int, Num[np.ndarray, "B K m 2 W H"]], None]
"""Is told (layer, first block, records) of each chunk, in order."""


@dataclasses.dataclass(frozen=True, slots=True)
class Prefilled:
    """What prefill leaves behind.

    Attributes:
        caches: K, V and summaries of each layer.
        logits: after the last token of each prompt, f32.
        chosen: blocks that the last token of each prompt chose, per layer; J = 0 in dense mode.
        scales: of the packed records, per layer; `None` where they were not packed.
    """

    caches: list[LayerCache]
    logits: Float[Array, "B V"]
    chosen: list[Int[Array, "B K J"]]
    scales: list[Float[Array, "B K M 2"]] | None = None


def chunk_tokens(longest: int, chunk: int, block_size: int) -> int:
    """Choose the tokens of one chunk: block_size · 2^i that holds the prompt, at most `chunk`.

    Args:
        longest: tokens of the longest prompt.
        chunk: the most tokens to run at once, a multiple of the block size.
        block_size: W.

    Raises:
        ValueError: `chunk` is not a positive multiple of `block_size`.

    Example:
        >>> chunk_tokens(5, 512, 16), chunk_tokens(100, 512, 16), chunk_tokens(9000, 512, 16)
        (16, 128, 512)
    """
    if chunk < block_size or chunk % block_size:
        raise ValueError(f"{chunk=} must be a positive multiple of {block_size=}")
    size = block_size
    while size < min(longest, chunk):
        size *= 2
    return min(size, chunk)


@functools.lru_cache(maxsize=32)
def _chunk_program(layout: Layout, plan: Plan) -> Callable:
    """Compile one chunk: all layers over [B T]; caches and what is gathered so far are donated."""
    config = plan.config

    def run(
        held: tuple[list[LayerCache], Array, list[Array]],
        parts: Parts,
        tokens: Array,
        lengths: Array,
        reach: Array,
        start: Array,
    ) -> tuple[list[LayerCache], Array, list[Array]]:
        caches, last, chosen = held
        model = layout.merge(parts)
        size = tokens.shape[1]
        at = start + jnp.arange(size, dtype=jnp.int32)[None, :]
        at = jnp.where(at < lengths[:, None], at, -1)
        rope = make_rope(config.rope, config.head_dim, at, reach)
        x = model.embed_tokens(tokens)
        attend_all = lengths < config.sparse.dense_below
        x, caches, choices = run_chunk(model, plan, x, caches, rope, start, attend_all)
        end = lengths - 1 - start
        ends_here = (end >= 0) & (end < size)
        take = jax.vmap(lambda row, index: row[index])
        index = jnp.clip(end, 0, size - 1)
        last = jnp.where(ends_here[:, None], take(x, index), last)
        for layer, choice in enumerate(choices):
            if choice is not None:
                ids = take(choice.ids, index)
                chosen[layer] = jnp.where(ends_here[:, None, None], ids, chosen[layer])
        return caches, last, chosen

    return jax.jit(run, donate_argnums=0, compiler_options=EXACT)


@functools.lru_cache(maxsize=32)
def _logits_program(layout: Layout) -> Callable:
    """Compile the LM head for one position of each row."""
    return jax.jit(
        lambda parts, x: layout.merge(parts).logits(x[:, None])[:, 0], compiler_options=EXACT
    )


@functools.partial(jax.jit, static_argnames=("size", "block_size", "host_dtype"))
def _chunk_records(
    cache: LayerCache, start: Array, *, size: int, block_size: int, host_dtype: HostDtype | None
) -> tuple[Array, Array | None]:
    """Cut the records of one chunk out of a cache, as the host stores them, with their scales."""
    k = jax.lax.dynamic_slice_in_dim(cache.k, start, size, axis=1)
    v = jax.lax.dynamic_slice_in_dim(cache.v, start, size, axis=1)
    records = block_records(k, v, block_size)
    return (records, None) if host_dtype is None else pack_records(records, host_dtype)


def _join_scales(scales: list[Array], num_blocks: int) -> Array:
    """Join the scales of the chunks of one layer; blocks that no prompt reached have 1."""
    joined = jnp.concatenate(scales, axis=2)
    missing = ((0, 0), (0, 0), (0, num_blocks - joined.shape[2]), (0, 0))
    return jnp.pad(joined, missing, constant_values=1.0)


def prefill(
    layout: Layout,
    parts: Parts,
    plan: Plan,
    tokens: Int[np.ndarray, "B S"],
    lengths: Int[np.ndarray, " B"],
    reach: Int[np.ndarray, " B"],
    *,
    capacity: int,
    chunk: int,
    on_records: RecordListener | None = None,
    host_dtype: HostDtype | None = None,
) -> Prefilled:
    """Run the prompts of a batch, chunk by chunk.

    Args:
        layout: of the model.
        parts: its weights.
        plan: the rule.
        tokens: right-padded prompts, S a multiple of `chunk`.
        lengths: real tokens of each; 0 for a row that is only padding.
        reach: length that each sequence may grow to; selects LongRoPE's factors.
        capacity: tokens to make room for, a multiple of `chunk` and at least S.
        chunk: tokens run at once, a multiple of the block size.
        on_records: told each chunk's records while the next chunk runs; the last block of a prompt
            may be partly filled, and blocks after it hold nothing of meaning.
        host_dtype: what the records are packed to; `None` leaves them in the model's dtype.

    Returns:
        The caches, the logits of the last tokens and their choices.
    """
    config = plan.config
    batch, padded = tokens.shape
    assert padded % chunk == 0, (padded, chunk)
    assert capacity % chunk == 0, (capacity, chunk)
    assert capacity >= padded, (capacity, padded)
    width = 0 if plan.selector is None else plan.width
    held = (
        [init_cache(plan, batch, capacity) for _ in range(config.layers)],
        jnp.zeros((batch, config.width), config.dtype),
        [
            jnp.full((batch, config.kv_heads, width), NO_BLOCK, jnp.int32)
            for _ in range(config.layers)
        ],
    )
    held = commit(held, parts)
    program = _chunk_program(layout, plan)
    lengths, reach = lengths.astype(np.int32), reach.astype(np.int32)
    pending: list[Array] = []
    scales: list[list[Array]] = [[] for _ in range(config.layers)]
    cut = {"size": chunk, "block_size": config.sparse.block_size, "host_dtype": host_dtype}

    def deliver(first_token: int) -> None:
        assert on_records is not None  # only then is anything pending
        for layer, records in enumerate(pending):
            on_records(layer, first_token // config.sparse.block_size, np.asarray(records))
        pending.clear()

    starts = range(0, max(int(lengths.max()), 1), chunk)
    for start in starts:
        now = np.int32(start)
        part = np.ascontiguousarray(tokens[:, start : start + chunk], dtype=np.int32)
        held = program(held, parts, part, lengths, reach, now)
        if on_records is None:
            continue
        deliver(start - chunk)
        for layer, cache in enumerate(held[0]):
            records, mine = _chunk_records(cache, now, **cut)
            records.copy_to_host_async()
            pending.append(records)
            if mine is not None:
                scales[layer].append(mine)
    if on_records is not None:
        deliver(starts[-1])
    caches, last, chosen = held
    logits = _logits_program(layout)(pick(parts, (HEAD,)), last)
    num_blocks = capacity // config.sparse.block_size
    joined = [_join_scales(each, num_blocks) for each in scales if each]
    return Prefilled(caches=caches, logits=logits, chosen=chosen, scales=joined or None)
