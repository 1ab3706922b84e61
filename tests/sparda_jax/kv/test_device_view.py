# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Host memory as a device array: the same bytes, for as long as it is held."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.errors import BackendError
from sparda_jax.kv import device_view as module
from sparda_jax.kv.device_view import ALIGNMENT, DeviceView
from sparda_jax.kv.page_lock import allocate

SHAPE = (4, 2, 8, 16)
DTYPES = ("float32", "bfloat16", "float16", "int8", "uint8", "float8_e4m3fn", "float8_e5m2")


def make(dtype="float32", shape=SHAPE):
    """Make memory, and the view of its beginning."""
    dtype = jnp.dtype(dtype)
    data = allocate(int(np.prod(shape)) * dtype.itemsize)
    return data.view(dtype).reshape(shape), DeviceView(data.ctypes.data, shape, dtype, owner=data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_arrives_in_every_dtype(dtype):
    memory, view = make(dtype)
    # Below every dtype's infinity: NaN has no bits to keep.
    raw = np.random.default_rng(0).integers(0, 120, memory.nbytes, dtype=np.uint8)
    memory.view(np.uint8)[...] = raw.reshape(memory.view(np.uint8).shape)
    assert (view.array.shape, view.array.dtype) == (SHAPE, jnp.dtype(dtype))
    got = np.asarray(jax.jit(lambda x: jnp.take(x, jnp.array([2, 0]), axis=0))(view.array))
    np.testing.assert_array_equal(got.view(np.uint8), memory[[2, 0]].view(np.uint8))
    assert view.close()


def test_a_program_reads_what_numpy_wrote_before_it_was_called():
    memory, view = make()
    assert view.array.unsafe_buffer_pointer() == memory.ctypes.data
    read = jax.jit(lambda x, i: x[i])
    for value in (1.0, 2.0):
        memory[3] = value
        assert np.all(np.asarray(read(view.array, 3)) == value)
    assert view.close()


def test_what_a_program_returns_is_never_the_memory_itself():
    memory, view = make()
    memory[...] = 1.0
    returned = jax.block_until_ready(jax.jit(lambda x: x)(view.array))
    memory[...] = 2.0
    assert np.all(np.asarray(returned) == 1.0)
    assert view.close()


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donating_the_array_does_not_give_the_memory_away():
    memory, view = make()
    memory[...] = 1.0
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(view.array)
    assert np.all(np.asarray(after) == 2.0)
    assert np.all(memory == 1.0)
    assert view.close()


def test_a_closed_array_cannot_be_used():
    _, view = make()
    kept = view.array
    assert view.close()
    assert view.close()
    with pytest.raises(RuntimeError, match="has been deleted"):
        jax.block_until_ready(jax.jit(lambda x: x[0])(kept))


def test_closing_waits_for_a_program_that_still_reads():
    _, view = make(shape=(8, 2, 64, 64))

    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 2000, lambda _, y: jnp.tanh(y + x), x)[0, 0, 0, 0]

    jax.block_until_ready(slow(view.array))
    result = slow(view.array)
    assert not result.is_ready()  # the call returned before the program did
    assert not view.close(timeout_s=0.0)
    assert view.close()
    assert np.isfinite(float(result))


def test_the_memory_and_its_description_are_let_go_with_the_array():
    before = len(module._EXPORTED)
    memory, view = make()
    assert len(module._EXPORTED) == before + 1
    assert view.close()
    assert len(module._EXPORTED) == before
    del view
    gc.collect()
    memory[...] = 3.0  # ours still


def test_an_array_that_is_collected_lets_go_too():
    _, view = make()
    address = view._export.address
    del view
    gc.collect()
    assert address not in module._EXPORTED


def test_an_address_that_kernels_cannot_take_is_refused():
    data = allocate(4096)
    where = data.ctypes.data + 16
    with pytest.raises(
        ValueError, match=rf"address={where} must be a multiple of {ALIGNMENT}.* 16"
    ):
        DeviceView(where, (4,), np.dtype(np.float32), owner=data)


def test_a_dtype_without_a_code_is_refused():
    data = allocate(4096)
    with pytest.raises(ValueError, match=r"complex64 cannot be exported; known: int8, .*bfloat16"):
        DeviceView(data.ctypes.data, (4,), np.dtype(np.complex64), owner=data)


def test_another_kind_of_device_is_refused(monkeypatch):
    class Device:
        platform = "tpu"

    monkeypatch.setattr(module.jax, "local_devices", lambda: [Device()])
    data = allocate(4096)
    with pytest.raises(BackendError, match=r"default device is a tpu; use fetch='device_put'"):
        DeviceView(data.ctypes.data, (4,), np.dtype(np.float32), owner=data)


def test_an_import_that_fails_leaves_nothing_behind(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no")

    before = len(module._EXPORTED)
    monkeypatch.setattr(module.jax.dlpack, "from_dlpack", refuse)
    data = allocate(4096)
    with pytest.raises(RuntimeError, match="no"):
        DeviceView(data.ctypes.data, (4,), np.dtype(np.float32), owner=data)
    assert len(module._EXPORTED) == before


def test_an_import_that_copies_is_refused(monkeypatch):
    real = module.jax.dlpack.from_dlpack
    monkeypatch.setattr(module.jax.dlpack, "from_dlpack", lambda export: jnp.array(real(export)))
    data = allocate(4096)
    with pytest.raises(BackendError, match=rf"copied 16 bytes .* from {data.ctypes.data} to \d+"):
        DeviceView(data.ctypes.data, (4,), np.dtype(np.float32), owner=data)
