# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The shipped layout: what is saved comes back, and nothing that is broken or foreign gets in."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.corpus import HELDOUT_NAMES
from sparda_jax import shipped
from sparda_jax.config import ModelConfig
from sparda_jax.errors import CheckpointError, DataError
from sparda_jax.layers import ForecastParam
from sparda_jax.model import SpardaLM
from sparda_jax.shipped import heldout_texts, load_shipped, save_shipped
from tests.compiled import forward

needs_weights = pytest.mark.skipif(
    not (shipped.FOLDER / shipped.HEADS).is_file(),
    reason="needs the trained weights and heads of sparda_jax/shipped",
)


def parameters(model, kind=nnx.Param):
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {".".join(map(str, path)): np.asarray(slot.get_value()) for path, slot in flat}


@pytest.fixture(scope="module")
def model():
    return SpardaLM(ModelConfig.shipped(), rngs=nnx.Rngs(3))  # bf16, so that saving is exact


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped")
    heads = parameters(model, ForecastParam)
    weights = {name: x for name, x in parameters(model).items() if name not in heads}
    np.savez(folder / "run.npz", **{name: x.view(np.uint16) for name, x in weights.items()})
    save_shipped(folder, folder / "run.npz", model, step=7)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    for name in (shipped.WEIGHTS, shipped.HEADS):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_loaded_bit_for_bit(model, folder, dtype):
    loaded = load_shipped(dtype, folder=folder)
    assert loaded.config.dtype == dtype
    want, got = parameters(model), parameters(loaded)
    assert got.keys() == want.keys()
    for name, array in got.items():
        assert array.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(array.astype(np.float32), want[name].astype(np.float32))


def test_without_heads_the_backbone_is_the_same_and_the_heads_are_fresh(model, folder):
    heads = parameters(model, ForecastParam)
    one, other = (parameters(load_shipped(heads=False, seed=s, folder=folder)) for s in (0, 1))
    for name, want in parameters(model).items():
        same = np.array_equal(one[name], want.astype(np.float32))
        assert same == (name not in heads), name
        assert np.array_equal(one[name], other[name]) == (name not in heads), name


def test_the_heads_say_how_they_were_trained(folder):
    from sparda_jax.weights.tensor_file import TensorFile

    metadata = TensorFile(folder / shipped.HEADS).metadata
    assert metadata["step"] == "7"
    assert json.loads(metadata["sparse_config"])["selected_blocks"] == 32


def test_weights_can_be_given_by_name(model, folder, tmp_path):
    heads = parameters(model, ForecastParam)
    weights = {name: x for name, x in parameters(model).items() if name not in heads}
    save_shipped(tmp_path, weights, heads, step=7)
    for name in (shipped.WEIGHTS, shipped.HEADS):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_missing_file_is_named(copy):
    (copy / shipped.HEADS).unlink()
    with pytest.raises(CheckpointError, match=r"heads\.safetensors is missing"):
        load_shipped(folder=copy)


def test_a_truncated_file_shows_both_sizes(copy):
    path = copy / shipped.WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=rf"{len(data) - 100} bytes.*{len(data)}"):
        load_shipped(folder=copy)


def test_heads_of_another_shape_are_refused_with_both_shapes(copy, model):
    heads = parameters(model, ForecastParam)
    weights = {name: x for name, x in parameters(model).items() if name not in heads}
    heads["layers.3.attention.forecast_proj"] = np.zeros((256, 2, 16), np.float32)
    with pytest.raises(CheckpointError, match=r"\[256, 2, 16\], expected \[256, 2, 32\]"):
        save_shipped(copy, weights, heads)


def test_a_missing_and_an_unknown_tensor_are_named(copy, model):
    heads = parameters(model, ForecastParam)
    heads["layers.7.attention.forecast_proj"] = heads.pop("layers.6.attention.forecast_proj")
    weights = {name: x for name, x in parameters(model).items() if "forecast" not in name}
    with pytest.raises(
        CheckpointError, match=r"8 tensors, expected 8: missing \['layers\.6.*'layers\.7"
    ):
        save_shipped(copy, weights, heads)


def write_heldout(folder, data):
    folder.mkdir()
    (folder / "a.0.txt").write_bytes(data)
    import hashlib

    entry = {"file": "a.0.txt", "source": "a.py", "offset": 0, "bytes": len(data)}
    entry["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"files": [entry]}))


def test_heldout_documents_are_read_with_their_names(tmp_path):
    write_heldout(tmp_path / "held", b"import this\n")
    (text,) = heldout_texts(tmp_path / "held")
    assert (text.name, text.data) == ("a.0", b"import this\n")


def test_a_changed_heldout_document_is_refused(tmp_path):
    write_heldout(tmp_path / "held", b"import this\n")
    (tmp_path / "held" / "a.0.txt").write_bytes(b"import that!\n")
    with pytest.raises(DataError, match="13 bytes that are not the 12 listed"):
        heldout_texts(tmp_path / "held")


def test_heldout_documents_without_a_manifest_are_refused(tmp_path):
    with pytest.raises(DataError, match="0 of 1 manifests"):
        heldout_texts(tmp_path)


@needs_weights
def test_the_shipped_model_predicts_its_own_language():
    text = heldout_texts()[0].data[:512]
    tokens = jnp.asarray(np.frombuffer(text, np.uint8).astype(np.int32))[None]
    logits = np.asarray(forward(load_shipped(), tokens, mode="sparda"))[0]
    right = logits[:-1].argmax(-1) == np.frombuffer(text, np.uint8)[1:]
    assert right.mean() > 0.5  # always guessing a blank gives less than 0.3


@needs_weights
def test_the_shipped_files_are_small():
    size = sum(path.stat().st_size for path in shipped.FOLDER.glob("*.safetensors"))
    assert size <= 12_000_000


@needs_weights
def test_no_shipped_document_was_trained_on():
    manifest = json.loads((shipped.FOLDER / "manifest.json").read_text(encoding="utf-8"))
    trained = [entry for entry in manifest["files"] if entry["split"] == "training"]
    held = [entry for entry in manifest["files"] if entry["split"] == "heldout"]
    assert trained
    assert {entry["name"] for entry in held} >= set(HELDOUT_NAMES)
    assert not {entry["name"] for entry in trained} & set(HELDOUT_NAMES)
    assert not {entry["sha256"] for entry in trained} & {entry["sha256"] for entry in held}
    documents = shipped.FOLDER / shipped.HELDOUT / "manifest.json"
    sources = {e["source"] for e in json.loads(documents.read_text(encoding="utf-8"))["files"]}
    assert len(heldout_texts()) >= 8
    assert sources <= set(HELDOUT_NAMES)
