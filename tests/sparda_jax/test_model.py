# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The whole decoder: against loops, over batches, modes and dtypes, and at its full size."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparda_jax.chunk import init_cache, make_plan, targets_of
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.layers import ForecastParam
from sparda_jax.model import SpardaLM, forward
from sparda_jax.selectors import RandomSelector
from sparda_jax.shapes import NO_BLOCK
from sparda_jax.testing import (
    assert_close_float32,
    assert_same_choices,
    assert_within_reference_rounding,
    tiny_config,
    tiny_model,
)
from tests import oracles

TOKENS = 64
BLOCKS = 8
GRID = {"block_size": 8, "pool_size": 4, "pool_stride": 2, "local_blocks": 1, "dense_below": 0}


def rule(selected=5, **changes):
    return SparseConfig(**(GRID | {"selected_blocks": selected} | changes))


def muted(**changes):
    """Make the fields of a MiniCPM-like model: muP scalings."""
    fields = {"embed_scale": 3.0, "residual_scale": 0.7, "logit_divisor": 2.0, "sparse": rule()}
    return fields | changes


def weighing(**changes):
    """Make the fields of a NOSA-like model: token importance."""
    return {"token_importance": True, "sparse": rule(query_blocks=2)} | changes


KINDS = {"minicpm": muted, "nosa": weighing}
each_kind = pytest.mark.parametrize("kind", sorted(KINDS))
each_mode = pytest.mark.parametrize("mode", ["dense", "sparse", "sparda"])
each_sparse_mode = pytest.mark.parametrize("mode", ["sparse", "sparda"])


def make(kind, **changes):
    """Make a model of two layers, with token importance that matters."""
    model = tiny_model(**({"layers": 2} | KINDS[kind](**changes)))
    for layer in model.layers:
        if kind == "nosa":
            scale = layer.attention.importance_scale
            scale[...] = jnp.array([2.0, -1.5], scale[...].dtype)
    return model


model_of = functools.cache(make)
"""The model of a kind, made once; for tests that do not change it."""


@functools.partial(
    jax.jit, static_argnames=("mode", "attention", "parity", "logits", "selector", "remat")
)
def program(model, tokens, lengths, **options):
    return forward(model, tokens, lengths=lengths, return_choices=True, **options)


def run(model, tokens, lengths=(TOKENS, TOKENS), **options):
    """Run two rows, so that most tests share their programs: logits and ids, as NumPy."""
    out = program(model, tokens, jnp.array(lengths), **options)
    return jax.tree.map(np.asarray, out)


def prompt(rows=2, seed=0, tokens=TOKENS):
    return jax.random.randint(jax.random.key(seed), (rows, tokens), 0, 64)


def weights_of(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(p[...], np.float64) for path, p in flat}


@pytest.mark.parametrize(
    ("kind", "mode", "tied"),
    [(kind, mode, False) for kind in sorted(KINDS) for mode in ("dense", "sparse", "sparda")]
    + [("minicpm", "sparda", True)],
)
def test_the_decoder_is_the_one_written_in_loops(kind, mode, tied):
    model = make(kind, tie_embeddings=True) if tied else model_of(kind)
    logits, ids = run(model, prompt(), mode=mode)
    tokens = np.asarray(prompt())[1]
    want, chosen = oracles.decoder(weights_of(model), model.config, tokens, mode)
    np.testing.assert_allclose(logits[1], want, rtol=0, atol=2e-4 * np.abs(want).max())
    if mode == "dense":
        assert ids.shape == (2, 2, TOKENS, 2, 0)
        return
    padded = [[[oracles.padded(h, 5) for h in t] for t in layer] for layer in chosen]
    assert_same_choices(ids[:, 1], padded, share=0.0)
    assert any(h != list(range(5)) for layer in chosen for h in layer[-1])


