# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Records that are moved: the right ones, the same bits, and no alias of host memory."""

import jax
import numpy as np
import pytest

from sparda_jax.kv import fetch_device_put
from sparda_jax.kv.fetch_device_put import DevicePut, bucket
from sparda_jax.kv.host import HostKV
from sparda_jax.testing import tiny_config

SLOTS, WIDTH = 6, 5


@pytest.fixture(params=["float32", "bfloat16"])
def host(request):
    with HostKV(tiny_config(dtype=request.param), batch=2, capacity=80) as host:
        for layer in range(3):
            view = host.view(layer)
            values = np.random.default_rng(layer).normal(size=view.shape)
            view[...] = values.astype(view.dtype)
        yield host


@pytest.fixture
def mover(host):
    mover = DevicePut(host, SLOTS, WIDTH)
    yield mover
    mover.close()


def misses(*missing):
    """Make misses [2 n] from (row, head, block, slot), of two KV heads and ten blocks."""
    out = np.full((2, 2 * 2 * WIDTH), -1, np.int32)
    for place, (row, head, block, slot) in enumerate(missing):
        lane = row * 2 + head
        out[:, place] = lane * 10 + block, lane * SLOTS + slot
    return out


def test_missing_records_arrive_with_the_same_bits(host, mover):
    fetched = mover.fetch(1, misses((0, 1, 7, 4), (1, 0, 9, 5), (1, 0, 2, 0)))
    assert fetched.records.shape[0] == fetched.places.shape[0] == bucket(3)
    want = [host.view(1)[0, 1, 7], host.view(1)[1, 0, 9], host.view(1)[1, 0, 2]]
    np.testing.assert_array_equal(np.asarray(fetched.records)[:3], np.stack(want))
    assert fetched.places[:3].tolist() == [(0 * 2 + 1) * 6 + 4, 2 * 6 + 5, 2 * 6 + 0]
    assert np.all(fetched.places[3:] == 2 * 2 * SLOTS)


def test_nothing_missing_moves_nothing(mover):
    assert mover.fetch(0, misses()) is None


def test_a_later_write_into_the_pool_changes_nothing_that_arrived(host, mover):
    fetched = mover.fetch(0, misses((0, 0, 3, 1)))
    want = np.array(host.view(0)[0, 0, 3])
    host.view(0)[...] = 0
    np.testing.assert_array_equal(np.asarray(fetched.records)[0], want)


def test_filling_the_staging_buffers_again_changes_nothing_that_arrived(host, mover):
    arrived = [mover.fetch(layer % 3, misses((1, 1, layer, 0))) for layer in range(7)]
    for layer, fetched in enumerate(arrived):
        want = host.view(layer % 3)[1, 1, layer]
        np.testing.assert_array_equal(np.asarray(fetched.records)[0], want)


def test_many_records_are_gathered_by_several_threads(host, mover, monkeypatch):
    monkeypatch.setattr(fetch_device_put, "_THREADS_ABOVE", 1)
    every = [(b, k, 2 * j + k, j) for b in range(2) for k in range(2) for j in range(WIDTH)]
    fetched = mover.fetch(2, misses(*every))
    want = np.stack([host.view(2)[b, k, block] for b, k, block, _ in every])
    np.testing.assert_array_equal(np.asarray(fetched.records)[: len(every)], want)


def test_a_block_that_does_not_exist_is_our_own_mistake(mover):
    with pytest.raises(AssertionError, match="40"):
        mover.fetch(0, misses((1, 1, 10, 0)))


def test_counts_fall_into_few_buckets():
    assert {bucket(n) for n in range(1, 21)} == {8, 16, 32}


def test_one_staging_buffer_is_refused(host):
    with pytest.raises(ValueError, match="ring=1 must be at least 2"):
        DevicePut(host, SLOTS, WIDTH, ring=1)


def test_records_live_on_the_default_device(mover):
    fetched = mover.fetch(0, misses((0, 0, 0, 0)))
    assert fetched.records.devices() == {jax.local_devices()[0]}
