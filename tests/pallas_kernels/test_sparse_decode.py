# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`sparse_decode`: loops, the plain programs of sparda_jax, interpreter, lowering, GPU."""

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kernel_cases.sparse_decode import cases
from pallas_kernels import _backend, _compat
from pallas_kernels._roofline import Work
from pallas_kernels.sparse_decode import Tiles, sparse_decode
from pallas_kernels.sparse_decode import triton as kernel
from pallas_kernels.sparse_decode.config import work
from pallas_kernels.sparse_decode.reference import LOWEST
from sparda_jax.attention import attend_dense, attend_records
from sparda_jax.testing import (
    assert_close_bfloat16,
    assert_close_float32,
    assert_within_reference_rounding,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A small call; the rows have different lengths."""

    name: str
    B: int = 3
    K: int = 2
    G: int = 3
    R: int = 9
    W: int = 16
    H: int = 16
    J: int = 5
    lengths: tuple[int, ...] = (83, 16, 40)  # tokens of each row, the query's own among them
    chosen: str = "some"
    bias_order: str | None = None


BATCHES = (
    Batch(name="odd tails"),
    Batch(name="one head a KV head", G=1),
    Batch(name="sixteen heads a KV head", B=1, G=16, lengths=(61,)),
    Batch(name="twenty heads a KV head", B=1, K=1, G=20, lengths=(61,)),
    Batch(name="only the own block", chosen="own"),
    Batch(name="every block", B=2, R=6, J=6, lengths=(96, 90), chosen="all"),
    Batch(name="equal positions", B=2, lengths=(50, 50)),
    Batch(name="an empty cache in the batch", lengths=(83, 0, 1)),
    Batch(name="holes between the ids", chosen="holes"),
    Batch(name="bias in slot order", bias_order="slot"),
    Batch(name="bias in block order", bias_order="block", lengths=(83, 0, 40)),
    Batch(name="blocks of two tiles", W=32, H=32, B=2, lengths=(190, 65), bias_order="slot"),
)
CUTS = {
    "one program a head": Tiles(tile_kv=16, programs=1),
    "two": Tiles(tile_kv=16, programs=12),
    "one a block": Tiles(tile_kv=16, programs=1000),
}


def make(key, batch, dtype="float32"):
    """Make arrays: distinct slots in random order, unseen tokens are NaN, one planted match."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    own = [max(length - 1, 0) // batch.W for length in batch.lengths]
    blocks = np.full((batch.B, batch.K, batch.J), -1, np.int32)
    slots = np.full((batch.B, batch.K, batch.J), -1, np.int32)
    for b, k in np.ndindex(batch.B, batch.K):
        if batch.lengths[b] == 0:
            continue
        if batch.chosen == "own":
            ids = [own[b]]
        elif batch.chosen == "all":
            ids = list(range(own[b] + 1))
        else:
            others = rng.permutation(own[b])[: min(batch.J - 1, own[b])]
            ids = sorted([*others.tolist(), own[b]])
        at = np.arange(len(ids))
        if batch.chosen == "holes":
            at = np.sort(rng.permutation(batch.J)[: len(ids)])
        blocks[b, k, at] = ids
        slots[b, k, at] = rng.permutation(batch.R)[: len(ids)]
    kv = rng.standard_normal((batch.B, batch.K, batch.R, 2, batch.W, batch.H), np.float32)
    q = rng.standard_normal((batch.B, batch.K * batch.G, batch.H), np.float32)
    for b, k in np.ndindex(batch.B, batch.K):
        for slot, block in zip(slots[b, k], blocks[b, k], strict=True):
            seen = batch.lengths[b] - block * batch.W
            if slot >= 0 and seen < batch.W:
                kv[b, k, slot, :, max(seen, 0) :] = np.nan
            if slot >= 0 and block == 0:
                kv[b, k, slot, 0, 0] = q[b, k * batch.G]
    positions = jnp.array([length - 1 for length in batch.lengths], jnp.int32)
    bias = None
    if batch.bias_order is not None:
        count = batch.R if batch.bias_order == "slot" else max(own) + 2
        shape = (batch.B, batch.K, count, batch.W)
        bias = jnp.asarray(rng.standard_normal(shape, np.float32))
    arrays = [jnp.asarray(q, dtype), jnp.asarray(kv, dtype), jnp.asarray(slots)]
    return (*arrays, jnp.asarray(blocks), positions), bias


def by_loops(operands, bias, bias_order, scale):
    """Write softmax(scale · q · k + bias) v and log Σ down as loops over scalars, in f64."""
    q, slots, slot_ids, block_ids, positions = (np.asarray(x, np.float64) for x in operands)
    slot_ids, block_ids = slot_ids.astype(int), block_ids.astype(int)
    (batch, heads, _), kv_heads, size = q.shape, slots.shape[1], slots.shape[4]
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], LOWEST)
    for b, n in np.ndindex(batch, heads):
        k = n // (heads // kv_heads)
        logits, values = [], []
        for slot, block in zip(slot_ids[b, k], block_ids[b, k], strict=True):
            for offset in range(size):
                if slot < 0 or block < 0 or block * size + offset > positions[b]:
                    continue
                logit = scale * float(q[b, n] @ slots[b, k, slot, 0, offset])
                if bias is not None:
                    index = slot if bias_order == "slot" else block
                    logit += float(bias[b, k, index, offset])
                logits.append(logit)
                values.append(slots[b, k, slot, 1, offset])
        if logits:
            top = max(logits)
            mass = [math.exp(logit - top) for logit in logits]
            out[b, n] = sum(m * v for m, v in zip(mass, values, strict=True)) / sum(mass)
            lse[b, n] = top + math.log(sum(mass))
    return out, lse


