# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Training against the original: teacher, routing, KL, gradients, and weights after three steps."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.rope import make_rope
from sparda_jax.training.layer import LayerPlan, label_layer, selector_of
from sparda_jax.training.state import OptimizerConfig, heads_from, init_state
from sparda_jax.training.step import divide_totals, make_step, project_forecast, walk_layers
from sparda_jax.training.teacher import align_mass, fine_keys, fine_mass, teacher_cells
from tests.sparda_jax.golden_models import golden_model, round_lowered

pytestmark = pytest.mark.parity
LENGTH = 704
FILES = [
    pytest.param("minicpm", 2, 1, id="minicpm 2/1"),
    pytest.param("nosa", 2, 1, id="nosa 2/1"),
    pytest.param("minicpm", 32, 16, id="minicpm 32/16", marks=pytest.mark.slow),
    pytest.param("nosa", 32, 16, id="nosa 32/16", marks=pytest.mark.slow),
]


def torch_layout(heads):
    """All heads as the original lays them out and orders them: Forecast 0, entry, 1, 2."""
    ours = [heads.forecast[0], heads.entry, *heads.forecast[1:]]
    return np.stack([np.asarray(w).transpose(1, 2, 0).reshape(-1, w.shape[0]) for w in ours])


def walk(plan, model, tokens):
    """Walk one sequence; give mean gradients, metrics, and what every layer saw."""

    def run(model, heads, tokens):
        seen = []
        lengths = jnp.array([tokens.shape[1]])
        sums = walk_layers(plan, model, heads, tokens, lengths, lambda *told: seen.append(told[1:]))
        return divide_totals(*sums), seen

    return jax.jit(run)(model, heads_from(model), tokens)


def share_of_rows(mine, wanted):
    return (np.asarray(mine) != wanted).any(-1).mean()


@pytest.mark.parametrize(("name", "size", "stride"), FILES)
def test_the_first_step_is_the_originals(golden, name, size, stride):
    z = np.load(golden / name / f"train_L{LENGTH}_k{size}s{stride}.npz")
    model = golden_model(name, teacher_pool_size=size, teacher_pool_stride=stride)
    plan = LayerPlan(config=model.config, parity="reference", has_metrics=False)
    tokens = jnp.asarray(z["batches"].astype(np.int32))
    (gradients, metrics), seen = walk(plan, model, tokens[:1])
    for layer, (_, labels) in enumerate(seen[:-1]):
        ids = np.asarray(labels.ids)[0].transpose(1, 0, 2)
        assert share_of_rows(ids, z["routing_block_ids"][layer]) <= 1e-3
        rows = np.asarray(labels.kl)[0].T
        np.testing.assert_allclose(rows, z["kl_rows"][layer], atol=1e-4)
    for layer, (x, _) in enumerate(seen):
        hidden = np.asarray(x)[0, z["positions"][::6]]
        np.testing.assert_allclose(hidden, z["hidden_out"][layer], atol=1e-3)
    np.testing.assert_allclose(metrics.kl, z["kl_per_layer"][0], rtol=1e-4)
    assert float(jnp.linalg.norm(metrics.grad_norm)) == pytest.approx(z["grad_norm"][0], rel=1e-4)
    for mine, wanted in zip(torch_layout(gradients), z["grads"], strict=True):
        error = np.linalg.norm(mine[z["grad_rows"]] - wanted) / np.linalg.norm(wanted)
        assert error < 1e-4


@pytest.mark.parametrize(
    ("name", "size", "stride"),
    [FILES[0], pytest.param("nosa", 2, 1, id="nosa 2/1", marks=pytest.mark.slow), *FILES[2:]],
)
def test_three_steps_of_adamw_end_at_the_originals_weights(golden, name, size, stride):
    z = np.load(golden / name / f"train_L{LENGTH}_k{size}s{stride}.npz")
    model = golden_model(name, teacher_pool_size=size, teacher_pool_stride=stride)
    plan = LayerPlan(config=model.config, parity="reference", has_metrics=False)
    optimizer = OptimizerConfig()
    step = make_step(plan, optimizer)
    state = init_state(heads_from(model), optimizer)
    for number, tokens in enumerate(z["batches"].astype(np.int32)):
        state, metrics = step(state, model, tokens[None, None], np.array([[LENGTH]]))
        np.testing.assert_allclose(metrics.kl, z["kl_per_layer"][number], rtol=1e-4)
        norm = float(jnp.linalg.norm(metrics.grad_norm))
        assert norm == pytest.approx(z["grad_norm"][number], rel=1e-4)
        mine = torch_layout(state.heads)[:, z["weight_rows"]]
        error = np.abs(mine - z["weights_after_steps"][number])
        assert (error <= 2e-5).mean() >= 0.999
        assert error.max() <= 5e-4 * (number + 1)
    assert int(state.step) == 3


