# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The four ways to attend against loops, against one another, and where nothing is visible."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparda_jax.attention import (
    Attention,
    attend_chosen,
    attend_dense,
    attend_fused,
    attend_masked,
    attend_records,
    block_bias,
    block_records,
    map_tiles,
)
from sparda_jax.config import SparseConfig
from sparda_jax.layers import ForecastParam
from sparda_jax.rope import make_rope
from sparda_jax.selection import block_mask
from sparda_jax.testing import (
    assert_close_bfloat16,
    assert_close_float32,
    assert_within_reference_rounding,
    tiny_config,
)
from tests import oracles

BATCH, TOKENS, HEADS, KV, DIM, W = 2, 23, 4, 2, 8, 8
BLOCKS = 3


def inputs(key, dtype="float32", heads=HEADS, kv=KV):
    """Draw q, k, v, a bias, and 2 of 3 distinct blocks for each query."""
    keys = jax.random.split(key, 5)
    shapes = [(BATCH, TOKENS, n, DIM) for n in (heads, kv, kv)]
    q, k, v = (jax.random.normal(*a, dtype) for a in zip(keys[:3], shapes, strict=True))
    bias = jax.random.normal(keys[3], (BATCH, TOKENS, kv))
    order = jax.random.uniform(keys[4], (BATCH, TOKENS, kv, BLOCKS))
    ids = jnp.sort(jnp.argsort(order, axis=-1)[..., :2].astype(jnp.int32), axis=-1)
    return q, k, v, bias, ids


def at_all(lengths=(TOKENS, 9)):
    at = jnp.arange(TOKENS)[None]
    return jnp.where(at < jnp.array(lengths)[:, None], at, -1)


def by_loops(q, k, v, ids, positions, bias=None):
    rows = []
    for row in range(q.shape[0]):
        parts = (np.asarray(x, np.float64)[row] for x in (q, k, v))
        own = None if bias is None else np.asarray(bias, np.float64)[row]
        rows.append(
            oracles.attend(*parts, np.asarray(ids)[row], np.asarray(positions)[row], W, own)
        )
    return np.stack(rows)


@functools.partial(jax.jit, static_argnames=("way", "tile"))
def attend(way, q, k, v, ids, positions, bias=None, tile=64):
    """Attend to the blocks of `ids` in one of the four ways."""
    if way == "dense":
        return attend_dense(q, k, v, positions, bias, tile_q=tile, tile_kv=tile)
    if way == "chosen":
        return attend_chosen(q, k, v, ids, positions, bias, block_size=W, tile_q=tile)
    marked = None if ids is None else block_mask(ids, BLOCKS)
    if way == "fused":
        return attend_fused(q, k, v, marked, block_size=W, implementation="xla")
    return attend_masked(q, k, v, marked, positions, bias, block_size=W, tile_q=tile)


def every_block(kv=KV):
    ids = jnp.arange(BLOCKS, dtype=jnp.int32)[None, None, None]
    return jnp.broadcast_to(ids, (BATCH, TOKENS, kv, BLOCKS))


@pytest.mark.parametrize(("tile", "with_bias"), [(5, True), (16, False), (64, True)])
@pytest.mark.parametrize("way", ["dense", "chosen", "masked"])
def test_attention_is_a_softmax_over_the_past_tokens_of_the_blocks(key, way, tile, with_bias):
    q, k, v, bias, ids = inputs(key)
    bias = bias if with_bias else None
    got = attend(way, q, k, v, ids, at_all(), bias, tile)
    read = every_block() if way == "dense" else ids
    assert_close_float32(got, by_loops(q, k, v, read, at_all(), bias))


@pytest.mark.parametrize(
    ("heads", "kv"), [(4, 4), (16, 1), (1, 1)], ids=["G=1", "G=16", "one head"]
)
@pytest.mark.parametrize("way", ["dense", "chosen", "masked"])
def test_every_way_reads_all_blocks_alike_for_any_group(key, way, heads, kv):
    q, k, v, bias, _ = inputs(key, heads=heads, kv=kv)
    got = attend(way, q, k, v, every_block(kv), at_all(), bias)
    assert_close_float32(got, by_loops(q, k, v, every_block(kv), at_all(), bias))


def test_a_mask_of_nothing_at_all_means_every_block(key):
    q, k, v, bias, _ = inputs(key)
    want = attend("masked", q, k, v, every_block(), at_all(), bias)
    assert_close_float32(attend("masked", q, k, v, None, at_all(), bias), want)


