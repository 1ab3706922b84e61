# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""A step of Forecast training: what adds up, what must not matter, and that it learns."""

import dataclasses
import functools
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.config import SparseConfig
from sparda_jax.model import forward
from sparda_jax.testing import tiny_config, tiny_model
from sparda_jax.training.layer import LayerPlan
from sparda_jax.training.state import OptimizerConfig, heads_from, init_heads, init_state, put_heads
from sparda_jax.training.step import divide_totals, make_evaluate, make_step, walk_layers

ROOT = Path(__file__).resolve().parents[3]
MODEL = tiny_model()
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 96)).astype(np.int32)
PLAN = LayerPlan(config=MODEL.config, tile_bytes=1 << 16)


@functools.cache
def compiled(plan):
    """Compile a walk that also gives what the layers saw."""

    def run(model, heads, tokens, lengths):
        seen = []
        sums = walk_layers(plan, model, heads, tokens, lengths, lambda *told: seen.append(told[1:]))
        return sums, seen

    return jax.jit(run)


def walk(plan=PLAN, tokens=TOKENS, lengths=(96, 96), model=MODEL):
    return compiled(plan)(model, heads_from(model), tokens, jnp.array(lengths))


def assert_sums_close(found, wanted, rtol=2e-5):
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = max(np.abs(np.asarray(theirs)).max(), 1e-6)
        np.testing.assert_allclose(mine, theirs, atol=rtol * scale)


def test_the_sums_of_a_ragged_batch_are_those_of_its_rows():
    both = walk(lengths=(96, 71))[0]
    rows = [walk(lengths=lengths)[0] for lengths in ((96, 0), (0, 71))]
    assert_sums_close(both, jax.tree.map(jnp.add, *rows))
    assert float(both[1].tokens) == 167
    assert float(both[1].counted[0]) == 167 * MODEL.config.kv_heads


