# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The tolerances themselves: what they let pass, and what they must not."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.testing import (
    ORIGINAL_TOLERANCES,
    assert_close_bfloat16,
    assert_close_float32,
    assert_same_choices,
    assert_within_reference_rounding,
    original_tolerance,
    tiny_config,
    tiny_model,
)


def test_float32_is_held_relative_to_the_value_and_to_the_greatest():
    want = np.array([100.0, 0.0, 1.0])
    assert_close_float32(want + np.array([3.9e-3, 1.9e-3, 2e-3]), want)
    for error in ([4.1e-3, 0, 0], [0, 2.1e-3, 0], [np.nan, 0, 0]):
        with pytest.raises(AssertionError):
            assert_close_float32(want + np.array(error), want)


def test_an_empty_array_is_close_to_an_empty_array():
    assert_close_float32(np.zeros((0, 3)), np.zeros((0, 3)))
    assert_close_bfloat16(jnp.zeros((2,)), jnp.zeros((2,)))


def test_bfloat16_may_err_a_little_everywhere_and_more_in_one_percent():
    want = np.zeros(1000)
    got = np.full(1000, 9e-3)
    got[:10] = 3.9e-2
    assert_close_bfloat16(got, want)
    got[10] = 3.9e-2
    with pytest.raises(AssertionError, match=r"98\.90% of the elements are within 1e-2"):
        assert_close_bfloat16(got, want)
    got[:11] = [4.1e-2, *[0.0] * 10]
    with pytest.raises(AssertionError, match=r"the greatest error is 0\.041, at most 4e-2"):
        assert_close_bfloat16(got, want)


def test_low_precision_is_held_to_the_error_of_its_reference():
    exact = np.linspace(-1, 1, 101)
    rough = exact + 0.01 * (-1.0) ** np.arange(101)
    assert_within_reference_rounding(exact + 0.0149, rough, exact)
    with pytest.raises(AssertionError, match=r"RMS error 0.0151 exceeds 1.5 times .* 0.01"):
        assert_within_reference_rounding(exact + 0.0151, rough, exact)
    assert_within_reference_rounding(exact + 0.0151, rough, exact, factor=2.0)


def test_a_reference_without_error_says_nothing_about_rounding():
    with pytest.raises(AssertionError, match="nothing to compare rounding with"):
        assert_within_reference_rounding(np.ones(3), np.ones(3), np.ones(3))


def test_a_thousandth_of_the_rows_may_choose_otherwise():
    want = np.zeros((2, 500, 3), int)
    got = want.copy()
    got[1, 7, 2] = 1
    assert_same_choices(got, want)
    with pytest.raises(AssertionError, match=re.escape("1 of 1000 rows differ, 0.00% may")):
        assert_same_choices(got, want, share=0.0)
    got[0, 3] = 1
    message = "2 of 1000 rows differ, 0.10% may; the first is [[0, 3]]"
    with pytest.raises(AssertionError, match=re.escape(message)):
        assert_same_choices(got, want)


@pytest.mark.parametrize(
    "check", [assert_close_float32, assert_close_bfloat16, assert_same_choices]
)
def test_shapes_must_be_equal(check):
    with pytest.raises(AssertionError, match=re.escape("got.shape=(2, 1) must equal")):
        check(np.zeros((2, 1)), np.zeros((1, 2)))
    with pytest.raises(AssertionError, match=re.escape("shapes=((2,), (2,), (3,))")):
        assert_within_reference_rounding(np.zeros(2), np.zeros(2), np.zeros(3))


def test_short_prompts_are_held_twenty_times_tighter():
    for name, bound in ORIGINAL_TOLERANCES.items():
        assert original_tolerance(name, 65) == bound
        assert original_tolerance(name, 64) == bound / 20


def test_tiny_models_of_one_seed_are_equal_and_fields_can_be_replaced():
    one, same, other = tiny_model(), tiny_model(), tiny_model(1)
    np.testing.assert_array_equal(one.embed[...], same.embed[...])
    assert not np.array_equal(one.embed[...], other.embed[...])
    assert tiny_config(layers=5).layers == 5
