# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Records into slots: the definition against loops, the kernel against the definition."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _backend, _compat
from pallas_kernels.gather_blocks import Tiles, gather_blocks, mosaic_gpu, reference
from pallas_kernels.gather_blocks.config import record_bytes, work
from sparda_jax.kv.page_lock import HostBuffer
from sparda_jax.kv.state import insert_records

TILES = Tiles(ctas=2, in_flight=3, parts=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, how many moves are listed, and how many of them count."""

    name: str
    count: int
    n: int = 9
    records: int = 23
    slots: int = 11
    W: int = 8
    H: int = 16
    dtype: str = "float32"
    tiles: Tiles = TILES

    def arrays(self, seed=0):
        rng = np.random.default_rng(seed)
        size = (2, self.W, self.H)
        records, slots = (
            jnp.asarray(rng.integers(-9, 9, (count, *size)), self.dtype)
            for count in (self.records, self.slots)
        )
        source = rng.integers(0, self.records, self.n).astype(np.int32)
        places = rng.permutation(self.slots)[: self.n].astype(np.int32)
        source[max(self.count, 0) :] = -1  # what `plan_fetch` leaves behind its misses
        places[max(self.count, 0) :] = -1
        lists = (jnp.asarray(source), jnp.asarray(places), jnp.array([self.count], jnp.int32))
        return records, *lists, slots


CASES = [
    Case("nothing is missing", count=0),
    Case("one record", count=1),
    Case("fewer than are in flight", count=2, tiles=Tiles(ctas=1, in_flight=7, parts=1)),
    Case("an odd number", count=7),
    Case("everything that is listed", count=9),
    Case("more than is listed", count=12),
    Case("a negative count", count=-3),
    Case("one move is listed", count=1, n=1),
    Case("more blocks than pieces", count=2, tiles=Tiles(ctas=5, in_flight=2, parts=1)),
    Case("pieces of part of a key", count=5, tiles=Tiles(ctas=3, in_flight=2, parts=8)),
    Case("bfloat16", count=8, dtype="bfloat16"),
    Case("int8", count=8, dtype="int8"),
    Case("long blocks", count=4, W=32, tiles=Tiles(ctas=2, in_flight=2, parts=4)),
]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def by_loops(records, source, places, count, slots):
    """Move record by record, in NumPy."""
    out = np.array(slots)
    for i in range(min(max(int(count[0]), 0), len(source))):
        out[int(places[i])] = np.asarray(records)[int(source[i])]
    return out


def interpret(case, receipt=None):
    return jax.jit(
        lambda *arrays: mosaic_gpu.gather_blocks(
            *arrays, receipt, tiles=case.tiles, interpret=True
        ),
        donate_argnums=4,
    )


@named
def test_the_definition_is_a_loop(case):
    arrays = case.arrays()
    got = jax.jit(reference.gather_blocks)(*arrays)
    np.testing.assert_array_equal(np.asarray(got), by_loops(*arrays))


@named
def test_the_kernel_is_the_definition(case):
    arrays = case.arrays()
    want = np.asarray(reference.gather_blocks(*arrays))
    np.testing.assert_array_equal(np.asarray(interpret(case)(*arrays)), want)


def test_the_library_inserts_the_same_records():
    records, source, places, count, slots = Case("", count=9).arrays()
    want = insert_records(slots[None, None], records[source], places)
    got = gather_blocks(records, source, places, count, slots, implementation="reference")
    np.testing.assert_array_equal(got, want[0, 0])


def test_one_program_serves_every_count():
    base = CASES[0]
    gather = jax.jit(chex.assert_max_traces(n=1)(gather_blocks))
    for count in (0, 3, 9):
        arrays = dataclasses.replace(base, count=count).arrays(seed=count)
        np.testing.assert_array_equal(np.asarray(gather(*arrays)), by_loops(*arrays))


def test_slots_that_somebody_still_needs_are_copied_first():
    """The kernel changes its operand, and JAX knows it."""
    case = CASES[3]
    *arrays, slots = case.arrays()

    @jax.jit
    def twice(*arrays):
        after = mosaic_gpu.gather_blocks(*arrays, None, tiles=case.tiles, interpret=True)
        return arrays[-1] * 1, after

    before, after = twice(*arrays, slots)
    np.testing.assert_array_equal(np.asarray(before), np.asarray(slots))
    np.testing.assert_array_equal(np.asarray(after), by_loops(*arrays, slots))


def test_two_gathers_into_the_same_slots_follow_each_other():
    case = CASES[4]
    records, source, places, count, slots = case.arrays()
    other = jnp.roll(source, 1)

    @jax.jit
    def chain(slots):
        for list_ in (source, other):
            moves = (records, list_, places, count)
            slots = mosaic_gpu.gather_blocks(*moves, slots, None, tiles=case.tiles, interpret=True)
        return slots

    want = by_loops(records, other, places, count, by_loops(*case.arrays()))
    np.testing.assert_array_equal(np.asarray(chain(slots)), want)


def test_records_in_host_memory_are_gathered():
    buffer = HostBuffer(1 << 16, page_lock="never")
    try:
        memory = buffer.array((23, 2, 8, 16), np.dtype(np.float32))
        seen = buffer.device_view(memory.shape, memory.dtype).array
        _, *lists, slots = Case("", count=6).arrays()
        gather = jax.jit(gather_blocks)
        for value in (1.0, 2.0):
            memory[...] = np.arange(23, dtype=np.float32).reshape(23, 1, 1, 1) * value
            got = np.asarray(gather(seen, *lists, slots))
            np.testing.assert_array_equal(got, by_loops(memory, *lists, slots))
    finally:
        buffer.close()


def test_the_receipt_is_an_operand_of_the_read():
    """The order of write and read is a dependency, not luck."""
    case = Case("", count=5)
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.arrays()]
    receipt = jax.ShapeDtypeStruct((1,), jnp.int32)
    text = _compat.lowered(
        lambda *x: mosaic_gpu.gather_blocks(*x, tiles=case.tiles), *arrays, receipt
    ).as_text()
    (call,) = re.findall(r"custom_call @mosaic_gpu\w*\(([^)]*)\)", text)
    assert "%arg5" in call


# --- lowered for CUDA, without a GPU ------------------------------------------------------------


SIZES = [(64, 128, "bfloat16"), (64, 128, "float32"), (64, 64, "bfloat16"), (64, 32, "bfloat16")]
SIZES += [(16, 32, "bfloat16"), (128, 128, "float32"), (128, 128, "bfloat16"), (64, 128, "int8")]
SIZES += [(64, 128, "float8_e4m3fn"), (32, 64, "float32"), (64, 128, "float16")]


@pytest.mark.parametrize(("block_size", "head_dim", "dtype"), SIZES)
def test_it_lowers_for_cuda_and_copies_nothing_else(block_size, head_dim, dtype):
    """Between the program's arguments and the kernel lie reshapes at most; slots are aliased.

    B · K · M is a million records: 32 GiB, past 2^31 numbers.
    """
    size = (2, block_size, head_dim)
    records = jax.ShapeDtypeStruct((1 << 20, *size), dtype)
    slots = jax.ShapeDtypeStruct((16 * 2 * 128, *size), dtype)
    lists = [jax.ShapeDtypeStruct((16 * 2 * 96,), jnp.int32)] * 2
    count = jax.ShapeDtypeStruct((1,), jnp.int32)
    tiles = Tiles.default(block_size, head_dim, jnp.dtype(dtype).itemsize)
    assert mosaic_gpu.shape_reason(size, jnp.dtype(dtype), tiles) is None
    text = _compat.lowered(
        lambda *arrays: mosaic_gpu.gather_blocks(*arrays, None, tiles=tiles),
        records,
        *lists,
        count,
        slots,
    ).as_text()
    assert set(re.findall(r"stablehlo\.(\w+)\b(?= )", text)) <= {"custom_call", "reshape"}
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 1
    (alias,) = re.findall(r"output_operand_alias<[^>]*operand_index = (\d+)", text)
    assert alias == "1"  # origin, target, lists


@pytest.mark.parametrize("ctas", [1, 4, 8, 16])
@pytest.mark.parametrize("parts", [1, 2, 4, 16])
def test_every_way_to_spread_the_moves_lowers(ctas, parts):
    case = Case("", count=9, W=64, H=128, dtype="bfloat16")
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.arrays()]
    tiles = Tiles(ctas=ctas, in_flight=min(16, 6 * parts), parts=parts)
    assert mosaic_gpu.shape_reason((2, 64, 128), arrays[0].dtype, tiles) is None
    _compat.lowered(lambda *x: mosaic_gpu.gather_blocks(*x, None, tiles=tiles), *arrays)


# --- the door -----------------------------------------------------------------------------------


def test_a_record_of_the_8b_model_is_32_kib_and_is_counted_once():
    assert record_bytes(64, 128, 2) == 32768
    found = work(128, 64, 128, 2)
    assert (found.bytes, found.flops, found.ceiling) == (128 * 32768, 0, "h2d")


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_the_default_fits_every_shape_of_record(block_size, head_dim, itemsize):
    tiles = Tiles.default(block_size, head_dim, itemsize)
    assert tiles.unsupported_reason(block_size, head_dim, itemsize) is None
    assert tiles.ctas <= 8
    piece = record_bytes(block_size, head_dim, itemsize) // tiles.parts
    assert tiles.ctas * tiles.in_flight * piece >= 4 * 12 * 512  # more than the link's latency


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (dict(ctas=0), "self.ctas=0 must be at least 1"),
        (dict(in_flight=1), "self.in_flight=1 must be at least 2"),
        (dict(parts=0), "self.parts=0 must be at least 1"),
    ],
)
def test_tiles_that_make_no_sense_are_refused(tiles, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**tiles)


@pytest.mark.parametrize(
    ("size", "dtype", "tiles", "message"),
    [
        ((8, 4), "bfloat16", {}, "a multiple of 16 bytes, but H=4 makes 8"),
        ((8, 512), "int8", {}, "at most 256 numbers, but H=512"),
        ((8, 16), "float32", dict(parts=3), "the 16 rows of a record into 3 parts"),
        ((256, 16), "int8", dict(parts=1), "at most 256 rows at once, but self.parts=1 leaves 512"),
        ((2, 16), "int8", dict(parts=1), "multiple of 128 bytes, but self.parts=1 makes 64"),
        (
            (64, 128),
            "bfloat16",
            dict(parts=1, in_flight=8),
            "has 230400 bytes .* but self.in_flight=8 pieces of 32768 bytes need 262144",
        ),
        ((8, 16), "int32", {}, "but the records are int32"),
    ],
)
def test_what_the_kernel_cannot_move_has_a_reason(size, dtype, tiles, message):
    found = mosaic_gpu.shape_reason((2, *size), jnp.dtype(dtype), Tiles(**tiles))
    assert re.search(message, found)


def test_without_a_gpu_the_kernel_is_refused_and_the_definition_runs():
    arrays = CASES[3].arrays()
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu' needs an NVIDIA GPU, but .*'cpu'"):
        gather_blocks(*arrays, implementation="mosaic_gpu")
    np.testing.assert_array_equal(np.asarray(gather_blocks(*arrays)), by_loops(*arrays))


def test_on_hopper_the_kernel_is_taken(monkeypatch):
    monkeypatch.setattr(_backend, "gpu_kind", lambda: _compat.H100)
    monkeypatch.setattr(_backend, "hopper_reason", lambda: None)
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in CASES[3].arrays()]
    assert "mosaic_gpu" in _compat.lowered(gather_blocks, *arrays).as_text()


def test_an_empty_list_moves_nothing():
    records, _, _, count, slots = CASES[0].arrays()
    none = jnp.zeros((0,), jnp.int32)
    assert gather_blocks(records, none, none, count, slots) is slots


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(slots=(11, 2, 8, 32)),
            r"origin.shape=\(23, 2, 8, 16\) and target.shape=\(11, 2, 8, 32\)",
        ),
        (dict(records=(23, 8, 16)), r"origin.shape=\(23, 8, 16\) and"),
        (dict(places=(4,)), r"source.shape=\(9,\) and places.shape=\(4,\)"),
        (dict(count=()), r"count.shape=\(\) must be \(1,\)"),
    ],
)
@pytest.mark.usefixtures("no_shape_hook")
def test_shapes_that_do_not_fit_are_refused(change, message):
    names = ("records", "source", "places", "count", "slots")
    arrays = dict(zip(names, CASES[0].arrays(), strict=True))
    for name, shape in change.items():
        arrays[name] = jnp.zeros(shape, arrays[name].dtype)
    with pytest.raises(ValueError, match=message):
        gather_blocks(**arrays)


def test_two_dtypes_are_refused():
    *arrays, slots = CASES[0].arrays()
    with pytest.raises(ValueError, match=r"float32.* must be .*bfloat16.*: bytes are copied"):
        gather_blocks(*arrays, slots.astype(jnp.bfloat16))


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def link():
    """Give a pool of 2048 records of the 8B model in host memory: NumPy's view and the kernels'."""
    buffer = HostBuffer(2048 * 32768, page_lock="require")
    memory = buffer.array((2048, 2, 64, 128), jnp.dtype(jnp.bfloat16))
    bits = np.random.default_rng(0).integers(0, 0x3F80, memory.size, dtype=np.uint16)
    memory.view(np.uint16)[...] = bits.reshape(memory.shape)
    yield memory, buffer.device_view(memory.shape, memory.dtype).array
    buffer.close()


def moves(count, n=768, records=2048, slots=1024, seed=0):
    rng = np.random.default_rng(seed)
    source, places = np.full((2, n), -1, np.int32)
    source[:count] = rng.permutation(records)[:count]
    places[:count] = rng.permutation(slots)[:count]
    return jnp.asarray(source), jnp.asarray(places), jnp.array([count], jnp.int32)


def as_bits(array):
    return np.asarray(array).view(np.uint16)


@pytest.mark.gpu
def test_gpu_one_program_moves_every_count_from_host_memory(link):
    memory, records = link
    kernel = jax.jit(gather_blocks, donate_argnums=4)
    for count in (0, 1, 5, 300, 768):
        lists = moves(count, seed=count)
        slots = jnp.full((1024, 2, 64, 128), -1, jnp.bfloat16)
        want = by_loops(memory, *lists, slots)
        np.testing.assert_array_equal(as_bits(kernel(records, *lists, slots)), as_bits(want))
    assert kernel._cache_size() == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tiles",
    [Tiles(ctas=1, in_flight=2, parts=1), Tiles(ctas=8, in_flight=6, parts=1), Tiles(parts=4)],
    ids=repr,
)
def test_gpu_every_way_to_spread_the_moves_gives_the_same_bits(link, tiles):
    memory, records = link
    lists, slots = moves(100), jnp.zeros((1024, 2, 64, 128), jnp.bfloat16)
    want = by_loops(memory, *lists, slots)
    got = jax.jit(lambda *arrays: gather_blocks(*arrays, tiles=tiles))(records, *lists, slots)
    np.testing.assert_array_equal(as_bits(got), as_bits(want))
    assert not np.any(as_bits(slots))  # not donated, so it was copied first


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("block_size", "head_dim", "dtype"), [(16, 32, "bfloat16"), (128, 64, "float32")]
)
def test_gpu_other_records_move_too(key, block_size, head_dim, dtype):
    size = (2, block_size, head_dim)
    records = jax.random.normal(key, (300, *size), jnp.float32).astype(dtype)
    lists, slots = moves(61, n=96, records=300, slots=128), jnp.zeros((128, *size), dtype)
    got = jax.jit(gather_blocks)(records, *lists, slots)
    assert jnp.array_equal(got, reference.gather_blocks(records, *lists, slots))


@pytest.mark.gpu
def test_gpu_xla_copies_neither_records_nor_donated_slots(link):
    _, records = link
    slots = jnp.zeros((1024, 2, 64, 128), jnp.bfloat16)
    kernel = jax.jit(gather_blocks, donate_argnums=4)
    compiled = kernel.lower(records, *moves(5), slots).compile()
    assert " copy(" not in str(compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < slots.nbytes
    assert compiled.memory_analysis().alias_size_in_bytes == slots.nbytes
    where = slots.unsafe_buffer_pointer()
    assert compiled(records, *moves(5), slots).unsafe_buffer_pointer() == where


@pytest.mark.gpu
def test_gpu_take_reads_the_same_memory(link):
    memory, records = link
    source = jnp.array([2047, 0, 77])
    got = jax.jit(lambda x, i: jnp.take(x, i, axis=0))(records, source)
    np.testing.assert_array_equal(as_bits(got), as_bits(memory[np.asarray(source)]))
