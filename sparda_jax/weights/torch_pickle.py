# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Files of `torch.save`, read and written without torch and without running what they name.

Such a file is a zip archive of raw tensor bytes and one pickle that refers to them. A pickle names
functions to call; here only a few names are known, each of them answered by code of this module:
tensors become descriptions whose bytes are read on request, containers become containers, and what
holds random state becomes an inert placeholder. Any other name refuses the file at once.
"""

import collections
import io
import math
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sparda_jax.errors import CheckpointError

_STORAGES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "BoolStorage": np.dtype(np.bool_),
}
_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items()}

_MAX_PICKLE = 1 << 26
_PROTOCOL = 2


class Placeholder:
    """Stands for an object that was not rebuilt; swallows its state."""

    def __setstate__(self, state: object) -> None:
        """Forget the state."""


class StoredTensor(NamedTuple):
    """A tensor in a torch file, not yet read.

    Attributes:
        key: name of its storage in the archive.
        dtype: of its elements.
        count: elements in the storage.
        offset: first element.
        shape: of the tensor.
        strides: in elements.
    """

    key: str
    dtype: np.dtype
    count: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StorageType(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int


class _Answer:
    """A function of ours that a pickle may call, but not change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it sets attributes of a function")


class _Unpickler(pickle.Unpickler):
    """Rebuilds plain values; every name that a pickle calls is answered here, never imported."""

    def __init__(self, file: io.BytesIO, path: pathlib.Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ANSWERS:
            return _Answer(_ANSWERS[module, name])
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        raise CheckpointError(
            f"{self._path} names {module}.{name}, which no indexer checkpoint needs: refused "
            "before anything ran"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _StorageType):
            raise CheckpointError(f"{self._path} refers to {kind!r}, expected a tensor storage")
        return _Storage(str(key), storage.dtype, int(count))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: object) -> StoredTensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    sizes, steps = tuple(map(int, shape)), tuple(map(int, strides))
    return StoredTensor(*storage, int(offset), sizes, steps)


def _parameter(data: Any, *_: object) -> Any:
    return data


def _inert(*_: object) -> Placeholder:
    return Placeholder()


# How random state spells NumPy arrays; protocol 2 keeps their bytes as a call of `encode`.
_INERT = (
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
)
_ANSWERS: dict[tuple[str, str], Callable] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "Counter"): collections.Counter,
    **dict.fromkeys(_INERT, _inert),
}