@pytest.mark.parametrize("which", ["chosen", "all"])
@pytest.mark.parametrize(("heads", "kv"), [(4, 2), (4, 4), (6, 1)])
def test_the_fused_way_gives_whole_rows_what_the_mask_gives_them(key, heads, kv, which):
    q, k, v, _, ids = inputs(key, heads=heads, kv=kv)
    own = jnp.broadcast_to((jnp.arange(TOKENS) // W)[None, :, None], ids.shape[:3])
    ids = None if which == "all" else ids.at[..., 0].set(own)
    positions = at_all((TOKENS, TOKENS))
    got = attend("fused", q, k, v, ids, positions)
    assert_close_float32(got, attend("masked", q, k, v, ids, positions))


@pytest.mark.parametrize("way", ["dense", "chosen", "masked"])
def test_rows_of_padding_and_rows_without_blocks_are_zero(key, way):
    q, k, v, _, ids = inputs(key)
    ids = ids.at[:, 5].set(-1)
    got = np.asarray(attend(way, q, k, v, ids, at_all((TOKENS, 0))))
    assert not got[1].any()
    assert (way == "dense") == bool(got[0, 5].any())


@pytest.mark.parametrize("way", ["chosen", "masked"])
def test_a_row_whose_blocks_all_lie_ahead_is_zero(key, way):
    q, k, v, _, ids = inputs(key)
    got = np.asarray(attend(way, q, k, v, jnp.full_like(ids, 2), at_all()))
    assert not got[:, : 2 * W].any()
    assert got[0, 2 * W :].any()


@pytest.mark.parametrize("way", ["dense", "chosen", "masked"])
def test_keys_after_a_query_change_nothing(key, way):
    q, k, v, bias, ids = inputs(key)
    want = attend(way, q, k, v, ids, at_all(), bias)
    changed = [x.at[:, 10:].set(1e4) for x in (k, v, bias)]
    got = attend(way, q, *changed[:2], ids, at_all(), changed[2])
    np.testing.assert_array_equal(got[:, :10], want[:, :10])


@pytest.mark.parametrize("way", ["dense", "chosen", "masked"])
def test_permuting_the_batch_permutes_the_result(key, way):
    q, k, v, bias, ids = inputs(key)
    want = attend(way, q, k, v, ids, at_all(), bias)[::-1]
    swapped = (x[::-1] for x in (q, k, v, ids, at_all(), bias))
    np.testing.assert_array_equal(attend(way, *swapped), want)


def test_the_bias_equals_two_attentions_to_weighted_values(key):
    """Σ e^s e^b v / Σ e^s e^b: attend to v·e^b and to e^b without a bias, and divide."""
    q, k, v, bias, ids = inputs(key)
    weight = jnp.exp(bias)[..., None]
    above = attend("chosen", q, k, v * weight, ids, at_all())
    below = attend("chosen", q, k, jnp.broadcast_to(weight, v.shape), ids, at_all())
    seen = np.asarray(below) > 0
    ratio = np.where(seen, above / np.where(seen, below, 1), 0.0)
    assert_close_float32(attend("chosen", q, k, v, ids, at_all(), bias), ratio)


@pytest.mark.parametrize("way", ["dense", "chosen", "masked"])
def test_bfloat16_rounds_no_more_than_a_plain_program_in_bfloat16(key, way):
    q, k, v, bias, _ = inputs(key, "bfloat16")
    ids, positions = every_block(), at_all((TOKENS, TOKENS))
    got = attend(way, q, k, v, ids, positions, bias)
    assert got.dtype == jnp.bfloat16
    exact = by_loops(q, k, v, ids, positions, bias)
    logits = jnp.einsum(
        "btkgh,bskh->bkgts",
        q.reshape(BATCH, TOKENS, KV, 2, DIM),
        k,
        preferred_element_type=jnp.float32,
    )
    logits = logits * DIM**-0.5 + bias.transpose(0, 2, 1)[:, :, None, None]
    causal = jnp.tril(jnp.ones((TOKENS, TOKENS), bool))[None, None, None]
    probs = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf)).astype(jnp.bfloat16)
    plain = jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(got.shape)
    assert_within_reference_rounding(got, plain, exact)
    assert_close_bfloat16(got, exact)


def test_gradients_under_a_mask_are_those_of_a_plain_softmax(key):
    q, k, v, bias, ids = inputs(key)
    marked = block_mask(ids, BLOCKS).at[:, :, :, 0].set(True)
    positions = at_all((TOKENS, TOKENS))

    def ours(q, k, v, bias):
        out = attend_masked(q, k, v, marked, positions, bias, block_size=W, tile_q=7)
        return jnp.sum(jnp.sin(out))

    def plain(q, k, v, bias):
        grouped = q.reshape(BATCH, TOKENS, KV, 2, DIM)
        logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k) * DIM**-0.5
        logits = logits + bias.transpose(0, 2, 1)[:, :, None, None]
        tokens = jnp.repeat(marked, W, axis=-1)[..., :TOKENS].transpose(0, 2, 1, 3)[:, :, None]
        causal = jnp.tril(jnp.ones((TOKENS, TOKENS), bool))[None, None, None]
        probs = jax.nn.softmax(jnp.where(causal & tokens, logits, -jnp.inf))
        return jnp.sum(jnp.sin(jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(q.shape)))

    argnums = (0, 1, 2, 3)
    got = jax.jit(jax.grad(ours, argnums))(q, k, v, bias)
    for a, b in zip(got, jax.jit(jax.grad(plain, argnums))(q, k, v, bias), strict=True):
        assert_close_float32(a, b)