def test_what_stands_in_the_padding_changes_nothing():
    padded = TOKENS.copy()
    padded[1, 71:] = 63 - padded[1, 71:]
    for mine, theirs in zip(
        jax.tree.leaves(walk(lengths=(96, 71))[0]),
        jax.tree.leaves(walk(tokens=padded, lengths=(96, 71))[0]),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("change", [{"attention": "gather"}, {"tile_bytes": 1 << 24}])
def test_how_blocks_are_read_and_how_tiles_are_cut_changes_nothing(change):
    sums, seen = walk()
    other_sums, other_seen = walk(dataclasses.replace(PLAN, **change))
    assert PLAN.label_tile(2, 96) < 96  # several tiles, the last one not full
    for (x, labels), (other_x, other_labels) in zip(seen, other_seen, strict=True):
        np.testing.assert_array_equal(labels.ids, other_labels.ids)
        np.testing.assert_allclose(x, other_x, atol=1e-5)
    assert_sums_close(other_sums, sums)


def test_routing_by_the_forecast_reads_what_the_sparda_mode_reads():
    plan = dataclasses.replace(PLAN, routing="forecast", has_gradient=False)
    _, seen = walk(plan, lengths=(96, 71))
    read = functools.partial(forward, mode="sparda", logits="last", return_choices=True)
    _, ids = jax.jit(read)(MODEL, jnp.asarray(TOKENS), lengths=jnp.array([96, 71]))
    for layer, (_, labels) in enumerate(seen[:-1]):
        np.testing.assert_array_equal(labels.ids, ids[layer])
    teacher = walk()[1]
    assert any((a.ids != b.ids).any() for (_, a), (_, b) in zip(seen, teacher, strict=True))


def test_each_loss_reaches_one_weight_as_differentiation_says():
    """Differentiate the summed KL of the whole walk: layers are independent and states stopped."""
    plan = dataclasses.replace(PLAN, has_metrics=False)
    (gradients, _), _ = walk(plan)

    def total(heads):
        tokens, lengths = jnp.asarray(TOKENS), jnp.array([96, 96])
        return jnp.sum(walk_layers(plan, MODEL, heads, tokens, lengths)[1].kl)

    # Teacher routing does not depend on the heads, so this is the sum over layers.
    wanted = jax.jit(jax.grad(total))(heads_from(MODEL))
    assert_sums_close(gradients, wanted, rtol=1e-4)


def test_micro_batches_add_up_to_the_batch():
    optimizer = OptimizerConfig(clip_norm=0.0)
    states = [init_state(heads_from(MODEL), optimizer) for _ in range(2)]
    lengths = np.array([96, 71])
    step = make_step(PLAN, optimizer)
    whole, metrics = step(states[0], MODEL, TOKENS[None], lengths[None])
    parts, part_metrics = step(states[1], MODEL, TOKENS[:, None], lengths[:, None])
    assert_sums_close(part_metrics, metrics)
    for mine, theirs in zip(
        jax.tree.leaves(parts.heads), jax.tree.leaves(whole.heads), strict=True
    ):
        near = np.abs(np.asarray(mine) - np.asarray(theirs)) < 1e-6
        assert near.mean() > 0.995  # Adam's first step is lr · sign of the gradient


def test_evaluation_gives_the_metrics_of_a_step_and_no_gradient():
    heads = heads_from(MODEL)
    totals = make_evaluate(PLAN)(heads, MODEL, TOKENS[None], np.array([[96, 96]]))
    sums, _ = walk()
    _, metrics = divide_totals(*sums)
    zeros = jax.tree.map(jnp.zeros_like, heads)
    _, found = divide_totals(zeros, totals)
    for name in ("kl", "recall", "overlap"):
        np.testing.assert_allclose(getattr(found, name), getattr(metrics, name), rtol=1e-5)
    assert not np.asarray(found.grad_norm).any()
    numbers = found.as_numbers("heldout")
    assert numbers["heldout/loss"] == pytest.approx(float(metrics.kl.mean()), rel=1e-5)
    assert {"heldout/recall/layer_0", "heldout/overlap/layer_2"} <= set(numbers)


def test_recall_is_not_a_number_where_every_block_is_chosen():
    totals = make_evaluate(PLAN)(heads_from(MODEL), MODEL, TOKENS[None], np.array([[40, 33]]))
    _, metrics = divide_totals(heads_from(MODEL), totals)
    assert np.isnan(np.asarray(metrics.recall)).all()
    assert np.isfinite(np.asarray(metrics.kl)).all()


def test_queries_that_an_own_query_teacher_says_nothing_of_are_left_out_unless_in_parity_mode():
    changes = {"pool_size": 4, "pool_stride": 2, "teacher_pool_size": 4, "teacher_pool_stride": 2}
    sparse = SparseConfig(block_size=8, local_blocks=1, selected_blocks=5, dense_below=0, **changes)
    model = tiny_model(sparse=sparse)
    plan = LayerPlan(config=model.config, has_metrics=False, has_gradient=False)
    found = walk(plan, model=model)[0][1]
    parity = walk(dataclasses.replace(plan, parity="reference"), model=model)[0][1]
    heads = model.config.kv_heads
    assert float(parity.counted[0] - found.counted[0]) == 2 * 3 * heads  # tokens 0, 1, 2
    # Entries of such a row: four cells of five blocks, and the rest.
    constant = -np.log(21) - 20 / 21 * np.log(1e-8)
    difference = float(parity.kl[0] - found.kl[0])
    assert difference == pytest.approx(2 * 3 * heads * constant, rel=0.2)


def test_fifty_steps_lower_the_loss_and_raise_the_recall():
    optimizer = OptimizerConfig(learning_rate=2e-2)
    step = make_step(PLAN, optimizer)
    state = init_state(init_heads(MODEL.config, jax.random.key(1)), optimizer)
    history = []
    for _ in range(50):
        state, metrics = step(state, MODEL, TOKENS[None], np.array([[96, 96]]))
        history.append((float(metrics.kl.mean()), float(metrics.recall.mean())))
    assert history[-1][0] < 0.6 * history[0][0]
    assert history[-1][1] > history[0][1] + 0.05
    assert all(0.0 <= recall <= 1.0 for _, recall in history)


def test_heads_go_into_the_model_in_its_own_dtype():
    model = tiny_model(dtype="bfloat16")
    heads = init_heads(model.config, jax.random.key(0))
    put_heads(model, heads)
    weight = model.layers[1].attention.forecast_proj[...]
    assert weight.dtype == jnp.bfloat16
    np.testing.assert_array_equal(weight, heads.of(2).astype(jnp.bfloat16))
    np.testing.assert_array_equal(
        model.layers[0].attention.entry_forecast_proj[...], heads.entry.astype(jnp.bfloat16)
    )
    bound = model.config.width**-0.5
    assert float(jnp.abs(heads.entry).max()) <= bound
    assert heads.entry.dtype == jnp.float32


def test_a_fresh_state_is_committed_where_its_heads_are():
    free = heads_from(MODEL)
    pinned = jax.device_put(free, jax.devices()[0])
    for heads, is_committed in ((free, False), (pinned, True)):
        leaves = jax.tree.leaves(init_state(heads, OptimizerConfig()))
        assert {leaf.committed for leaf in leaves} == {is_committed}


def test_a_bf16_backbone_trains_f32_heads():
    model = tiny_model(dtype="bfloat16")
    plan = LayerPlan(config=model.config)
    optimizer = OptimizerConfig()
    state = init_state(heads_from(model), optimizer)
    state, metrics = make_step(plan, optimizer)(state, model, TOKENS[None], np.array([[96, 96]]))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.heads)} == {jnp.dtype("float32")}
    exact = walk(model=tiny_model(dtype="float32"))[0]
    np.testing.assert_allclose(
        metrics.kl, divide_totals(*exact)[1].kl, rtol=0.05
    )  # other random weights' rounding only