class TorchFile:
    """One file of `torch.save`.

    Attributes:
        path: of the file.
        value: what was saved, tensors as `StoredTensor`.

    Raises:
        CheckpointError: not such a file, damaged, or naming anything but tensors, plain containers
            and random state.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = [
                    name for name in archive.namelist() if name.split("/", 1)[1:] == ["data.pkl"]
                ]
                if len(names) != 1:
                    raise CheckpointError(f"{self.path} holds {len(names)} pickles, expected 1")
                self._root = names[0].removesuffix("data.pkl")
                size = archive.getinfo(names[0]).file_size
                if size > _MAX_PICKLE:
                    raise CheckpointError(
                        f"{self.path} has a pickle of {size} bytes; at most {_MAX_PICKLE} are read"
                    )
                order = b"little"
                if self._root + "byteorder" in archive.namelist():
                    order = archive.read(self._root + "byteorder").strip()
                if order != b"little":
                    raise CheckpointError(f"{self.path} has byte order {order!r}, expected little")
                raw = archive.read(names[0])
            self.value: Any = _Unpickler(io.BytesIO(raw), self.path).load()
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        except zipfile.BadZipFile as error:
            raise CheckpointError(
                f"{self.path} is truncated or not a zip archive of torch.save: {error}"
            ) from error
        except Exception as error:  # a damaged pickle may raise anything
            raise CheckpointError(f"{self.path} has an unreadable pickle: {error!r}") from error

    def read(self, tensor: StoredTensor) -> np.ndarray:
        """Read one tensor.

        Raises:
            CheckpointError: its storage is missing, or has fewer elements than the tensor.
        """
        name = f"{self._root}data/{tensor.key}"
        need = tensor.count * tensor.dtype.itemsize
        last = tensor.offset + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)
        )
        if 0 in tensor.shape or min((tensor.offset, *tensor.strides)) < 0 or last >= tensor.count:
            raise CheckpointError(
                f"{self.path}: a tensor of shape {list(tensor.shape)} reaches element {last} of a "
                f"storage of {tensor.count}"
            )
        if math.prod(tensor.shape) > tensor.count:  # a stride of 0 would make anything of little
            raise CheckpointError(
                f"{self.path}: a tensor of shape {list(tensor.shape)} has more elements than its "
                f"storage of {tensor.count}"
            )
        try:
            with zipfile.ZipFile(self.path) as archive:
                size = archive.getinfo(name).file_size
                if size != need:
                    raise CheckpointError(
                        f"{self.path}: {name} holds {size} bytes, expected {need}"
                    )
                flat = np.frombuffer(archive.read(name), tensor.dtype)
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error
        strides = [stride * tensor.dtype.itemsize for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides)
        return np.array(view)


def write_torch_file(path: str | pathlib.Path, value: Mapping[str, Any]) -> None:
    """Write a file that `torch.load` reads, `weights_only=True` included.

    Args:
        path: of the new file.
        value: a dictionary of numbers, texts, booleans, `None`, lists, dictionaries and arrays.

    Raises:
        ValueError: a value of another type, or an array of a dtype that torch lacks.
    """
    arrays: list[np.ndarray] = []
    pickled = b"\x80\x02" + _pickle(value, arrays) + pickle.STOP
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        for key, array in enumerate(arrays):
            archive.writestr(f"archive/data/{key}", array.reshape(-1).view(np.uint8).data)
        archive.writestr("archive/version", b"3\n")


def _pickle(value: Any, arrays: list[np.ndarray]) -> bytes:
    """Spell a value in pickle's opcodes, collecting arrays on the way."""
    if value is None:
        return pickle.NONE
    if isinstance(value, bool):
        return pickle.NEWTRUE if value else pickle.NEWFALSE
    if isinstance(value, int):
        return pickle.dumps(value, _PROTOCOL)[2:-1]
    if isinstance(value, float):
        return pickle.BINFLOAT + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    if isinstance(value, Mapping):
        items = b"".join(_pickle(k, arrays) + _pickle(v, arrays) for k, v in value.items())
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if isinstance(value, list):
        items = b"".join(_pickle(item, arrays) for item in value)
        return pickle.EMPTY_LIST + pickle.MARK + items + pickle.APPENDS
    if isinstance(value, tuple):
        items = b"".join(_pickle(item, arrays) for item in value)
        return pickle.MARK + items + pickle.TUPLE
    if isinstance(value, np.ndarray):
        return _pickle_array(value, arrays)
    raise ValueError(f"cannot write a {type(value).__name__} to a torch file")


def _pickle_array(array: np.ndarray, arrays: list[np.ndarray]) -> bytes:
    if array.dtype not in _STORAGE_OF:
        known = sorted(map(str, _STORAGE_OF))
        raise ValueError(f"torch has no storage for dtype {array.dtype}; known are {known}")
    array = np.ascontiguousarray(array)
    arrays.append(array)
    strides = tuple(stride // array.itemsize for stride in array.strides)
    storage = (
        pickle.MARK
        + _pickle("storage", arrays)
        + _global("torch", _STORAGE_OF[array.dtype])
        + _pickle(str(len(arrays) - 1), arrays)
        + _pickle("cpu", arrays)
        + _pickle(array.size, arrays)
        + pickle.TUPLE
        + pickle.BINPERSID
    )
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    return (
        _global("torch._utils", "_rebuild_tensor_v2")
        + pickle.MARK
        + storage
        + b"".join(_pickle(item, arrays) for item in (0, array.shape, strides, False))
        + hooks
        + pickle.TUPLE
        + pickle.REDUCE
    )


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
