# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Finding a checkpoint, reading its JSON, and seeing its shards as one."""

import json
import sys

import numpy as np
import pytest

from sparda_jax.errors import CheckpointError
from sparda_jax.weights.folder import Shards, read_json, resolve_folder
from sparda_jax.weights.tensor_file import PlannedTensor, write_tensor_file


def write(path, **arrays):
    planned = [
        PlannedTensor(name, array.shape, array.dtype, lambda array=array: array)
        for name, array in arrays.items()
    ]
    write_tensor_file(path, planned)


def write_index(folder, weight_map):
    text = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


A, B = np.arange(3, dtype=np.float32), np.arange(4, dtype=np.float32)


def test_a_folder_is_found_as_it_is(tmp_path):
    assert resolve_folder(tmp_path) == tmp_path
    assert resolve_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["no/such/folder", "./models/mine", "plain"])
def test_what_is_no_folder_and_no_hub_id_is_refused(name):
    with pytest.raises(CheckpointError, match=f"{name} is not a folder; give a checkpoint folder"):
        resolve_folder(name)


def test_a_file_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="owner/name is not a folder; give"):
        resolve_folder("owner/name")


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(name, **patterns):
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert resolve_folder("owner/name-1.0") == tmp_path
    assert asked == ["owner/name-1.0"]


def test_a_download_in_offline_mode_says_what_to_do(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"owner/name .* could not be downloaded .*; do"):
        resolve_folder("owner/name")


def test_a_download_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"needs huggingface-hub: pip install .*\[train\]"):
        resolve_folder("owner/name")


def test_json_must_be_there_and_an_object(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list, expected an object"):
        read_json(tmp_path / "config.json")


def test_a_single_file_is_one_shard(tmp_path):
    write(tmp_path / "model.safetensors", a=A, b=B)
    shards = Shards(tmp_path)
    assert list(shards.entries) == ["a", "b"]
    assert shards.size_bytes == 28
    np.testing.assert_array_equal(shards.read("b"), B)


def test_an_index_joins_its_shards(tmp_path):
    write(tmp_path / "one.safetensors", a=A)
    write(tmp_path / "two.safetensors", b=B)
    write(tmp_path / "heads.safetensors", c=B)
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    shards = Shards(tmp_path)
    assert list(shards.entries) == ["a", "b"]
    np.testing.assert_array_equal(shards.read("a"), A)
    np.testing.assert_array_equal(shards.read("b"), B)


def test_all_missing_shards_are_named(tmp_path):
    write(tmp_path / "one.safetensors", a=A)
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "x.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks 2 of 3 shards: two\.safetensors, x\.safe"):
        Shards(tmp_path)


def test_an_index_may_not_leave_its_folder(tmp_path):
    write_index(tmp_path, {"a": "../one.safetensors"})
    with pytest.raises(CheckpointError, match=r"outside its folder: \['\.\./one\.safetensors'\]"):
        Shards(tmp_path)


def test_an_index_without_a_map_is_refused(tmp_path):
    write_index(tmp_path, {})
    with pytest.raises(CheckpointError, match="has no weight_map"):
        Shards(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    write(tmp_path / "one.safetensors", a=A)
    write(tmp_path / "two.safetensors", a=A, b=B)
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"a lies in both one\.safe\w+ and two\.safe\w+"):
        Shards(tmp_path)


def test_a_folder_without_safetensors_says_what_it_has(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(CheckpointError, match=r"but \['pytorch_model\.bin'\]; convert"):
        Shards(tmp_path)
