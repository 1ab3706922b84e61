# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Single functions against the PyTorch original: pooling, scores, choices, rotations, attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.attention import attend_chosen, attend_masked
from sparda_jax.config import ModelConfig, RopeConfig, SparseConfig
from sparda_jax.pooling import (
    LOWEST,
    PooledSummary,
    extend_pooled,
    init_pooled,
    pool_keys,
    pool_scores,
    pooled_count,
)
from sparda_jax.rope import base_frequencies, make_rope
from sparda_jax.selection import block_mask, pinned_blocks, select_blocks
from sparda_jax.selectors import ForecastSelector, NosaSelector, QuerySelector
from sparda_jax.selectors.query import score_by_queries, visible_cells
from sparda_jax.shapes import NO_BLOCK, pooled_in
from sparda_jax.testing import assert_close_float32
from sparda_jax.training.layer import GivenScores
from tests.sparda_jax.golden_models import GOLDEN

pytestmark = pytest.mark.parity


def stored(name):
    """Read one golden file of functions."""
    with np.load(GOLDEN / "functions" / f"{name}.npz") as arrays:
        return dict(arrays)


def cases(name):
    return sorted({key.split(".")[0] for key in stored(name) if key.endswith(".setting")})


def model_config(sparse, **changes):
    """Make the configuration of a model that is never built: 4 heads in 2 groups."""
    fields = {"vocab_size": 8, "width": 8, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 16}
    return ModelConfig(**fields, mlp_width=8, sparse=sparse, **changes)


@pytest.mark.parametrize("grid", [(32, 16), (2, 1), (128, 64), (16, 8), (8, 4), (4, 2)])
def test_a_sequence_has_as_many_pooled_keys_as_in_the_original(grid):
    size, stride = grid
    want, lengths = (
        stored("pooled_keys")[f"count_{size}_{stride}"],
        stored("pooled_keys")["lengths"],
    )
    sparse = SparseConfig(block_size=128, pool_size=size, pool_stride=stride)
    assert [pooled_in(int(n), size, stride) for n in lengths] == want.tolist()
    got = pooled_count(jnp.asarray(lengths, jnp.int32), sparse)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("grid", [(32, 16), (2, 1)])
