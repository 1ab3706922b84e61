# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Page-aligned host memory, page-locked for CUDA where that is possible.

A GPU copies page-locked ("registered") memory about five times as fast as ordinary memory. The
driver locks memory that we allocate, so its size is not bound by any pool of XLA's. Where there is
no CUDA device the memory is plain.
"""

import ctypes
import logging
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol, runtime_checkable

import jax
import numpy as np

from sparda_jax.errors import BackendError

PageLock = Literal["auto", "require", "never"]
"""`auto`: lock on a CUDA device and note why not; `require`: lock or raise; `never`."""

_LOG = logging.getLogger(__name__)
_STRIPE = 1 << 28  # bytes that one thread touches at a time
_PORTABLE_AND_MAPPED = 3


@runtime_checkable
class Driver(Protocol):
    """Locks and unlocks pages; each method returns `None` or a reason why it could not."""

    def lock(self, address: int, size: int) -> str | None:
        """Lock `size` bytes at `address`."""

    def unlock(self, address: int) -> str | None:
        """Unlock what was locked at `address`."""


class CudaDriver:
    """The CUDA driver's cuMemHostRegister, called in the device's primary context.

    Args:
        ordinal: number of the device, as the driver counts.
    """

    def __init__(self, ordinal: int) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._device = ctypes.c_int()
        self._check("cuInit", self._library.cuInit(0))
        self._check("cuDeviceGet", self._library.cuDeviceGet(ctypes.byref(self._device), ordinal))

    def _check(self, name: str, code: int) -> None:
        if code != 0:
            raise OSError(f"{name} failed: {self._name(code)}")

    def _name(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(code, ctypes.byref(text))
        return f"{(text.value or b'unknown error').decode()} ({code})"

    def _call(self, name: str, *arguments: object) -> str | None:
        """Call one function in the primary context, which JAX uses too."""
        library, context = self._library, ctypes.c_void_p()
        code = library.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._device)
        if code != 0:
            return f"cuDevicePrimaryCtxRetain failed: {self._name(code)}"
        try:
            library.cuCtxPushCurrent_v2(context)
            code = getattr(library, name)(*arguments)
            library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        finally:
            library.cuDevicePrimaryCtxRelease_v2(self._device)
        return None if code == 0 else f"{name} failed: {self._name(code)}"

    def lock(self, address: int, size: int) -> str | None:
        """Lock `size` bytes at `address` for every context, mapped for kernels."""
        flags = ctypes.c_uint(_PORTABLE_AND_MAPPED)
        pointer = ctypes.c_void_p(address)
        return self._call("cuMemHostRegister_v2", pointer, ctypes.c_size_t(size), flags)

    def unlock(self, address: int) -> str | None:
        """Unlock what was locked at `address`."""
        return self._call("cuMemHostUnregister", ctypes.c_void_p(address))


def find_driver() -> Driver | str:
    """Find the driver of the default device, or say why there is none."""
    device = jax.local_devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return f"the default device is a {device.platform}, not a CUDA GPU"
    try:
        return CudaDriver(device.local_hardware_id or 0)
    except OSError as error:
        return f"the CUDA driver cannot be used: {error}"


def available_host_bytes() -> int | None:
    """Count the bytes that can still be allocated; `None` where the system does not say."""
    limits = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    limits.append(int(line.split()[1]) * 1024)
    except OSError:
        return None
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            used = int(file.read())
        if limit != "max":
            limits.append(max(int(limit) - used, 0))
    except (OSError, ValueError):
        _LOG.debug("no memory limit of a control group can be read")
    return min(limits) if limits else None


class HostBuffer:
    """Zeroed, page-aligned host memory; page-locked if asked for and possible.

    Args:
        size: bytes.
        page_lock: whether to lock the pages.
        driver: who locks; found by itself if left out.

    Attributes:
        unlocked_reason: why the memory is not page-locked; `None` if it is.

    Raises:
        BackendError: `page_lock="require"` and the pages cannot be locked.
    """

    def __init__(
        self, size: int, *, page_lock: PageLock = "auto", driver: Driver | str | None = None
    ) -> None:
        self.size = size
        self.unlocked_reason: str | None = "page_lock='never'"
        self._driver: Driver | None = None
        pages = mmap.mmap(-1, max(size, 1))
        self._bytes: np.ndarray | None = np.frombuffer(pages, np.uint8)
        if page_lock == "never":
            return
        found = find_driver() if driver is None else driver
        if isinstance(found, str):
            self.unlocked_reason = found
        else:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                pages.madvise(mmap.MADV_HUGEPAGE)
            self._touch()
            self.unlocked_reason = found.lock(self._bytes.ctypes.data, self._bytes.nbytes)
            self._driver = found if self.unlocked_reason is None else None
        if self.unlocked_reason is None:
            return
        if page_lock == "require":
            self._bytes = None
            raise BackendError(
                f"{size} bytes of host memory cannot be page-locked: {self.unlocked_reason}; try "
                "fewer or shorter prompts, a higher limit of locked memory, or page_lock='auto'"
            )
        if not isinstance(found, str):
            _LOG.warning("%d bytes are not page-locked: %s", size, self.unlocked_reason)

    def _touch(self) -> None:
        """Fault all pages in, from several threads: locking would do it from one."""
        data = self._bytes
        assert data is not None  # not after `close`

        def touch(start: int) -> None:
            data[start : start + _STRIPE : mmap.PAGESIZE] = 0

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(touch, range(0, data.nbytes, _STRIPE)))

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """See the first bytes as an array; it must not be used after `close`.

        Raises:
            BackendError: the buffer is closed.
        """
        if self._bytes is None:
            raise BackendError(f"this host buffer of {self.size} bytes is closed; open a new one")
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return self._bytes[:count].view(dtype).reshape(shape)

    def close(self) -> None:
        """Unlock the pages and let go of them; again does nothing."""
        if self._bytes is None:
            return
        if self._driver is not None:
            reason = self._driver.unlock(self._bytes.ctypes.data)
            if reason is not None:
                _LOG.warning("host memory stays page-locked: %s", reason)
            self._driver = None
        self._bytes = None
