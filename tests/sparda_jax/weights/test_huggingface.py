# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Loading real checkpoints: other implementations' logits, every fault told, bounded memory."""

import inspect
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import sparda_jax
from sparda_jax.config import SparseConfig
from sparda_jax.errors import CheckpointError
from sparda_jax.layers import ForecastParam
from sparda_jax.model import SpardaLM, forward
from sparda_jax.testing import assert_close_float32, tiny_config, tiny_model
from sparda_jax.weights import heads_of, load_pretrained, save_forecast_heads, save_pretrained
from sparda_jax.weights.huggingface import assemble

CASES = (
    "llama_group_1",
    "llama_group_4",
    "llama_group_16",
    "llama_yarn",
    "llama_3",
    "llama_linear",
    "nosa",
    "minicpm",
    "longrope_plain",
    "longrope_stretched",
)


def parameters(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): slot.get_value() for path, slot in flat}


def assert_same_parameters(got, want, *, ignore="\0"):
    got, want = parameters(got), parameters(want)
    assert got.keys() == want.keys()
    for path, array in want.items():
        if ignore not in path:
            assert got[path].dtype == array.dtype, path
            assert got[path].tobytes() == array.tobytes(), path


@pytest.fixture
def saved(tmp_path):
    """A tiny model and its folder."""
    model = tiny_model()
    save_pretrained(model, tmp_path / "model")
    return model, tmp_path / "model"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_dense_logits_are_those_of_the_transformers_library(golden, case):
    folder = golden / "transformers" / case
    model = load_pretrained(folder)
    assert model.config.dtype == "float32"
    held = np.load(folder / "logits.npz")
    lengths = sorted({int(name.split(".")[0]) for name in held})
    assert len(lengths) == 4
    tokens = np.zeros((4, lengths[-1]), np.int32)
    at = np.zeros((4, 12), np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = held[f"{length}.tokens"]
        at[row, : len(held[f"{length}.positions"])] = held[f"{length}.positions"]
    run = jax.jit(lambda model, x, n, at: forward(model, x, lengths=n, mode="dense", logits=at))
    got = np.asarray(run(model, jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(at)))
    for row, length in enumerate(lengths):
        want = held[f"{length}.logits"]
        error = np.abs(got[row, : len(want)] - want).max() / np.abs(want).max()
        assert error <= 1e-4, (length, error)


def test_the_transformers_cases_have_all_gqa_groups(golden):
    groups = {load_pretrained(golden / "transformers" / c).config.group for c in CASES[:3]}
    assert groups == {1, 4, 16}


@pytest.mark.parity
@pytest.mark.parametrize("name", ["minicpm", "nosa"])
def test_a_golden_model_gives_the_originals_logits(golden, name):
    folder = golden / name
    model = load_pretrained(folder, dtype="float32", heads=folder / "indexer.pt")
    held = np.load(folder / "prefill_L50.npz")
    tokens = jnp.asarray(held["tokens"], jnp.int32)[None]
    at = jnp.asarray(held["logit_positions"], jnp.int32)[None]
    got = jax.jit(lambda model: forward(model, tokens, mode="sparda", logits=at)[0])(model)
    np.testing.assert_allclose(got, held["sparda.logits"], atol=1e-4)


def test_a_golden_checkpoint_keeps_its_bits(golden):
    model = load_pretrained(golden / "minicpm")
    held = safetensors.numpy.load_file(golden / "minicpm" / "model.safetensors")
    assert model.config.dtype == "bfloat16"
    assert model.embed[...].tobytes() == held["model.embed_tokens.weight"].tobytes()
    want = held["lm_head.weight"].T
    np.testing.assert_array_equal(np.asarray(model.lm_head[...]), want)


def test_the_models_own_methods_are_the_same_doors(tmp_path):
    model = tiny_model(seed=3)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    told = []
    model.save_pretrained(
        tmp_path / "m",
        tokenizer_files=[tokenizer],
        eos_ids=[2, 5],
        step=7,
        name="tiny",
        max_shard_bytes=20_000,
        progress=lambda done, total: told.append(done),
    )
    assert len(told) == 30
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "m" / "config.json").read_text())["eos_token_id"] == [2, 5]
    assert json.loads((tmp_path / "m" / "heads.json").read_text())["step"] == 7
    assert_same_parameters(SpardaLM.from_pretrained(tmp_path / "m"), model)
    with pytest.raises(ValueError, match="exists; pass overwrite=True"):
        model.save_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m", overwrite=True, progress=None)
    assert (tmp_path / "m" / "model.safetensors").is_file()
    rule = SparseConfig(local_blocks=2, selected_blocks=7)
    heads = tmp_path / "heads.pt"
    save_forecast_heads(heads, heads_of(tiny_model(seed=4)))
    (tmp_path / "m" / "heads.safetensors").unlink()
    other = SpardaLM.from_pretrained(
        tmp_path / "m", dtype="bfloat16", sparse=rule, heads=heads, progress=None
    )
    assert (other.config.dtype, other.config.sparse) == ("bfloat16", rule)
    want = heads_of(tiny_model(seed=4)).entry.astype("bfloat16")
    assert heads_of(other).entry.tobytes() == want.tobytes()
    drawn = [heads_of(SpardaLM.from_pretrained(tmp_path / "m", seed=s)).entry for s in (1, 2)]
    assert drawn[0].tobytes() != drawn[1].tobytes()


