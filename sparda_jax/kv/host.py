# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""All K and V of a batch, as records in host memory.

A record is K and V of one block and one KV head, contiguous, so that one missing block is one
piece to move. Each layer has one array of records. On a CUDA device the memory is page-locked.
"""

import atexit
import weakref

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from sparda_jax.config import ModelConfig
from sparda_jax.errors import BackendError, CapacityError
from sparda_jax.kv.page_lock import HostBuffer, PageLock, available_host_bytes

_OPEN: "weakref.WeakSet[HostKV]" = weakref.WeakSet()


def record_bytes(config: ModelConfig) -> int:
    """Count the bytes of one record: 2 · W · H numbers."""
    return 2 * config.sparse.block_size * config.head_dim * jnp.dtype(config.dtype).itemsize


class HostKV:
    """Every K and V of a batch as records in host memory; a context manager.

    Args:
        config: of the model.
        batch: B.
        capacity: tokens of room for each sequence.
        page_lock: whether to page-lock the memory.

    Attributes:
        unlocked_reason: why the memory is not page-locked; `None` if it is.

    Raises:
        CapacityError: the records exceed the host memory that is available.
        BackendError: `page_lock="require"` and the memory cannot be locked.

    Example:
        >>> from sparda_jax.testing import tiny_config
        >>> with HostKV(tiny_config(), batch=2, capacity=64) as host:
        ...     host.view(0).shape
        (2, 2, 8, 2, 8, 8)
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, *, page_lock: PageLock = "auto"
    ) -> None:
        blocks = config.sparse.blocks(capacity)
        size = (2, config.sparse.block_size, config.head_dim)
        self._shape = (batch, config.kv_heads, blocks, *size)
        self._dtype = jnp.dtype(config.dtype)
        layer_bytes = batch * config.kv_heads * blocks * record_bytes(config)
        self.nbytes = config.layers * layer_bytes
        available = available_host_bytes()
        if available is not None and self.nbytes > available:
            raise CapacityError(
                f"offloaded KV needs {self.nbytes} bytes of host memory, but {available} are "
                "available; take fewer or shorter prompts"
            )
        self._buffers: list[HostBuffer] = []
        try:
            for _ in range(config.layers):
                self._buffers.append(HostBuffer(layer_bytes, page_lock=page_lock))
        except BaseException:
            self.close()
            raise
        reasons = [buffer.unlocked_reason for buffer in self._buffers]
        self.unlocked_reason = next((reason for reason in reasons if reason), None)
        _OPEN.add(self)

    @property
    def is_closed(self) -> bool:
        """Tell whether the memory is gone."""
        return not self._buffers

    def view(self, layer: int) -> Float[np.ndarray, "B K M 2 W H"]:
        """Give the records of a layer to NumPy; not to be used after `close`.

        Raises:
            BackendError: the memory is closed.
        """
        if self.is_closed:
            raise BackendError(f"the host records of layer {layer} are closed; open a new HostKV")
        return self._buffers[layer].array(self._shape, self._dtype)

    def write_range(
        self,
        layer: int,
        first_row: int,
        first_block: int,
        records: Float[np.ndarray, "b K m 2 W H"],
    ) -> None:
        """Store neighbouring blocks of neighbouring rows; blocks past the end are dropped.

        Args:
            layer: which layer.
            first_row: row of the first sequence.
            first_block: the first block.
            records: to store.
        """
        view = self.view(layer)[first_row : first_row + records.shape[0], :, first_block:]
        view[:, :, : records.shape[2]] = records[:, :, : view.shape[2]]

    def write(
        self,
        layer: int,
        rows: Int[np.ndarray, " n"],
        blocks: Int[np.ndarray, " n"],
        records: Float[np.ndarray, "n K 2 W H"],
    ) -> None:
        """Store one block of each of some rows.

        Args:
            layer: which layer.
            rows: sequences.
            blocks: the block of each.
            records: to store.
        """
        self.view(layer)[rows, :, blocks] = records

    def close(self) -> None:
        """Unlock and free; every view dies with it. Again does nothing."""
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []
        _OPEN.discard(self)

    def __enter__(self) -> "HostKV":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@atexit.register
def close_forgotten() -> None:
    """Close what a program left open: locked pages must not outlive the driver."""
    for host in list(_OPEN):
        host.close()
