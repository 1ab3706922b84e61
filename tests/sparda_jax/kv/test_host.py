# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Records in host memory: layout, writes, limits, lifetime."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.config import SparseConfig
from sparda_jax.errors import BackendError, CapacityError
from sparda_jax.kv import host_pool
from sparda_jax.kv.host import HostKV, record_bytes
from sparda_jax.kv.host_pool import HostPool
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
    monkeypatch.setattr(host_pool, "available_host_bytes", lambda: 1000)
    with pytest.raises(CapacityError, match=r"needs 6144 bytes .* but 1000 are available"):
        HostKV(tiny_config(), batch=1, capacity=16)


def test_unknown_memory_is_not_refused(monkeypatch):
    monkeypatch.setattr(host_pool, "available_host_bytes", lambda: None)
    with HostKV(tiny_config(), batch=1, capacity=16) as host:
        assert host.nbytes == 6144


def test_layers_do_not_share_bytes_and_begin_where_kernels_want_it():
    config = tiny_config(kv_heads=1, head_dim=4, dtype="bfloat16")
    with HostKV(config, batch=1, capacity=8) as host:
        assert host.view(0).nbytes == 128
        for layer in range(config.layers):
            host.view(layer)[...] = layer + 1
        for layer in range(config.layers):
            assert np.all(host.view(layer) == layer + 1)
            assert host.view(layer).ctypes.data % 256 == 0


def test_records_past_two_to_the_31_bytes_are_found(monkeypatch):
    # Pages that nobody writes take only address space.
    monkeypatch.setattr(host_pool, "available_host_bytes", lambda: None)
    config = tiny_config(layers=5, head_dim=128, dtype="bfloat16", sparse=SparseConfig())
    with HostKV(config, batch=1, capacity=1 << 19, page_lock="never") as host:
        assert host.view(0).nbytes == 1 << 29
        assert host.view(4).ctypes.data - host.view(0).ctypes.data == 1 << 31
        host.view(4)[0, 1, -1] = 3.0
        got = jax.jit(lambda x: x[0, 1, -1, 1, 63, 127])(host.operand(4))
        assert float(got.astype(jnp.float32)) == 3.0


def test_there_are_as_many_layers_as_in_the_model(host):
    with pytest.raises(ValueError, match="layer=3 must be one of the 3 layers"):
        host.view(3)
    with pytest.raises(ValueError, match="layer=-1 must be one of the 3 layers"):
        host.operand(-1)


# --- the five rules -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_operand_holds_what_the_view_holds(dtype):
    with HostKV(tiny_config(dtype=dtype), batch=2, capacity=40) as host:
        take = jax.jit(lambda records, i: jnp.take(records.reshape(-1, 2, 8, 8), i, axis=0))
        for step in range(3):
            values = np.random.default_rng(step).normal(size=host.view(1).shape)
            host.view(1)[...] = values.astype(host.view(1).dtype)
            got = np.asarray(take(host.operand(1), jnp.array([3, 17])))
            np.testing.assert_array_equal(got, host.view(1).reshape(-1, 2, 8, 8)[[3, 17]])


def test_a_layer_has_one_operand(host):
    assert host.operand(1) is host.operand(1)
    assert host.operand(1) is not host.operand(2)


def test_a_finished_block_that_is_stored_between_steps_is_read_by_the_next(host):
    @jax.jit
    def step(records, x):
        return records[0, :, 1], x + 1

    x = jnp.zeros(())
    for value in range(4):
        fetched, x = step(host.operand(0), x)
        assert np.all(np.asarray(fetched) == value)
        finished = np.full((1, 2, 2, 8, 8), value + 1, np.float32)
        host.write(0, np.array([0]), np.array([1]), finished)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_a_program_that_breaks_the_rules_gets_a_copy_and_never_the_records(host):
    host.view(0)[...] = 1.0
    returned = jax.jit(lambda x: x)(host.operand(0))
    donated = jax.jit(lambda x: x * 2, donate_argnums=0)(host.operand(0))
    jax.block_until_ready((returned, donated))
    host.view(0)[...] = 5.0
    assert np.all(np.asarray(returned) == 1.0)
    assert np.all(np.asarray(donated) == 2.0)


def test_operands_die_with_the_records(host):
    kept = host.operand(0)
    host.close()
    assert kept.is_deleted()
    with pytest.raises(BackendError, match="records of layer 0 are closed"):
        host.operand(0)


def test_what_was_forgotten_is_freed_when_it_is_collected():
    host = HostKV(tiny_config(), batch=1, capacity=8)
    kept = host.operand(0)
    del host
    gc.collect()
    assert kept.is_deleted()


def test_one_pool_serves_one_batch_after_another():
    with HostPool() as pool:
        with HostKV(tiny_config(), batch=2, capacity=64, pool=pool) as first:
            first.view(0)[...] = 7.0
            where, size, kept = first.view(0).ctypes.data, pool.size, first.operand(0)
        assert kept.is_deleted()
        with HostKV(tiny_config(), batch=1, capacity=64, pool=pool) as second:
            assert second.view(0).ctypes.data == where
            assert np.all(second.view(0) == 7.0)  # not cleaned: nobody reads what it did not write
            assert np.all(np.asarray(second.operand(0)[0]) == 7.0)
        assert pool.size == pool.free_bytes == size


def test_two_batches_at_once_need_a_pool_for_both():
    with HostPool(12288) as pool, HostKV(tiny_config(), batch=1, capacity=16, pool=pool) as first:
        with pytest.raises(CapacityError, match=r"6144 bytes .* pool of 12288, of which 4096 are"):
            HostKV(tiny_config(), batch=1, capacity=16, pool=pool)
        first.view(0)[...] = 1.0


def test_closed_records_cannot_be_seen(host):
    host.close()
    host.close()
    assert host.is_closed
    with pytest.raises(BackendError, match="records of layer 1 are closed"):
        host.view(1)


def test_an_exception_frees_the_memory():
    with pytest.raises(KeyboardInterrupt), HostKV(tiny_config(), batch=1, capacity=8) as host:
        raise KeyboardInterrupt
    assert host.is_closed
    gc.collect()


def test_on_a_cpu_the_memory_is_plain_and_says_so(host):
    assert host.unlocked_reason == "the default device is a cpu, not a CUDA GPU"
