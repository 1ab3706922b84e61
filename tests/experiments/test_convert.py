# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The convert command: look in, import and export, from and to real files."""

import json
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import pytest
import safetensors.numpy

from experiments.convert import Export, Import, Inspect, main
from sparda_jax.errors import CheckpointError
from sparda_jax.testing import tiny_model
from sparda_jax.weights import heads_of, load_forecast_heads, load_pretrained, save_pretrained

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tiny_model(), tmp_path / "m", eos_ids=[2])
    return tmp_path / "m"


def test_a_model_is_described_and_found_complete(folder, capsys):
    summary = main(Inspect(path=str(folder)))
    assert summary["kind"] == "model"
    assert summary["config"]["layers"] == 3
    assert summary["eos_ids"] == [2]
    assert summary["tensors"] == 30
    assert summary["has_heads"]
    assert summary["faults"] is None
    assert json.loads(capsys.readouterr().out)["path"] == str(folder)


def test_a_model_with_faults_is_described_with_them(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    del tensors["model.norm.weight"]
    safetensors.numpy.save_file(tensors, path)
    assert "missing: model.norm.weight, expected [32]" in main(Inspect(path=str(folder)))["faults"]


def test_heads_are_described_without_a_model(golden, folder):
    summary = main(Inspect(path=str(golden / "trainer" / "ckpt-1234.pt")))
    assert summary["kind"] == "heads"
    assert summary["step"] == 1234
    assert summary["model"] == "owner/backbone"
    assert set(summary["tensors"].values()) == {"bfloat16[16, 32]"}
    assert len(summary["tensors"]) == 4
    assert main(Inspect(path=str(folder / "heads.safetensors")))["kind"] == "heads"


def test_an_import_lands_where_loading_finds_it(golden, folder):
    source = golden / "trainer" / "ckpt-1234.pt"
    before = heads_of(load_pretrained(folder)).entry.tobytes()
    with pytest.raises(ValueError, match=r"heads\.safetensors exists; pass --overwrite"):
        main(Import(heads=source, model=str(folder)))
    summary = main(Import(heads=source, model=str(folder), overwrite=True))
    assert (summary["tensors"], summary["shape"], summary["step"]) == (4, [16, 32], 1234)
    model = load_pretrained(folder)
    want = load_forecast_heads(source, model.config)
    got = heads_of(model)
    assert got.entry.tobytes() == want.entry.astype("float32").tobytes() != before


def test_an_export_and_its_import_are_the_same_arrays(folder, tmp_path):
    one, two = tmp_path / "out.pt", tmp_path / "back.safetensors"
    main(Export(heads=folder, model=str(folder), out=one))
    main(Import(heads=one, model=str(folder), out=two))
    was = safetensors.numpy.load_file(folder / "heads.safetensors")
    now = safetensors.numpy.load_file(two)
    assert {n: a.tobytes() for n, a in was.items()} == {n: a.tobytes() for n, a in now.items()}


def test_heads_of_another_model_are_refused(golden, folder, tmp_path):
    source = golden / "nosa" / "indexer.pt"
    with pytest.raises(CheckpointError, match=r"found \[64, 256\], expected \[16, 32\]"):
        main(Import(heads=source, model=str(folder), out=tmp_path / "x.safetensors"))
    assert not (tmp_path / "x.safetensors").exists()


def test_an_unknown_suffix_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"'\.ckpt' must be one of"):
        main(Export(heads=folder, model=str(folder), out=tmp_path / "x.ckpt"))


def test_the_command_line_knows_the_three_commands(golden):
    pytest.importorskip("tyro")
    path = golden / "trainer" / "ckpt-1234.pt"
    run = subprocess.run(
        [sys.executable, "-m", "experiments.convert", "inspect", "--path", str(path)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout)["step"] == 1234


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    pytest.importorskip("tyro")
    hostile = tmp_path / "x.pt"
    with zipfile.ZipFile(hostile, "w") as file:
        file.writestr("x/data.pkl", pickle.dumps({"bait": eval}, 2))
    run = subprocess.run(
        [sys.executable, "-m", "experiments.convert", "inspect", "--path", str(hostile)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    [line] = run.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(
        "x.pt names __builtin__.eval, which no indexer checkpoint needs: refused "
        "before anything ran"
    )
