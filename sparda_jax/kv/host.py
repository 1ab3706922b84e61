# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""All K and V of a batch, as records in host memory.

A record is K and V of one block and one KV head, contiguous, so that one missing block is one
piece to move. Each layer has one array of records, all layers lie in one piece of memory. On a CUDA
device it is page-locked, and kernels read and write it as a device array.

Five rules, each with a test:

1. What `operand` gives is an operand of our kernels and of `jnp.take`, nothing else: not donated,
   not returned, not closed over, not computed with, not reshaped beyond a bitcast.
2. `HostKV` outlives its operands: `close` deletes them and waits for programs that hold them.
   Leaving the `with`, an exception, Ctrl-C and the interpreter's exit close it too.
3. A kernel that writes returns a receipt, and whatever reads later takes it as an operand.
4. A page lock that fails gives a reason, with size, limit and what to try.
5. On a CPU, `jax.device_put` may alias this memory: `fetch_device_put` copies.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num

from sparda_jax.config import ModelConfig
from sparda_jax.errors import BackendError
from sparda_jax.kv.device_view import ALIGNMENT
from sparda_jax.kv.host_pool import HostPool, Loan
from sparda_jax.kv.pack import HostDtype
from sparda_jax.kv.page_lock import PageLock


def record_bytes(config: ModelConfig, host_dtype: HostDtype | None = None) -> int:
    """Count the bytes of one record: 2 · W · H numbers.

    Args:
        config: of the model.
        host_dtype: of the numbers; `None` takes the model's.
    """
    dtype = jnp.dtype(host_dtype or config.dtype)
    return 2 * config.sparse.block_size * config.head_dim * dtype.itemsize


class HostKV:
    """Every K and V of a batch as records in host memory; a context manager.

    Records that were never written hold zeros in memory of its own; in a pool's, what a request
    before left there.

    Args:
        config: of the model.
        batch: B.
        capacity: tokens of room for each sequence.
        page_lock: whether to page-lock the memory; a pool has settled it already.
        pool: lends the memory; without it, memory is allocated and freed again by `close`.
        host_dtype: of the numbers in memory (`pack`); `None` takes the model's.

    Attributes:
        nbytes: of all records.
        host_dtype: as given.

    Raises:
        CapacityError: the records exceed the host memory that is available, or the pool.
        BackendError: `page_lock="require"` and the memory cannot be locked.

    Example:
        >>> from sparda_jax.testing import tiny_config
        >>> with HostKV(tiny_config(), batch=2, capacity=64) as host:
        ...     host.view(0).shape, host.operand(0).shape
        ((2, 2, 8, 2, 8, 8), (2, 2, 8, 2, 8, 8))
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        page_lock: PageLock = "auto",
        pool: HostPool | None = None,
        host_dtype: HostDtype | None = None,
    ) -> None:
        self.host_dtype: HostDtype | None = host_dtype
        blocks = config.sparse.blocks(capacity)
        size = (2, config.sparse.block_size, config.head_dim)
        self._layers = config.layers
        self._shape = (batch, config.kv_heads, blocks, *size)
        self._dtype = jnp.dtype(host_dtype or config.dtype)
        layer_bytes = math.prod(self._shape) * self._dtype.itemsize
        self.nbytes = config.layers * layer_bytes
        self._stride = -(-layer_bytes // ALIGNMENT) * ALIGNMENT
        lender = HostPool(page_lock=page_lock) if pool is None else pool
        self._own_pool = lender if pool is None else None
        self._operands: dict[int, Array] = {}
        self._loan: Loan = lender.lend(config.layers * self._stride)

    @property
    def is_closed(self) -> bool:
        """Tell whether the memory is gone."""
        return self._loan.is_closed

    @property
    def unlocked_reason(self) -> str | None:
        """Say why the memory is not page-locked; `None` if it is."""
        return self._loan.unlocked_reason

    def _offset(self, layer: int) -> int:
        if self.is_closed:
            raise BackendError(f"the host records of layer {layer} are closed; open a new HostKV")
        if not 0 <= layer < self._layers:
            raise ValueError(f"{layer=} must be one of the {self._layers} layers")
        return layer * self._stride

    def view(self, layer: int) -> Num[np.ndarray, "B K M 2 W H"]:
        """Give the records of a layer to NumPy; not to be used after `close`.

        Args:
            layer: which layer.

        Raises:
            BackendError: the memory is closed.
            ValueError: there is no such layer.
        """
        return self._loan.array(self._shape, self._dtype, offset=self._offset(layer))

    def operand(self, layer: int) -> Num[Array, "B K M 2 W H"]:
        """Give the same bytes to kernels, as an array of the default device: always the same one.

        On CUDA a kernel may write into it, and `view` shows that once the kernel's receipt has
        arrived. On a CPU it stands in for that: a program reads what `view` held when it was
        called, but nothing can write there, so a step returns what it finished and `write` stores
        it between steps, when no program runs that reads it.

        Args:
            layer: which layer.

        Raises:
            BackendError: the memory is closed, or the device cannot see it; the message says why.
            ValueError: there is no such layer.
        """
        offset = self._offset(layer)
        if layer not in self._operands:
            found = self._loan.device_array(self._shape, self._dtype, offset=offset)
            self._operands[layer] = found
        return self._operands[layer]

    def write_range(
        self,
        layer: int,
        first_row: int,
        first_block: int,
        records: Num[np.ndarray, "b K m 2 W H"],
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
        records: Num[np.ndarray, "n K 2 W H"],
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
        """Delete the operands, wait for programs that hold them, unlock and free; once.

        Every view dies with it.
        """
        self._operands = {}
        self._loan.close()
        if self._own_pool is not None:
            self._own_pool.close()

    def __enter__(self) -> "HostKV":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