@functools.partial(jax.jit, static_argnames=("bias_order", "scale"))
def by_reference(operands, bias=None, bias_order=None, scale=None):
    return sparse_decode(
        *operands,
        bias=bias,
        bias_order=bias_order or "slot",
        scale=scale,
        return_lse=True,
        implementation="reference",
    )


@functools.partial(jax.jit, static_argnames=("bias_order", "tiles"))
def interpreted(operands, bias, bias_order, tiles):
    return kernel.sparse_decode_triton(
        *operands,
        bias,
        scale=operands[0].shape[-1] ** -0.5,
        bias_order=bias_order or "slot",
        tiles=tiles,
        interpret=True,
    )


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: batch.name)
def test_the_reference_is_the_rule_written_as_loops(key, batch):
    operands, bias = make(key, batch)
    out, lse = by_reference(operands, bias, batch.bias_order, 0.3)
    want, want_lse = by_loops(operands, bias, batch.bias_order, 0.3)
    assert_close_float32(out, want)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", BATCHES[:9], ids=lambda batch: batch.name)
def test_the_reference_has_the_bits_of_attention_to_chosen_records(key, batch):
    (q, slots, slot_ids, block_ids, positions), _ = make(key, batch)
    slots = jnp.where(jnp.isnan(slots), 0.0, slots)
    want = jax.jit(attend_records)(
        q[:, None], slots, slot_ids[:, None], block_ids[:, None], positions[:, None]
    )
    got, _ = by_reference((q, slots, slot_ids, block_ids, positions))
    np.testing.assert_array_equal(got, want[:, 0])


def test_a_bias_in_block_order_is_that_of_attention_to_chosen_records(key):
    batch = next(b for b in BATCHES if b.bias_order == "block")
    (q, slots, slot_ids, block_ids, positions), bias = make(key, batch)
    slots = jnp.where(jnp.isnan(slots), 0.0, slots)
    want = jax.jit(attend_records)(
        q[:, None], slots, slot_ids[:, None], block_ids[:, None], positions[:, None], bias
    )
    got, _ = by_reference((q, slots, slot_ids, block_ids, positions), bias, batch.bias_order)
    np.testing.assert_array_equal(got, want[:, 0])