def test_a_model_with_token_importance_supervises_its_query_aware_share():
    config = tiny_config()
    sparse = dataclasses.replace(config.sparse, query_blocks=2, selected_blocks=6)
    model = tiny_model(sparse=sparse, token_importance=True)
    for layer in model.layers:
        layer.attention.importance_scale[...] = jnp.array([0.9, -0.7])
    plan = LayerPlan(config=model.config)
    sums, seen = walk(plan, model=model, lengths=(96, 71))
    for _, labels in seen[:-1]:
        counts = (np.asarray(labels.ids) >= 0).sum(-1)
        assert counts.max() == 6
    _, metrics = divide_totals(*sums)
    assert np.isfinite(np.asarray(metrics.kl)).all()
    assert ((np.asarray(metrics.recall) > 0) & (np.asarray(metrics.recall) <= 1)).all()


@pytest.mark.slow
def test_the_memory_of_a_step_does_not_grow_with_the_square_of_the_length():
    model = tiny_model(layers=2, heads=8)
    optimizer = OptimizerConfig()
    for attention in ("mask", "gather"):
        plan = LayerPlan(config=model.config, attention=attention, tile_bytes=1 << 19)
        step: Any = make_step(plan, optimizer)
        state = init_state(heads_from(model), optimizer)
        sizes = []
        for length in (512, 2048):
            tokens = jax.ShapeDtypeStruct((1, 1, length), jnp.int32)
            lengths = jax.ShapeDtypeStruct((1, 1), jnp.int32)
            memory = step.lower(state, model, tokens, lengths).compile().memory_analysis()
            sizes.append(memory.temp_size_in_bytes)
        assert sizes[1] < 6 * sizes[0], sizes  # a square would be 16 times as large


