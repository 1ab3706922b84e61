# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Norm, MLP and the two kinds of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparda_jax.layers import MLP, ForecastParam, RMSNorm, init_forecast, init_weight
from sparda_jax.testing import assert_close_float32, tiny_config, tiny_model
from tests import oracles


def test_the_norm_divides_by_the_root_mean_square(key):
    x = jax.random.normal(key, (2, 3, 8)) * 5
    norm = RMSNorm(8, 1e-5, "float32")
    norm.scale[...] = jnp.arange(8.0)
    got = norm(x).reshape(6, 8)
    want = oracles.rms_norm(np.asarray(x, np.float64).reshape(6, 8), np.arange(8.0), 1e-5)
    assert_close_float32(got, want)


def test_a_zero_row_stays_zero():
    assert not np.asarray(RMSNorm(4, 1e-6, "float32")(jnp.zeros((1, 1, 4)))).any()


def test_the_norm_takes_its_statistics_in_float32():
    x = jnp.full((1, 1, 512), 300.0, jnp.bfloat16)
    got = RMSNorm(512, 1e-6, "bfloat16")(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), 1.0, atol=4e-3)


def test_the_norm_casts_before_it_scales():
    x = jnp.array([[[1.0, 2.0, 3.0, 5.0]]], jnp.bfloat16)
    norm = RMSNorm(4, 0.0, "bfloat16")
    norm.scale[...] = jnp.array([3.0, 5.0, 7.0, 9.0], jnp.bfloat16)
    unit = np.asarray(x, np.float32) / np.sqrt(np.mean(np.asarray(x, np.float32) ** 2))
    rounded = jnp.asarray(unit).astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm(x), rounded * norm.scale[...][None, None])


def test_the_mlp_gates_with_silu(key):
    mlp = MLP(tiny_config(), rngs=nnx.Rngs(1))
    x = jax.random.normal(key, (1, 5, 32))
    a = np.asarray(x, np.float64)[0]
    gate, up, down = (
        np.asarray(weight[...], np.float64)
        for weight in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )
    assert_close_float32(mlp(x)[0], (oracles.silu(a @ gate) * (a @ up)) @ down)


def test_a_weight_starts_with_the_deviation_of_its_fan_in(key):
    weight = init_weight(key, (400, 300), "DF", 400, "float32")
    assert float(jnp.std(weight[...])) == pytest.approx(0.05, rel=0.02)
    assert float(jnp.mean(weight[...])) == pytest.approx(0.0, abs=1e-3)
    assert weight.axes == "DF"
    assert type(weight) is nnx.Param


def test_a_forecast_starts_uniform_within_one_over_the_root_of_the_width(key):
    weight = init_forecast(key, tiny_config(width=1024, dtype="float32"))
    assert isinstance(weight, ForecastParam)
    assert weight[...].shape == (1024, 2, 8)
    bound = 0.03125  # 0.015625 at the width of MiniCPM4.1-8B, 4096
    assert float(jnp.max(jnp.abs(weight[...]))) <= bound
    assert float(jnp.max(jnp.abs(weight[...]))) > 0.999 * bound
    assert float(jnp.std(weight[...])) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_forecast_weights_can_be_told_from_all_others_by_their_type():
    heads = nnx.state(tiny_model(), ForecastParam)
    names = sorted(".".join(map(str, path)) for path, _ in nnx.to_flat_state(heads))
    assert names == [
        "layers.0.attention.entry_forecast_proj",
        "layers.0.attention.forecast_proj",
        "layers.1.attention.forecast_proj",
    ]


def test_every_parameter_names_its_axes():
    for path, param in nnx.to_flat_state(nnx.state(tiny_model(), nnx.Param)):
        assert len(param.axes) == param[...].ndim, path
        assert set(param.axes) <= set("VDNKHF"), path