def test_all_blocks_in_order_are_dense_attention(key):
    batch = Batch(name="dense", B=2, R=6, J=6, lengths=(96, 41))
    (q, slots, _, _, positions), _ = make(key, batch)
    slots = jnp.where(jnp.isnan(slots), 0.0, slots)
    ids = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 2, 6))
    keys, values = (jnp.moveaxis(slots[:, :, :, i], 1, 3) for i in range(2))  # [B R W K H]
    keys, values = (x.reshape(2, -1, *x.shape[3:]) for x in (keys, values))
    want = attend_dense(q[:, None], keys, values, positions[:, None])[:, 0]
    got, _ = by_reference((q, slots, ids, ids, positions))
    assert_close_float32(got, want)
    got, _ = interpreted((q, slots, ids, ids, positions), None, None, Tiles(tile_kv=16))
    assert_close_float32(got, want)


@pytest.mark.parametrize(
    ("batch", "cut"),
    [(batch, "two") for batch in BATCHES]
    + [(batch, cut) for batch in (BATCHES[0], BATCHES[7], BATCHES[9]) for cut in list(CUTS)[::2]],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_the_interpreted_kernel_agrees_with_the_reference(key, batch, cut):
    operands, bias = make(key, batch)
    want, want_lse = by_reference(operands, bias, batch.bias_order)
    got, lse = interpreted(operands, bias, batch.bias_order, CUTS[cut])
    assert_close_float32(got, want)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)
    nothing = np.asarray(operands[4]) < 0
    assert not np.any(np.asarray(got)[nothing])
    assert np.all(np.asarray(lse)[nothing] == np.float32(LOWEST))


def test_the_interpreted_kernel_in_bfloat16_rounds_like_plain_attention(key):
    batch = Batch(name="bf16", W=32, H=64, R=6, J=5, lengths=(157, 100, 33))
    (q, slots, slot_ids, block_ids, positions), _ = make(key, batch, "bfloat16")
    slots = jnp.where(jnp.isnan(slots), jnp.bfloat16(0.0), slots)
    operands = (slot_ids, block_ids, positions)
    plain = jax.jit(attend_records)(
        q[:, None], slots, slot_ids[:, None], block_ids[:, None], positions[:, None]
    )
    exact, _ = by_reference((q.astype(jnp.float32), slots.astype(jnp.float32), *operands))
    got, _ = interpreted((q, slots, *operands), None, None, CUTS["two"])
    assert got.dtype == jnp.bfloat16
    assert_within_reference_rounding(got, plain[:, 0], exact)


def test_a_call_twice_gives_the_same_bits(key):
    operands, _ = make(key, BATCHES[0])
    first = interpreted(operands, None, None, CUTS["two"])
    chex.assert_trees_all_equal(first, interpreted(operands, None, None, CUTS["two"]))


def test_a_permuted_batch_gives_the_permuted_result(key):
    operands, _ = make(key, BATCHES[0])
    order = jnp.array([2, 0, 1])
    first = interpreted(operands, None, None, CUTS["two"])
    moved = interpreted(tuple(x[order] for x in operands), None, None, CUTS["two"])
    chex.assert_trees_all_equal(moved, tuple(x[order] for x in first))


def test_other_lengths_and_ids_do_not_trace_again(key):
    call = jax.jit(chex.assert_max_traces(n=1)(lambda *x: sparse_decode(*x)))
    operands, _ = make(key, BATCHES[0])
    other, _ = make(jax.random.split(key)[0], dataclasses.replace(BATCHES[0], lengths=(5, 77, 0)))
    call(*operands)
    call(*other)


@pytest.mark.parametrize(
    ("number", "shape", "message"),
    [
        (0, (3, 6), r"q.shape=\(3, 6\) must be \[B N H\] and slots.shape=\(3, 2, 9, 2, 16, 16\)"),
        (0, (3, 6, 8), r"q.shape=\(3, 6, 8\) .* slots.shape=\(3, 2, 9, 2, 16, 16\)"),
        (0, (3, 5, 16), r"q.shape=\(3, 5, 16\) must be a multiple of kv_heads=2"),
        (1, (3, 2, 9, 1, 16, 16), r"slots.shape=\(3, 2, 9, 1, 16, 16\)"),
        (2, (3, 2, 4), r"slot_ids.shape=\(3, 2, 4\) and block_ids.shape=\(3, 2, 5\)"),
        (4, (2,), r"positions.shape=\(2,\) must be \[B\] of slots.shape=\(3, 2, 9, 2, 16, 16\)"),
    ],
)
def test_shapes_that_disagree_are_refused(key, no_shape_hook, number, shape, message):
    operands = list(make(key, BATCHES[0])[0])
    operands[number] = jnp.zeros(shape, operands[number].dtype)
    with pytest.raises(ValueError, match=message):
        sparse_decode(*operands)


