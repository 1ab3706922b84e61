# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""A pool of host memory: who borrows what, how it grows, how it ends."""

import mmap
import threading

import numpy as np
import pytest

from sparda_jax.errors import BackendError, CapacityError
from sparda_jax.kv import host_pool
from sparda_jax.kv.host_pool import HostPool

BYTE = np.dtype(np.uint8)
PAGE = mmap.PAGESIZE


def place(loan):
    return loan.array((1,), BYTE).ctypes.data


def test_loans_are_pages_that_do_not_overlap():
    with HostPool(10 * PAGE) as pool:
        loans = [pool.lend(size) for size in (1, PAGE, PAGE + 1, 3 * PAGE)]
        starts = [place(loan) for loan in loans]
        assert np.diff(starts).tolist() == [PAGE, PAGE, 2 * PAGE]
        assert pool.free_bytes == 3 * PAGE
        assert [loan.size for loan in loans] == [1, PAGE, PAGE + 1, 3 * PAGE]


def test_gaps_are_used_again_and_joined():
    with HostPool(6 * PAGE) as pool:
        loans = [pool.lend(2 * PAGE) for _ in range(3)]
        starts = [place(loan) for loan in loans]
        loans[0].close()
        loans[2].close()
        with pytest.raises(CapacityError, match=f"{3 * PAGE} bytes .* {6 * PAGE}.* {4 * PAGE} are"):
            pool.lend(3 * PAGE)
        small = pool.lend(PAGE)
        assert place(small) == starts[0]
        loans[1].close()
        small.close()
        assert place(pool.lend(6 * PAGE)) == starts[0]


@pytest.mark.parametrize("seed", range(3))
def test_however_loans_come_and_go_they_never_overlap(seed):
    rng = np.random.default_rng(seed)
    with HostPool(40 * PAGE) as pool:
        loans = []
        for stamp in range(1, 80):
            if loans and rng.random() < 0.45:
                loan, written = loans.pop(rng.integers(len(loans)))
                assert np.all(loan.array((loan.size,), BYTE) == written)
                loan.close()
            try:
                loan = pool.lend(int(rng.integers(1, 8 * PAGE)))
            except CapacityError:
                continue
            loan.array((loan.size,), BYTE)[...] = stamp
            loans.append((loan, stamp))
        for loan, written in loans:
            assert np.all(loan.array((loan.size,), BYTE) == written)
            loan.close()
        assert pool.free_bytes == pool.size == 40 * PAGE
        assert pool._free == [(0, 40 * PAGE)]


def test_an_idle_pool_grows_and_a_busy_one_does_not():
    with HostPool() as pool:
        assert pool.size == 0
        first = pool.lend(PAGE)
        assert pool.size == PAGE
        with pytest.raises(CapacityError, match=f"{2 * PAGE} bytes are asked of a host pool of"):
            pool.lend(2 * PAGE)
        first.close()
        pool.lend(2 * PAGE)
        assert pool.size == 2 * PAGE
        with pytest.raises(
            BackendError, match=f"these {PAGE} bytes of host memory were given back"
        ):
            first.array((1,), BYTE)


def test_a_pool_that_the_host_cannot_hold_is_refused_and_stays_usable(monkeypatch):
    with HostPool(PAGE) as pool:
        monkeypatch.setattr(host_pool, "available_host_bytes", lambda: 3 * PAGE)
        with pytest.raises(CapacityError, match=rf"needs {4 * PAGE} bytes .* but {3 * PAGE} are"):
            pool.lend(4 * PAGE)
        assert pool.lend(2 * PAGE).size == 2 * PAGE


def test_a_loan_knows_its_end():
    with HostPool(4 * PAGE) as pool:
        loan = pool.lend(100)
        with pytest.raises(ValueError, match="bytes 99 to 101 are not within the 100 of this loan"):
            loan.array((2,), BYTE, offset=99)
        with pytest.raises(ValueError, match="bytes -1 to 1 are not within the 100"):
            loan.device_array((2,), BYTE, offset=-1)


def test_arrays_of_a_loan_die_with_it_and_others_live_on():
    with HostPool(4 * PAGE) as pool:
        loans = [pool.lend(PAGE) for _ in range(2)]
        arrays = [loan.device_array((4,), BYTE, offset=256) for loan in loans]
        loans[0].array((4,), BYTE, offset=256)[...] = 9
        assert np.asarray(arrays[0]).tolist() == [9, 9, 9, 9]
        loans[0].close()
        loans[0].close()
        assert [array.is_deleted() for array in arrays] == [True, False]
        assert pool.free_bytes == 3 * PAGE
    assert arrays[1].is_deleted()
    assert loans[1].is_closed


def test_a_closed_pool_lends_nothing():
    pool = HostPool(PAGE)
    loan = pool.lend(1)
    pool.close()
    pool.close()
    assert loan.is_closed
    assert pool.size == pool.free_bytes == 0
    loan.close()
    with pytest.raises(BackendError, match="5 bytes are asked of a closed host pool"):
        pool.lend(5)


def test_a_loan_says_why_it_is_not_locked():
    with HostPool() as pool:
        assert pool.lend(1).unlocked_reason == "the default device is a cpu, not a CUDA GPU"
    with HostPool(page_lock="never") as pool:
        assert pool.lend(1).unlocked_reason == "page_lock='never'"


def test_threads_borrow_different_ranges():
    with HostPool(64 * PAGE) as pool:
        found = []
        threads = [
            threading.Thread(target=lambda: found.extend(pool.lend(PAGE) for _ in range(8)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({place(loan) for loan in found}) == 64
        assert pool.free_bytes == 0
