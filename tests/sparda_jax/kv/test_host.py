# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Records in host memory: layout, writes, limits, lifetime."""

import gc

import numpy as np
import pytest

from sparda_jax.errors import BackendError, CapacityError
from sparda_jax.kv import host as host_module
from sparda_jax.kv.host import HostKV, close_forgotten, record_bytes
from sparda_jax.testing import tiny_config


@pytest.fixture
def host():
    with HostKV(tiny_config(), batch=3, capacity=30) as host:
        yield host


def test_a_record_is_one_contiguous_piece(host):
    view = host.view(1)
    assert view.shape == (3, 2, 4, 2, 8, 8)
    assert view[0, 0, 0].flags.c_contiguous
    assert view[0, 0, 0].nbytes == record_bytes(tiny_config()) == 2 * 8 * 8 * 4
    assert host.nbytes == 3 * view.nbytes


def test_bfloat16_records_take_half_the_bytes():
    with HostKV(tiny_config(dtype="bfloat16"), batch=1, capacity=8) as host:
        assert host.view(0).dtype.name == "bfloat16"
        assert record_bytes(tiny_config(dtype="bfloat16")) == 2 * 8 * 8 * 2


def test_single_blocks_of_some_rows_are_written(host):
    records = np.random.default_rng(0).normal(size=(2, 2, 2, 8, 8)).astype(np.float32)
    host.write(2, np.array([0, 2]), np.array([3, 1]), records)
    want = np.zeros(host.view(2).shape, np.float32)
    want[0, :, 3], want[2, :, 1] = records
    np.testing.assert_array_equal(host.view(2), want)
    assert not host.view(1).any()


def test_a_range_that_reaches_past_the_end_is_cut(host):
    records = np.random.default_rng(0).normal(size=(2, 2, 3, 2, 8, 8)).astype(np.float32)
    host.write_range(0, 1, 2, records)
    want = np.zeros(host.view(0).shape, np.float32)
    want[1:, :, 2:] = records[:, :, :2]
    np.testing.assert_array_equal(host.view(0), want)


def test_too_little_memory_is_refused_before_any_is_taken(monkeypatch):
    monkeypatch.setattr(host_module, "available_host_bytes", lambda: 1000)
    with pytest.raises(CapacityError, match=r"needs 6144 bytes .* but 1000 are available"):
        HostKV(tiny_config(), batch=1, capacity=16)


def test_unknown_memory_is_not_refused(monkeypatch):
    monkeypatch.setattr(host_module, "available_host_bytes", lambda: None)
    with HostKV(tiny_config(), batch=1, capacity=16) as host:
        assert host.nbytes == 6144


def test_a_layer_that_cannot_be_locked_frees_the_others(monkeypatch):
    made = []

    class Fails(host_module.HostBuffer):
        def __init__(self, size, *, page_lock):
            if len(made) == 2:
                raise BackendError("the third does not fit")
            super().__init__(size, page_lock="never")
            made.append(self)

    monkeypatch.setattr(host_module, "HostBuffer", Fails)
    with pytest.raises(BackendError, match="the third"):
        HostKV(tiny_config(), batch=1, capacity=16)
    assert len(made) == 2
    for buffer in made:
        with pytest.raises(BackendError, match="is closed"):
            buffer.array((1,), np.dtype(np.uint8))


def test_closed_records_cannot_be_seen(host):
    host.close()
    host.close()
    assert host.is_closed
    with pytest.raises(BackendError, match="records of layer 1 are closed"):
        host.view(1)


def test_what_was_forgotten_is_closed_at_exit():
    host = HostKV(tiny_config(), batch=1, capacity=8)
    close_forgotten()
    assert host.is_closed


def test_an_exception_frees_the_memory():
    with pytest.raises(KeyboardInterrupt), HostKV(tiny_config(), batch=1, capacity=8) as host:
        raise KeyboardInterrupt
    assert host.is_closed
    gc.collect()


def test_on_a_cpu_the_memory_is_plain_and_says_so(host):
    assert host.unlocked_reason == "the default device is a cpu, not a CUDA GPU"