def test_a_bias_that_does_not_fit_is_refused(key, no_shape_hook):
    operands, _ = make(key, BATCHES[0])
    with pytest.raises(ValueError, match=r"bias.shape=\(3, 2, 9, 8\) .* slots.shape=\(3, 2, 9, 2"):
        sparse_decode(*operands, bias=jnp.zeros((3, 2, 9, 8)))
    with pytest.raises(ValueError, match=r"bias.shape=\(3, 2, 7, 16\) in slot order .*\(3, 2, 9"):
        sparse_decode(*operands, bias=jnp.zeros((3, 2, 7, 16)))
    with pytest.raises(ValueError, match="bias_order='head' must be 'slot' or 'block'"):
        sparse_decode(*operands, bias=jnp.zeros((3, 2, 7, 16)), bias_order="head")


@pytest.mark.parametrize(
    ("q_dtype", "dtype", "block_size", "dim", "tiles", "message"),
    [
        ("int8", "int8", 64, 128, Tiles(), "not int8"),
        ("float32", "bfloat16", 64, 128, Tiles(), "has float32 and bfloat16"),
        ("bfloat16", "bfloat16", 64, 96, Tiles(), "not 96"),
        ("bfloat16", "bfloat16", 48, 128, Tiles(tile_kv=16), "not 48"),
        ("bfloat16", "bfloat16", 16, 128, Tiles(), "block_size=16 and tiles.tile_kv=64"),
        ("float32", "float32", 128, 256, Tiles(tile_kv=128), "524288 bytes .* most 204800"),
    ],
)
def test_what_the_kernel_cannot_take_has_a_reason(q_dtype, dtype, block_size, dim, tiles, message):
    q = jax.ShapeDtypeStruct((1, 2, dim), q_dtype)
    slots = jax.ShapeDtypeStruct((1, 1, 4, 2, block_size, dim), dtype)
    assert re.search(message, kernel.shape_reason(q, slots, tiles))


@pytest.mark.skipif(_backend.gpu_kind() is not None, reason="there is a GPU")
def test_the_kernel_says_that_it_needs_a_gpu(key):
    operands, _ = make(key, BATCHES[0])
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, but JAX computes on 'cpu'"):
        sparse_decode(*operands, implementation="triton")


def test_tiles_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="tile_kv=8 must be a power of two, at least 16"):
        Tiles(tile_kv=8)
    with pytest.raises(ValueError, match="warps=3 must be a power of two from 1 to 16"):
        Tiles(warps=3)
    with pytest.raises(ValueError, match="stages=0 must be at least 1"):
        Tiles(stages=0)
    with pytest.raises(ValueError, match="programs=0 must be at least 1"):
        Tiles(programs=0)


