# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Records of one byte a number into wider slots: the definition against loops, then the kernel."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _backend, _compat
from pallas_kernels.gather_blocks import Tiles, gather_blocks, mosaic_gpu_unpack, reference
from sparda_jax.kv.pack import pack_records, unpack_records
from sparda_jax.kv.page_lock import HostBuffer

TILES = Tiles(ctas=2, in_flight=3, parts=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, dtypes, and how many of the listed moves count."""

    name: str
    count: int
    dtype: str = "int8"
    slot: str = "bfloat16"
    n: int = 9
    W: int = 8
    H: int = 32
    tiles: Tiles = TILES

    def arrays(self, seed=0):
        """Make records, lists, slots and scales; record 3 is all zeros."""
        rng = np.random.default_rng(seed)
        wide = rng.standard_normal((23, 2, self.W, self.H)).astype(np.float32)
        wide[3] = 0.0
        records, scales = pack_records(jnp.asarray(wide), self.dtype)
        slots = jnp.asarray(rng.standard_normal((11, 2, self.W, self.H)), self.slot)
        source, places = np.full((2, self.n), -1, np.int32)  # what `plan_fetch` leaves behind
        listed = max(0, min(self.count, self.n))
        source[:listed] = rng.integers(0, 23, listed)
        source[: min(1, listed)] = 3
        places[:listed] = rng.permutation(11)[:listed]
        count = jnp.array([self.count], jnp.int32)
        return (records, jnp.asarray(source), jnp.asarray(places), count, slots), scales


CASES = [
    Case("nothing is missing", count=0),
    Case("one record", count=1),
    Case("an odd number", count=7),
    Case("more than is listed", count=12),
    Case("a negative count", count=-3),
    Case("more blocks than pieces", count=1, tiles=Tiles(ctas=5, in_flight=2, parts=2)),
    Case("pieces of part of a key", count=5, tiles=Tiles(ctas=3, in_flight=2, parts=4)),
    Case("wide slots", count=8, slot="float32"),
    Case("fp8", count=8, dtype="float8_e4m3fn"),
    Case("fp8 into float16", count=8, dtype="float8_e4m3fn", slot="float16"),
]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def by_loops(arrays, scales):
    """Move record by record, in NumPy."""
    records, source, places, count, slots = arrays
    out = np.array(slots)
    for i in range(min(max(int(count[0]), 0), len(source))):
        wide = np.asarray(records)[int(source[i])].astype(np.float32)
        for half in range(2):
            out[int(places[i]), half] = (
                wide[half] * np.asarray(scales)[int(source[i]), half]
            ).astype(out.dtype)
    return out


def as_bits(array):
    return np.asarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))


@named
def test_the_definition_is_a_loop(case):
    arrays, scales = case.arrays()
    got = jax.jit(reference.gather_blocks)(*arrays, scales)
    np.testing.assert_array_equal(as_bits(got), as_bits(by_loops(arrays, scales)))


@named
def test_the_kernel_gives_the_bits_of_the_definition(case):
    (records, *moves), scales = case.arrays()
    kernel = jax.jit(
        functools.partial(mosaic_gpu_unpack.gather_blocks, tiles=case.tiles, interpret=True)
    )
    got = kernel(records, scales, *moves, None)
    want = reference.gather_blocks(records, *moves, scales)
    np.testing.assert_array_equal(as_bits(got), as_bits(want))


def test_the_library_unpacks_the_same_records():
    (records, source, places, count, slots), scales = Case("", count=9).arrays()
    want = unpack_records(records[source], scales[source], slots.dtype)
    got = gather_blocks(records, source, places, count, slots, scales=scales)
    np.testing.assert_array_equal(as_bits(got[places]), as_bits(want))


# --- lowered for CUDA, without a GPU ------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_size", "head_dim", "dtype", "slot"),
    [
        (64, 128, "int8", "bfloat16"),
        (64, 128, "float8_e4m3fn", "bfloat16"),
        (64, 128, "int8", "float32"),
        (16, 32, "float8_e4m3fn", "bfloat16"),
        (128, 64, "int8", "float16"),
    ],
)
def test_it_lowers_for_cuda_and_copies_nothing_else(block_size, head_dim, dtype, slot):
    """Between the program's arguments and the kernel lie reshapes at most; slots are aliased."""
    size = (2, block_size, head_dim)
    tiles = Tiles.default(*size[1:], 1, jnp.dtype(slot).itemsize)
    assert mosaic_gpu_unpack.shape_reason(size, jnp.dtype(dtype), jnp.dtype(slot), tiles) is None
    shapes = [
        jax.ShapeDtypeStruct((1 << 20, *size), dtype),
        jax.ShapeDtypeStruct((1 << 20, 2), jnp.float32),
        *[jax.ShapeDtypeStruct((16 * 2 * 96,), jnp.int32)] * 2,
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((16 * 2 * 128, *size), slot),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    ]
    text = _compat.lowered(
        functools.partial(mosaic_gpu_unpack.gather_blocks, tiles=tiles), *shapes
    ).as_text()
    assert set(re.findall(r"stablehlo\.(\w+)\b(?= )", text)) <= {"custom_call", "reshape"}
    (call,) = re.findall(r"custom_call @mosaic_gpu\w*\(([^)]*)\)", text)
    assert "%arg6" in call  # the receipt: the order of write and read is a dependency
    (alias,) = re.findall(r"output_operand_alias<[^>]*operand_index = (\d+)", text)
    assert alias == "1"


# --- the door -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("slot_itemsize", [2, 4])
def test_the_default_fits_every_shape_of_record(block_size, head_dim, slot_itemsize):
    tiles = Tiles.default(block_size, head_dim, 1, slot_itemsize)
    assert tiles.unsupported_reason(block_size, head_dim, 1, slot_itemsize) is None
    assert tiles.parts % 2 == 0
    assert tiles.in_flight >= 12 or block_size * head_dim >= 16_384


@pytest.mark.parametrize(
    ("dtype", "slot", "tiles", "message"),
    [
        ("int16", "bfloat16", {}, "but this is int16 into bfloat16"),
        ("int8", "int8", {}, "but this is int8 into int8"),
        ("int8", "bfloat16", dict(parts=1), "keys or of values, but tiles.parts=1 leaves both"),
        ("int8", "bfloat16", dict(parts=16), "128 threads equal work, .*parts=16 makes 32 numbers"),
        ("int8", "float32", dict(parts=2, in_flight=900), r"has 228352 bytes .* need 230400"),
    ],
)
def test_what_the_kernel_cannot_unpack_has_a_reason(dtype, slot, tiles, message):
    found = mosaic_gpu_unpack.shape_reason(
        (2, 8, 32), jnp.dtype(dtype), jnp.dtype(slot), Tiles(**tiles)
    )
    assert re.search(message, found)


def test_without_a_gpu_the_kernel_is_refused_and_the_definition_runs():
    arrays, scales = CASES[2].arrays()
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu' needs an NVIDIA GPU, but .*'cpu'"):
        gather_blocks(*arrays, scales=scales, implementation="mosaic_gpu")
    got = gather_blocks(*arrays, scales=scales)
    np.testing.assert_array_equal(as_bits(got), as_bits(by_loops(arrays, scales)))


def test_on_hopper_the_kernel_is_taken(monkeypatch):
    monkeypatch.setattr(_backend, "gpu_kind", lambda: _compat.H100)
    monkeypatch.setattr(_backend, "hopper_reason", lambda: None)
    arrays, scales = CASES[2].arrays()
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays, scales)]
    text = _compat.lowered(lambda *x: gather_blocks(*x[:-1], scales=x[-1]), *shapes).as_text()
    assert "gather_blocks_unpack" in text


