# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The state of a backbone run: what is saved comes back, whenever saving is interrupted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import backbone_state
from experiments.backbone_state import flatten, load_state, save_state
from sparda_jax.errors import CheckpointError


def state_at(step):
    params = {"a": {"b": jnp.full((3, 4), step, jnp.float32)}, "c": jnp.arange(5.0) + step}
    moments = jax.tree.map(lambda x: x * 2, params)
    return {"phase": 1, "step": step, "params": params, "moments": moments}


def assert_is(found, step):
    want = state_at(step)
    assert (found["phase"], found["step"]) == (1, step)
    for name in ("params", "moments"):
        mine, theirs = jax.tree.leaves(found[name]), jax.tree.leaves(want[name])
        for got, wanted in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_masters_are_cast_and_saved_as_bits():
    tree = {"a": {"b": jnp.array([1.0, 1.0 + 2**-10])}}
    assert flatten(tree)["a.b"].dtype == np.float32
    bits = flatten(tree, np.dtype(jnp.bfloat16))["a.b"]
    assert bits.tolist() == [0x3F80, 0x3F80]


def test_what_is_saved_comes_back_from_small_files(tmp_path, monkeypatch):
    monkeypatch.setattr(backbone_state, "FILE_BYTES", 60)
    fresh = state_at(0)
    assert load_state(tmp_path, fresh) is fresh
    for step in (3, 7):
        save_state(tmp_path, state_at(step))
        assert_is(load_state(tmp_path, fresh), step)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert len(list((tmp_path / "state").glob("*.npz"))) == 4


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_save_that_is_interrupted_leaves_a_whole_state(tmp_path, monkeypatch, renames):
    save_state(tmp_path, state_at(3))
    done = []
    rename = type(tmp_path).rename

    def stop(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", stop)
    if renames < 2:
        with pytest.raises(KeyboardInterrupt):
            save_state(tmp_path, state_at(7))
    else:
        save_state(tmp_path, state_at(7))
    monkeypatch.undo()
    assert_is(load_state(tmp_path, state_at(0)), 7 if renames == 2 else 3)
    save_state(tmp_path, state_at(9))
    assert_is(load_state(tmp_path, state_at(0)), 9)


def test_a_file_that_is_missing_an_array_is_refused(tmp_path):
    save_state(tmp_path, state_at(3))
    path = tmp_path / "state" / "0.npz"
    arrays = dict(np.load(path))
    del arrays["3"]
    backbone_state.save_arrays(path, arrays)
    with pytest.raises(CheckpointError, match="3 of 4 arrays"):
        load_state(tmp_path, state_at(0))