@pytest.mark.parametrize("rows", [1, 2, 7, 32, 128, 1000])
@pytest.mark.parametrize("width", [1, 5, 96, 2048])
def test_every_block_is_dealt_to_a_program(rows, width):
    splits = Tiles().splits(rows, width)
    each = -(-width // splits)
    assert 1 <= splits <= width
    assert splits == 1 or splits * rows <= Tiles().programs
    assert (splits - 1) * each < width <= splits * each


def test_the_work_is_the_bytes_of_the_chosen_blocks():
    counted = work(
        batch=2, heads=4, kv_heads=2, width=3, block_size=16, head_dim=32, itemsize=2, has_bias=True
    )
    tokens = 2 * 2 * 3 * 16
    ends, indices = 2 * 2 * 4 * 32 * 2, 4 * (2 * 2 * 2 * 3 + 2)
    assert counted == Work(bytes=tokens * (2 * 32 * 2 + 4) + ends + indices, flops=tokens * 8 * 32)


def test_the_measured_cases_run_where_there_is_no_gpu():
    chosen = cases(tiny=True)
    assert chosen
    for case in chosen:
        operands = case.operands(0)
        out = jax.jit(case.call)(*operands)
        assert case.check is not None
        case.check(out, operands)
        wrong = jax.tree.map(lambda x: x + jnp.ones_like(x), out)
        with pytest.raises(AssertionError):
            case.check(wrong, operands)


def _real(B, K, G, R, W, H, J, dtype):
    return (
        jax.ShapeDtypeStruct((B, K * G, H), dtype),
        jax.ShapeDtypeStruct((B, K, R, 2, W, H), dtype),
        jax.ShapeDtypeStruct((B, K, J), jnp.int32),
        jax.ShapeDtypeStruct((B, K, J), jnp.int32),
        jax.ShapeDtypeStruct((B,), jnp.int32),
    )


def _lower(shapes, bias=None, bias_order="slot", tiles=None):
    slots = shapes[1]
    tiles = tiles or Tiles.default(slots.shape[4], slots.shape[5], slots.dtype.itemsize)
    assert kernel.shape_reason(shapes[0], slots, tiles) is None

    def call(*operands):
        *operands, given = (*operands, None) if bias is None else operands
        return kernel.sparse_decode_triton(
            *operands, given, scale=0.1, bias_order=bias_order, tiles=tiles
        )

    return _compat.lowered(call, *shapes, *(() if bias is None else (bias,))).as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_the_kernel_lowers_at_real_shapes(group, dim, dtype):
    text = _lower(_real(16, 2, group, 128, 64, dim, 96, dtype))
    assert "sparse_decode_split" in text
    assert "sparse_decode_merge" in text


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_the_kernel_lowers_for_other_blocks(block_size):
    assert "sparse_decode_split" in _lower(_real(4, 2, 16, 32, block_size, 128, 20, "float32"))


def test_the_kernel_lowers_for_dense_attention_with_a_bias_past_two_to_the_31_elements():
    shapes = _real(128, 2, 16, 2048, 64, 128, 2048, "bfloat16")
    assert math.prod(shapes[1].shape) > 2**31
    bias = jax.ShapeDtypeStruct((128, 2, 2048, 64), jnp.float32)
    text = _lower(shapes, bias, "block")
    assert "sparse_decode_split" in text
    assert "sparse_decode_merge" not in text  # one program a KV head fills the chip


# The GPU: MiniCPM4.1-8B, N 32, K 2, H 128, block 64, 96 blocks of 128.


def _on_gpu(key, batch, dtype, J=96, R=128, lengths=None):
    seed = jax.random.bits(key)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 5)
    K, G, W, H = 2, 16, 64, 128
    q = jax.random.normal(keys[0], (batch, K * G, H), dtype)
    slots = jax.random.normal(keys[1], (batch, K, R, 2, W, H), dtype)
    order = jax.random.uniform(keys[2], (batch, K, R))
    slot_ids = jnp.argsort(order, axis=-1)[..., :J].astype(jnp.int32)
    block_ids = jnp.sort(
        jnp.argsort(jax.random.uniform(keys[3], (batch, K, 1024)), axis=-1)[..., : J - 1], axis=-1
    )
    last = jnp.full((batch, K, 1), 1024, block_ids.dtype)
    block_ids = jnp.concatenate([block_ids, last], axis=-1).astype(jnp.int32)
    positions = 1024 * W + jax.random.randint(keys[4], (batch,), 0, W)
    if lengths is not None:  # rows that hold fewer blocks, down to none
        held = jnp.array(lengths, jnp.int32)[:, None, None]
        real = jnp.arange(J, dtype=jnp.int32)[None, None, :] < held
        slot_ids, block_ids = jnp.where(real, slot_ids, -1), jnp.where(real, block_ids, -1)
        positions = jnp.where(held[:, 0, 0] > 0, positions, -1)
    return q, slots, slot_ids, block_ids, positions.astype(jnp.int32)


