# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Page-aligned memory, and page-locking with a driver that the tests hold in their hands."""

import gc
import logging
import mmap
import os
import resource

import jax
import numpy as np
import pytest

from sparda_jax.errors import BackendError
from sparda_jax.kv import page_lock as module
from sparda_jax.kv.page_lock import (
    Driver,
    HostBuffer,
    allocate,
    available_host_bytes,
    find_driver,
    touch,
)

FLOAT = np.dtype(np.float32)
HUGE = 2 << 20


class Recorder:
    """Stands for a driver: notes calls, refuses if told so."""

    def __init__(self, refusal=None):
        self.refusal, self.locked, self.unlocked, self.calls = refusal, [], [], []

    def lock(self, address, size):
        self.calls.append("lock")
        self.locked.append((address, size))
        return self.refusal

    def device_address(self, address):
        return self.refusal or address

    def synchronize(self):
        self.calls.append("synchronize")
        return None

    def unlock(self, address):
        self.calls.append("unlock")
        self.unlocked.append(address)
        return self.refusal


def test_the_recorder_is_a_driver():
    assert isinstance(Recorder(), Driver)


@pytest.mark.parametrize("size", [1, 4096, HUGE - 1, HUGE, HUGE + 1])
def test_memory_begins_at_a_page_and_at_a_huge_one_if_it_has_one(size):
    data = allocate(size)
    assert data.nbytes == size
    assert data.ctypes.data % (HUGE if size >= HUGE else mmap.PAGESIZE) == 0
    data[-1] = 1


def test_every_page_is_touched_by_some_thread(monkeypatch):
    monkeypatch.setattr(module, "_STRIPE", 3 * mmap.PAGESIZE)
    data = np.ones(10 * mmap.PAGESIZE + 5, np.uint8)
    touch(data)
    assert np.flatnonzero(data == 0).tolist() == list(range(0, data.nbytes, mmap.PAGESIZE))


def test_a_child_of_a_fork_neither_has_the_memory_nor_unlocks_it(monkeypatch):
    driver = Recorder()
    buffer = HostBuffer(5000, driver=driver)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    buffer.close()
    assert driver.calls == ["lock"]


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
    assert buffer.is_closed


def test_the_device_is_waited_for_before_pages_are_unlocked():
    driver = Recorder()
    HostBuffer(5000, driver=driver).close()
    assert driver.calls == ["lock", "synchronize", "unlock"]


def test_a_buffer_that_is_collected_is_unlocked():
    driver = Recorder()
    buffer = HostBuffer(5000, driver=driver)
    view = buffer.device_view((4,), FLOAT).array
    del buffer
    gc.collect()
    assert len(driver.unlocked) == 1
    assert view.is_deleted()


def test_arrays_that_kernels_see_die_before_pages_are_unlocked():
    driver = Recorder()
    buffer = HostBuffer(5000, driver=driver)
    array = buffer.device_view((4,), FLOAT, offset=1024).array
    assert array.unsafe_buffer_pointer() == driver.locked[0][0] + 1024
    seen = []
    driver.unlock = lambda address: seen.append(array.is_deleted())
    buffer.close()
    assert seen == [True]


def test_memory_that_a_program_still_uses_stays_locked(monkeypatch, caplog):
    driver = Recorder()
    buffer = HostBuffer(5000, driver=driver)
    view = buffer.device_view((4,), FLOAT)
    monkeypatch.setattr(type(view), "close", lambda self: False)
    with caplog.at_level(logging.WARNING):
        buffer.close()
    assert "5000 bytes of host memory stay page-locked: a program still uses it" in caplog.text
    assert driver.unlocked == []
    assert any(held.nbytes == 5000 for held in module._STUCK)
    module._STUCK.clear()


def test_views_that_a_program_still_uses_are_not_given_back(monkeypatch):
    buffer = HostBuffer(5000, page_lock="never")
    view = buffer.device_view((4,), FLOAT)
    monkeypatch.setattr(type(view), "close", lambda self: False)
    with pytest.raises(BackendError, match="still uses 16 of 5000 bytes"):
        buffer.close_views([view])
    module._STUCK.clear()


def test_some_views_are_closed_and_the_others_live_on():
    buffer = HostBuffer(5000, page_lock="never")
    views = [buffer.device_view((4,), FLOAT, offset=256 * i) for i in range(3)]
    buffer.close_views(views[:2])
    assert [view.array.is_deleted() for view in views] == [True, True, False]
    buffer.close()
    assert views[2].array.is_deleted()


def test_what_kernels_see_is_what_numpy_sees():
    buffer = HostBuffer(5000, page_lock="never")
    buffer.array((4, 8), FLOAT, offset=512)[...] = 3.0
    seen = buffer.device_view((4, 8), FLOAT, offset=512).array
    assert np.all(np.asarray(jax.jit(lambda x: x * 2)(seen)) == 6.0)
    buffer.close()


def test_a_gpu_cannot_see_memory_that_is_not_locked(monkeypatch):
    class Device:
        platform = "gpu"

    buffer = HostBuffer(5000, page_lock="never")
    monkeypatch.setattr(module.jax, "local_devices", lambda: [Device()])
    with pytest.raises(
        BackendError, match=r"these 16 of 5000 bytes .* page_lock='never'; use fetch"
    ):
        buffer.device_view((4,), FLOAT)


def test_a_driver_without_an_address_for_kernels_gives_its_reason():
    driver = Recorder()
    buffer = HostBuffer(5000, driver=driver)
    driver.refusal = "invalid value (1)"
    with pytest.raises(
        BackendError, match=r"these 16 of 5000 bytes .*: invalid value \(1\); use fetch"
    ):
        buffer.device_view((4,), FLOAT)
    driver.refusal = None
    buffer.close()


def test_bytes_outside_the_buffer_are_refused():
    buffer = HostBuffer(5000, page_lock="never")
    with pytest.raises(ValueError, match="bytes 4992 to 5008 are not within the 5000"):
        buffer.array((4,), FLOAT, offset=4992)
    with pytest.raises(ValueError, match="bytes -16 to 0 are not within the 5000"):
        buffer.device_view((4,), FLOAT, offset=-16)


def test_a_refusal_is_kept_as_a_reason_and_logged(caplog):
    with caplog.at_level(logging.WARNING):
        buffer = HostBuffer(5000, driver=Recorder("out of lockable memory"))
    assert buffer.unlocked_reason == "out of lockable memory"
    assert "5000 bytes are not page-locked: out of lockable memory" in caplog.text
    buffer.close()


def test_required_locking_raises_with_size_and_reason():
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    number = "none" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
    why = rf"5000 bytes .* invalid value \(1\); the limit of locked memory is {number}; try fewer"
    with pytest.raises(BackendError, match=why):
        HostBuffer(5000, page_lock="require", driver=Recorder("invalid value (1)"))


def test_without_a_driver_the_reason_says_so():
    assert HostBuffer(64, driver="no CUDA here").unlocked_reason == "no CUDA here"
    assert HostBuffer(64, page_lock="never").unlocked_reason == "page_lock='never'"


def test_a_failing_unlock_is_logged_and_does_not_stop_the_close(caplog):
    driver = Recorder()
    buffer = HostBuffer(64, driver=driver)
    driver.refusal = "invalid value (1)"
    with caplog.at_level(logging.WARNING):
        buffer.close()
    assert "64 bytes of host memory stay page-locked: invalid value (1)" in caplog.text
    assert any(held.nbytes == 64 for held in module._STUCK)
    module._STUCK.clear()


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
