# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""One suite for every registered selector: what any ranking of blocks must hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax import selectors
from sparda_jax.config import SparseConfig
from sparda_jax.model import forward
from sparda_jax.selection import pinned_blocks, select_blocks
from sparda_jax.shapes import NO_BLOCK
from sparda_jax.testing import tiny_model

NAMES = selectors.names()
TOKENS, SHORT = 64, 50
PLAIN = SparseConfig(
    block_size=8, pool_size=4, pool_stride=2, local_blocks=1, selected_blocks=5, dense_below=0
)
WITH_SHARE = SparseConfig(
    block_size=8,
    pool_size=4,
    pool_stride=2,
    local_blocks=1,
    selected_blocks=5,
    query_blocks=2,
    dense_below=0,
)
every = pytest.mark.parametrize("name", NAMES)


@functools.cache
def model_for(name):
    """Make a model that the selector can rank for."""
    if name != "nosa":
        return tiny_model(layers=2, sparse=PLAIN)
    model = tiny_model(layers=2, sparse=WITH_SHARE, token_importance=True)
    for layer in model.layers:
        layer.attention.importance_scale[...] = jnp.array([0.9, -0.7])
    return model


@functools.cache
def program(name):
    return jax.jit(functools.partial(forward, mode="sparse", selector=name, return_choices=True))


FULL = jnp.array([TOKENS, TOKENS])


def tokens_for(name):
    return jax.random.randint(jax.random.key(len(name)), (2, TOKENS), 0, 64)


@functools.cache
def ran(name):
    """Run both rows at their full length, watching layer by layer."""
    seen = {}

    def observe(what, layer, value):
        seen[what, layer] = value

    def run(model, tokens):
        _, ids = forward(
            model,
            tokens,
            mode="sparse",
            selector=name,
            return_choices=True,
            observe=observe,
        )
        return ids, {key: seen[key] for key in seen if key[0] in ("probe", "cache")}

    ids, watched = jax.jit(run)(model_for(name), tokens_for(name))
    return np.asarray(ids), watched


@every
def test_it_is_hashable_equal_to_its_twin_and_fits_the_protocol(name):
    config = model_for(name).config
    one, other = selectors.get(name, config), selectors.get(name, config)
    assert one == other
    assert hash(one) == hash(other)
    assert isinstance(one, selectors.Selector)


@every
def test_it_asks_the_layer_itself_or_the_one_before(name):
    selector = selectors.get(name, model_for(name).config)
    layers = [selector.source(layer).probe_layer for layer in range(4)]
    assert layers in ([0, 1, 2, 3], [0, 0, 1, 2])


@every
def test_its_scores_are_finite_also_before_the_first_window(name):
    model = model_for(name)
    selector = selectors.get(name, model.config)
    _, watched = ran(name)

    @jax.jit
    def score(probe, summary):
        positions = jnp.tile(jnp.arange(TOKENS)[None], (2, 1))
        lengths = jnp.array([TOKENS, TOKENS])
        return selector.score_blocks(probe, summary, positions, lengths, PLAIN.blocks(TOKENS))

    for layer in range(2):
        scores = score(watched["probe", layer], watched["cache", layer].summary)
        assert scores.shape == (2, TOKENS, 2, 8)
        assert scores.dtype == jnp.float32
        assert np.isfinite(scores).all()


@every
def test_every_choice_is_causal_full_and_holds_the_pinned_blocks(name):
    ids, _ = ran(name)
    positions = jnp.arange(TOKENS)[None]
    pinned = np.asarray(pinned_blocks(positions, 8, PLAIN))[0]
    for t in range(TOKENS):
        rows = ids[:, :, t].reshape(-1, ids.shape[-1])
        for row in rows:
            real = row[row != NO_BLOCK]
            assert len(real) == min(t // 8 + 1, 5)
            assert set(np.flatnonzero(pinned[t])) <= set(real) <= set(range(t // 8 + 1))


@every
def test_tokens_after_a_query_never_change_its_choice(name):
    tokens = tokens_for(name)
    want, _ = ran(name)
    other = tokens.at[:, 51:].set((tokens[:, 51:] + 17) % 64)
    _, got = program(name)(model_for(name), other, lengths=FULL)
    np.testing.assert_array_equal(np.asarray(got)[:, :, :51], want[:, :, :51])


@every
def test_two_programs_choose_the_same(name):
    _, got = program(name)(model_for(name), tokens_for(name), lengths=FULL)
    np.testing.assert_array_equal(got, ran(name)[0])


@every
def test_a_ragged_batch_chooses_what_each_row_chooses_alone(name):
    model, tokens = model_for(name), tokens_for(name)
    _, ids = program(name)(model, tokens, lengths=jnp.array([SHORT, TOKENS]))
    _, alone = program(name)(model, tokens[:1, :SHORT])
    width = alone.shape[-1]
    np.testing.assert_array_equal(ids[:, 0, :SHORT, :, :width], alone[:, 0])
    assert (np.asarray(ids)[:, 0, :SHORT, :, width:] == NO_BLOCK).all()
    assert (np.asarray(ids)[:, 0, SHORT:] == NO_BLOCK).all()
    np.testing.assert_array_equal(ids[:, 1], ran(name)[0][:, 1])


@every
def test_a_summary_extended_in_pieces_is_the_summary_made_at_once(name):
    config = model_for(name).config
    selector = selectors.get(name, config)
    _, watched = ran(name)
    cache = watched["cache", 1]
    extend = jax.jit(selector.extend_summary)
    for cuts in ([7, 1, 24, 32], [1] * 9 + [55], [64]):
        summary = selector.init_summary(2, TOKENS, "float32")
        start = 0
        for size in cuts:
            part = slice(start, start + size)
            positions = jnp.tile(jnp.arange(start, start + size)[None], (2, 1))
            importance = None if cache.importance is None else cache.importance[:, part]
            summary = extend(summary, cache.k[:, part], positions, importance)
            start += size
        jax.tree.map(np.testing.assert_array_equal, summary, cache.summary)


@every
def test_one_step_of_decode_chooses_what_prefill_chooses(name):
    config = model_for(name).config
    selector = selectors.get(name, config)
    ids, watched = ran(name)

    @jax.jit
    def step(probe, cache, t):
        held = jnp.arange(TOKENS)[None] <= t
        positions = jnp.tile(jnp.where(held, jnp.arange(TOKENS)[None], -1), (2, 1))
        summary = selector.extend_summary(
            selector.init_summary(2, TOKENS, "float32"), cache.k, positions, cache.importance
        )
        probe = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, t, 1, 1), probe)
        at = jnp.full((2, 1), t)
        scores = selector.score_blocks(probe, summary, at, at[:, 0] + 1, 8)
        return select_blocks(scores, at, config.sparse).ids[:, 0]

    for layer in (0, 1):
        for t in (0, 3, 31, 47, 48, 62, 63):
            got = step(watched["probe", layer], watched["cache", layer], t)
            np.testing.assert_array_equal(got, ids[layer, :, t])