def walk_rounded(z, size, stride):
    """Walk the first sequence with rounded scores: ids [L][K T J], KL rows [L][T K] and means."""
    model = golden_model("minicpm", teacher_pool_size=size, teacher_pool_stride=stride)
    plan = LayerPlan(
        config=model.config,
        parity="reference_bf16_scores",
        has_metrics=False,
        has_gradient=False,
    )
    (_, metrics), seen = walk(plan, model, jnp.asarray(z["batches"][:1].astype(np.int32)))
    labels = [labels for _, labels in seen[:-1]]
    ids = np.stack([np.asarray(each.ids)[0].transpose(1, 0, 2) for each in labels])
    return ids, np.stack([np.asarray(each.kl)[0] for each in labels]), np.asarray(metrics.kl)


@pytest.mark.parametrize(("size", "stride"), [(2, 1), (32, 16)])
def test_rounded_scores_route_as_the_original_does_and_leave_the_loss_alone(
    golden, monkeypatch, size, stride
):
    z = np.load(golden / "minicpm" / f"train_L{LENGTH}_k{size}s{stride}.npz")
    ids, rows, means = walk_rounded(z, size, stride)
    wanted = z["bf16cast.routing_block_ids"]
    if size == 2:
        # Block 3 of one row in the last layer scores 1e-6 below a border between two bf16 numbers
        # by float64, and 1e-5 above it by ours: float32 leaves 4e-6 (RMS) there, in the original
        # 3e-6. That row takes another block, and its KL moves.
        differ = np.argwhere((ids != wanted).any(-1)).tolist()
        assert differ in ([], [[3, 1, 667]])
        np.testing.assert_allclose(means[:3], z["bf16cast.kl_per_layer"][0, :3], rtol=1e-4)
        given = rows
        lowered = functools.partial(round_lowered, share=2.0**-15)
        monkeypatch.setattr("sparda_jax.training.layer.round_scores", lowered)
        ids, rows, means = walk_rounded(z, size, stride)
        given[3, 667, 1] = rows[3, 667, 1]
        np.testing.assert_allclose(given, rows, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_allclose(means, z["bf16cast.kl_per_layer"][0], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minicpm", "nosa"])
def test_the_mean_alignment_is_the_originals(golden, name):
    z = np.load(golden / name / f"train_L{LENGTH}_k2s1.npz")
    model = golden_model(name, teacher_alignment="mean")
    plan = LayerPlan(config=model.config, parity="reference", has_metrics=False)
    (_, metrics), _ = walk(plan, model, jnp.asarray(z["batches"][:1].astype(np.int32)))
    np.testing.assert_allclose(metrics.kl, z["mean_pooling.kl_per_layer"][0], rtol=1e-4)
    norms = [metrics.grad_norm[layer] for layer in (1, 0, 2, 3)]
    np.testing.assert_allclose(norms, z["mean_pooling.grads_norm"], rtol=1e-4)


def function_config(local, sinks, budget, **teacher):
    """A configuration for the golden functions: 4 query heads of 16 over 2 KV heads."""
    sparse = SparseConfig(
        local_blocks=local, sink_blocks=sinks, selected_blocks=budget, dense_below=0, **teacher
    )
    return ModelConfig(
        vocab_size=8,
        width=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        mlp_width=8,
        sparse=sparse,
        dtype="float32",
    )


@pytest.mark.parametrize("case", ["k2s1_max", "k2s1_mean", "k4s2_max", "k32s16_max"])
def test_the_loss_of_given_queries_keys_and_forecasts_is_the_originals(golden, case):
    z = np.load(golden / "functions" / "kl_loss.npz")
    length, local, sinks, budget = map(int, z["setting"])
    grid, mode = case.split("_")
    size, stride = map(int, grid[1:].split("s"))
    config = function_config(
        local,
        sinks,
        budget,
        teacher_pool_size=size,
        teacher_pool_stride=stride,
        teacher_alignment=mode,
    )
    q, k, forecast = (jnp.asarray(z[name])[None] for name in ("q", "k", "forecast"))
    at, lengths = jnp.arange(length)[None], jnp.array([length])
    plan = LayerPlan(config=config, parity="reference", has_metrics=False)
    selector = selector_of("sparda", config)

    @jax.jit
    def label(q, k, forecast):
        summary = selector.extend_summary(selector.init_summary(1, length, "float32"), k, at)
        return label_layer(plan, q, k, forecast, summary, at, lengths)

    labels = label(q, k, forecast)
    ids = np.asarray(labels.ids[0]).transpose(1, 0, 2)
    assert share_of_rows(ids, z[f"{case}.supervised_block_ids"]) == 0
    np.testing.assert_allclose(labels.kl[0].T, z[f"{case}.kl_rows"], atol=1e-4)
    assert float(labels.kl.mean()) == pytest.approx(float(z[f"{case}.loss"]), rel=1e-4)
    if f"{case}.grad_forecast" in z:
        wanted = z[f"{case}.grad_forecast"]
        mine = np.asarray(labels.gradient)[0] / labels.kl.size
        assert np.linalg.norm(mine - wanted) / np.linalg.norm(wanted) < 1e-4


def test_fine_mass_and_its_alignment_are_the_originals(golden):
    z = np.load(golden / "functions" / "scores.npz")
    q, k = jnp.asarray(z["q"])[None], jnp.asarray(z["k"])[None]
    length = q.shape[1]
    at, lengths = jnp.arange(length)[None], jnp.array([length])
    count = z["pooled"].shape[0]
    for size, stride in ((2, 1), (4, 2), (8, 4)):
        for mode in ("max", "mean"):
            sparse = SparseConfig(
                teacher_pool_size=size, teacher_pool_stride=stride, teacher_alignment=mode
            )
            mass = fine_mass(q, fine_keys(k, sparse), at, lengths, sparse)
            if (size, stride) == (2, 1):
                np.testing.assert_allclose(mass[0], z["teacher_2_1"], atol=1e-4)
            aligned = align_mass(mass, count, sparse)[0].transpose(1, 0, 2)
            wanted = z[f"teacher_aligned_{size}_{stride}_{mode}"]
            np.testing.assert_allclose(aligned, wanted, atol=1e-4)
    config = function_config(2, 1, 6, teacher_pool_size=32, teacher_pool_stride=16)
    pooled = jnp.asarray(z["pooled"])[None]
    own = teacher_cells(q, pooled, pooled, at, lengths, config, parity="reference")
    np.testing.assert_allclose(own[0].transpose(1, 0, 2), z["own_query_scores"], atol=1e-4)


def test_the_golden_files_are_of_the_settings_that_are_our_defaults(golden):
    info = json.loads(str(np.load(golden / "minicpm" / f"train_L{LENGTH}_k2s1.npz")["info"]))
    ours = dataclasses.asdict(OptimizerConfig())
    assert ours["learning_rate"] == info["lr"]
    assert [ours["beta1"], ours["beta2"]] == info["betas"]
    assert (ours["eps"], ours["weight_decay"]) == (info["eps"], info["weight_decay"])
    assert ours["clip_norm"] == info["max_grad_norm"]


def test_a_forecast_is_projected_as_the_selector_projects_it():
    model = golden_model("minicpm")
    config = model.config
    rope = make_rope(config.rope, config.head_dim, jnp.arange(9)[None], jnp.array([9]))
    x = jax.random.normal(jax.random.key(0), (1, 9, config.width))
    q = jnp.zeros((1, 9, config.heads, config.head_dim))
    selector = selector_of("sparda", config)
    for layer, target in ((0, 0), (0, 1), (1, 2)):
        wanted = selector.probe(model, layer, target, x, q, rope)
        a = model.layers[layer].input_norm(x)
        mine = project_forecast(heads_from(model).of(target), a, rope, config)
        np.testing.assert_array_equal(mine, wanted)
