# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The table of names: every parameter once, transposed as the formulas ask, faults in one error."""

import jax
import numpy as np
import pytest
from flax import nnx

from sparda_jax.config import ModelConfig
from sparda_jax.errors import CheckpointError
from sparda_jax.model import SpardaLM
from sparda_jax.testing import tiny_config
from sparda_jax.weights.names import (
    axis_sizes,
    check_tensors,
    expected_tensors,
    has_importance,
    specification,
)
from sparda_jax.weights.tensor_file import TensorEntry


def nosa_config():
    sparse = tiny_config().sparse
    fields = {name: getattr(sparse, name) for name in sparse.__slots__} | {"query_blocks": 1}
    return tiny_config(token_importance=True, sparse=type(sparse)(**fields))


CONFIGS = {
    "plain": tiny_config(),
    "tied": tiny_config(tie_embeddings=True),
    "importance": nosa_config(),
    "odd head dim": tiny_config(heads=6, kv_heads=3, head_dim=10),
}


def entries(config):
    return {
        name: TensorEntry("BF16", target.torch_shape, 0, 0)
        for name, target in expected_tensors(config).items()
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_table_covers_every_parameter_once_with_its_shape_and_axes(config):
    model = nnx.eval_shape(lambda: SpardaLM(config, rngs=nnx.Rngs(0)))
    slots = {
        ".".join(map(str, path)): slot
        for path, slot in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if "forecast" not in str(path[-1])
    }
    targets = {target.path: target for target in expected_tensors(config).values()}
    assert targets.keys() == slots.keys()
    assert len(targets) == len(expected_tensors(config))
    for path, target in targets.items():
        assert target.shape == slots[path].get_value().shape, path
        assert target.letters == slots[path].axes, path


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_tensor_goes_there_and_back(config):
    for number, target in enumerate(expected_tensors(config).values()):
        stored = np.random.default_rng(number).normal(size=target.torch_shape)
        ours = target.from_torch(stored)
        assert ours.shape == target.shape
        np.testing.assert_array_equal(target.to_torch(ours), stored)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_an_input_projection_gives_what_the_torch_layer_gives(name):
    config = tiny_config()
    target = expected_tensors(config)[f"model.layers.1.self_attn.{name}.weight"]
    rng = np.random.default_rng(0)
    stored, x = rng.normal(size=target.torch_shape), rng.normal(size=config.width)
    want = (stored @ x).reshape(-1, config.head_dim)
    np.testing.assert_allclose(np.einsum("d,dnh->nh", x, target.from_torch(stored)), want)


def test_the_output_projection_gives_what_the_torch_layer_gives():
    config = tiny_config()
    target = expected_tensors(config)["model.layers.0.self_attn.o_proj.weight"]
    rng = np.random.default_rng(0)
    stored = rng.normal(size=target.torch_shape)
    y = rng.normal(size=(config.heads, config.head_dim))
    want = stored @ y.reshape(-1)
    np.testing.assert_allclose(np.einsum("nh,nhd->d", y, target.from_torch(stored)), want)


def test_the_importance_projection_gives_what_the_torch_layer_gives():
    config = nosa_config()
    target = expected_tensors(config)["model.layers.2.self_attn.delta.weight"]
    rng = np.random.default_rng(0)
    stored = rng.normal(size=target.torch_shape)
    v = rng.normal(size=(config.kv_heads, config.head_dim))
    want = stored @ v.reshape(-1)
    np.testing.assert_allclose(np.einsum("kh,khj->j", v, target.from_torch(stored)), want)


def test_a_published_model_has_the_published_shapes():
    targets = expected_tensors(ModelConfig.minicpm4_1_8b())
    shapes = {name: target.torch_shape for name, target in targets.items()}
    assert len(shapes) == 3 + 9 * 32
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (73448, 4096)
    assert shapes["model.layers.31.self_attn.k_proj.weight"] == (256, 4096)
    assert shapes["model.layers.31.mlp.down_proj.weight"] == (4096, 16384)
    nosa = expected_tensors(ModelConfig.nosa_8b())
    assert nosa["model.layers.0.self_attn.delta.weight"].torch_shape == (2, 256)
    assert nosa["model.layers.0.self_attn.A"].torch_shape == (2,)


def test_token_importance_shows_in_the_names():
    assert has_importance(entries(nosa_config()))
    assert not has_importance(entries(tiny_config()))


def test_a_complete_checkpoint_passes():
    config = nosa_config()
    found = entries(config)
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = TensorEntry("F32", (4,), 0, 0)
    check_tensors(found, expected_tensors(config), where="here")


def test_every_fault_stands_in_one_error_with_both_shapes():
    config = tiny_config()
    found = entries(config)
    del found["lm_head.weight"]
    for layer in range(config.layers):
        del found[f"model.layers.{layer}.self_attn.k_proj.weight"]
    found["model.norm.weight"] = TensorEntry("BF16", (31,), 0, 0)
    found["model.embed_tokens.weight"] = TensorEntry("BF16", (60, 32), 0, 0)
    found["model.layers.1.mlp.up_proj.weight"] = TensorEntry("I8", (48, 32), 0, 0)
    found["model.layers.2.mlp.up_proj.bias"] = TensorEntry("BF16", (48,), 0, 0)
    found["surprise"] = TensorEntry("BF16", (2, 3), 0, 0)
    with pytest.raises(CheckpointError) as caught:
        check_tensors(found, expected_tensors(config), where="the folder")
    text = str(caught.value)
    for line in (
        f"the folder does not fit its config.json: 9 faults in {len(found)} tensors, 30 expected",
        "missing: lm_head.weight, expected [64, 32]",
        "missing: model.layers.{l}.self_attn.k_proj.weight, expected [16, 32] (l = 0, 1, 2)",
        "misshapen: model.norm.weight, found [31], expected [32]",
        "misshapen: model.embed_tokens.weight, found [60, 32], expected [64, 32]",
        "of the wrong dtype: model.layers.1.mlp.up_proj.weight, found I8, expected one of",
        "unexpected: model.layers.2.mlp.up_proj.bias, found [48]",
        "unexpected: surprise, found [2, 3]",
    ):
        assert line in text


@pytest.mark.parametrize(("shards", "sharded"), [(1, 9), (2, 9), (4, 7), (3, 3), (5, 0)])
def test_an_axis_is_sharded_where_the_mesh_divides_it(shards, sharded):
    """N = 4, K = 2, F = 48, V = 64: 4 divides all but K, 3 divides F only, 5 none."""
    config = tiny_config(layers=1)
    mesh = jax.sharding.AbstractMesh((shards,), ("model",))
    specs = {
        name: (target, specification(target, mesh))
        for name, target in expected_tensors(config).items()
    }
    assert sum(any(spec) for _, spec in specs.values()) == sharded
    sizes = axis_sizes(config)
    for target, spec in specs.values():
        assert len(spec) == len(target.shape)
        for letter, axis in zip(target.letters, spec, strict=True):
            assert axis is None or (letter in "NKFV" and sizes[letter] % shards == 0)