def test_keys_of_a_packed_batch_are_pooled_as_in_the_original(grid):
    size, stride = grid
    want = stored("pooled_keys")
    lengths = want["packed_lengths"].astype(np.int32)
    ends = np.cumsum(lengths)
    bounds = want[f"packed_pooled_cu_{size}_{stride}"]
    sparse = SparseConfig(pool_size=size, pool_stride=stride)
    rows = np.zeros((len(lengths), max(lengths), 2, 8), np.float32)
    for row, end, length in zip(rows, ends, lengths, strict=True):
        row[:length] = want["packed_keys"][end - length : end]
    at = np.arange(max(lengths))[None, :]
    positions = jnp.asarray(np.where(at < lengths[:, None], at, -1))
    summary = init_pooled(len(lengths), int(max(lengths)), 2, 8, sparse, "float32")
    extend = jax.jit(extend_pooled, static_argnames="sparse")
    summary = extend(summary, jnp.asarray(rows), positions, sparse)
    everything = jax.jit(pool_keys, static_argnums=(1, 2))(jnp.asarray(rows), size, stride)
    for row in range(len(lengths)):
        golden = want[f"packed_pooled_{size}_{stride}"][bounds[row] : bounds[row + 1]]
        alone = everything[row, : len(golden)]
        np.testing.assert_allclose(alone, golden, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(summary.pooled[row, : len(golden)], alone)
        assert not np.asarray(summary.pooled[row, len(golden) :]).any()


@pytest.mark.parametrize("tokens", [31, 32, 46, 47, 48, 63, 64, 79, 100])
def test_a_query_sees_as_many_pooled_keys_as_in_the_original(tokens):
    want = stored("scores")
    sparse, count = SparseConfig(), pooled_in(tokens, 32, 16)
    positions, lengths = jnp.arange(tokens)[None], jnp.array([tokens])
    query = QuerySelector(model_config(sparse), parity="reference")
    # Blocks as long as a stride: n > 0 visible cells give scores to blocks 0 … n.
    narrow = SparseConfig(block_size=16, local_blocks=0, selected_blocks=4)
    forecast = ForecastSelector(model_config(narrow), parity="reference")

    @jax.jit
    def compute(positions, lengths):
        summary = PooledSummary(pooled=jnp.ones((1, count, 2, 16)), tail=jnp.zeros((1, 32, 2, 16)))
        probe = jnp.ones((1, tokens, 2, 16))
        scores = forecast.score_blocks(probe, summary, positions, lengths, count + 1)
        return (
            query.visible(positions, lengths, count).sum(axis=-1)[0],
            visible_cells(positions, count, sparse).sum(axis=-1)[0],
            (scores > LOWEST).sum(axis=-1)[0],
        )

    seen, correct, scored = map(np.asarray, compute(positions, lengths))
    golden = np.maximum(want[f"n_visible_ownquery_L{tokens}"], 0)
    np.testing.assert_array_equal(seen, golden)
    if tokens % 16 == 15:
        assert (correct > seen).any() == (tokens >= 47), "a window is lost where 15 are left over"
    else:
        np.testing.assert_array_equal(correct, seen)

    golden = want[f"n_visible_forecast_L{tokens}"]
    np.testing.assert_array_equal(
        scored, np.repeat(np.where(golden, golden + 1, 0), 2).reshape(-1, 2)
    )


def test_own_query_scores_are_the_originals():
    want = stored("scores")
    tokens = int(want["L"])
    k = jnp.asarray(want["k"])[None]
    pooled = pool_keys(k, 32, 16)
    np.testing.assert_allclose(pooled[0], want["pooled"], rtol=0, atol=1e-6)
    visible = visible_cells(jnp.arange(tokens)[None], pooled.shape[1], SparseConfig())
    got = score_by_queries(jnp.asarray(want["q"])[None], pooled, visible)[0].transpose(1, 0, 2)
    assert_close_float32(got, want["own_query_scores"])
    total = np.asarray(got).sum(-1)
    np.testing.assert_allclose(total[:, 31:], 2.0, rtol=0, atol=1e-6)
    assert not total[:, :31].any()
    last = score_by_queries(jnp.asarray(want["q"])[None, -1:], pooled, visible[:, -1:])[0]
    assert_close_float32(last.transpose(1, 0, 2), want["own_query_scores_decode"])


@pytest.mark.parametrize("case", cases("block_selection"))
def test_block_scores_and_choices_are_the_originals(case):
    want = stored("block_selection")
    tokens, cached, local, sink, selected, stride = (int(x) for x in want[f"{case}.setting"])
    sparse = SparseConfig(
        pool_stride=stride,
        local_blocks=local,
        sink_blocks=sink,
        selected_blocks=max(selected, sink + local + 1),
    )
    blocks = sparse.blocks(tokens + cached)
    positions = jnp.asarray(want[f"{case}.query_index"] + cached)[None]
    cells = jnp.asarray(want[f"{case}.scores"]).transpose(1, 0, 2)[None]  # [1 T K C]

    @jax.jit
    def compute(cells, positions):
        scores = pool_scores(jnp.maximum(cells, LOWEST), blocks, sparse.cells_per_block)
        leaking = select_blocks(scores, positions, sparse, parity="reference").ids
        correct = select_blocks(scores, positions, sparse).ids
        return scores, leaking, correct, pinned_blocks(positions, blocks, sparse)[0]

    scores, ids, correct, pinned = map(np.asarray, compute(cells, positions))
    golden = want[f"{case}.block_scores"]
    got = scores[0].transpose(1, 0, 2)
    future = np.arange(blocks)[None, :] > np.asarray(positions)[0, :, None] // 64
    for head in range(2):
        # The original pins sink blocks of the future too; nothing comes of it.
        assert np.isposinf(golden[head][pinned]).all()
        assert not np.isposinf(golden[head][~pinned & ~future]).any()
        free = ~pinned & np.isfinite(golden[head])
        np.testing.assert_array_equal(got[head][free], golden[head][free])
        assert (got[head][np.isneginf(golden[head])] == np.float32(LOWEST)).all()

    golden = want[f"{case}.block_ids"]
    np.testing.assert_array_equal(ids[0].transpose(1, 0, 2), golden)
    # Where no future block took a place in the original, the correct rule chooses the same.
    correct = correct[0].transpose(1, 0, 2)
    own = np.asarray(positions)[0] // 64
    full = (golden >= 0).sum(-1) == np.minimum(own + 1, golden.shape[-1])[None, :]
    assert full.any()
    np.testing.assert_array_equal(correct[full], golden[full])
    assert ((correct >= 0).sum(-1) >= (golden >= 0).sum(-1)).all()


@pytest.mark.parametrize("case", cases("nosa_selection"))
def test_the_two_step_choice_is_the_originals(case):
    want = stored("nosa_selection")
    tokens, cached, local, sink, query, selected = (int(x) for x in want[f"{case}.setting"])
    sparse = SparseConfig(
        local_blocks=local, sink_blocks=sink, query_blocks=query, selected_blocks=selected
    )
    length = tokens + cached
    config = model_config(sparse, token_importance=True)
    selector = NosaSelector(config, inner=GivenScores(config), parity="reference")
    importance = jnp.asarray(want[f"{case}.cis"])[None]
    positions = jnp.asarray(want[f"{case}.query_index"] + cached)[None]
    cells = jnp.maximum(jnp.asarray(want[f"{case}.scores"]).transpose(1, 0, 2)[None], LOWEST)

    @jax.jit
    def choose(importance, cells):
        summary = selector.extend_summary(
            selector.init_summary(1, length, "float32"),
            jnp.zeros((1, length, 2, 16)),
            jnp.arange(length)[None],
            importance,
        )
        blocks = sparse.blocks(length)
        probe = pool_scores(cells, blocks, sparse.cells_per_block)
        scores = selector.score_blocks(probe, summary, positions, jnp.array([length]), blocks)
        return select_blocks(scores, positions, sparse, parity="reference").ids

    ids = choose(importance, cells)
    np.testing.assert_array_equal(np.asarray(ids)[0].transpose(1, 0, 2), want[f"{case}.block_ids"])


@pytest.mark.parametrize("case", cases("rope_tables"))
def test_rotations_are_the_originals(case):
    want = stored("rope_tables")
    dim, maximum, original, requested = (int(x) for x in want[f"{case}.setting"])
    rope = RopeConfig(
        kind="longrope",
        max_positions=maximum,
        original_max_positions=original,
        short_factor=tuple(want[f"{case}.short_factor"].tolist()),
        long_factor=tuple(want[f"{case}.long_factor"].tolist()),
    )
    positions = jnp.asarray(want[f"{case}.positions"], jnp.int32)[None]
    assert rope.attention_factor == pytest.approx(want[f"{case}.attention_factor"], abs=1e-12)
    # The original builds its first table for `maximum` positions, whatever the request.
    got = make_rope(rope, dim, positions, jnp.array([max(requested, maximum)]))
    # Angles of up to 131072 radians, bit for bit; what is left is the rounding of a cosine.
    np.testing.assert_allclose(got.cos[0], want[f"{case}.cos"], rtol=0, atol=2.5e-7)
    np.testing.assert_allclose(got.sin[0], want[f"{case}.sin"], rtol=0, atol=2.5e-7)
    short = make_rope(rope, dim, positions, jnp.array([original]))
    differs = rope.short_factor != rope.long_factor
    assert (np.abs(short.cos - got.cos).max() > 0.1) == (
        differs and max(requested, maximum) > original
    )


def test_yarn_frequencies_are_the_originals():
    want = stored("rope_tables")
    rope = RopeConfig(kind="yarn", factor=4.0, original_max_positions=32768)
    np.testing.assert_array_equal(base_frequencies(rope, 128), want["nosa_yarn4.inv_freq"])
    assert rope.attention_factor == pytest.approx(want["nosa_yarn4.attention_factor"], abs=1e-12)


def test_attention_to_chosen_blocks_is_the_originals():
    want = stored("block_sparse_attention")
    q, k, v = (jnp.asarray(want[name])[None] for name in "qkv")
    ids = want["block_ids"].transpose(1, 0, 2)[None].astype(np.int32)
    positions = jnp.arange(q.shape[1])[None]
    empty = (ids < 0).all(axis=-1)
    assert empty.any()
    repeats = (ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] >= 0)
    assert repeats.any()
    masked = attend_masked(
        q, k, v, block_mask(jnp.asarray(ids), 4), positions, block_size=64, tile_q=96
    )
    assert_close_float32(masked[0], want["out"])
    once = ids.copy()
    once[..., 1:][repeats] = NO_BLOCK
    chosen = attend_chosen(q, k, v, jnp.asarray(once), positions, block_size=64, tile_q=48)
    assert_close_float32(chosen[0], want["out"])
    rows = np.repeat(empty[0], 2, axis=-1)
    assert not np.asarray(chosen)[0][rows].any()
    assert not np.asarray(masked)[0][rows].any()
