# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Host memory that is allocated and page-locked once, and lent to one request after another.

Touching and locking 80 GiB takes half a minute, so a server does it once. A pool is one buffer; a
request borrows a range of it and gives the range back. What a range held before stays in it.
"""

import threading

import jax
import numpy as np

from sparda_jax.errors import BackendError, CapacityError
from sparda_jax.kv.device_view import DeviceView
from sparda_jax.kv.page_lock import PAGE, HostBuffer, PageLock, available_host_bytes


class Loan:
    """A range of a pool's memory; give it back with `close`.

    Attributes:
        size: bytes.
    """

    def __init__(self, pool: "HostPool", buffer: HostBuffer, first: int, size: int) -> None:
        self.size = size
        self._pool, self._buffer, self._first = pool, buffer, first
        self._views: list[DeviceView] = []
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Tell whether the range was given back, or the pool is gone."""
        return self._is_closed or self._buffer.is_closed

    @property
    def unlocked_reason(self) -> str | None:
        """Say why the memory is not page-locked; `None` if it is."""
        return self._buffer.unlocked_reason

    def _check(self, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> None:
        if self.is_closed:
            raise BackendError(f"these {self.size} bytes of host memory were given back")
        end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if offset < 0 or end > self.size:
            raise ValueError(f"bytes {offset} to {end} are not within the {self.size} of this loan")

    def array(self, shape: tuple[int, ...], dtype: np.dtype, *, offset: int = 0) -> np.ndarray:
        """See some bytes as an array; it must not be used after `close`.

        Args:
            shape: of the array.
            dtype: of its numbers.
            offset: of its first byte in the range.

        Raises:
            BackendError: the range was given back.
            ValueError: the array reaches out of it.
        """
        self._check(shape, dtype, offset)
        return self._buffer.array(shape, dtype, offset=self._first + offset)

    def device_array(
        self, shape: tuple[int, ...], dtype: np.dtype, *, offset: int = 0
    ) -> jax.Array:
        """See the same bytes as an array of the default device, for kernels; `close` deletes it.

        Args:
            shape: of the array.
            dtype: of its numbers.
            offset: of its first byte in the range, a multiple of 256.

        Raises:
            BackendError: the range was given back, or the device cannot see it.
            ValueError: the array reaches out of it, or cannot be exported.
        """
        self._check(shape, dtype, offset)
        view = self._buffer.device_view(shape, dtype, offset=self._first + offset)
        self._views.append(view)
        return view.array

    def close(self) -> None:
        """Delete the arrays, wait for programs that read them, give the range back; once."""
        if self._is_closed:
            return
        self._is_closed = True
        views, self._views = self._views, []
        if not self._buffer.is_closed:
            self._buffer.close_views(views)
        self._pool._take_back(self._buffer, self._first, self.size)


class HostPool:
    """Lends ranges of one page-locked buffer; grows while nothing is lent. A context manager.

    Args:
        size: bytes to begin with.
        page_lock: whether to page-lock the memory.

    Raises:
        CapacityError: the host has too little memory.
        BackendError: `page_lock="require"` and the memory cannot be locked.

    Example:
        >>> with HostPool() as pool:
        ...     loan = pool.lend(10_000)
        ...     loan.array((2, 3), np.dtype(np.float32)).shape
        (2, 3)
    """

    def __init__(self, size: int = 0, *, page_lock: PageLock = "auto") -> None:
        self._page_lock: PageLock = page_lock
        self._buffer: HostBuffer | None = None
        self._free: list[tuple[int, int]] = []  # first byte and bytes of each gap, ascending
        self._is_closed = False
        self._mutex = threading.Lock()
        if size > 0:
            self._grow(size)

    @property
    def size(self) -> int:
        """Count the bytes that are allocated, lent or not."""
        return 0 if self._buffer is None else self._buffer.size

    @property
    def free_bytes(self) -> int:
        """Count the bytes that are allocated and not lent."""
        return sum(size for _, size in self._free)

    def lend(self, size: int) -> Loan:
        """Lend a range that begins at a page: the first gap that is large enough.

        A pool that is too small and has nothing lent is replaced by one of this size.

        Args:
            size: bytes.

        Raises:
            BackendError: the pool is closed, or its new memory cannot be locked but must be.
            CapacityError: neither the pool nor the host has room.
        """
        whole = _whole_pages(size)
        with self._mutex:
            if self._is_closed:
                raise BackendError(f"{size} bytes are asked of a closed host pool; open a new one")
            place = self._find(whole)
            if place is None and self.free_bytes == self.size:
                self._grow(size)
                place = self._find(whole)
            if place is None:
                raise CapacityError(
                    f"{size} bytes are asked of a host pool of {self.size}, of which "
                    f"{self.free_bytes} are free; close what borrows the rest, or open a larger one"
                )
            first, gap = self._free.pop(place)
            if gap > whole:
                self._free.insert(place, (first + whole, gap - whole))
            assert self._buffer is not None  # it has a gap
            return Loan(self, self._buffer, first, size)

    def _find(self, size: int) -> int | None:
        return next((i for i, (_, gap) in enumerate(self._free) if gap >= size), None)

    def _grow(self, size: int) -> None:
        """Replace the buffer, of which nothing is lent, by one of at least `size` bytes."""
        if self._buffer is not None:
            self._buffer.close()
        self._buffer, self._free = None, []
        available = available_host_bytes()
        if available is not None and size > available:
            raise CapacityError(
                f"offloaded KV needs {size} bytes of host memory, but {available} are available; "
                "take fewer or shorter prompts"
            )
        whole = _whole_pages(size)
        self._buffer = HostBuffer(whole, page_lock=self._page_lock)
        self._free = [(0, whole)]

    def _take_back(self, buffer: HostBuffer, first: int, size: int) -> None:
        with self._mutex:
            if buffer is not self._buffer:
                return
            gaps: list[tuple[int, int]] = []
            for start, length in sorted([*self._free, (first, _whole_pages(size))]):
                if gaps and sum(gaps[-1]) == start:
                    start, length = gaps[-1][0], gaps.pop()[1] + length
                gaps.append((start, length))
            self._free = gaps

    def close(self) -> None:
        """Unlock and free; every array of every loan dies with it. Again does nothing."""
        with self._mutex:
            self._is_closed = True
            if self._buffer is not None:
                self._buffer.close()
            self._buffer, self._free = None, []

    def __enter__(self) -> "HostPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _whole_pages(size: int) -> int:
    return max(-(-size // PAGE), 1) * PAGE