@pytest.mark.parametrize(
    ("kind", "mode", "attention"),
    [
        ("minicpm", "sparse", "gather"),
        ("minicpm", "sparda", "gather"),
        ("minicpm", "sparda", "mask"),
        ("nosa", "sparse", "gather"),
        ("nosa", "sparda", "gather"),
    ],
)
def test_choosing_every_block_is_dense_attention(kind, mode, attention):
    all_of_them = make(kind, sparse=rule(BLOCKS, query_blocks=2 if kind == "nosa" else None))
    dense, _ = run(model_of(kind), prompt(), mode="dense")
    got, ids = run(all_of_them, prompt(), mode=mode, attention=attention)
    assert (ids[:, :, -1] == np.arange(BLOCKS)).all()
    assert_close_float32(got, dense)
    sparse, _ = run(model_of(kind), prompt(), mode=mode)
    assert np.max(np.abs(sparse - dense)) > 1e-3, "five of eight blocks are not dense"


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("minicpm", "dense"), ("minicpm", "sparse"), ("minicpm", "sparda"), ("nosa", "sparda")],
)
def test_gathering_and_masking_give_the_same_logits_and_choices(kind, mode):
    model, lengths = model_of(kind), (TOKENS, 41)
    got, got_ids = run(model, prompt(), lengths, mode=mode, attention="mask")
    want, want_ids = run(model, prompt(), lengths, mode=mode, attention="gather")
    np.testing.assert_array_equal(got_ids, want_ids)
    assert_close_float32(got[0], want[0])
    assert_close_float32(got[1, :41], want[1, :41])


@each_mode
@each_kind
def test_permuting_the_batch_permutes_logits_and_choices(kind, mode):
    model, tokens = model_of(kind), prompt()
    want, want_ids = run(model, tokens, (TOKENS, 30), mode=mode)
    got, got_ids = run(model, tokens[::-1], (30, TOKENS), mode=mode)
    np.testing.assert_array_equal(got_ids, want_ids[:, ::-1])
    np.testing.assert_array_equal(got, want[::-1])


@each_mode
@each_kind
def test_tokens_to_come_and_padding_change_nothing(kind, mode):
    model, tokens = model_of(kind), prompt()
    changed = tokens.at[:, 45:].set((tokens[:, 45:] + 11) % 64)
    want, want_ids = run(model, tokens, mode=mode)
    got, got_ids = run(model, changed, mode=mode)
    np.testing.assert_array_equal(got_ids[:, :, :45], want_ids[:, :, :45])
    assert_close_float32(got[:, :45], want[:, :45])
    cut, cut_ids = run(model, changed, (45, TOKENS), mode=mode)
    np.testing.assert_array_equal(cut_ids[:, 0, :45], want_ids[:, 0, :45])
    assert (cut_ids[:, 0, 45:] == NO_BLOCK).all()
    assert_close_float32(cut[0, :45], want[0, :45])


@each_sparse_mode
@each_kind
def test_the_last_query_of_a_prompt_chooses_as_it_would_inside_a_longer_one(kind, mode):
    model, tokens = model_of(kind), prompt()
    _, whole = run(model, tokens, mode=mode)
    for lengths in ((1, 15), (31, 47), (48, 63)):
        _, ids = run(model, tokens, lengths, mode=mode)
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(ids[:, row, length - 1], whole[:, row, length - 1])


@each_sparse_mode
@each_kind
def test_a_ragged_batch_chooses_what_each_row_chooses_alone(kind, mode):
    model, tokens = model_of(kind), prompt()
    _, together = run(model, tokens, (TOKENS, 50), mode=mode)
    _, alone = run(model, tokens[1:, :50], (50,), mode=mode)
    np.testing.assert_array_equal(together[:, 1, :50], alone[:, 0])


