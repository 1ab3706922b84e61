# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: relative, norm-preserving, and a pure function of position and reach."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.config import RopeConfig
from sparda_jax.rope import apply_rope, base_frequencies, make_rope
from sparda_jax.testing import assert_close_float32
from tests import oracles

PLAIN = RopeConfig()
LONG = RopeConfig(
    kind="longrope",
    original_max_positions=100,
    max_positions=400,
    short_factor=(1.0, 1.5, 2.0, 2.5),
    long_factor=(1.0, 3.0, 5.0, 9.0),
)


def rotations(rope, dim, positions, reach):
    return make_rope(rope, dim, jnp.asarray(positions), jnp.asarray(reach))


def test_rotation_turns_each_pair_by_position_times_frequency(key):
    positions = [0, 1, 5, 77]
    x = jax.random.normal(key, (1, 4, 3, 8))
    got = apply_rope(x, rotations(PLAIN, 8, [positions], [78]), PLAIN)
    assert_close_float32(got[0], oracles.rotate(np.asarray(x)[0], positions, 10000.0))


def test_position_zero_is_left_alone(key):
    x = jax.random.normal(key, (1, 1, 2, 8))
    np.testing.assert_array_equal(apply_rope(x, rotations(PLAIN, 8, [[0]], [1]), PLAIN), x)


def test_rotation_keeps_norms_and_sees_only_distances(key):
    q, k = jax.random.normal(key, (2, 1, 1, 1, 16))
    products = []
    for shift in (0, 3, 250):
        at = [rotations(PLAIN, 16, [[p + shift]], [999]) for p in (9, 2)]
        a, b = (apply_rope(x, rope, PLAIN) for x, rope in zip((q, k), at, strict=True))
        products.append(float(jnp.sum(a * b)))
        assert float(jnp.linalg.norm(a)) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-5)
    np.testing.assert_allclose(products, products[0], atol=2e-4)


def test_long_factors_hold_for_a_sequence_that_reaches_beyond_the_original_length():
    positions = [[0, 7, 60], [0, 7, 60], [0, 7, 60]]
    got = rotations(LONG, 8, positions, [100, 101, 61])
    scale = math.sqrt(1 + math.log(4) / math.log(100))
    for row, factors in enumerate((LONG.short_factor, LONG.long_factor, LONG.short_factor)):
        angle = np.array(
            [[p / f * 10000.0 ** (-i / 4) for i, f in enumerate(factors)] for p in (0, 7, 60)]
        )
        np.testing.assert_allclose(got.cos[row], scale * np.cos(angle), atol=1e-5)
        np.testing.assert_allclose(got.sin[row], scale * np.sin(angle), atol=1e-5)


def test_a_long_call_never_changes_a_short_one():
    before = rotations(LONG, 8, [[3, 50]], [51])
    rotations(LONG, 8, [[3, 350]], [351])
    np.testing.assert_array_equal(rotations(LONG, 8, [[3, 50]], [51]).cos, before.cos)


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    yarn = RopeConfig(kind="yarn", factor=4.0, original_max_positions=32768)
    plain, stretched = base_frequencies(PLAIN, 128), base_frequencies(yarn, 128)
    turns = 32768 * plain / (2 * math.pi)
    np.testing.assert_array_equal(stretched[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(stretched[turns < 0.8], plain[turns < 0.8] / 4, rtol=1e-6)
    between = (turns < 20) & (turns > 2)
    assert between.any()
    assert ((stretched < plain) & (stretched > plain / 4))[between].all()
    assert (np.diff(stretched) < 0).all()


def test_linear_divides_every_frequency():
    linear = RopeConfig(kind="linear", factor=4.0)
    plain = base_frequencies(PLAIN, 16)
    np.testing.assert_allclose(base_frequencies(linear, 16), plain / 4, rtol=1e-6)
    assert linear.attention_factor == 1.0


def test_llama3_keeps_what_turns_often_and_divides_what_turns_rarely():
    llama = RopeConfig(
        kind="llama3", theta=500000.0, factor=8.0, original_max_positions=8192, fast_turns=4.0
    )
    got = base_frequencies(llama, 128)
    for i, frequency in enumerate(got):
        plain = 500000.0 ** (-i / 64)
        turns = 8192 * plain / (2 * math.pi)
        kept = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        assert frequency == pytest.approx(plain * kept + plain / 8 * (1 - kept), rel=1e-6)
    assert llama.attention_factor == 1.0


def test_frequencies_start_at_one_and_fall_geometrically():
    got = base_frequencies(RopeConfig(theta=100.0), 8)
    np.testing.assert_allclose(got, 100.0 ** (-np.arange(4) / 4), rtol=1e-6)
    assert got.dtype == np.float32


@pytest.mark.parametrize("compute", ["float32", "model"])
def test_bfloat16_heads_stay_bfloat16_and_near_the_exact_rotation(key, compute):
    rope = RopeConfig(compute_dtype=compute)
    x = jax.random.normal(key, (1, 40, 2, 16), jnp.bfloat16)
    at = rotations(rope, 16, [list(range(40))], [40])
    got = apply_rope(x, at, rope)
    assert got.dtype == jnp.bfloat16
    exact = oracles.rotate(np.asarray(x, np.float64)[0], range(40), 10000.0)
    error = np.abs(np.asarray(got, np.float64)[0] - exact)
    # One rounding of the result, or also of both tables and both products.
    assert error.max() < (2**-8 if compute == "float32" else 2**-6) * np.abs(exact).max()


def test_rotating_in_the_models_dtype_rounds_more_than_in_float32(key):
    x = jax.random.normal(key, (1, 64, 2, 16), jnp.bfloat16)
    errors = []
    for compute in ("float32", "model"):
        rope = RopeConfig(compute_dtype=compute)
        at = rotations(rope, 16, [list(range(64))], [64])
        exact = oracles.rotate(np.asarray(x, np.float64)[0], range(64), 10000.0)
        errors.append(
            np.sqrt(np.mean((np.asarray(apply_rope(x, at, rope)[0], float) - exact) ** 2))
        )
    assert errors[0] < 0.8 * errors[1]


def test_rotations_are_one_function_of_device_arrays():
    run = jax.jit(lambda p, r: make_rope(LONG, 8, p, r))
    eager = rotations(LONG, 8, [[1, 120]], [121])
    np.testing.assert_allclose(
        run(jnp.array([[1, 120]]), jnp.array([121])).cos, eager.cos, atol=1e-6
    )
    assert eager.positions.tolist() == [[1, 120]]