def _hold(operands, **options):
    got, lse = jax.jit(
        lambda *x: sparse_decode(*x, return_lse=True, implementation="triton", **options)
    )(*operands)
    wide = (*(x.astype(jnp.float32) for x in operands[:2]), *operands[2:])
    want, want_lse = jax.jit(
        lambda *x: sparse_decode(*x, return_lse=True, implementation="reference", **options)
    )(*wide)
    if operands[0].dtype == jnp.float32:
        assert_close_float32(got, want)
    else:
        assert_close_bfloat16(got, want)
    seen = np.asarray(want_lse) > LOWEST
    np.testing.assert_array_equal(np.asarray(lse) > LOWEST, seen)
    np.testing.assert_allclose(
        np.asarray(lse)[seen], np.asarray(want_lse)[seen], rtol=2e-5, atol=2e-4
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "tiles"),
    [(1, None), (4, None), (16, None), (16, Tiles(programs=1))],  # the last joins nothing
)
def test_the_kernel_is_right_on_the_gpu_in_bfloat16(key, batch, tiles):
    _hold(_on_gpu(key, batch, "bfloat16"), tiles=tiles)


@pytest.mark.gpu
def test_the_kernel_is_right_on_the_gpu_in_float32(key):
    _hold(_on_gpu(key, 4, "float32"))


@pytest.mark.gpu
def test_ragged_rows_are_right_on_the_gpu(key):
    _hold(_on_gpu(key, 6, "bfloat16", lengths=(96, 0, 1, 50, 95, 7)))


@pytest.mark.gpu
def test_rounding_on_the_gpu_is_that_of_plain_attention(key):
    q, slots, slot_ids, block_ids, positions = _on_gpu(key, 4, "bfloat16")
    places = (slot_ids, block_ids, positions)
    plain = jax.jit(attend_records)(
        q[:, None], slots, slot_ids[:, None], block_ids[:, None], positions[:, None]
    )
    wide = q.astype(jnp.float32), slots.astype(jnp.float32)
    exact = sparse_decode(*wide, *places, implementation="reference")
    got = sparse_decode(q, slots, *places, implementation="triton")
    assert_within_reference_rounding(got, plain[:, 0], exact)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["slot", "block"])
def test_a_bias_is_right_on_the_gpu(key, order):
    operands = _on_gpu(key, 2, "bfloat16")
    count = 128 if order == "slot" else 1025
    _hold(operands, bias=jax.random.normal(key, (2, 2, count, 64)), bias_order=order)


@pytest.mark.gpu
def test_garbage_after_the_position_is_not_read_on_the_gpu(key):
    q, slots, slot_ids, block_ids, positions = _on_gpu(key, 2, "bfloat16")
    positions = jnp.full_like(positions, 1024 * 64 + 9)
    want = sparse_decode(q, slots, slot_ids, block_ids, positions, implementation="triton")
    for b, k in np.ndindex(2, 2):
        slots = slots.at[b, k, slot_ids[b, k, -1], :, 10:].set(jnp.nan)
    got = sparse_decode(q, slots, slot_ids, block_ids, positions, implementation="triton")
    chex.assert_trees_all_equal(got, want)


@pytest.mark.gpu
def test_two_calls_on_the_gpu_give_the_same_bits_and_trace_once(key):
    traced = chex.assert_max_traces(n=1)(lambda *x: sparse_decode(*x, implementation="triton"))
    call = jax.jit(traced)
    operands = _on_gpu(key, 16, "bfloat16")
    chex.assert_trees_all_equal(call(*operands), call(*operands))
    call(*_on_gpu(jax.random.split(key)[0], 16, "bfloat16"))


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "dim", "block_size"), [(1, 64, 16), (4, 32, 128)])
def test_other_shapes_are_right_on_the_gpu(key, group, dim, block_size):
    batch = Batch(
        name="other",
        G=group,
        W=block_size,
        H=dim,
        R=8,
        lengths=(6 * block_size + 3, 0, 3 * block_size),
    )
    operands, _ = make(key, batch)
    want = sparse_decode(*operands, implementation="reference")
    assert_close_float32(sparse_decode(*operands, implementation="triton"), want)
