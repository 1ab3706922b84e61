# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Fetch by copy: records are gathered on the host into staging memory and put on the device.

The gather and the copy of one layer run while the device computes the layer before. Staging buffers
form a ring; one is filled again only after its last copy has arrived. Batches of records are padded
to powers of two, so that a handful of programs takes them all in.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num

from sparda_jax.kv.host import HostKV
from sparda_jax.kv.page_lock import HostBuffer

_THREADS_ABOVE = 4 << 20  # bytes from which a gather is worth several threads
_SMALLEST = 8  # records of the smallest bucket


@dataclasses.dataclass(frozen=True, slots=True)
class Fetched:
    """Records on their way to the device.

    Attributes:
        records: the missing records, then padding.
        places: index of each into the flattened [B K R]; padding points past the end.
        sources: index of each into the flattened [B K M]; 0 for padding.
    """

    records: Num[Array, "n 2 W H"]
    places: Int[np.ndarray, " n"]
    sources: Int[np.ndarray, " n"]


def bucket(count: int) -> int:
    """Round a number of records up to a power of two, at least 8.

    Example:
        >>> bucket(3), bucket(8), bucket(9)
        (8, 8, 16)
    """
    return max(_SMALLEST, 1 << (count - 1).bit_length())


class DevicePut:
    """Moves missing records to the device, each batch by one copy.

    Args:
        host: all records.
        slots: R.
        width: J, the most records a (row, head) can miss.
        ring: staging buffers, at least 2: one fills while another is copied.
    """

    def __init__(self, host: HostKV, slots: int, width: int, *, ring: int = 2) -> None:
        if ring < 2:
            raise ValueError(f"{ring=} must be at least 2: one fills while another is copied")
        self._host = host
        batch, kv_heads, _, *self._record = host.view(0).shape
        self._nowhere = batch * kv_heads * slots
        self._dtype = host.view(0).dtype
        most = bucket(batch * kv_heads * width)
        size = most * int(np.prod(self._record)) * self._dtype.itemsize
        self._staging = [HostBuffer(size) for _ in range(ring)]
        self._in_flight: list[Array | None] = [None] * ring
        self._next = 0
        self._device = jax.local_devices()[0]
        self._threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    def fetch(self, layer: int, misses: Int[np.ndarray, "2 misses"]) -> Fetched | None:
        """Start moving the missing records of a layer.

        Args:
            layer: whose records.
            misses: indices of the missing records and of their slots, then −1; see `FetchPlan`.

        Returns:
            The records on their way, or `None` if nothing is missing.
        """
        count = int(np.count_nonzero(misses[0] >= 0))
        if count == 0:
            return None
        padded = bucket(count)
        targets = np.full((padded,), self._nowhere, np.int32)
        targets[:count] = misses[1, :count]
        sources = np.zeros((padded,), np.int32)
        sources[:count] = misses[0, :count]
        records = self._copy(layer, sources[:count], padded)
        return Fetched(records=records, places=targets, sources=sources)

    def _copy(
        self, layer: int, sources: Int[np.ndarray, " n"], padded: int
    ) -> Num[Array, "m 2 W H"]:
        """Gather records into the next staging buffer and copy it to the device."""
        turn, self._next = self._next, (self._next + 1) % len(self._staging)
        if self._in_flight[turn] is not None:
            jax.block_until_ready(self._in_flight[turn])
        staged = self._staging[turn].array((padded, *self._record), self._dtype)
        self._gather(layer, sources, staged)
        if self._device.platform == "cpu":  # device_put may alias aligned memory there
            arrived = jnp.array(staged, copy=True)
        else:
            # Without a device, so that it is free: what is committed would commit the slots.
            arrived = jax.device_put(staged)
        self._in_flight[turn] = arrived
        return arrived

    def _gather(
        self, layer: int, sources: Int[np.ndarray, " n"], staged: Num[np.ndarray, "m 2 W H"]
    ) -> None:
        """Copy records[sources] to the start of `staged`, from several threads if it is much."""
        view = self._host.view(layer)
        total = view.shape[0] * view.shape[1] * view.shape[2]
        assert sources.min() >= 0, sources.min()
        assert sources.max() < total, (sources.max(), total)
        # Rows of whole words: NumPy copies them as memory, whatever the dtype is.
        words = view.reshape(total, -1).view(np.uint32)
        out = staged.reshape(staged.shape[0], -1).view(np.uint32)

        def part(start: int, stop: int) -> None:
            # mode="clip" writes straight into `out`; the bounds were checked above.
            np.take(words, sources[start:stop], axis=0, out=out[start:stop], mode="clip")

        if sources.size * words.shape[1] * 4 < _THREADS_ABOVE:
            part(0, sources.size)
            return
        step = -(-sources.size // self._threads._max_workers)
        list(
            self._threads.map(
                lambda start: part(start, min(start + step, sources.size)),
                range(0, sources.size, step),
            )
        )

    def close(self) -> None:
        """Wait for the copies under way and free the staging memory."""
        jax.block_until_ready([array for array in self._in_flight if array is not None])
        self._threads.shutdown()
        for buffer in self._staging:
            buffer.close()
