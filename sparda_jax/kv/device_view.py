# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Host memory seen as a device array: the same bytes, exported through DLPack.

Page-locked memory has an address on the device, so a tensor description that says "CUDA, at this
address" gives a `jax.Array` whose bytes lie in host memory. Kernels read and write it through the
link; NumPy sees what they wrote, and they see what NumPy wrote. JAX believes that it is ordinary
device memory that never changes. So such an array is an operand of our kernels and of `jnp.take`,
and nothing else: not donated, not returned, not closed over, not computed with, not reshaped beyond
a bitcast, because each of these makes XLA copy all of it.

On a CPU the same export gives an array over the same bytes. A program reads what NumPy wrote
before the program was called, but cannot write there: whatever a step finished is stored by NumPy
between steps.

The description must outlive the array, and the array the page lock: `DeviceView.close` deletes the
array and waits until no running program holds it.
"""

import ctypes
import math
import threading

import jax
import jax.numpy as jnp
import numpy as np

from sparda_jax.errors import BackendError

ALIGNMENT = 256
"""Bytes that an exported address must be a multiple of: what kernels expect of device memory."""

_CPU, _CUDA = 1, 2  # DLDeviceType
_KINDS = {  # DLDataTypeCode
    "int8": 0,
    "uint8": 1,
    "float16": 2,
    "float32": 2,
    "bfloat16": 4,
    "float8_e4m3fn": 10,
    "float8_e5m2": 12,
}


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("ordinal", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # null: row-major
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_EXPORTED: dict[int, "_Export"] = {}  # by address of its description, until JAX lets go of it


@_Deleter
def _let_go(address: int) -> None:
    export = _EXPORTED.pop(address, None)
    if export is not None:
        export.is_released.set()


class _Export:
    """A DLPack producer of one tensor; keeps the description and the memory alive."""

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: np.dtype, device: _Device, owner: object
    ) -> None:
        self.is_released = threading.Event()
        self._owner, self._device = owner, device
        self._extents = (ctypes.c_int64 * len(shape))(*shape)
        self._managed = _Managed()
        self._managed.tensor = _Tensor(
            data=address,
            device=device,
            ndim=len(shape),
            dtype=_Type(code=_KINDS[dtype.name], bits=8 * dtype.itemsize, lanes=1),
            shape=self._extents,
        )
        self._managed.deleter = ctypes.cast(_let_go, ctypes.c_void_p)
        self.address = ctypes.addressof(self._managed)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device.kind, self._device.ordinal

    def __dlpack__(self, **_: object) -> object:
        make = ctypes.pythonapi.PyCapsule_New
        make.restype = ctypes.py_object
        make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(self.address, b"dltensor", None)


class DeviceView:
    """An array of the default device over bytes of host memory.

    Args:
        address: where the device sees the first byte; on CUDA of page-locked memory.
        shape: of the array, row-major.
        dtype: of its numbers.
        owner: kept alive as long as JAX may read the bytes.

    Attributes:
        array: what kernels take; it dies with `close`.

    Raises:
        ValueError: the dtype cannot be exported, or the address is not aligned.
        BackendError: the default device is neither a CPU nor a CUDA GPU, or JAX makes a copy.
    """

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: np.dtype, owner: object
    ) -> None:
        dtype = jnp.dtype(dtype)
        if dtype.name not in _KINDS:
            raise ValueError(f"{dtype.name} cannot be exported; known: {', '.join(_KINDS)}")
        if address % ALIGNMENT:
            raise ValueError(
                f"{address=} must be a multiple of {ALIGNMENT}, but {address % ALIGNMENT} bytes "
                "are left over; begin at a page"
            )
        self.nbytes = math.prod(shape) * dtype.itemsize
        self._export = _Export(address, shape, dtype, _default_device(), owner)
        _EXPORTED[self._export.address] = self._export
        try:
            self.array: jax.Array = jax.dlpack.from_dlpack(self._export)
        except BaseException:
            _EXPORTED.pop(self._export.address, None)
            raise
        found = self.array.unsafe_buffer_pointer()
        if found != address:
            self.close()
            raise BackendError(
                f"JAX copied {self.nbytes} bytes of host memory from {address} to {found} instead "
                "of looking at them; use fetch='device_put'"
            )

    def close(self, timeout_s: float = 60.0) -> bool:
        """Delete the array and wait until no program holds its memory; again does nothing.

        Args:
            timeout_s: how long to wait.

        Returns:
            Whether the memory is free to go.
        """
        if not self.array.is_deleted():
            self.array.delete()
        return self._export.is_released.wait(timeout_s)


def _default_device() -> _Device:
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return _Device(_CPU, 0)
    if device.platform in ("gpu", "cuda"):
        return _Device(_CUDA, device.local_hardware_id or 0)
    raise BackendError(
        f"host memory can be seen by a CPU or a CUDA GPU, but the default device is a "
        f"{device.platform}; use fetch='device_put'"
    )
