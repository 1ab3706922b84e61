# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""torch files without torch: real ones are read, and nothing that one names is ever run."""

import collections
import copyreg
import io
import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from sparda_jax.errors import CheckpointError
from sparda_jax.weights.torch_pickle import (
    Placeholder,
    StoredTensor,
    TorchFile,
    write_torch_file,
)


def archive(path, pickled, root="archive", **extra):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{root}/data.pkl", pickled)
        for name, data in extra.items():
            file.writestr(f"{root}/{name}", data)
    return path


class Runs:
    """What a hostile pickle does: call something when it is rebuilt."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_everything_that_a_trainer_saves_is_read(golden):
    file = TorchFile(golden / "trainer" / "ckpt-1234.pt")
    assert file.value["step"] == 1234
    assert file.value["sparse_config"]["topk"] == 4
    expected = np.load(golden / "trainer" / "expected.npz")
    weights = file.value["model_state_dict"]
    assert isinstance(weights, collections.OrderedDict)
    assert {name.removeprefix("module.") for name in weights} == set(expected)
    for name, tensor in weights.items():
        array = file.read(tensor)
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(
            array.astype(np.float32), expected[name.removeprefix("module.")]
        )


def test_random_state_becomes_a_placeholder(golden):
    value = TorchFile(golden / "trainer" / "ckpt-1234.pt").value
    name, keys, position, *_ = value["rng_state"]["numpy"]
    assert name == "MT19937"
    assert isinstance(keys, Placeholder)
    assert isinstance(position, int)
    assert isinstance(value["rng_state"]["torch"], StoredTensor)
    assert isinstance(value["accuracy"], Placeholder)
    assert value["other_scheduler_state_dict"]["milestones"] == collections.Counter([3, 4])


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {marker}",), "system"),
        (eval, ("open('{marker}', 'w')",), "eval"),
        (pathlib.Path.touch, (pathlib.PurePath("x"),), "getattr|Path|PurePosixPath"),
        (np.load, ("{marker}",), "load"),
        (collections.defaultdict, (list,), "defaultdict"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_any_other_name_is_refused_before_anything_runs(
    tmp_path, function, arguments, name, protocol
):
    marker = tmp_path / "ran"
    filled = [str(a).format(marker=marker) if isinstance(a, str) else a for a in arguments]
    hostile = {"step": 1, "model_state_dict": {}, "bait": Runs(function, *filled)}
    path = archive(tmp_path / "x.pt", pickle.dumps(hostile, protocol))
    with pytest.raises(CheckpointError, match=f"names .*({name}).*refused before anything ran"):
        TorchFile(path)
    assert not marker.exists()


@pytest.fixture
def registered():
    """`os.system` under a number, as an installed package might register a name."""
    copyreg.add_extension("os", "system", 77)
    yield
    copyreg.remove_extension("os", "system", 77)


@pytest.mark.usefixtures("registered")
def test_a_name_reached_through_the_extension_registry_is_refused(tmp_path):
    path = archive(tmp_path / "x.pt", b"\x80\x02\x82\x4d.")
    with pytest.raises(CheckpointError, match=r"names os\.system"):
        TorchFile(path)


@pytest.mark.parametrize(
    "state",
    [b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x01\x00\x00\x00aK\x01s\x86"],
    ids=["dict", "slots"],
)
@pytest.mark.parametrize(
    "name", [b"collections\nOrderedDict\n", b"torch\nFloatStorage\n", b"numpy\nndarray\n"]
)
def test_a_pickle_cannot_change_what_answers_it(tmp_path, name, state):
    """BUILD on a known name would set attributes of it."""
    with pytest.raises(CheckpointError, match="unreadable pickle"):
        TorchFile(archive(tmp_path / "x.pt", b"\x80\x02c" + name + state + b"b."))


def test_a_tensor_over_something_else_than_a_storage_is_refused(tmp_path):
    pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00K\x05\x85K\x01\x85tR."
    with pytest.raises(CheckpointError, match="a tensor without a storage"):
        TorchFile(archive(tmp_path / "x.pt", pickled))


def test_a_reference_to_something_else_than_a_storage_is_refused(tmp_path):
    pickled = b"\x80\x02(X\x06\x00\x00\x00moduleK\x01K\x02K\x03K\x04tQ."
    with pytest.raises(CheckpointError, match="refers to 'module', expected a tensor storage"):
        TorchFile(archive(tmp_path / "x.pt", pickled))


ARRAYS = {
    "bf16": np.array([[1.5, -2.0, 3.0], [4.0, 5.0, 6.5]], ml_dtypes.bfloat16),
    "f32": np.linspace(0, 1, 5, dtype=np.float32),
    "int": np.arange(4, dtype=np.int64).reshape(2, 2).T,
}


def test_what_we_write_comes_back(tmp_path):
    plain = {
        "step": 70_000,
        "large": 1 << 70,
        "negative": -5,
        "ratio": 0.1,
        "flag": True,
        "other": False,
        "nothing": None,
        "text": "naïve",
        "list": [1, [2, "x"]],
        "pair": (1, 2),
        "nested": {"a": {}},
    }
    write_torch_file(tmp_path / "x.pt", {**plain, "tensors": ARRAYS})
    file = TorchFile(tmp_path / "x.pt")
    tensors = file.value.pop("tensors")
    assert file.value == plain
    for name, array in ARRAYS.items():
        got = file.read(tensors[name])
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)


def test_what_we_write_is_stored_uncompressed_as_torch_expects(tmp_path):
    write_torch_file(tmp_path / "x.pt", {"a": ARRAYS["f32"]})
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        assert {entry.compress_type for entry in file.infolist()} == {zipfile.ZIP_STORED}
        assert file.read("archive/data/0") == ARRAYS["f32"].tobytes()
        assert file.read("archive/version") == b"3\n"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "cannot write a object to a torch file"),
        (np.zeros(2, np.uint32), "no storage for dtype uint32"),
    ],
)
def test_what_torch_lacks_is_not_written(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        write_torch_file(tmp_path / "x.pt", {"a": value})


def test_a_file_that_is_no_archive_says_so(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"step": 1}))
    with pytest.raises(CheckpointError, match="truncated or not a zip archive"):
        TorchFile(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        TorchFile(tmp_path / "none.pt")


def test_a_truncated_file_says_so(tmp_path, golden):
    whole = (golden / "trainer" / "ckpt-1234.pt").read_bytes()
    path = tmp_path / "x.pt"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated or not a zip archive"):
        TorchFile(path)


def test_an_archive_without_a_pickle_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("readme", "hello")
    with pytest.raises(CheckpointError, match="holds 0 pickles, expected 1"):
        TorchFile(tmp_path / "x.pt")


def test_a_damaged_pickle_is_refused(tmp_path):
    path = archive(tmp_path / "x.pt", b"\x80\x02}(X\x04\x00\x00\x00step")
    with pytest.raises(CheckpointError, match="unreadable pickle"):
        TorchFile(path)


def test_big_endian_bytes_are_refused(tmp_path):
    path = archive(tmp_path / "x.pt", b"\x80\x02}.", byteorder="big")
    with pytest.raises(CheckpointError, match="byte order b'big', expected little"):
        TorchFile(path)


def test_a_huge_pickle_is_refused_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr("sparda_jax.weights.torch_pickle._MAX_PICKLE", 100)
    path = archive(tmp_path / "x.pt", bytes(101))
    with pytest.raises(CheckpointError, match="a pickle of 101 bytes; at most 100 are read"):
        TorchFile(path)


def stored(**changes):
    fields = {
        "key": "0",
        "dtype": np.dtype(np.float32),
        "count": 5,
        "offset": 0,
        "shape": (5,),
        "strides": (1,),
    }
    return StoredTensor(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (6,)}, r"shape \[6\] reaches element 5 of a storage of 5"),
        ({"offset": 1}, r"shape \[5\] reaches element 5 of a storage of 5"),
        ({"shape": (2, 3), "strides": (3, 1)}, r"shape \[2, 3\] reaches element 5"),
        ({"shape": (10**15,), "strides": (0,)}, "has more elements than its storage of 5"),
        ({"offset": -1}, "reaches element 3"),
        ({"strides": (-1,)}, "reaches element -4"),
        ({"count": 6, "shape": (6,)}, "data/0 holds 20 bytes, expected 24"),
        ({"key": "7"}, "data/7 cannot be read"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, changes, message):
    write_torch_file(tmp_path / "x.pt", {"a": ARRAYS["f32"]})
    file = TorchFile(tmp_path / "x.pt")
    np.testing.assert_array_equal(file.read(stored()), ARRAYS["f32"])
    with pytest.raises(CheckpointError, match=message):
        file.read(stored(**changes))


def test_an_offset_and_strides_pick_the_right_elements(tmp_path):
    write_torch_file(tmp_path / "x.pt", {"a": np.arange(12, dtype=np.float32)})
    view = stored(count=12, offset=1, shape=(2, 3), strides=(1, 4))
    assert TorchFile(tmp_path / "x.pt").read(view).tolist() == [[1, 5, 9], [2, 6, 10]]


def test_a_compressed_storage_that_lies_about_its_size_is_not_inflated(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"\x80\x02}.")
        file.writestr("a/data/0", bytes(1_000_000))
    path = tmp_path / "x.pt"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="holds 1000000 bytes, expected 20"):
        TorchFile(path).read(stored())
