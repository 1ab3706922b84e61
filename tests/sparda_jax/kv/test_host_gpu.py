# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The real thing: page-locked records that kernels on a GPU read and write."""

import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gather_blocks import gather_blocks
from pallas_kernels.write_blocks import write_blocks
from sparda_jax.errors import BackendError
from sparda_jax.kv.host import HostKV
from sparda_jax.kv.host_pool import HostPool
from sparda_jax.kv.page_lock import HostBuffer, available_host_bytes, find_driver
from sparda_jax.testing import tiny_config

pytestmark = pytest.mark.gpu

ROOT = pathlib.Path(__file__).resolve().parents[3]
RECORD = (2, 8, 64)


@pytest.fixture
def host():
    config = tiny_config(dtype="bfloat16", head_dim=64)
    with HostKV(config, batch=2, capacity=512, page_lock="require") as host:
        for layer in range(3):
            bits = host.view(layer).view(np.uint16)
            draw = np.random.default_rng(layer).integers(0, 0x3F80, bits.shape, dtype=np.uint16)
            bits[...] = draw
        yield host


def flat(array):
    return array.reshape(-1, *RECORD)


def as_bits(array):
    return np.asarray(array).view(np.uint16)


def test_records_are_page_locked_and_seen_where_they_lie(host):
    assert host.unlocked_reason is None
    operand = host.operand(1)
    assert operand.unsafe_buffer_pointer() == host.view(1).ctypes.data
    assert operand.devices() == {jax.local_devices()[0]}
    assert (operand.shape, operand.dtype) == (host.view(1).shape, jnp.bfloat16)


def test_take_and_the_kernel_read_what_numpy_writes(host):
    source = jnp.array([3, 100, 255, 0], jnp.int32)
    places, count = jnp.array([1, 0, 3, 2], jnp.int32), jnp.array([4], jnp.int32)
    take = jax.jit(lambda x, i: jnp.take(flat(x), i, axis=0))
    gather = jax.jit(lambda x, slots: gather_blocks(flat(x), source, places, count, slots))
    for change in range(3):
        host.view(2)[...] = np.roll(host.view(2), change, axis=2)
        want = as_bits(flat(host.view(2))[np.asarray(source)])
        np.testing.assert_array_equal(as_bits(take(host.operand(2), source)), want)
        slots = gather(host.operand(2), jnp.zeros((6, *RECORD), jnp.bfloat16))
        np.testing.assert_array_equal(as_bits(slots)[np.asarray(places)], want)


def test_numpy_sees_what_a_kernel_writes_and_nothing_else_changes(host):
    want = [np.array(host.view(layer)) for layer in range(3)]
    slots = jax.random.normal(jax.random.key(0), (5, *RECORD), jnp.bfloat16)
    source, places = jnp.array([4, 0, 2], jnp.int32), jnp.array([7, 255, 31], jnp.int32)
    count = jnp.array([3], jnp.int32)
    write = jax.jit(lambda slots, x: write_blocks(slots, flat(x), source, places, count).receipt)
    jax.block_until_ready(write(slots, host.operand(1)))
    flat(want[1])[np.asarray(places)] = np.asarray(slots)[np.asarray(source)]
    for layer in range(3):
        np.testing.assert_array_equal(as_bits(host.view(layer)), as_bits(want[layer]))


def test_a_read_after_a_write_in_one_program_sees_it(host):
    here = jnp.arange(4, dtype=jnp.int32)
    count = jnp.array([4], jnp.int32)

    @jax.jit
    def there_and_back(slots, x):
        written = write_blocks(slots, flat(x), here, here + 20, count)
        empty = jnp.zeros_like(slots)
        moves = (here + 20, here, count)
        return gather_blocks(written.records, *moves, empty, receipt=written.receipt)

    for seed in range(10):
        slots = jax.random.normal(jax.random.key(seed), (4, *RECORD), jnp.bfloat16)
        got = there_and_back(slots, host.operand(0))
        np.testing.assert_array_equal(as_bits(got), as_bits(slots))


def test_closing_waits_for_a_program_that_still_reads(host):
    @jax.jit
    def slow(x, y):
        chosen = jnp.take(flat(x), jnp.arange(64), axis=0).reshape(64, -1).astype(jnp.float32)
        return jax.lax.fori_loop(0, 3000, lambda _, y: jnp.tanh(y @ y) + chosen[0, 0], y)

    y = jnp.ones((1024, 1024))
    jax.block_until_ready(slow(host.operand(0), y))
    result = slow(host.operand(0), y)
    assert not result.is_ready()
    kept = host.operand(0)
    host.close()
    assert kept.is_deleted()
    assert bool(jnp.isfinite(result).all())


def test_a_pool_is_locked_once_for_many_requests():
    take = jax.jit(lambda x, i: jnp.take(x.reshape(-1, 2, 8, 8), i, axis=0))
    with HostPool(64 << 20, page_lock="require") as pool:
        for value in (1.0, 2.0, 3.0):
            with HostKV(tiny_config(), batch=1, capacity=512, pool=pool) as host:
                host.view(0)[...] = value
                got = take(host.operand(0), jnp.array([5]))
                assert bool(jnp.all(got == value))
        assert pool.free_bytes == pool.size == 64 << 20


def test_memory_that_is_not_locked_is_not_shown_to_kernels():
    with HostKV(tiny_config(), batch=1, capacity=64, page_lock="never") as host:
        with pytest.raises(BackendError, match="page_lock='never'; use fetch='device_put'"):
            host.operand(0)


def test_a_lock_that_fails_gives_the_drivers_reason():
    buffer = HostBuffer(1 << 20, page_lock="require")
    driver = find_driver()
    where = buffer.array((1,), np.dtype(np.uint8)).ctypes.data
    assert "cuMemHostRegister_v2 failed: CUDA_ERROR_" in driver.lock(where, 1 << 20)
    buffer.close()
    assert "cuMemHostUnregister failed: CUDA_ERROR_" in driver.unlock(where)


def test_a_gigabyte_is_touched_and_locked_in_seconds():
    if (available_host_bytes() or 0) < 4 << 30:
        pytest.skip("needs 4 GiB of host memory")
    begun = time.perf_counter()
    buffer = HostBuffer(1 << 30, page_lock="require")
    took = time.perf_counter() - begun
    buffer.close()
    assert took < 10


PROGRAM = """
import jax, jax.numpy as jnp
from sparda_jax.kv.host import HostKV
from sparda_jax.testing import tiny_config
host = HostKV(tiny_config(), batch=1, capacity=512, page_lock="require")
host.view(0)[...] = 1.0
y = jnp.ones((1024, 1024))
@jax.jit
def slow(x, y):
    taken = jnp.take(x.reshape(-1, 2, 8, 8), jnp.array([5]), axis=0).sum()
    return jax.lax.fori_loop(0, 500, lambda _, y: jnp.tanh(y @ y) + taken, y)
slow(host.operand(0), y)
print("ready", flush=True)
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [("", 0), ("raise KeyboardInterrupt", None)],
)
def test_a_program_that_forgets_to_close_ends_without_a_crash(end, status):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM + end],
        cwd=ROOT,
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.stdout == "ready\n", run.stderr
    assert run.returncode in ((status,) if status is not None else (1, 130, -2)), run.stderr
    assert "stay page-locked" not in run.stderr
    assert "Fatal" not in run.stderr
