# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Chunked prefill: any cut of the prompts gives what one pass gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.chunk import make_plan
from sparda_jax.config import SparseConfig
from sparda_jax.parts import cut
from sparda_jax.pooling import pooled_count
from sparda_jax.prefill import _chunk_program, chunk_tokens, prefill
from sparda_jax.testing import assert_close_float32, tiny_config, tiny_model
from tests.compiled import forward

LENGTHS = np.array([61, 8, 1, 39], np.int32)
CAPACITY = 96
NOSA = {
    "token_importance": True,
    "sparse": dataclasses.replace(tiny_config().sparse, query_blocks=2),
}
CASES = [
    pytest.param("sparda", {}, id="sparda"),
    pytest.param("sparse", NOSA, id="nosa"),
    pytest.param("dense", {}, id="dense"),
]


@functools.cache
def model_of(name):
    model = tiny_model(layers=2, **(NOSA if name == "sparse" else {}))
    for layer in model.layers:
        if layer.attention.importance_scale is not None:
            layer.attention.importance_scale[...] = jnp.array([0.9, -0.7])
    return model


@functools.cache
def prompts():
    tokens = np.random.default_rng(0).integers(0, 64, (len(LENGTHS), CAPACITY))
    return np.where(np.arange(CAPACITY) < LENGTHS[:, None], tokens, 0).astype(np.int32)


@functools.cache
def filled(mode, chunk, capacity=CAPACITY):
    model = model_of(mode)
    layout, parts = cut(model)
    plan = make_plan(model.config, mode, max_length=capacity)
    padded = -(-int(LENGTHS.max()) // chunk) * chunk
    seen = []
    done = prefill(
        layout,
        parts,
        plan,
        prompts()[:, :padded],
        LENGTHS,
        LENGTHS,
        capacity=capacity,
        chunk=chunk,
        on_records=lambda *told: seen.append(told),
    )
    return done, seen


@pytest.mark.parametrize("chunk", [8, 32])
@pytest.mark.parametrize(("mode", "changes"), CASES)
def test_chunks_give_what_one_pass_gives(mode, changes, chunk):
    done, _ = filled(mode, chunk)
    whole, _ = filled(mode, CAPACITY)
    assert_close_float32(done.logits, whole.logits)
    jax.tree.map(np.testing.assert_array_equal, done.chosen, whole.chosen)
    held = np.arange(CAPACITY) < LENGTHS[:, None]
    for cache, want in zip(done.caches, whole.caches, strict=True):
        assert_close_float32(np.asarray(cache.k)[held], np.asarray(want.k)[held])
        assert_close_float32(np.asarray(cache.v)[held], np.asarray(want.v)[held])
        if mode == "dense":
            assert cache.summary is None
            continue
        pooled, reference = (getattr(c.summary, "inner", c.summary) for c in (cache, want))
        count = np.asarray(pooled_count(jnp.array(LENGTHS), tiny_config().sparse))
        for row, windows in enumerate(count):
            assert_close_float32(pooled.pooled[row, :windows], reference.pooled[row, :windows])


@pytest.mark.parametrize(("mode", "changes"), CASES)
def test_the_last_logits_and_choices_are_those_of_forward(mode, changes):
    done, _ = filled(mode, 8)
    logits, ids = forward(
        model_of(mode),
        jnp.array(prompts()[:, :64]),
        lengths=jnp.array(LENGTHS),
        mode=mode,
        logits="last",
        return_choices=True,
    )
    assert_close_float32(done.logits, logits[:, 0])
    for layer, chosen in enumerate(done.chosen):
        want = [ids[layer, row, length - 1] for row, length in enumerate(LENGTHS)]
        np.testing.assert_array_equal(chosen, np.stack(want))


def test_records_arrive_chunk_by_chunk_and_hold_the_prompt():
    done, seen = filled("sparda", 32)
    assert [(layer, block) for layer, block, _ in seen] == [(0, 0), (1, 0), (0, 4), (1, 4)]
    for layer, block, records in seen:
        for row, length in enumerate(LENGTHS):
            tokens = np.arange(block * 8, min(block * 8 + 32, length))
            got = records[row].transpose(1, 3, 2, 0, 4)  # [m W 2 K H]
            got = got.reshape(32, 2, 2, 8)[: len(tokens)]
            cache = done.caches[layer]
            np.testing.assert_array_equal(got[:, 0], np.asarray(cache.k)[row, tokens])
            np.testing.assert_array_equal(got[:, 1], np.asarray(cache.v)[row, tokens])


def test_prompts_of_other_lengths_use_the_same_program():
    model = model_of("sparda")
    layout, parts = cut(model)
    plan = make_plan(model.config, "sparda", max_length=CAPACITY)
    program = _chunk_program(layout, plan)
    filled("sparda", 8)
    before = program._cache_size()
    for lengths in ([3, 20, 17, 61], [40, 1, 8, 9]):
        sizes = np.array(lengths, np.int32)
        room = -(-max(lengths) // 8) * 8
        prefill(layout, parts, plan, prompts()[:, :room], sizes, sizes, capacity=CAPACITY, chunk=8)
    assert program._cache_size() == before


def test_short_prompts_attend_to_everything():
    sparse = dataclasses.replace(tiny_config().sparse, dense_below=64)
    model = tiny_model(layers=2, sparse=sparse)
    layout, parts = cut(model)
    plan = make_plan(model.config, "sparda", max_length=CAPACITY, shortest=1)
    done = prefill(
        layout, parts, plan, prompts()[:, :64], LENGTHS, LENGTHS, capacity=CAPACITY, chunk=32
    )
    tokens, lengths = jnp.array(prompts()[:, :64]), jnp.array(LENGTHS)
    want = forward(model, tokens, lengths=lengths, mode="dense", logits="last")
    assert_close_float32(done.logits, want[:, 0])


@pytest.mark.parametrize("chunk", [0, 4, 20])
def test_a_chunk_is_a_whole_number_of_blocks(chunk):
    with pytest.raises(ValueError, match=f"chunk={chunk} must be .* multiple of block_size=8"):
        chunk_tokens(100, chunk, 8)


def test_chunks_hold_short_prompts_and_cap_long_ones():
    sparse = SparseConfig(block_size=8, pool_stride=8, pool_size=8, local_blocks=1)
    sizes = [chunk_tokens(tokens, 48, sparse.block_size) for tokens in (1, 8, 9, 33, 48, 1000)]
    assert sizes == [8, 8, 16, 48, 48, 48]
