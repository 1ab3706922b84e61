# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What is refused before work starts, and where K and V go."""

import logging

import numpy as np
import pytest

from sparda_jax import capacity
from sparda_jax.capacity import (
    check_prompts,
    choose_place,
    free_device_bytes,
    full_kv_bytes,
    round_capacity,
)
from sparda_jax.errors import CapacityError, DataError
from sparda_jax.testing import tiny_config

CONFIG = tiny_config(max_context=100)
FULL = full_kv_bytes(CONFIG, 2, 64)


def test_full_kv_counts_every_record():
    assert FULL == 3 * 2 * 2 * 8 * (2 * 8 * 8 * 4)  # layers, rows, heads, blocks, record


@pytest.mark.parametrize("chunk", [8, 24, 64])
def test_capacities_hold_the_length_and_waste_an_eighth_at_most(chunk):
    for tokens in range(1, 3000, 7):
        room = round_capacity(tokens, chunk)
        assert room >= tokens
        assert room % chunk == 0
        assert room - tokens < max(tokens / 8 + chunk, chunk)
    assert len({round_capacity(tokens, chunk) for tokens in range(1024, 2048)}) <= 10


def test_auto_takes_the_device_if_it_fits_and_logs_the_arithmetic(caplog):
    with caplog.at_level(logging.INFO):
        assert choose_place("auto", "sparda", CONFIG, 2, 64, 10 * FULL) == "resident"
    assert f"{FULL * 4 // 3 / 2**20:.1f} MiB" in caplog.text
    assert f"{9 * FULL / 2**20:.1f} MiB; resident" in caplog.text


def test_auto_takes_the_host_if_it_does_not_fit(caplog):
    with caplog.at_level(logging.INFO):
        assert choose_place("auto", "sparse", CONFIG, 2, 64, FULL) == "offload"
    assert caplog.text.strip().endswith("offload")


def test_where_memory_is_unknown_everything_fits():
    assert free_device_bytes() is None  # on a CPU
    assert choose_place("auto", "sparda", CONFIG, 2, 64, None) == "resident"


def test_offload_is_never_overruled():
    assert choose_place("offload", "sparda", CONFIG, 2, 64, 100 * FULL) == "offload"


@pytest.mark.parametrize(("kv", "mode"), [("resident", "sparda"), ("auto", "dense")])
def test_what_must_be_resident_and_does_not_fit_is_refused(kv, mode):
    needed, room = FULL * 4 // 3, int(FULL * 0.9)
    with pytest.raises(CapacityError, match=f"needs {needed} bytes .* {room} can be used"):
        choose_place(kv, mode, CONFIG, 2, 64, FULL)


def test_dense_mode_cannot_be_offloaded():
    with pytest.raises(ValueError, match="mode='dense' reads every block"):
        choose_place("offload", "dense", CONFIG, 2, 64, None)


def test_an_unknown_place_is_refused(no_shape_hook):
    with pytest.raises(ValueError, match="kv='disk' must be 'auto', 'resident' or 'offload'"):
        choose_place("disk", "sparda", CONFIG, 2, 64, None)


def test_a_device_that_knows_its_memory_is_asked(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 1000, "bytes_in_use": 300}

    monkeypatch.setattr(capacity.jax, "local_devices", lambda: [Device()])
    assert free_device_bytes() == 700


def test_prompts_become_arrays():
    arrays = check_prompts([[1, 2], np.array([3])], 5, CONFIG)
    assert [array.tolist() for array in arrays] == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("prompts", "new", "error", "message"),
    [
        ([], 1, DataError, "got 0 prompts"),
        ([[1], []], 1, DataError, r"prompt 1 has shape \(0,\): it needs at least 1 token"),
        ([[1, 64]], 1, DataError, "prompt 0 holds token 64, but the vocabulary ends at 63"),
        ([[-1]], 1, DataError, "prompt 0 holds token -1, but the vocabulary ends at 63"),
        ([[1]], 0, ValueError, "max_new_tokens=0 must be at least 1"),
        (
            [[1], [1] * 90],
            11,
            CapacityError,
            "prompt 1 has 90 tokens .*101 in all.*max_context=100",
        ),
    ],
)
def test_requests_that_no_model_could_run_are_refused(prompts, new, error, message):
    with pytest.raises(error, match=message):
        check_prompts(prompts, new, CONFIG)
