# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the same bits back, what is kept, and what is refused with the good one in place."""

import dataclasses
import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.errors import CheckpointError
from sparda_jax.testing import tiny_config
from sparda_jax.training import checkpoint as module
from sparda_jax.training.checkpoint import ForecastCheckpoints
from sparda_jax.training.state import Heads, OptimizerConfig, init_heads, init_state

CONFIG, OPTIMIZER = tiny_config(), OptimizerConfig(warmup_steps=3)


def state_at(step, config=CONFIG):
    """A state whose every array is different at every step."""
    state = init_state(init_heads(config, jax.random.key(step)), OPTIMIZER)
    filled = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state.optimizer)
    return dataclasses.replace(state, optimizer=filled, step=jnp.int32(step))


@pytest.fixture
def saved(tmp_path):
    """A folder with the steps 10 and 20."""
    with ForecastCheckpoints(tmp_path / "run") as checkpoints:
        for step in (10, 20):
            checkpoints.save(state_at(step), CONFIG, settings={"seed": 3}, recall=step / 100)
    return tmp_path / "run"


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def test_a_state_comes_back_bit_for_bit(saved):
    with ForecastCheckpoints(saved) as checkpoints:
        assert checkpoints.steps() == [10, 20]
        assert_same(checkpoints.restore(CONFIG, OPTIMIZER), state_at(20))
        found = checkpoints.restore(CONFIG, OPTIMIZER, step=10, settings={"seed": 3})
        assert_same(found, state_at(10))
        assert isinstance(found.heads, Heads)
        assert checkpoints.recall_of(20) == pytest.approx(0.2)


def test_the_newest_and_the_best_stay(tmp_path):
    recalls = [0.1, 0.9, 0.2, float("nan"), None, 0.3]
    with ForecastCheckpoints(tmp_path, keep_latest=2, keep_best=1) as checkpoints:
        for step, recall in enumerate(recalls):
            checkpoints.save(state_at(step), CONFIG, recall=recall)
        assert checkpoints.steps() == [1, 4, 5]
        assert checkpoints.recall_of(1) == pytest.approx(0.9)
        assert checkpoints.recall_of(4) is None
        with pytest.raises(CheckpointError, match="holds step 5 already, so step 5 cannot"):
            checkpoints.save(state_at(5), CONFIG)
    with pytest.raises(ValueError, match="keep_latest=0 must be at least 1"):
        ForecastCheckpoints(tmp_path, keep_latest=0)


def test_nothing_is_made_before_something_is_saved(tmp_path):
    checkpoints = ForecastCheckpoints(tmp_path / "new")
    assert checkpoints.steps() == []
    with pytest.raises(CheckpointError, match="holds 0 checkpoints, at least 1"):
        checkpoints.restore(CONFIG, OPTIMIZER)
    assert not (tmp_path / "new").exists()
    checkpoints.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 48}, r"3 heads of \[32, 2, 8\], this model needs 3 heads of \[48, 2, 8\]"),
        ({"layers": 4}, r"3 heads of \[32, 2, 8\], this model needs 4 heads of \[32, 2, 8\]"),
        (
            {"sparse": dataclasses.replace(CONFIG.sparse, selected_blocks=6)},
            "another sparse rule .selected_blocks: 5 there, 6 here",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_both_shapes(saved, change, message):
    with ForecastCheckpoints(saved) as checkpoints:
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(tiny_config(**change), OPTIMIZER)
        assert_same(checkpoints.restore(CONFIG, OPTIMIZER), state_at(20))


def test_other_settings_are_refused_and_named(saved):
    with (
        ForecastCheckpoints(saved) as checkpoints,
        pytest.raises(CheckpointError, match="seed: 3 there, 4 here"),
    ):
        checkpoints.restore(CONFIG, OPTIMIZER, settings={"seed": 4})


def test_a_step_that_is_not_there_is_refused_with_those_that_are(saved):
    with (
        ForecastCheckpoints(saved) as checkpoints,
        pytest.raises(CheckpointError, match=r"no step 15, only \[10, 20\]"),
    ):
        checkpoints.restore(CONFIG, OPTIMIZER, step=15)


def test_another_format_is_refused(saved, monkeypatch):
    monkeypatch.setattr(module, "FORMAT", 2)
    with (
        ForecastCheckpoints(saved) as checkpoints,
        pytest.raises(CheckpointError, match="format 1, this version reads 2"),
    ):
        checkpoints.restore(CONFIG, OPTIMIZER)


# When its storage fails, orbax leaves coroutines and tasks of its own behind, with their errors:
# they are collected within the test, or they would warn in whichever test runs later.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_truncated_checkpoint_is_refused_and_the_good_one_stays(saved):
    for path in (saved / "20" / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with ForecastCheckpoints(saved) as checkpoints:
        with pytest.raises(CheckpointError, match=r"step 20 .* cannot be read .*: \[10\]"):
            checkpoints.restore(CONFIG, OPTIMIZER)
        assert_same(checkpoints.restore(CONFIG, OPTIMIZER, step=10), state_at(10))
    assert (saved / "20").is_dir()
    gc.collect()


def test_a_foreign_folder_is_refused_and_the_good_one_stays(saved):
    (saved / "30").mkdir()
    (saved / "30" / "notes.txt").write_text("mine")
    with ForecastCheckpoints(saved) as checkpoints:
        with pytest.raises(CheckpointError, match=r"step 30 .*; other steps here: \[10, 20\]"):
            checkpoints.restore(CONFIG, OPTIMIZER)
        assert_same(checkpoints.restore(CONFIG, OPTIMIZER, step=20), state_at(20))
    assert (saved / "30" / "notes.txt").read_text() == "mine"


def test_a_save_that_was_cut_off_is_not_a_checkpoint(saved):
    shutil.copytree(saved / "20", saved / "30.orbax-checkpoint-tmp")
    with ForecastCheckpoints(saved) as checkpoints:
        assert checkpoints.steps() == [10, 20]