def test_a_mesh_reaches_the_loader_through_the_method(saved):
    mesh = jax.make_mesh((1,), ("data",))
    with pytest.raises(ValueError, match=r"mesh has axes \['data'\], expected one named 'model'"):
        SpardaLM.from_pretrained(saved[1], mesh=mesh)


def test_a_selector_given_at_loading_ranks_in_the_sparda_mode_only(saved):
    folder = saved[1]
    plain = SpardaLM.from_pretrained(folder, progress=None)
    other = SpardaLM.from_pretrained(folder, selector="random", progress=None)
    tokens = jnp.arange(96)[None] % 64
    for mode, selector, given in (
        ("sparda", None, "random"),
        ("sparda", "forecast", "forecast"),
        ("sparse", None, None),
    ):
        got = forward(other, tokens, mode=mode, selector=selector)
        want = forward(plain, tokens, mode=mode, selector=given)
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="unknown selector 'nearest'; known: forecast"):
        SpardaLM.from_pretrained(folder, selector="nearest", progress=None)


def test_the_methods_have_the_arguments_and_defaults_of_the_functions():
    for method, function in (
        (SpardaLM.from_pretrained, load_pretrained),
        (SpardaLM.save_pretrained, save_pretrained),
    ):
        want = list(inspect.signature(function).parameters.values())
        got = list(inspect.signature(method).parameters.values())[-len(want) + 1 :]
        assert [(p.name, p.kind, p.default) for p in got] == [
            (p.name, p.kind, p.default) for p in want[1:]
        ]


def test_a_loaded_model_is_the_saved_one(saved):
    model, folder = saved
    again = load_pretrained(folder)
    assert again.config == model.config
    assert_same_parameters(again, model)
    assert isinstance(again.layers[0].attention.forecast_proj, ForecastParam)
    assert again.layers[0].attention.q_proj.axes == "DNH"


def test_the_callers_rule_and_dtype_win(saved):
    _, folder = saved
    rule = SparseConfig(local_blocks=2, selected_blocks=7)
    model = load_pretrained(folder, sparse=rule, dtype="bfloat16")
    assert model.config.sparse == rule
    assert {array.dtype for array in parameters(model).values()} == {jnp.dtype("bfloat16")}


def test_without_heads_they_are_random_by_seed_and_it_is_said(saved, caplog):
    model, folder = saved
    (folder / "heads.safetensors").unlink()
    one, same, other = (load_pretrained(folder, seed=seed) for seed in (1, 1, 2))
    assert "has no Forecast heads: they start at random" in caplog.text
    assert_same_parameters(one, model, ignore="forecast_proj")
    assert_same_parameters(one, same)
    first, second = heads_of(one), heads_of(other)
    assert not np.array_equal(first.entry, second.entry)
    assert not np.array_equal(first.entry, first.forecast[0])
    assert 0.9 / 32**0.5 < np.abs(np.asarray(first.entry)).max() <= 1 / 32**0.5


