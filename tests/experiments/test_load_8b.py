# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Loading at full size, at tiny size: what is written loads, is measured, compared and removed."""

import collections
import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from experiments import load_8b, records
from experiments.load_8b import Config, main, measure_load, random_tensor, write_checkpoint
from sparda_jax.config import ModelConfig
from sparda_jax.errors import CapacityError
from sparda_jax.testing import tiny_config
from sparda_jax.weights.names import expected_tensors

TINY = tiny_config(dtype="bfloat16", layers=2)


def test_a_checkpoint_has_the_models_tensors_in_bounded_files(tmp_path):
    total = write_checkpoint(tmp_path / "m", TINY, 9_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    targets = expected_tensors(TINY)
    assert index["weight_map"].keys() == targets.keys()
    assert (
        total
        == index["metadata"]["total_size"]
        == sum(2 * np.prod(target.torch_shape) for target in targets.values())
    )
    files = set(index["weight_map"].values())
    assert len(files) >= 3
    for file in files:
        held = safetensors.numpy.load_file(tmp_path / "m" / file)
        assert sum(array.nbytes for array in held.values()) <= 9_000
        for name, array in held.items():
            assert array.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(array, random_tensor(targets[name]))


def test_numbers_depend_on_the_name_and_repeat_in_large_tensors():
    targets = expected_tensors(ModelConfig.minicpm4_1_8b())
    one, other = (random_tensor(targets[f"model.layers.{l}.mlp.up_proj.weight"])[0] for l in (0, 1))
    assert not np.array_equal(one, other)
    again = random_tensor(targets["model.layers.0.mlp.up_proj.weight"])
    assert again.shape == (16384, 4096)
    np.testing.assert_array_equal(again[256], one)
    assert 0.015 < np.std(one.astype(np.float32)) < 0.025


def test_a_loaded_checkpoint_is_measured_and_compared(tmp_path, caplog):
    total = write_checkpoint(tmp_path / "m", TINY, 9_000)
    found = measure_load(tmp_path / "m")
    heads = 2 * 32 * 16 * 2  # one forecast and the entry forecast, drawn at random
    assert found["model_bytes"] == total + heads
    assert found["compared_tensors"] == len(
        {t.path.split(".")[-1] for t in expected_tensors(TINY).values()}
    )
    assert found["seconds"] >= 0.0
    assert found["largest_tensor_bytes"] == 64 * 32 * 2
    assert -found["model_bytes"] <= found["extra_host_bytes"] < 2e9


def test_a_tensor_that_is_not_the_one_written_is_found(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m", TINY, 1_000_000)
    monkeypatch.setattr(load_8b, "random_tensor", lambda target: np.zeros(target.torch_shape))
    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight is not what was written, of 10"
    ):
        measure_load(tmp_path / "m")


def test_a_full_disk_is_told_with_both_numbers_and_leaves_nothing(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "free")(1000)
    monkeypatch.setattr(load_8b.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CapacityError, match=r"checkpoint has \d+ bytes .* the disk has 1000 left"):
        write_checkpoint(tmp_path / "m", TINY, 9_000)
    assert not (tmp_path / "m").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="exists and would be removed"):
        main(Config(folder=tmp_path, commit="0123abcd", dirty=False), TINY)
    assert tmp_path.is_dir()


@pytest.mark.slow
def test_a_run_leaves_a_record_and_no_checkpoint(tmp_path, capsys):
    config = Config(
        folder=tmp_path / "m", layers=1, commit="0123abcd", dirty=False, out=tmp_path / "out"
    )
    path = main(config, TINY)
    assert not (tmp_path / "m").exists()
    record = records.read(path)
    assert record.command.endswith("--layers 1")
    [row] = record.rows
    assert (row["layers"], row["shards"], row["status"]) == (1, 1, "ok")
    assert json.loads(capsys.readouterr().out) == row
    assert row["checkpoint_bytes"] < row["model_bytes"]
    main(dataclasses.replace(config, layers=2), TINY)
    assert [row["layers"] for row in records.read(path).rows] == [1, 2]
