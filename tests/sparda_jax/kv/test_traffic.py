# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Totals of what a cache did."""

import numpy as np

from sparda_jax.kv.traffic import Traffic


def test_hit_rate_and_bytes_follow_from_the_counts():
    counts = np.array([[3, 1], [4, 0]])
    traffic = Traffic(
        resident=counts, fetched=np.array([[1, 0], [0, 1]]), evicted=counts, record_bytes=10
    )
    assert traffic.hit_rate == 8 / 10
    assert traffic.fetched_bytes.tolist() == [[10, 0], [0, 10]]


def test_nothing_chosen_counts_as_all_resident():
    none = np.zeros((0, 2), np.int64)
    assert Traffic(none, none, none, record_bytes=10).hit_rate == 1.0