def test_heads_are_taken_from_the_argument_then_the_folder_then_the_model(saved, tmp_path):
    model, folder = saved
    other = tiny_model(seed=5)
    save_forecast_heads(tmp_path / "other.pt", heads_of(other))
    loaded = load_pretrained(folder, heads=tmp_path / "other.pt")
    assert heads_of(loaded).entry.tobytes() == heads_of(other).entry.tobytes()

    (folder / "heads.safetensors").rename(tmp_path / "kept.safetensors")
    inside = safetensors.numpy.load_file(tmp_path / "kept.safetensors")
    edit_tensors(folder, lambda tensors: tensors.update(inside))
    loaded = load_pretrained(folder)
    assert_same_parameters(loaded, model)


def test_heads_for_another_grid_are_noted(saved, tmp_path, caplog):
    model, folder = saved
    rule = SparseConfig(block_size=16, pool_size=4, pool_stride=2)
    save_forecast_heads(tmp_path / "x.pt", heads_of(model), sparse=rule)
    load_pretrained(folder, heads=tmp_path / "x.pt")
    assert "trained with block_size=16, the model has 8" in caplog.text
    assert "pool_size" not in caplog.text


def test_sharded_folders_load(saved, tmp_path):
    model, _ = saved
    save_pretrained(model, tmp_path / "many", max_shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert_same_parameters(load_pretrained(tmp_path / "many"), model)


def test_progress_counts_all_bytes(saved):
    model, folder = saved
    told = []
    load_pretrained(folder, progress=lambda done, total: told.append((done, total)))
    backbone = {p: a for p, a in parameters(model).items() if "forecast_proj" not in p}
    total = sum(array.nbytes for array in backbone.values())
    assert len(told) == len(backbone)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_a_wrong_vocab_size_is_one_clear_error(saved):
    _, folder = saved
    edit_config(folder, vocab_size=70)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder)
    assert "2 faults" in str(caught.value)
    assert "model.embed_tokens.weight, found [64, 32], expected [70, 32]" in str(caught.value)
    assert "lm_head.weight, found [64, 32], expected [70, 32]" in str(caught.value)


def test_a_wrong_dtype_is_one_clear_error(saved):
    _, folder = saved

    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)

    edit_tensors(folder, change)
    message = "of the wrong dtype: model.norm.weight, found I32, expected one of"
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        load_pretrained(folder)


