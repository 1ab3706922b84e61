# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Page-aligned host memory, page-locked for CUDA where that is possible.

A GPU copies page-locked ("registered") memory about five times as fast as ordinary memory, and its
kernels can read and write it. The driver locks memory that we allocate, so its size is not bound by
any pool of XLA's. Where there is no CUDA device the memory is plain.
"""

import contextlib
import ctypes
import logging
import mmap
import os
import resource
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol, runtime_checkable

import jax
import numpy as np

from sparda_jax.errors import BackendError
from sparda_jax.kv.device_view import DeviceView

PageLock = Literal["auto", "require", "never"]
"""`auto`: lock on a CUDA device and note why not; `require`: lock or raise; `never`."""

PAGE = mmap.PAGESIZE
"""Bytes that every piece of a buffer is best a multiple of."""

_LOG = logging.getLogger(__name__)
_HUGE = 2 << 20  # bytes of a huge page
_STRIPE = 32 << 20  # bytes that one thread touches at a time
_PORTABLE_AND_MAPPED = 3
_STUCK: list[object] = []  # memory that a device may still use: better kept than freed


@runtime_checkable
class Driver(Protocol):
    """Locks and unlocks pages; a method that fails returns the reason, as text."""

    def lock(self, address: int, size: int) -> str | None:
        """Lock `size` bytes at `address`."""

    def device_address(self, address: int) -> int | str:
        """Give the address at which the device sees the locked byte at `address`."""

    def synchronize(self) -> str | None:
        """Wait until the device has done all it was given."""

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

    def device_address(self, address: int) -> int | str:
        """Give the address for kernels; with unified addressing it is the same."""
        found = ctypes.c_uint64()
        where = (ctypes.byref(found), ctypes.c_void_p(address), ctypes.c_uint(0))
        return self._call("cuMemHostGetDevicePointer_v2", *where) or int(found.value)

    def synchronize(self) -> str | None:
        """Wait for everything in the primary context."""
        return self._call("cuCtxSynchronize")

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


def allocate(size: int) -> np.ndarray:
    """Allocate zeroed bytes that begin at a page, a huge page if there are that many.

    The mapping is private, because huge pages for shared memory are often switched off, and a child
    of a fork does not get it: it could neither use nor unlock what the device holds.

    Args:
        size: bytes.
    """
    margin = _HUGE if size >= _HUGE else 0
    pages = mmap.mmap(-1, max(size, 1) + margin, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
        if hasattr(mmap, advice):
            with contextlib.suppress(OSError):  # a kernel without it: only slower
                pages.madvise(getattr(mmap, advice))
    data = np.frombuffer(pages, np.uint8)
    first = -data.ctypes.data % _HUGE if margin else 0
    return data[first : first + max(size, 1)]


def touch(data: np.ndarray) -> None:
    """Fault all pages in, from several threads: locking would do it from one.

    Args:
        data: bytes.
    """

    def write(start: int) -> None:
        data[start : start + _STRIPE : PAGE] = 0

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(write, range(0, data.nbytes, _STRIPE)))


class _Pages:
    """What a buffer holds of the system; apart from it, so that it can go after the buffer."""

    def __init__(self, data: np.ndarray) -> None:
        self.data: np.ndarray | None = data
        self.driver: Driver | None = None
        self.views: list[DeviceView] = []
        self._process = os.getpid()

    def release_views(self, views: list[DeviceView]) -> bool:
        """Delete arrays, and tell whether no program holds them any more."""
        gone = [view.close() for view in views]
        self.views = [view for view in self.views if view not in views]
        return all(gone)

    def release(self) -> None:
        """Delete the arrays, wait for the device, unlock, and let go of the memory."""
        data, self.data = self.data, None
        driver, self.driver = self.driver, None
        if data is None or os.getpid() != self._process:  # a fork shares the device, not the pages
            return
        _STUCK.append(data)  # until all is well: an interrupt may come any time
        is_free = self.release_views(self.views)
        reason = None if is_free else "a program still uses it"
        if driver is not None:
            reason = reason or driver.synchronize() or driver.unlock(data.ctypes.data)
        if reason is None:
            _STUCK[:] = [held for held in _STUCK if held is not data]
        else:
            _LOG.warning("%d bytes of host memory stay page-locked: %s", data.nbytes, reason)


class HostBuffer:
    """Zeroed, page-aligned host memory; page-locked if asked for and possible.

    Freed by `close`, when it is collected, or at the latest when the interpreter exits, in this
    order: arrays that kernels see are deleted, running programs end, pages are unlocked.

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
        self._pages = _Pages(allocate(size))
        if page_lock != "never":
            self._lock(page_lock, find_driver() if driver is None else driver)
        # Runs once: on close, on collection or at exit, whichever comes first.
        self._release = weakref.finalize(self, self._pages.release)

    def _lock(self, page_lock: PageLock, found: Driver | str) -> None:
        data = self._pages.data
        assert data is not None  # it was just allocated
        if isinstance(found, str):
            self.unlocked_reason = found
        else:
            touch(data)
            self.unlocked_reason = found.lock(data.ctypes.data, data.nbytes)
            self._pages.driver = found if self.unlocked_reason is None else None
        if self.unlocked_reason is None:
            return
        if page_lock == "require":
            self._pages.data = None
            raise BackendError(
                f"{self.size} bytes of host memory cannot be page-locked: {self.unlocked_reason}; "
                f"the limit of locked memory is {_lock_limit()}; try fewer or shorter prompts, a "
                "higher limit (ulimit -l), or page_lock='auto'"
            )
        if not isinstance(found, str):
            _LOG.warning("%d bytes are not page-locked: %s", self.size, self.unlocked_reason)

    @property
    def is_closed(self) -> bool:
        """Tell whether the memory is gone."""
        return self._pages.data is None

    def _bytes(self, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
        data = self._pages.data
        if data is None:
            raise BackendError(f"this host buffer of {self.size} bytes is closed; open a new one")
        end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if offset < 0 or end > self.size:
            raise ValueError(
                f"bytes {offset} to {end} are not within the {self.size} of this host buffer"
            )
        return data[offset:end]

    def array(self, shape: tuple[int, ...], dtype: np.dtype, *, offset: int = 0) -> np.ndarray:
        """See some bytes as an array; it must not be used after `close`.

        Args:
            shape: of the array.
            dtype: of its numbers.
            offset: of its first byte.

        Raises:
            BackendError: the buffer is closed.
            ValueError: the array reaches out of the buffer.
        """
        return self._bytes(shape, dtype, offset).view(dtype).reshape(shape)

    def device_view(
        self, shape: tuple[int, ...], dtype: np.dtype, *, offset: int = 0
    ) -> DeviceView:
        """See the same bytes as an array of the default device, for kernels.

        The caller may close it before the buffer; the buffer does at the latest.

        Args:
            shape: of the array.
            dtype: of its numbers.
            offset: of its first byte, a multiple of 256.

        Raises:
            BackendError: the buffer is closed, or the device is a GPU and the memory is not locked.
            ValueError: the array reaches out of the buffer, or cannot be exported.
        """
        data = self._bytes(shape, dtype, offset)
        address: int | str = data.ctypes.data
        if self._pages.driver is not None:
            address = self._pages.driver.device_address(data.ctypes.data)
        elif jax.local_devices()[0].platform != "cpu":
            address = f"it is not page-locked: {self.unlocked_reason}"
        if isinstance(address, str):
            raise BackendError(
                f"kernels cannot see these {data.nbytes} of {self.size} bytes of host memory: "
                f"{address}; use fetch='device_put'"
            )
        view = DeviceView(address, shape, dtype, owner=data)
        self._pages.views.append(view)
        return view

    def close_views(self, views: list[DeviceView]) -> None:
        """Delete some of the arrays that `device_view` gave, and wait for programs that read them.

        Args:
            views: to close.

        Raises:
            BackendError: a program still holds one after a minute; the buffer keeps the memory.
        """
        if not self._pages.release_views(views):
            _STUCK.append(self._pages.data)
            held = sum(view.nbytes for view in views)
            raise BackendError(
                f"a program still uses {held} of {self.size} bytes of host memory; wait for what "
                "it returns before closing"
            )

    def close(self) -> None:
        """Unlock the pages and let go of them; again does nothing."""
        self._release()


def _lock_limit() -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "none" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
