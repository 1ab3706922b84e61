# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The loop: what is logged and saved when, and that a stopped run ends as one that was not."""

import sys

import jax
import numpy as np
import pytest

from sparda_jax.testing import tiny_model
from sparda_jax.training.checkpoint import ForecastCheckpoints
from sparda_jax.training.data import TokenBatch
from sparda_jax.training.layer import LayerPlan
from sparda_jax.training.loop import LoopConfig, train_heads
from sparda_jax.training.state import OptimizerConfig

MODEL = tiny_model()
PLAN = LayerPlan(config=MODEL.config)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)
SHAPE = (2, 72)


class Batches:
    """Random tokens that depend on the step alone."""

    micro_batches = 1

    def batch_at(self, step, micro=0):
        tokens = np.random.default_rng([step, micro]).integers(0, 64, SHAPE).astype(np.int32)
        return TokenBatch(
            tokens=tokens,
            lengths=np.array([72, 60], np.int32),
            segments=np.zeros(SHAPE, np.int32),
            first_documents=np.zeros(2, np.int64),
            first_offsets=np.zeros(2, np.int64),
        )


class Notebook:
    """A tracker that remembers."""

    def __init__(self):
        self.lines = {}

    def log_hyperparameters(self, hyperparameters):
        raise AssertionError("the loop has no hyperparameters of its own")

    def log(self, metrics, *, step):
        assert step not in self.lines
        self.lines[step] = dict(metrics)

    def finish(self):
        raise AssertionError("the caller finishes its tracker")


def run(steps, **changes):
    """Train for some steps; give the result and what was logged."""
    tracker = Notebook()
    loop = LoopConfig(steps=steps, evaluate_every=2, save_every=2)
    fields = {
        "plan": PLAN,
        "optimizer": OPTIMIZER,
        "loop": loop,
        "tracker": tracker,
        "heldout": [Batches().batch_at(1000)],
        "progress": False,
    }
    return train_heads(MODEL, Batches(), **(fields | changes)), tracker.lines


def test_every_step_is_logged_once_and_held_out_numbers_beside_it(tmp_path):
    told = []
    with ForecastCheckpoints(tmp_path, keep_latest=9) as checkpoints:
        result, lines = run(
            5, checkpoints=checkpoints, on_step=lambda step, numbers: told.append(step)
        )
        assert sorted(lines) == list(range(6)) == told
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.recall_of(4) == pytest.approx(lines[4]["heldout/recall"])
    assert [step for step in lines if "heldout/recall" in lines[step]] == [0, 2, 4, 5]
    assert [step for step in lines if "train/loss" in lines[step]] == [0, 1, 2, 3, 4]
    assert all(lines[step]["train/tokens_per_s"] > 0 for step in range(5))
    assert int(result.state.step) == 5
    assert result.heldout is not None
    assert float(result.heldout.kl.mean()) == pytest.approx(lines[5]["heldout/loss"])
    assert result.seconds > 0


def test_a_resumed_run_ends_with_the_same_bits_and_logs_the_same_numbers(tmp_path):
    whole, whole_lines = run(5)
    with ForecastCheckpoints(tmp_path) as checkpoints:
        run(2, checkpoints=checkpoints)
        state = checkpoints.restore(MODEL.config, OPTIMIZER)
        resumed, lines = run(5, checkpoints=checkpoints, state=state)
    for mine, theirs in zip(
        jax.tree.leaves(resumed.state), jax.tree.leaves(whole.state), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    assert sorted(lines) == [2, 3, 4, 5]
    for step, numbers in lines.items():
        for name in numbers:
            if name != "train/tokens_per_s":
                assert numbers[name] == whole_lines[step][name], (step, name)


def test_the_model_is_left_as_it_was():
    before = [np.array(leaf) for leaf in jax.tree.leaves(MODEL)]
    run(2, heldout=())
    for leaf, copy in zip(jax.tree.leaves(MODEL), before, strict=True):
        np.testing.assert_array_equal(leaf, copy)


def test_a_loop_that_has_nothing_to_do_is_refused():
    done, _ = run(2, heldout=())
    assert done.heldout is None
    with pytest.raises(ValueError, match=r"2 steps are done and loop\.steps=2"):
        run(2, state=done.state)
    with pytest.raises(ValueError, match="save_every=0 must be at least 1"):
        LoopConfig(save_every=0)


def test_a_bar_is_drawn_on_request_and_its_package_is_named_when_it_lacks(monkeypatch, capsys):
    run(1, heldout=(), progress=True)
    assert "1/1" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ModuleNotFoundError, match="needs rich: pip install"):
        run(1, heldout=(), progress=True)
