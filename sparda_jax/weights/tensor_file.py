# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, one tensor at a time.

A file is eight bytes (length of the header), a JSON header and the bytes of the tensors. Reading
takes one tensor into memory and leaves no mapping behind; writing keeps one tensor at a time. So an
8B checkpoint passes through in the space of its largest tensor, and a broken file gives one message
with both sizes.
"""

import dataclasses
import json
import math
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from sparda_jax.errors import CheckpointError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Names of the format for the dtypes that a checkpoint may hold."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Those that a weight may have."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        dtype: name of the format, `BF16` for instance.
        shape: as stored.
        start: first byte, counted from the beginning of the file.
        stop: the byte after the last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        """Count the bytes of the tensor."""
        return self.stop - self.start


class TensorFile:
    """The header of one safetensors file, and its tensors on request.

    Attributes:
        path: of the file.
        entries: of all tensors, by name.
        metadata: text by name, as the writer left it.

    Raises:
        CheckpointError: the file is missing, truncated or not a safetensors file.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{self.path} is missing or not a file")
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{self.path} holds {size} bytes but its header claims {length}: it is "
                    "truncated or not a safetensors file; copy it again"
                )
            raw = file.read(length)
        try:
            header = json.loads(raw)
            self.metadata: dict[str, str] = dict(header.pop("__metadata__", None) or {})
            self.entries = {name: _entry(item, 8 + length) for name, item in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path} has an unreadable header: {error!r}") from error
        end = max((entry.stop for entry in self.entries.values()), default=8 + length)
        if end != size:
            raise CheckpointError(
                f"{self.path} holds {size} bytes but its header describes {end}: it is truncated "
                "or damaged; copy it again"
            )

    def read(self, name: str) -> np.ndarray:
        """Read one tensor into fresh memory.

        Args:
            name: as in `entries`.

        Returns:
            the tensor in its stored shape and dtype.

        Raises:
            CheckpointError: a dtype that no weight has, or bytes that do not fit the shape.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} has dtype {entry.dtype}; known are {sorted(DTYPES)}"
            )
        dtype = DTYPES[entry.dtype]
        need = math.prod(entry.shape) * dtype.itemsize
        if need != entry.size_bytes:
            raise CheckpointError(
                f"{self.path}: {name} has {entry.size_bytes} bytes but {entry.dtype} of shape "
                f"{list(entry.shape)} needs {need}"
            )
        buffer = np.empty(need, np.uint8)
        with self.path.open("rb") as file:
            file.seek(entry.start)
            got = file.readinto(memoryview(buffer))
        if got != need:
            raise CheckpointError(f"{self.path}: read {got} bytes of {name}, expected {need}")
        return buffer.view(dtype).reshape(entry.shape)


def _entry(item: Mapping[str, Any], offset: int) -> TensorEntry:
    start, stop = (int(number) for number in item["data_offsets"])
    if not 0 <= start <= stop:
        raise ValueError(f"data_offsets [{start}, {stop}]")
    shape = tuple(int(number) for number in item["shape"])
    return TensorEntry(str(item["dtype"]), shape, offset + start, offset + stop)


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor to be written, made only when its turn comes.

    Attributes:
        name: in the file.
        shape: in the file.
        dtype: in the file.
        make: gives the array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def size_bytes(self) -> int:
        """Count the bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensor_file(
    path: str | pathlib.Path,
    tensors: Iterable[PlannedTensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, making one tensor at a time.

    Args:
        path: of the new file.
        tensors: what to write, in this order.
        metadata: text by name.

    Raises:
        ValueError: a dtype that the format lacks, or an array other than planned.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for tensor in tensors:
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{tensor.name} has dtype {tensor.dtype}; known are {sorted(DTYPES)}")
        stop = start + tensor.size_bytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with pathlib.Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in tensors:
            array = tensor.make()
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(
                    f"{tensor.name} was planned as {tensor.dtype}{list(tensor.shape)} but is "
                    f"{array.dtype}{list(array.shape)}"
                )
            file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