def test_a_truncated_shard_is_one_clear_error(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size // 2)
    with pytest.raises(CheckpointError, match=f"{size // 2} bytes but its header describes {size}"):
        load_pretrained(folder)


def test_missing_and_unexpected_tensors_are_told_together(saved):
    _, folder = saved

    def change(tensors):
        tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        del tensors["model.layers.2.mlp.up_proj.weight"]

    edit_tensors(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder)
    assert "missing: model.layers.2.mlp.up_proj.weight, expected [48, 32]" in str(caught.value)
    assert "unexpected: model.layers.1.self_attn.q_proj.bias, found [32]" in str(caught.value)


def test_nosa_without_its_tensors_is_told_so(golden, tmp_path):
    shutil.copytree(golden / "transformers" / "nosa", tmp_path / "nosa")

    def change(tensors):
        for name in list(tensors):
            if name.endswith(("self_attn.A", "delta.weight")):
                del tensors[name]

    edit_tensors(tmp_path / "nosa", change)
    with pytest.raises(CheckpointError, match=r"missing: .*\.A, expected \[2\] \(l = 0, 1\)"):
        load_pretrained(tmp_path / "nosa")


def test_a_small_nosa_without_a_rule_loads_with_64_and_16_blocks_and_says_so(
    golden, tmp_path, caplog
):
    shutil.copytree(golden / "transformers" / "nosa", tmp_path / "nosa")
    edit_config(tmp_path / "nosa", sparse_config=None)
    model = SpardaLM.from_pretrained(tmp_path / "nosa", progress=None)
    assert model.config.token_importance
    sparse = model.config.sparse
    assert (sparse.selected_blocks, sparse.query_blocks, sparse.local_blocks) == (64, 16, 16)
    said = "NOSA checkpoint without sparse_config: 64 selected and 16 query-aware blocks"
    assert [record.levelname for record in caplog.records if said in record.message] == ["WARNING"]


def test_a_tied_head_may_repeat_the_embedding_but_not_differ(tmp_path):
    model = tiny_model(tie_embeddings=True)
    save_pretrained(model, tmp_path / "m")

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(tmp_path / "m", repeat)
    assert_same_parameters(load_pretrained(tmp_path / "m"), model)

    def differ(tensors):
        tensors["lm_head.weight"][3, 4] += 1

    edit_tensors(tmp_path / "m", differ)
    with pytest.raises(CheckpointError, match=r"unexpected: lm_head\.weight, found \[64, 32\]"):
        load_pretrained(tmp_path / "m")


def test_a_mesh_without_a_model_axis_is_refused(saved):
    mesh = jax.make_mesh((1,), ("data",))
    with pytest.raises(ValueError, match=r"mesh has axes \['data'\], expected one named 'model'"):
        load_pretrained(saved[1], mesh=mesh)


def test_assemble_refuses_other_paths_and_shapes(saved):
    arrays = parameters(saved[0])
    head = arrays.pop("lm_head")
    with pytest.raises(ValueError, match=r"33 arrays for 33 parameters: missing \['lm_head'\]"):
        assemble(tiny_config(), arrays | {"other": head})
    with pytest.raises(ValueError, match=r"lm_head is float32\[64, 32\], expected float32\[32, 64"):
        assemble(tiny_config(), arrays | {"lm_head": head.T})


MESH = """
import logging, sys
import jax, numpy as np
from flax import nnx
from sparda_jax.model import SpardaLM, forward
from sparda_jax.weights import save_pretrained
jax.config.update("jax_default_matmul_precision", "highest")
logging.basicConfig(level=logging.WARNING)
mesh = jax.make_mesh((int(sys.argv[2]),), ("model",))
model = SpardaLM.from_pretrained(sys.argv[1], mesh=mesh, progress=None)
for path, slot in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    array = slot.get_value()
    shard = array.addressable_shards[0].data.shape
    print(path[-1], len(array.sharding.device_set), array.size // np.prod(shard))
save_pretrained(model, sys.argv[1] + "-again")
tokens = np.arange(96)[None] % 64
run = jax.jit(forward, static_argnames="mode")
np.savez(sys.argv[1] + ".npz", **{m: run(model, tokens, mode=m) for m in ("dense", "sparda")})
"""


def run_python(code, *arguments, **environment):
    root = pathlib.Path(sparda_jax.__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run


def test_a_mesh_spreads_what_it_divides_and_says_what_it_copies(saved):
    """Four devices: N = 4, F = 48 and V = 64 are spread, K = 2 is copied; saving gathers.

    The spread model gives the logits of the whole one.
    """
    model, folder = saved
    flags = "--xla_force_host_platform_device_count=4"
    run = run_python(MESH, folder, 4, XLA_FLAGS=flags)
    parts = {name: (int(a), int(b)) for name, a, b in map(str.split, run.stdout.splitlines())}
    copied = {"k_proj", "v_proj", "scale", "forecast_proj", "entry_forecast_proj"}
    assert parts == {name: (4, 1 if name in copied else 4) for name in parts}
    assert parts.keys() > copied
    assert "model=4 divides no sharded axis of ['k_proj', 'v_proj']" in run.stderr
    assert_same_parameters(load_pretrained(f"{folder}-again"), model)
    with np.load(f"{folder}.npz") as spread:
        assert sorted(spread) == ["dense", "sparda"]
        for mode, logits in spread.items():
            assert_close_float32(logits, forward(model, jnp.arange(96)[None] % 64, mode=mode))


MEMORY = """
import resource, sys
import jax
from sparda_jax.weights import load_pretrained
jax.block_until_ready(jax.jit(lambda x: x.T + 1)(jax.numpy.ones((8, 8), "bfloat16")))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_pretrained(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_loading_needs_the_model_and_two_of_its_largest_tensor(tmp_path):
    """The host holds one tensor and its transposition, whatever the number of tensors."""
    sizes = {"width": 1024, "mlp_width": 4096, "layers": 6, "vocab_size": 40_000}
    model = tiny_model(dtype="bfloat16", **sizes)
    save_pretrained(model, tmp_path / "m", max_shard_bytes=100_000_000)
    held = sum(array.nbytes for array in parameters(model).values())
    largest = 2 * 40_000 * 1024
    extra = int(run_python(MEMORY, tmp_path / "m").stdout) - held
    assert held > 3.5 * largest
    assert extra < 2 * largest + 60e6, (held, extra)


def test_a_plain_llama_says_that_it_is_dense(golden, caplog):
    with caplog.at_level(logging.INFO):
        load_pretrained(golden / "transformers" / "llama_group_1")
    assert "no sparse_config: attention is dense" in caplog.text
