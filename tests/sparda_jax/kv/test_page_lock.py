# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Page-aligned memory, and page-locking with a driver that the tests hold in their hands."""

import logging
import mmap

import numpy as np
import pytest

from sparda_jax.errors import BackendError
from sparda_jax.kv.page_lock import HostBuffer, available_host_bytes, find_driver

FLOAT = np.dtype(np.float32)


class Recorder:
    """Stands for a driver: notes calls, refuses if told so."""

    def __init__(self, refusal=None):
        self.refusal, self.locked, self.unlocked = refusal, [], []

    def lock(self, address, size):
        self.locked.append((address, size))
        return self.refusal

    def unlock(self, address):
        self.unlocked.append(address)
        return self.refusal


def test_memory_is_zeroed_and_page_aligned():
    buffer = HostBuffer(10_000, page_lock="never")
    array = buffer.array((2500,), FLOAT)
    assert not array.any()
    assert array.ctypes.data % mmap.PAGESIZE == 0


def test_arrays_of_one_buffer_are_the_same_bytes():
    buffer = HostBuffer(64, page_lock="never")
    buffer.array((16,), FLOAT)[:4] = 3.0
    assert buffer.array((2, 2), FLOAT).tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_locked_memory_is_unlocked_once():
    driver = Recorder()
    buffer = HostBuffer(5000, driver=driver)
    address = buffer.array((1,), FLOAT).ctypes.data
    assert buffer.unlocked_reason is None
    assert [where for where, _ in driver.locked] == [address]
    assert driver.locked[0][1] >= 5000
    buffer.close()
    buffer.close()
    assert driver.unlocked == [address]


def test_a_refusal_is_kept_as_a_reason_and_logged(caplog):
    with caplog.at_level(logging.WARNING):
        buffer = HostBuffer(5000, driver=Recorder("out of lockable memory"))
    assert buffer.unlocked_reason == "out of lockable memory"
    assert "5000 bytes are not page-locked: out of lockable memory" in caplog.text
    buffer.close()


def test_required_locking_raises_with_size_and_reason():
    with pytest.raises(BackendError, match=r"5000 bytes .* limit 4096 reached; try fewer"):
        HostBuffer(5000, page_lock="require", driver=Recorder("limit 4096 reached"))


def test_without_a_driver_the_reason_says_so():
    assert HostBuffer(64, driver="no CUDA here").unlocked_reason == "no CUDA here"
    assert HostBuffer(64, page_lock="never").unlocked_reason == "page_lock='never'"


def test_a_failing_unlock_is_logged_and_does_not_stop_the_close(caplog):
    driver = Recorder()
    buffer = HostBuffer(64, driver=driver)
    driver.refusal = "invalid value (1)"
    with caplog.at_level(logging.WARNING):
        buffer.close()
    assert "host memory stays page-locked: invalid value (1)" in caplog.text


def test_a_closed_buffer_gives_no_array():
    buffer = HostBuffer(64, page_lock="never")
    buffer.close()
    with pytest.raises(BackendError, match="host buffer of 64 bytes is closed"):
        buffer.array((1,), FLOAT)


def test_on_a_cpu_there_is_no_driver():
    assert find_driver() == "the default device is a cpu, not a CUDA GPU"


def test_available_memory_is_a_positive_number_where_it_is_known():
    available = available_host_bytes()
    assert available is None or available > 0


@pytest.mark.gpu
def test_a_cuda_driver_locks_and_unlocks():
    buffer = HostBuffer(1 << 24, page_lock="require")
    assert buffer.unlocked_reason is None
    buffer.close()