def test_gradients_are_finite_where_a_row_sees_nothing(key):
    q, k, v, bias, _ = inputs(key)
    marked = jnp.zeros((BATCH, TOKENS, KV, BLOCKS), bool).at[:, :, 0, 1].set(True)

    def loss(*args):
        return jnp.sum(attend_masked(*args[:3], marked, at_all(), args[3], block_size=W))

    grads = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, bias)
    assert all(np.isfinite(g).all() for g in grads)
    assert float(jnp.abs(grads[2][:, W : 2 * W, 0]).sum()) > 0
    assert not np.asarray(grads[2][:, :, 1]).any()


def test_records_hold_the_keys_and_values_of_each_block(key):
    _, k, v, bias, _ = inputs(key)
    records = np.asarray(block_records(k, v, W))
    assert records.shape == (BATCH, KV, BLOCKS, 2, W, DIM)
    cut = np.asarray(block_bias(bias, W))
    for b, head, s in np.ndindex(BATCH, KV, TOKENS):
        np.testing.assert_array_equal(records[b, head, s // W, 0, s % W], k[b, s, head])
        np.testing.assert_array_equal(records[b, head, s // W, 1, s % W], v[b, s, head])
        assert cut[b, head, s // W, s % W] == bias[b, s, head]
    assert not records[:, :, -1, :, TOKENS % W :].any()


def test_records_may_lie_in_slots_in_any_order(key):
    q, k, v, bias, ids = inputs(key)
    records, cut = block_records(k, v, W), block_bias(bias, W)
    want = attend_records(q, records, ids, ids, at_all(), cut)
    order = jnp.array([2, 0, 1])  # slot r holds block order[r]
    slots = jnp.argsort(order).astype(jnp.int32)[ids]
    got = attend_records(q, records[:, :, order], slots, ids, at_all(), cut)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 20])
def test_tiles_are_joined_in_order_and_padding_is_dropped(count):
    x = jnp.arange(2 * count, dtype=jnp.int32).reshape(2, count)
    seen = []

    def double(part):
        seen.append(part[0].shape)
        return {"twice": part[0] * 2, "sum": part[0][..., None] + part[1]}

    got = map_tiles(double, (x, jnp.ones((2, count, 3), jnp.int32)), 8, (-1, -1))
    np.testing.assert_array_equal(got["twice"], x * 2)
    np.testing.assert_array_equal(got["sum"], np.repeat(x[..., None] + 1, 3, axis=-1))
    assert seen == [(2, min(count, 8))]


def test_a_layer_has_the_heads_that_somebody_reads():
    config = tiny_config()
    layers = [Attention(config, layer, rngs=nnx.Rngs(0)) for layer in range(3)]
    assert [layer.forecast_proj is not None for layer in layers] == [True, True, False]
    assert [layer.entry_forecast_proj is not None for layer in layers] == [True, False, False]
    assert all(layer.importance_proj is None for layer in layers)
    assert layers[0].importance(jnp.zeros((1, 1, 2, 8))) is None
    assert isinstance(layers[0].forecast_proj, ForecastParam)


def test_a_layer_projects_rotates_and_weighs_tokens(key):
    sparse = SparseConfig(
        block_size=8, pool_size=4, pool_stride=2, local_blocks=1, selected_blocks=5, query_blocks=2
    )
    config = tiny_config(token_importance=True, sparse=sparse)
    layer = Attention(config, 0, rngs=nnx.Rngs(0))
    layer.importance_scale[...] = jnp.array([0.9, -0.7])
    a = jax.random.normal(key, (1, 6, 32))
    rope = make_rope(config.rope, 8, jnp.arange(6)[None], jnp.array([6]))
    q, k, v = layer.project(a, rope)
    weights = {
        name: np.asarray(getattr(layer, name)[...], np.float64)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "importance_proj")
    }
    x = np.asarray(a, np.float64)[0]
    want_v = np.tensordot(x, weights["v_proj"], axes=1)
    for got, name in ((q, "q_proj"), (k, "k_proj")):
        want = oracles.rotate(np.tensordot(x, weights[name], axes=1), range(6), 10000.0)
        assert_close_float32(got[0], want)
    assert_close_float32(v[0], want_v)
    raw = np.tensordot(want_v, weights["importance_proj"], axes=2)
    want = np.array([0.9, -0.7]) * oracles.softplus(raw)
    assert_close_float32(layer.importance(v)[0], want)
    assert_close_float32(layer.output(q)[0], np.tensordot(np.asarray(q)[0], weights["o_proj"], 2))


def test_importance_is_float32_and_finite_for_large_values():
    sparse = SparseConfig(query_blocks=24)
    config = tiny_config(token_importance=True, sparse=sparse, dtype="bfloat16")
    layer = Attention(config, 0, rngs=nnx.Rngs(0))
    layer.importance_scale[...] = jnp.ones((2,), jnp.bfloat16)
    got = layer.importance(jnp.full((1, 1, 2, 8), 1e4, jnp.bfloat16))
    assert got.dtype == jnp.float32
    assert np.isfinite(got).all()
