# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Forecast heads in and out of the original's files."""

import dataclasses
import json
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sparda_jax.config import ModelConfig
from sparda_jax.errors import CheckpointError
from sparda_jax.layers import ForecastParam
from sparda_jax.testing import tiny_config, tiny_model
from sparda_jax.weights.config import parse_config, parse_sparse
from sparda_jax.weights.sparda_torch import (
    apply_forecast_heads,
    head_paths,
    heads_from_tensors,
    heads_of,
    is_head,
    load_forecast_heads,
    read_indexer,
    save_forecast_heads,
)
from sparda_jax.weights.torch_pickle import write_torch_file

CONFIG = tiny_config()
FUTURE = "model.layers.{}.self_attn.q_future_proj.weight"
ENTRY = "model.layers.0.self_attn.q_curr_proj.weight"


def tensors(dtype=np.float32, prefix="", last=True):
    rng = np.random.default_rng(0)
    names = [FUTURE.format(layer) for layer in range(CONFIG.layers - (not last))] + [ENTRY]
    return {prefix + name: rng.normal(size=(16, 32)).astype(dtype) for name in names}


def assert_same_heads(got, want):
    assert len(got.forecast) == len(want.forecast)
    for a, b in zip((*got.forecast, got.entry), (*want.forecast, want.entry), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def assert_from(heads, source, prefix=""):
    """[K·H, D] → [D K H], by its definition: element (d, k, h) is row k·H + h, column d."""
    names = [FUTURE.format(layer) for layer in range(CONFIG.layers - 1)] + [ENTRY]
    for array, name in zip((*heads.forecast, heads.entry), names, strict=True):
        stored = source[prefix + name]
        assert array.shape == (32, 2, 8)
        for d, k, h in [(0, 0, 0), (31, 1, 7), (5, 0, 6), (9, 1, 2)]:
            assert array[d, k, h] == stored[k * 8 + h, d]


@pytest.mark.parametrize("name", ["minicpm", "nosa"])
def test_the_originals_two_forms_give_the_same_heads(golden, name):
    config = parse_config(json.loads((golden / name / "config.json").read_text()))
    torch = load_forecast_heads(golden / name / "indexer.pt", config)
    safe = load_forecast_heads(golden / name / "indexer.safetensors", config)
    assert_same_heads(torch, safe)
    assert torch.step == 0
    assert parse_sparse(torch.sparse_config) == config.sparse
    assert safe.step is None
    assert torch.entry.dtype == jnp.bfloat16


def test_a_trainers_checkpoint_is_read(golden):
    heads = load_forecast_heads(golden / "trainer" / "ckpt-1234.pt", CONFIG)
    assert (heads.step, heads.model) == (1234, "owner/backbone")
    assert heads.sparse_config["training_kernel_size"] == 2
    expected = np.load(golden / "trainer" / "expected.npz")
    assert_from(heads, {name: expected[name].astype(ml_dtypes.bfloat16) for name in expected})


@pytest.mark.parametrize(
    "wrapper", [None, "state_dict", "model_state_dict", "model", "net", "weights"]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_wrappers_and_prefixes_do_not_matter(tmp_path, wrapper, prefix):
    state = tensors(prefix=prefix)
    other = {"lm_head.weight": np.zeros((3, 3), np.float32), "full_model": True}
    value = {**state, **other} if wrapper is None else {wrapper: {**state, **other}}
    write_torch_file(tmp_path / "x.pt", value)
    assert_from(load_forecast_heads(tmp_path / "x.pt", CONFIG), state, prefix)


@pytest.mark.parametrize("last", [True, False])
def test_the_last_layers_forecast_may_be_absent(tmp_path, last):
    safetensors.numpy.save_file(tensors(last=last), tmp_path / "x.safetensors")
    assert len(load_forecast_heads(tmp_path / "x.safetensors", CONFIG).forecast) == 2


def test_heads_may_be_spread_over_the_files_of_a_folder(tmp_path):
    state = tensors()
    names = list(state)
    safetensors.numpy.save_file({n: state[n] for n in names[:2]}, tmp_path / "a.safetensors")
    safetensors.numpy.save_file({n: state[n] for n in names[2:]}, tmp_path / "b.safetensors")
    assert_from(load_forecast_heads(tmp_path, CONFIG), state)


def test_heads_safetensors_of_a_folder_comes_first(tmp_path):
    state = tensors()
    safetensors.numpy.save_file(state, tmp_path / "heads.safetensors")
    other = {name: array + 1 for name, array in state.items()}
    safetensors.numpy.save_file(other, tmp_path / "a.safetensors")
    assert_from(load_forecast_heads(tmp_path, CONFIG), state)


def test_a_path_without_heads_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_forecast_heads(tmp_path / "none.pt", CONFIG)
    with pytest.raises(CheckpointError, match=r"holds no safetensors; name the \.pt file"):
        load_forecast_heads(tmp_path, CONFIG)
    write_torch_file(tmp_path / "x.pt", {})
    with pytest.raises(CheckpointError, match="3 layers: 3 faults"):
        load_forecast_heads(tmp_path / "x.pt", CONFIG)


def test_a_torch_file_that_is_no_dictionary_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02].")
    with pytest.raises(CheckpointError, match="holds a list, expected a dictionary"):
        read_indexer(tmp_path / "x.pt")


def test_unreadable_metadata_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tensors(), path, metadata={"step": "many"})
    with pytest.raises(CheckpointError, match=r"x\.safetensors has unreadable metadata"):
        load_forecast_heads(path, CONFIG)


