# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Slots into records: the definition against loops, the kernel against the definition, order."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _backend, _compat
from pallas_kernels.gather_blocks import gather_blocks
from pallas_kernels.gather_blocks import mosaic_gpu as gather_kernel
from pallas_kernels.gather_blocks.config import record_bytes
from pallas_kernels.write_blocks import Tiles, Written, mosaic_gpu, reference, write_blocks
from pallas_kernels.write_blocks.config import work
from sparda_jax.kv.page_lock import HostBuffer

SLOTS, RECORDS, LISTED, W, H = 11, 23, 9, 8, 16
TILES = [
    Tiles(ctas=2, in_flight=3, parts=2),
    Tiles(ctas=1, in_flight=7, parts=1),
    Tiles(ctas=5, in_flight=2, parts=8),
]


def operands(count, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    slots, records = (
        jnp.asarray(rng.integers(-9, 9, (size, 2, W, H)), dtype) for size in (SLOTS, RECORDS)
    )
    source = rng.integers(0, SLOTS, LISTED).astype(np.int32)
    places = rng.permutation(RECORDS)[:LISTED].astype(np.int32)
    source[max(count, 0) :] = places[max(count, 0) :] = -1
    return slots, records, jnp.asarray(source), jnp.asarray(places), jnp.array([count], jnp.int32)


def by_loops(slots, records, source, places, count):
    """Move record by record, in NumPy."""
    out = np.array(records)
    moved = min(max(int(count[0]), 0), len(source))
    for i in range(moved):
        out[int(places[i])] = np.asarray(slots)[int(source[i])]
    return moved, out


def assert_written(got, want):
    moved, records = want
    assert got[0].tolist() == [moved]
    np.testing.assert_array_equal(np.asarray(got[1]), records)


@pytest.mark.parametrize("count", [0, 1, 7, 9, 12, -2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_definition_is_a_loop(count, dtype):
    arrays = operands(count, dtype)
    assert_written(jax.jit(reference.write_blocks)(*arrays), by_loops(*arrays))


@pytest.mark.parametrize("tiles", TILES, ids=repr)
@pytest.mark.parametrize("count", [0, 1, 7, 9, 12, -2])
def test_the_kernel_is_the_definition(count, tiles):
    arrays = operands(count, seed=count + 9)
    kernel = jax.jit(lambda *x: mosaic_gpu.write_blocks(*x, tiles=tiles, interpret=True))
    assert_written(kernel(*arrays), by_loops(*arrays))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_kernel_moves_other_dtypes(dtype):
    arrays = operands(5, dtype)
    kernel = jax.jit(lambda *x: mosaic_gpu.write_blocks(*x, tiles=TILES[0], interpret=True))
    assert_written(kernel(*arrays), by_loops(*arrays))


def test_one_program_serves_every_count():
    write = jax.jit(chex.assert_max_traces(n=1)(write_blocks))
    for count in (0, 3, 9):
        arrays = operands(count, seed=count)
        assert_written(write(*arrays), by_loops(*arrays))


def test_a_record_written_and_fetched_is_the_same_bits():
    slots, records, source, places, count = operands(9, "bfloat16")
    tiles = TILES[0]

    @jax.jit
    def there_and_back(slots, records):
        moves = (source, places, count)
        written = mosaic_gpu.write_blocks(slots, records, *moves, tiles=tiles, interpret=True)
        return gather_kernel.gather_blocks(
            written.records,
            places,
            jnp.arange(LISTED, dtype=jnp.int32),
            count,
            jnp.zeros_like(slots),
            written.receipt,
            tiles=tiles,
            interpret=True,
        )

    got = np.asarray(there_and_back(slots, records))[:LISTED]
    np.testing.assert_array_equal(got, np.asarray(slots)[np.asarray(source)])


def test_a_write_and_the_reads_after_it_lower_to_a_chain():
    """The records are never a result, so XLA has no reason to copy them; the receipt is."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(3)]

    def step(slots, records, source, places, count):
        written = mosaic_gpu.write_blocks(slots, records, source, places, count, tiles=TILES[0])
        flipped = (written.records, places, source, count, slots)
        after = gather_kernel.gather_blocks(*flipped, written.receipt, tiles=TILES[0])
        return written.receipt, after

    text = _compat.lowered(step, *shapes).as_text()
    main, *_ = text.split("func.func private")
    (receipt,) = re.findall(r"(%\d+) = call @_pump\(", main)
    again = re.findall(r"(%\d+) = sdy.sharding_constraint " + receipt, main)  # of the abstract mesh
    (read,) = re.findall(r"call @gather_blocks\(([^)]*)\)", main)
    assert read.split(", ")[-1] in (receipt, *again)
    operands_of = re.findall(r"stablehlo.custom_call @mosaic_gpu\w*\(([^)]*)\)", text)
    assert [len(found.split(", ")) for found in operands_of] == [5, 6]  # the receipt is the sixth
    assert len(re.findall(r"output_operand_alias<", text)) == 1  # the slots' alone
    assert set(re.findall(r"= stablehlo\.(\w+)\b(?= )", text)) <= {"custom_call", "reshape"}


@pytest.mark.parametrize(
    ("block_size", "head_dim", "dtype"),
    [
        (64, 128, "bfloat16"),
        (64, 128, "float32"),
        (64, 64, "bfloat16"),
        (64, 32, "bfloat16"),
        (16, 32, "bfloat16"),
        (128, 128, "float32"),
        (64, 128, "float8_e4m3fn"),
    ],
)
def test_it_lowers_for_cuda_with_the_receipt_as_the_only_result(block_size, head_dim, dtype):
    """B · K · M is a million records: 32 GiB, past 2^31 numbers."""
    size = (2, block_size, head_dim)
    shapes = [
        jax.ShapeDtypeStruct((16 * 2 * 128, *size), dtype),
        jax.ShapeDtypeStruct((1 << 20, *size), dtype),
        *[jax.ShapeDtypeStruct((32,), jnp.int32)] * 2,
        jax.ShapeDtypeStruct((1,), jnp.int32),
    ]
    tiles = Tiles.default(block_size, head_dim, jnp.dtype(dtype).itemsize)
    text = _compat.lowered(
        lambda *arrays: mosaic_gpu.write_blocks(*arrays, tiles=tiles).receipt, *shapes
    ).as_text()
    assert set(re.findall(r"= stablehlo\.(\w+)\b(?= )", text)) <= {"custom_call", "reshape"}
    assert "output_operand_alias<" not in text
    assert re.search(r"-> tensor<1xi32>", text)


def test_writing_is_counted_as_bytes_over_the_link():
    found = work(4, 64, 128, 2)
    assert (found.bytes, found.ceiling) == (4 * record_bytes(64, 128, 2), "h2d")


# --- the door -----------------------------------------------------------------------------------


def test_without_a_gpu_the_kernel_is_refused_and_the_definition_runs():
    arrays = operands(4)
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu' needs an NVIDIA GPU, but .*'cpu'"):
        write_blocks(*arrays, implementation="mosaic_gpu")
    assert_written(write_blocks(*arrays), by_loops(*arrays))


def test_on_hopper_the_kernel_is_taken_and_gives_back_the_operand(monkeypatch):
    monkeypatch.setattr(_backend, "gpu_kind", lambda: _compat.H100)
    monkeypatch.setattr(_backend, "hopper_reason", lambda: None)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(4)]
    assert "mosaic_gpu" in _compat.lowered(write_blocks, *shapes).as_text()

    def is_the_operand(*arrays):
        assert write_blocks(*arrays).records is arrays[1]
        return arrays[0]

    jax.eval_shape(is_the_operand, *shapes)


def test_an_empty_list_writes_nothing():
    slots, records, *_ = operands(0)
    none = jnp.zeros((0,), jnp.int32)
    written = write_blocks(slots, records, none, none, jnp.array([3]))
    assert isinstance(written, Written)
    assert written.receipt.tolist() == [0]
    assert written.records is records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(slots=(11, 2, 8, 32)), r"shape=\(11, 2, 8, 32\) and target.shape=\(23, 2, 8, 16\)"),
        (dict(places=(4,)), r"source.shape=\(9,\) and places.shape=\(4,\)"),
        (dict(count=(2,)), r"count.shape=\(2,\) must be \(1,\)"),
    ],
)
@pytest.mark.usefixtures("no_shape_hook")
def test_shapes_that_do_not_fit_are_refused(change, message):
    names = ("slots", "records", "source", "places", "count")
    arrays = dict(zip(names, operands(0), strict=True))
    for name, shape in change.items():
        arrays[name] = jnp.zeros(shape, arrays[name].dtype)
    with pytest.raises(ValueError, match=message):
        write_blocks(**arrays)


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def link():
    """Give 512 records of the 8B model in host memory: NumPy's view and the kernels'."""
    buffer = HostBuffer(512 * 32768, page_lock="require")
    memory = buffer.array((512, 2, 64, 128), jnp.dtype(jnp.bfloat16))
    yield memory, buffer.device_view(memory.shape, memory.dtype).array
    buffer.close()


def random_slots(key, count=256):
    bits = jax.random.bits(key, (count, 2, 64, 128), jnp.uint16) % 0x3F80
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def as_bits(array):
    return np.asarray(array).view(np.uint16)


@pytest.mark.gpu
def test_gpu_numpy_sees_what_the_kernel_wrote(key, link):
    memory, records = link
    write = jax.jit(lambda *arrays: write_blocks(*arrays).receipt)
    slots = random_slots(key)
    rng = np.random.default_rng(0)
    want = np.array(memory)
    for count in (0, 1, 37, 200):
        source, places = (rng.permutation(size)[:200].astype(np.int32) for size in (256, 512))
        want[places[:count]] = np.asarray(slots)[source[:count]]
        receipt = write(slots, records, source, places, jnp.array([count], jnp.int32))
        assert receipt.tolist() == [count]
        np.testing.assert_array_equal(as_bits(memory), as_bits(want))
    assert write._cache_size() == 1


@pytest.mark.gpu
def test_gpu_xla_does_not_copy_the_records(key, link):
    _, records = link
    lists = (jnp.arange(8, dtype=jnp.int32), jnp.arange(8, dtype=jnp.int32))
    write = jax.jit(lambda *arrays: write_blocks(*arrays).receipt)
    compiled = write.lower(random_slots(key), records, *lists, jnp.array([8], jnp.int32)).compile()
    assert " copy(" not in str(compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < records.nbytes


@pytest.mark.gpu
def test_gpu_a_read_that_takes_the_receipt_comes_after_the_write(key, link):
    """Also where commands run beside each other: each round reads what it just wrote."""
    _, records = link
    count = jnp.array([128], jnp.int32)
    here = jnp.arange(128, dtype=jnp.int32)
    options = {
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
        "xla_gpu_graph_min_graph_size": "2",
    }

    def rounds(slots, records, lists, here, count):
        found = []
        for number, places in enumerate(lists):
            written = write_blocks(slots[number], records, here, places, count)
            empty = jnp.zeros_like(slots[number])
            after = gather_blocks(
                written.records, places, here, count, empty, receipt=written.receipt
            )
            found.append(after)
        return found

    slots = [random_slots(one) for one in jax.random.split(key, 4)]
    lists = [jnp.roll(jnp.arange(512, dtype=jnp.int32), 128 * n + 7)[:128] for n in range(4)]
    program = jax.jit(rounds, compiler_options=options)
    for _ in range(5):
        found = program(slots, records, lists, here, count)
        for got, want in zip(found, slots, strict=True):
            np.testing.assert_array_equal(as_bits(got)[:128], as_bits(want)[:128])