@each_sparse_mode
def test_an_early_query_reads_every_block_up_to_its_own(mode):
    _, ids = run(model_of("minicpm"), prompt(), mode=mode)
    for t in range(5 * 8):
        assert (ids[:, :, t] == oracles.padded(range(t // 8 + 1), 5)).all()


def test_longer_forecasts_choose_the_same_blocks():
    model, longer = model_of("minicpm"), make("minicpm")
    for layer in longer.layers:
        for name in ("forecast_proj", "entry_forecast_proj"):
            weight = getattr(layer.attention, name)
            if weight is not None:
                weight[...] = weight[...] * 64.0
    want, want_ids = run(model, prompt(), mode="sparda")
    got, got_ids = run(longer, prompt(), mode="sparda")
    np.testing.assert_array_equal(got_ids, want_ids)
    np.testing.assert_array_equal(got, want)


def test_a_larger_budget_reads_more_of_what_a_smaller_one_reads_in_the_first_layer():
    _, small = run(model_of("minicpm"), prompt(), mode="sparda")
    _, large = run(make("minicpm", sparse=rule(7)), prompt(), mode="sparda")
    for t in range(TOKENS):
        for head in range(2):
            a, b = (set(ids[0, 0, t, head]) - {NO_BLOCK} for ids in (small, large))
            assert a <= b
            assert len(b) == min(7, t // 8 + 1)


@each_kind
def test_sequences_below_dense_below_attend_densely(kind):
    query_blocks = 2 if kind == "nosa" else None
    model = make(kind, sparse=rule(dense_below=48, query_blocks=query_blocks))
    tokens, usual = prompt(), model_of(kind)
    for lengths in ((TOKENS, 47), (48, 47)):
        got, ids = run(model, tokens, lengths, mode="sparda")
        assert ids.shape[-1] == 6, "47 tokens have six blocks, more than the five of the budget"
        dense, _ = run(usual, tokens, lengths, mode="dense")
        sparse, sparse_ids = run(usual, tokens, lengths, mode="sparda")
        length = lengths[0]
        np.testing.assert_array_equal(ids[:, 0, ..., :5], sparse_ids[:, 0])
        assert (ids[:, 0, ..., 5] == NO_BLOCK).all()
        assert_close_float32(got[0, :length], sparse[0, :length])
        own = np.arange(47) // 8
        np.testing.assert_array_equal((ids[0, 1, :47] >= 0).sum(-1)[:, 0], own + 1)
        assert_close_float32(got[1, :47], dense[1, :47])


def test_a_batch_that_can_only_be_dense_makes_no_choice():
    model = make("minicpm", sparse=rule(dense_below=TOKENS + 1))
    got, ids = run(model, prompt(), mode="sparda")
    want, _ = run(model_of("minicpm"), prompt(), mode="dense")
    assert ids.shape[-1] == 0
    np.testing.assert_array_equal(got, want)


def test_parity_drops_the_bias_of_dense_attention_as_the_original_does():
    with_bias, _ = run(model_of("nosa"), prompt(), mode="dense")
    without, _ = run(model_of("nosa"), prompt(), mode="dense", parity="reference")
    assert (np.abs(with_bias - without)[:, 1:].max(-1) > 1e-4).all()
    np.testing.assert_allclose(with_bias[:, 0], without[:, 0], rtol=0, atol=1e-5)


@each_kind
def test_bfloat16_stays_within_its_own_rounding(kind):
    """Rounding every operation errs a few times as much as rounding the weights alone."""
    exact, rounded = model_of(kind), make(kind)
    rough = make(kind, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(nnx.state(rough))} == {jnp.dtype("bfloat16")}
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(exact))
    nnx.update(rough, halved)
    nnx.update(rounded, jax.tree.map(lambda x: x.astype(jnp.float32), halved))
    # Dense attention has no choice that could flip.
    (want, _), (once, _), (got, _) = (
        run(model, prompt(), mode="dense") for model in (exact, rounded, rough)
    )
    assert got.dtype == np.float32
    assert_within_reference_rounding(got, once, want, factor=4.0)
    _, ids = run(rough, prompt(), mode="sparda")
    _, exact_ids = run(rounded, prompt(), mode="sparda")
    assert_same_choices(ids[0], exact_ids[0], share=0.05)


@each_kind
def test_gradients_under_a_mask_are_finite_and_reach_the_backbone_only(kind):
    @jax.jit
    def gradient(model):
        def loss(model):
            lengths = jnp.array([TOKENS, 5])
            logits = forward(model, prompt(), lengths=lengths, mode="sparda", attention="mask")
            return jnp.mean(jax.nn.logsumexp(logits[:, :5], axis=-1))

        return jax.grad(loss)(model)

    grads = weights_of(gradient(model_of(kind)))
    assert all(np.isfinite(g).all() for g in grads.values())
    moved = {name for name, g in grads.items() if np.abs(g).max() > 0}
    assert moved == {name for name in grads if "forecast" not in name}


def test_recomputing_layers_changes_no_gradient():
    model, tokens = model_of("minicpm"), prompt()

    def loss(model, remat):
        logits = forward(model, tokens, mode="sparse", attention="mask", remat=remat)
        return jnp.mean(jnp.square(logits))

    kept, again = (
        weights_of(jax.jit(jax.grad(functools.partial(loss, remat=remat)))(model))
        for remat in (False, True)
    )
    for name, want in kept.items():
        assert_close_float32(again[name], want)


def test_logits_are_given_for_all_the_last_or_some_positions():
    model, tokens, lengths = model_of("minicpm"), prompt(), (TOKENS, 9)
    everywhere, _ = run(model, tokens, lengths, mode="dense")
    last, _ = run(model, tokens, lengths, mode="dense", logits="last")
    assert_close_float32(last[:, 0], np.stack([everywhere[0, -1], everywhere[1, 8]]))
    at = jnp.array([[3, 60, 0], [8, 8, 1]])
    some = jax.jit(functools.partial(forward, mode="dense"))(
        model, tokens, lengths=jnp.array(lengths), logits=at
    )
    for row in range(2):
        assert_close_float32(some[row], everywhere[row][np.asarray(at)[row]])


@each_kind
def test_an_empty_row_disturbs_nobody(kind):
    got, ids = run(model_of(kind), prompt(), (TOKENS, 0), mode="sparda")
    want, want_ids = run(model_of(kind), prompt(), mode="sparda")
    np.testing.assert_array_equal(ids[:, 0], want_ids[:, 0])
    assert (ids[:, 1] == NO_BLOCK).all()
    assert np.isfinite(got).all()
    assert_close_float32(got[0], want[0])


def test_a_program_is_traced_once_for_all_lengths():
    model = model_of("minicpm")

    @jax.jit
    @chex.assert_max_traces(n=1)
    def once(model, tokens, lengths):
        return forward(model, tokens, lengths=lengths, mode="sparda")

    for lengths in ([64, 1], [8, 9], [0, 63]):
        once(model, prompt(), jnp.array(lengths))


def test_equal_selectors_share_a_program():
    model, traces = make("minicpm", layers=1), []

    @functools.partial(jax.jit, static_argnames="selector")
    def select_by(model, tokens, selector):
        traces.append(selector)
        return forward(model, tokens, selector=selector)

    for seed in (1, 1, 2):
        select_by(model, prompt(tokens=16), selector=RandomSelector(model.config, seed=seed))
    assert [selector.seed for selector in traces] == [1, 2]


def test_observers_see_every_layer_once_while_tracing():
    seen = []

    def observe(name, layer, value):
        seen.append((name, layer, [x.shape for x in jax.tree.leaves(value)][:1]))

    watched = functools.partial(forward, mode="sparda", observe=observe)
    jax.eval_shape(watched, tiny_model(), prompt(tokens=16))
    assert [(name, layer) for name, layer, _ in seen] == [
        *((name, layer) for layer in range(3) for name in ("input", "q", "probe", "cache")),
        ("output", 3),
    ]
    shapes = {name: shape for name, _, shape in seen}
    assert shapes["input"] == shapes["output"] == [(2, 16, 32)]
    assert shapes["q"] == [(2, 16, 4, 8)]
    assert shapes["probe"] == [(2, 16, 2, 8)]


@pytest.mark.parametrize(
    ("mode", "targets"),
    [("dense", [(), (), ()]), ("sparse", [(0,), (1,), (2,)]), ("sparda", [(0, 1), (2,), ()])],
)
def test_each_layer_probes_for_the_layers_that_ask_it(mode, targets):
    plan = make_plan(tiny_config(), mode, max_length=64)
    assert [targets_of(plan, layer) for layer in range(3)] == targets


def test_a_plan_is_hashable_and_bounds_its_tiles():
    config = ModelConfig.minicpm4_1_8b()
    plan = make_plan(config, "sparda", max_length=65536, tile_bytes=64 << 20)
    assert hash(plan) == hash(make_plan(config, "sparda", max_length=65536, tile_bytes=64 << 20))
    assert plan.width == 96
    gathered = 2 * 96 * 64 * 2 * 128 * 4
    assert plan.tile(1, 65536) == max(8, (64 << 20) // gathered)
    assert plan.tile(64, 65536) == 8
    assert make_plan(config, "sparda", max_length=100).selector is None


def test_an_empty_cache_has_what_the_plan_needs():
    nosa = model_of("nosa").config
    sparse = init_cache(make_plan(nosa, "sparse", max_length=64), 2, 64)
    assert sparse.k.shape == sparse.v.shape == (2, 64, 2, 8)
    assert sparse.importance.shape == (2, 64, 2)
    assert sparse.summary.inner.pooled.shape == (2, 31, 2, 8)
    dense = init_cache(make_plan(tiny_config(), "dense", max_length=64), 2, 64)
    assert dense.importance is None
    assert dense.summary is None


def test_embeddings_and_logits_carry_their_scales():
    model = make("minicpm")
    tokens = prompt(tokens=3)
    np.testing.assert_array_equal(
        model.embed_tokens(tokens)[0], 3.0 * np.asarray(model.embed[...])[tokens[0]]
    )
    x = model.embed_tokens(tokens)
    plain = make("minicpm", logit_divisor=1.0)
    assert_close_float32(model.logits(x), plain.logits(x) / 2.0)


@pytest.mark.parametrize(
    ("preset", "tokens", "backbone"),
    # NOSA adds 2 scales and a [2 128 2] projection to each of 32 layers.
    [
        ("minicpm4_1_8b", 65536, 8_185_253_888),
        ("nosa_8b", 32768, 8_185_253_888 + 32 * (2 + 512)),
    ],
)
def test_full_size_models_have_the_published_shapes(preset, tokens, backbone):
    config = getattr(ModelConfig, preset)()
    model = nnx.eval_shape(lambda: SpardaLM(config, rngs=nnx.Rngs(0)))
    heads = jax.tree.leaves(nnx.state(model, ForecastParam))
    assert [x.shape for x in heads] == [(4096, 2, 128)] * 32
    assert sum(x.size for x in heads) == 33_554_432
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == backbone + 33_554_432
    rows = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    logits, ids = jax.eval_shape(
        functools.partial(forward, mode="sparda", logits="last", return_choices=True), model, rows
    )
    assert logits.shape == (1, 1, config.vocab_size)
    assert logits.dtype == jnp.float32
    width = max(config.sparse.selected_blocks, 128)  # dense below 8192 tokens, 128 blocks
    assert ids.shape == (32, 1, tokens, 2, width)


@pytest.mark.usefixtures("no_shape_hook")
def test_rows_and_lengths_must_agree():
    message = "lengths.shape=(3,) must be (2,), one per row of tokens.shape=(2, 8)"
    with pytest.raises(ValueError, match=re.escape(message)):
        forward(model_of("minicpm"), prompt(tokens=8), lengths=jnp.array([8, 8, 8]))


@pytest.mark.usefixtures("no_shape_hook")
def test_an_unknown_place_for_logits_is_refused():
    message = "logits='first' must be 'all', 'last' or positions [B P]"
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(
            functools.partial(forward, logits="first"), model_of("minicpm"), prompt(tokens=8)
        )


@pytest.mark.usefixtures("no_shape_hook")
def test_an_unknown_mode_or_selector_is_refused():
    model, tokens = model_of("minicpm"), prompt(tokens=8)
    with pytest.raises(ValueError, match="mode='quick' must be 'dense', 'sparse' or 'sparda'"):
        forward(model, tokens, mode="quick")
    with pytest.raises(ValueError, match="unknown selector 'oraclle'; known: forecast, "):
        forward(model, tokens, selector="oraclle")


def test_cudnn_refuses_a_bias_per_key():
    message = "attention='cudnn' has no bias per key; use 'mask' or 'gather'"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            functools.partial(forward, mode="dense", attention="cudnn"),
            model_of("nosa"),
            prompt(tokens=8),
        )
