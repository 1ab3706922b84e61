# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""From a time to a rate and the share of a ceiling, by hand."""

import dataclasses
import typing
from typing import Any

import pytest

from pallas_kernels._roofline import Ceiling, Work

CEILINGS = {"copy": 4e12, "h2d": 50e9, "matmul": 800e12}


@pytest.mark.parametrize(
    ("ceiling", "rate", "share"),
    [("copy", 2e12, 0.5), ("h2d", 2e12, 40.0), ("matmul", 100e12, 0.125)],
)
def test_bytes_count_unless_the_tensor_cores_bound(ceiling, rate, share):
    work = Work(bytes=1_000_000_000, flops=50_000_000_000, ceiling=ceiling)
    assert work.rate(0.5) == pytest.approx(rate)
    assert work.share(0.5, CEILINGS) == pytest.approx(share)


def test_device_memory_bounds_unless_another_is_named():
    assert Work(bytes=1, flops=1).ceiling == "copy"
    assert set(typing.get_args(Ceiling)) == set(CEILINGS)


def test_half_the_time_is_twice_the_rate():
    work = Work(bytes=7, flops=0)
    assert work.rate(1.0) == pytest.approx(7e3)
    assert work.rate(0.5) == pytest.approx(2 * work.rate(1.0))


def test_a_ceiling_that_was_not_measured_is_named():
    with pytest.raises(KeyError, match="h2d"):
        Work(bytes=1, flops=0, ceiling="h2d").share(1.0, {"copy": 1.0})


def test_work_does_not_change():
    work: Any = Work(bytes=1, flops=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        work.bytes = 2


def test_bytes_past_32_bits_are_exact():
    assert Work(bytes=3 << 40, flops=0).rate(1000.0) == 3 << 40
