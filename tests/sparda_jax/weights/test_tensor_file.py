# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: ours and the official library's read each other; damage gives one error."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sparda_jax.errors import CheckpointError
from sparda_jax.weights.tensor_file import PlannedTensor, TensorFile, write_tensor_file

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, -2.25], ml_dtypes.bfloat16),
    "c": np.array(7, np.int64),
    "d": np.array([[True], [False]]),
    "e": np.zeros((0, 4), np.float16),
}


def planned(arrays):
    return [
        PlannedTensor(name, array.shape, array.dtype, lambda array=array: array)
        for name, array in arrays.items()
    ]


def assert_same(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.tobytes() == want.tobytes()


def test_the_official_library_reads_what_we_write(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensor_file(path, planned(ARRAYS), metadata={"step": "3"})
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}
        assert set(file.keys()) == set(ARRAYS)
    for name, array in safetensors.numpy.load_file(path).items():
        assert_same(array, ARRAYS[name])


def test_we_read_what_the_official_library_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, metadata={"step": "3"})
    file = TensorFile(path)
    assert file.metadata == {"step": "3"}
    assert set(file.entries) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert_same(file.read(name), array)
        assert file.entries[name].size_bytes == array.nbytes


def test_a_transposed_array_is_written_in_its_own_order(tmp_path):
    path = tmp_path / "x.safetensors"
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_tensor_file(path, planned({"t": array}))
    assert TensorFile(path).read("t").tolist() == array.tolist()


def test_a_tensor_that_is_not_asked_for_is_not_made(tmp_path):
    made = []

    def make(number):
        made.append(number)
        return np.full((2,), number, np.float32)

    tensors = [
        PlannedTensor(str(n), (2,), np.dtype(np.float32), lambda n=n: make(n)) for n in range(3)
    ]
    assert made == []
    write_tensor_file(tmp_path / "x.safetensors", tensors)
    assert made == [0, 1, 2]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.safetensors is missing"):
        TensorFile(tmp_path / "x.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 20])
def test_a_file_cut_in_its_header_shows_both_sizes(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(ARRAYS, path)
    whole = path.read_bytes()
    claimed = struct.unpack("<Q", whole[:8])[0] if keep >= 8 else 0
    path.write_bytes(whole[:keep])
    with pytest.raises(
        CheckpointError, match=f"holds {keep} bytes but its header claims {claimed}"
    ):
        TensorFile(path)


@pytest.mark.parametrize("change", [-1, 8])
def test_a_file_cut_in_its_data_shows_both_sizes(tmp_path, change):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(ARRAYS, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:change] if change < 0 else whole + bytes(change))
    size = len(whole) + change
    with pytest.raises(
        CheckpointError, match=f"{size} bytes but its header describes {len(whole)}"
    ):
        TensorFile(path)


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"[1, 2, 3]",
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    ],
)
def test_an_unreadable_header_is_refused(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match="unreadable header"):
        TensorFile(path)


def write_raw(path, entry, data):
    header = json.dumps({"a": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_an_unknown_dtype_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write_raw(path, {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, bytes(4))
    with pytest.raises(CheckpointError, match="a has dtype F8_E4M3; known are"):
        TensorFile(path).read("a")


def test_bytes_that_do_not_fit_the_shape_show_both_numbers(tmp_path):
    path = tmp_path / "x.safetensors"
    write_raw(path, {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}, bytes(12))
    with pytest.raises(CheckpointError, match=r"12 bytes but F32 of shape \[4\] needs 16"):
        TensorFile(path).read("a")


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    write_raw(path, {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, bytes(16))
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(CheckpointError, match="read 10 bytes of a, expected 16"):
        file.read("a")


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    arrays = {"z": np.zeros(2, np.complex64)}
    with pytest.raises(ValueError, match="z has dtype complex64; known are"):
        write_tensor_file(tmp_path / "x.safetensors", planned(arrays))


def test_an_array_other_than_planned_shows_both_shapes(tmp_path):
    tensor = PlannedTensor("z", (2,), np.dtype(np.float32), lambda: np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"z was planned as float32\[2\] but is float32\[3\]"):
        write_tensor_file(tmp_path / "x.safetensors", [tensor])