def test_every_fault_stands_in_one_error_with_both_shapes():
    state = tensors()
    del state[FUTURE.format(0)]
    state[FUTURE.format(1)] = np.zeros((8, 32), np.float32)
    state[ENTRY] = np.zeros((16, 32), np.int32)
    state[FUTURE.format(3)] = np.zeros((16, 32), np.float32)
    state[ENTRY.replace("layers.0", "layers.1")] = np.zeros((16, 32), np.float32)
    state["module." + FUTURE.format(2)] = np.zeros((16, 32), np.float32)
    with pytest.raises(CheckpointError) as caught:
        heads_from_tensors(state, CONFIG, where="the file")
    text = str(caught.value)
    for line in (
        "the file does not fit a model of 3 layers: 6 faults",
        f"missing: {FUTURE.format(0)}, expected [16, 32]",
        f"misshapen: {FUTURE.format(1)}, found [8, 32], expected [16, 32]",
        f"of the wrong dtype: {ENTRY}, found int32",
        f"unexpected: {FUTURE.format(3)}, found [16, 32]",
        "unexpected: model.layers.1.self_attn.q_curr_proj.weight, found [16, 32]",
        f"twice: module.{FUTURE.format(2)}",
    ):
        assert line in text


def test_f64_heads_become_f32():
    heads = heads_from_tensors(tensors(np.float64), CONFIG, where="the file")
    assert heads.entry.dtype == jnp.float32


def test_head_names_are_told_apart():
    assert is_head("module.model.layers.12.self_attn.q_future_proj.weight")
    assert is_head("layers.0.self_attn.q_curr_proj.weight")
    assert not is_head("model.layers.0.self_attn.q_proj.weight")
    assert not is_head("model.sublayers.0.self_attn.q_curr_proj.weight")


def test_heads_go_into_a_model_and_come_out(tmp_path):
    source = heads_of(tiny_model(seed=1), step=7, name="tiny")
    model = tiny_model(seed=2)
    backbone = np.asarray(model.layers[0].attention.q_proj[...])
    apply_forecast_heads(model, source)
    assert_same_heads(heads_of(model), source)
    assert isinstance(model.layers[0].attention.forecast_proj, ForecastParam)
    np.testing.assert_array_equal(model.layers[0].attention.q_proj[...], backbone)
    assert parse_sparse(source.sparse_config) == CONFIG.sparse


def test_heads_take_the_models_dtype():
    model = tiny_model(dtype="bfloat16")
    apply_forecast_heads(model, heads_of(tiny_model()))
    assert model.layers[1].attention.forecast_proj[...].dtype == jnp.bfloat16


def test_the_paths_of_heads_are_the_models():
    assert head_paths(CONFIG) == [
        "layers.0.attention.forecast_proj",
        "layers.1.attention.forecast_proj",
        "layers.0.attention.entry_forecast_proj",
    ]


def test_heads_of_another_model_show_both_numbers():
    model = tiny_model()
    with pytest.raises(CheckpointError, match="4 heads for a model of 3"):
        apply_forecast_heads(model, heads_of(tiny_model(layers=4)))
    with pytest.raises(
        CheckpointError, match=r"head 0 is \[32, 4, 8\], the model's is \[32, 2, 8\]"
    ):
        apply_forecast_heads(model, heads_of(tiny_model(kv_heads=4)))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_comes_back_bit_for_bit(tmp_path, suffix, dtype):
    heads = heads_of(tiny_model(dtype=dtype), step=42, name="tiny")
    path = tmp_path / f"x.{suffix}"
    save_forecast_heads(path, heads)
    back = load_forecast_heads(path, CONFIG)
    assert_same_heads(back, heads)
    assert (back.step, back.model) == (42, "tiny")
    assert back.sparse_config == heads.sparse_config


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_what_is_not_known_is_not_written(tmp_path, suffix):
    heads = dataclasses.replace(heads_of(tiny_model()), sparse_config=None)
    path = tmp_path / f"x.{suffix}"
    save_forecast_heads(path, heads)
    _, notes = read_indexer(path)
    assert notes == {}


def test_an_export_has_the_originals_tensors_and_zeros_for_the_last_layer(tmp_path):
    save_forecast_heads(tmp_path / "x.safetensors", heads_of(tiny_model(), step=3))
    held = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert {name: array.shape for name, array in held.items()} == dict.fromkeys(
        [FUTURE.format(layer) for layer in range(3)] + [ENTRY], (16, 32)
    )
    assert not held[FUTURE.format(2)].any()
    assert all(held[name].any() for name in (FUTURE.format(0), FUTURE.format(1), ENTRY))
    beside = json.loads((tmp_path / "x.json").read_text())
    assert beside["step"] == 3
    assert beside["sparse_config"]["kernel_size"] == 4


def test_the_rule_that_is_written_can_be_chosen(tmp_path):
    rule = dataclasses.replace(CONFIG.sparse, selected_blocks=9)
    save_forecast_heads(tmp_path / "x.bin", heads_of(tiny_model()), sparse=rule, form="torch")
    assert parse_sparse(load_forecast_heads(tmp_path / "x.bin", CONFIG).sparse_config) == rule


def test_a_suffix_that_tells_no_form_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path\.suffix='\.ckpt' must be one of"):
        save_forecast_heads(tmp_path / "x.ckpt", heads_of(tiny_model()))


def test_the_published_model_exports_33_tensors():
    assert len(head_paths(ModelConfig.minicpm4_1_8b())) + 1 == 33
