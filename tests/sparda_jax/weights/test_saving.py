# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Saving: the layout that others expect, complete or not at all."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from sparda_jax.testing import tiny_model
from sparda_jax.weights import load_forecast_heads, load_pretrained, save_pretrained, saving
from sparda_jax.weights.config import parse_eos_ids
from sparda_jax.weights.saving import plan_shards
from sparda_jax.weights.tensor_file import PlannedTensor


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_a_folder_has_the_layout_that_others_expect(tmp_path):
    model = tiny_model(layers=2)
    save_pretrained(model, tmp_path / "m", eos_ids=[2, 5], step=9, name="tiny")
    assert names_in(tmp_path / "m") == {
        "config.json",
        "model.safetensors",
        "heads.safetensors",
        "heads.json",
    }
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    assert raw["model_type"] == "minicpm"
    assert raw["sparse_config"]["topk"] == 4
    assert parse_eos_ids(raw) == (2, 5)
    held = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")
    assert held["model.layers.1.self_attn.q_proj.weight"].shape == (32, 32)
    assert held["model.layers.1.mlp.gate_proj.weight"].shape == (48, 32)
    want = np.asarray(model.layers[1].mlp.gate_proj[...]).T
    np.testing.assert_array_equal(held["model.layers.1.mlp.gate_proj.weight"], want)
    heads = load_forecast_heads(tmp_path / "m", model.config)
    assert (heads.step, heads.model) == (9, "tiny")
    with safetensors.safe_open(tmp_path / "m" / "heads.safetensors", framework="numpy") as file:
        assert file.metadata().keys() == {"format", "model", "step", "sparse_config"}


def test_a_golden_checkpoint_is_saved_as_it_was(golden, tmp_path):
    for name in ("minicpm", "nosa"):
        heads = golden / name / "indexer.pt"
        save_pretrained(load_pretrained(golden / name, heads=heads), tmp_path / name)
        was = safetensors.numpy.load_file(golden / name / "model.safetensors")
        now = safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
        assert was.keys() == now.keys()
        for tensor in was:
            assert was[tensor].dtype == now[tensor].dtype
            assert was[tensor].tobytes() == now[tensor].tobytes(), tensor
        before = json.loads((golden / name / "config.json").read_text())
        after = json.loads((tmp_path / name / "config.json").read_text())
        same = before.keys() & after.keys() - {"sparse_config", "architectures"}
        assert {key: before[key] for key in same} == {key: after[key] for key in same}
        for key in before["sparse_config"].keys() & after["sparse_config"].keys():
            assert before["sparse_config"][key] == after["sparse_config"][key]
        assert before["sparse_config"].keys() <= after["sparse_config"].keys()


def test_shards_are_indexed_and_bounded(tmp_path):
    save_pretrained(tiny_model(), tmp_path / "m", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert set(files) == {name for name in names_in(tmp_path / "m") if name.startswith("model-")}
    total = 0
    for file in files:
        held = safetensors.numpy.load_file(tmp_path / "m" / file)
        assert {name for name in held if index["weight_map"][name] == file} == set(held)
        size = sum(array.nbytes for array in held.values())
        assert size <= 20_000
        total += size
    assert index["metadata"]["total_size"] == total


def test_a_tensor_above_the_limit_gets_a_shard_of_its_own():
    tensors = [
        PlannedTensor(str(number), (size,), np.dtype(np.uint8), lambda: np.zeros(0))
        for number, size in enumerate([5, 5, 30, 1, 9, 2])
    ]
    cut = plan_shards(tensors, 10)
    assert [[tensor.name for tensor in shard] for shard in cut] == [
        ["0", "1"],
        ["2"],
        ["3", "4"],
        ["5"],
    ]


def test_a_limit_below_one_byte_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be at least 1"):
        save_pretrained(tiny_model(), tmp_path / "m", max_shard_bytes=0)


def test_tokenizer_files_are_copied_by_name_or_from_a_folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "notes.txt"):
        (source / name).write_text(name)
    model = tiny_model()
    save_pretrained(model, tmp_path / "a", tokenizer_files=source)
    assert names_in(tmp_path / "a") >= {"tokenizer.json", "tokenizer_config.json"}
    assert "notes.txt" not in names_in(tmp_path / "a")
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "tokenizer.json"
    save_pretrained(model, tmp_path / "b", tokenizer_files=[source / "notes.txt"])
    assert "notes.txt" in names_in(tmp_path / "b")
    save_pretrained(model, tmp_path / "c", tokenizer_files=source / "tokenizer.json")
    assert "tokenizer.json" in names_in(tmp_path / "c")


def test_missing_tokenizer_files_are_named_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"1 of 1 tokenizer files are missing: .*absent"):
        save_pretrained(tiny_model(), tmp_path / "m", tokenizer_files=[tmp_path / "absent"])
    assert names_in(tmp_path) == set()


def test_a_folder_that_exists_is_replaced_only_on_request(tmp_path):
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    save_pretrained(first, tmp_path / "m")
    (tmp_path / "m" / "old.txt").write_text("old")
    with pytest.raises(ValueError, match="m exists; pass overwrite=True to replace it"):
        save_pretrained(second, tmp_path / "m")
    assert load_pretrained(tmp_path / "m").embed[...].tobytes() == first.embed[...].tobytes()
    save_pretrained(second, tmp_path / "m", overwrite=True)
    assert load_pretrained(tmp_path / "m").embed[...].tobytes() == second.embed[...].tobytes()
    assert "old.txt" not in names_in(tmp_path / "m")
    assert names_in(tmp_path) == {"m"}


def fail(*_, **__):
    raise OSError("disk full")


def test_a_failure_while_writing_leaves_the_old_folder_and_no_rest(tmp_path, monkeypatch):
    save_pretrained(tiny_model(), tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    monkeypatch.setattr(saving, "write_tensor_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(tiny_model(seed=3), tmp_path / "m", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(tiny_model(seed=3), tmp_path / "new")
    assert names_in(tmp_path) == {"m"}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt("now")])
def test_a_failure_while_renaming_brings_the_old_folder_back(tmp_path, monkeypatch, error):
    save_pretrained(tiny_model(), tmp_path / "m")
    real = type(tmp_path).rename

    def rename(self, target):
        if self.name == "new":
            raise error
        return real(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", rename)
    with pytest.raises(type(error), match=str(error)):
        save_pretrained(tiny_model(seed=3), tmp_path / "m", overwrite=True)
    assert "config.json" in names_in(tmp_path / "m")
    assert names_in(tmp_path) == {"m"}


def test_progress_counts_all_bytes(tmp_path):
    told = []
    save_pretrained(
        tiny_model(), tmp_path / "m", progress=lambda done, total: told.append((done, total))
    )
    assert told[-1][0] == told[-1][1] > 0
    assert len(told) == 30