PARALLEL = """
    import os
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from sparda_jax.testing import tiny_model
    from sparda_jax.training.layer import LayerPlan
    from sparda_jax.training.state import OptimizerConfig, heads_from, init_state
    from sparda_jax.training.step import make_step

    model, optimizer = tiny_model(), OptimizerConfig()
    plan = LayerPlan(config=model.config)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 4, 64)).astype(np.int32)
    lengths = np.array([[64, 64, 50, 37]])
    mesh = Mesh(np.array(jax.devices()), ("data",))
    state, alone = make_step(plan, optimizer)(
        init_state(heads_from(model), optimizer), model, tokens, lengths
    )
    everywhere = jax.device_put(
        (init_state(heads_from(model), optimizer), model), NamedSharding(mesh, PartitionSpec())
    )
    step = make_step(plan, optimizer, mesh=mesh)
    try:
        step(*everywhere, tokens[:, :3], lengths[:, :3])
    except ValueError as error:
        print(error)
    spread_state, spread = step(*everywhere, tokens, lengths)
    assert len(spread.kl.sharding.device_set) == 4
    for name in ("kl", "recall", "overlap", "grad_norm", "tokens"):
        np.testing.assert_allclose(getattr(spread, name), getattr(alone, name), rtol=2e-5)
    for mine, theirs in zip(
        jax.tree.leaves(spread_state.heads), jax.tree.leaves(state.heads), strict=True
    ):
        assert (np.abs(np.asarray(mine) - np.asarray(theirs)) < 1e-6).mean() > 0.995
"""


@pytest.mark.slow
def test_four_devices_give_the_loss_of_one():
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PARALLEL)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "3 sequences in a micro-batch must be a multiple of the 4 devices" in run.stdout


def test_settings_that_no_step_could_use_are_refused():
    with pytest.raises(ValueError, match=r"learning_rate=0\.0 must be above 0"):
        OptimizerConfig(learning_rate=0.0)
    with pytest.raises(ValueError, match=r"clip_norm=-1\.0 must be at least 0"):
        OptimizerConfig(clip_norm=-1.0)
    with pytest.raises(ValueError, match=r"tile_bytes=0 must be at least 1"):
        LayerPlan(config=MODEL.config, tile_bytes=0)


def test_a_plan_fills_in_what_suits_the_device():
    plan = LayerPlan(config=MODEL.config)
    assert (plan.attention, plan.tile_bytes) == ("mask", 8 << 20)
    chosen = LayerPlan(config=MODEL.config, attention="gather", tile_bytes=1 << 30)
    assert (chosen.attention, chosen.tile_bytes) == ("gather", 1 << 30)
    assert chosen.label_tile(1, 2048) > plan.label_tile(1, 2048)


def test_unknown_routings_and_attentions_are_refused(no_shape_hook):
    with pytest.raises(ValueError, match="'student' must be 'teacher' or 'forecast'"):
        LayerPlan(config=MODEL.config, routing="student")
    with pytest.raises(ValueError, match="'flash' must be 'gather' or 'mask'"):
        LayerPlan(config=MODEL.config, attention="flash")


def test_a_warm_up_starts_from_zero_and_clipping_bounds_the_norm():
    heads = heads_from(MODEL)
    gradients = jax.tree.map(jnp.ones_like, heads)
    warm = OptimizerConfig(warmup_steps=10).make()
    with jax.numpy_dtype_promotion("standard"):
        first, moments = warm.update(gradients, warm.init(heads), heads)
        second, _ = warm.update(gradients, moments, heads)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(first))
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(second))
    clip = OptimizerConfig(clip_norm=0.5).make()
    with jax.numpy_dtype_promotion("standard"):
        _, after = clip.update(gradients, clip.init(heads), heads)
    moments: Any = after
    first_moment = jax.tree.leaves(moments[1][0].mu)
    norm = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in first_moment)))
    assert norm == pytest.approx(0.5 * (1 - 0.9), rel=1e-5)