@pytest.mark.usefixtures("no_shape_hook")
def test_scales_of_other_records_are_refused():
    arrays, scales = CASES[2].arrays()
    with pytest.raises(ValueError, match=r"scales.shape=\(22, 2\) must be \(23, 2\)"):
        gather_blocks(*arrays, scales=scales[1:])


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "slot"),
    [("int8", "bfloat16"), ("float8_e4m3fn", "bfloat16"), ("int8", "float32")],
)
def test_gpu_every_count_is_unpacked_from_host_memory(dtype, slot):
    records, slots = 2048, 1024
    buffer = HostBuffer(records * 2 * 64 * 128, page_lock="require")
    try:
        memory = buffer.array((records, 2, 64, 128), jnp.dtype(dtype))
        rng = np.random.default_rng(0)
        memory[...] = rng.integers(-127, 128, memory.shape).astype(memory.dtype)
        seen = buffer.device_view(memory.shape, memory.dtype).array
        scales = jnp.asarray(rng.uniform(0.01, 0.1, (records, 2)), jnp.float32)
        kernel = jax.jit(lambda *x: gather_blocks(*x[:-1], scales=x[-1]), donate_argnums=4)
        for count in (0, 1, 5, 300, 768):
            source, places = np.full((2, 768), -1, np.int32)
            source[:count] = rng.permutation(records)[:count]
            places[:count] = rng.permutation(slots)[:count]
            moves = (jnp.asarray(source), jnp.asarray(places), jnp.array([count], jnp.int32))
            before = jnp.full((slots, 2, 64, 128), -1, slot)
            want = by_loops((memory, *moves, before), scales)
            got = kernel(seen, *moves, before, scales)
            np.testing.assert_array_equal(as_bits(got), as_bits(want))
        assert kernel._cache_size() == 1
    finally:
        buffer.close()


@pytest.mark.gpu
def test_gpu_xla_copies_neither_records_nor_donated_slots():
    shape = (1024, 2, 64, 128)
    records, slots = jnp.zeros((4096, *shape[1:]), jnp.int8), jnp.zeros(shape, jnp.bfloat16)
    moves = (*[jnp.zeros((768,), jnp.int32)] * 2, jnp.array([0], jnp.int32))
    kernel = jax.jit(gather_blocks, donate_argnums=4)
    compiled = kernel.lower(records, *moves, slots, scales=jnp.ones((4096, 2))).compile()
    assert " copy(" not in str(compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < slots.nbytes
    assert compiled.memory_analysis().alias_size_in_bytes == slots.nbytes
