# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`append_kv`: the plain functions of sparda_jax to the bit, interpreter, lowering, GPU."""

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kernel_cases.append_kv import cases
from pallas_kernels import _backend, _compat
from pallas_kernels.append_kv import Appended, Tiles, append_kv
from pallas_kernels.append_kv import triton as kernel
from pallas_kernels.append_kv.config import work
from pallas_kernels.append_kv.reference import reference
from sparda_jax.config import RopeConfig, SparseConfig
from sparda_jax.kv.state import LayerKV, append_tokens
from sparda_jax.parts import EXACT
from sparda_jax.pooling import PooledSummary, extend_pooled, pool_keys
from sparda_jax.rope import Rope, apply_rope
from sparda_jax.testing import assert_close_float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A small call: row 2 does nothing, tails are missing, past the end and fine."""

    name: str
    B: int = 5
    K: int = 2
    G: int = 3
    F: int = 3  # 0 for none
    H: int = 16
    R: int = 4
    W: int = 12
    M: int = 6
    C: int = 9
    P: int = 4  # 0 without a summary
    stride: int = 2
    has_bias: bool = True
    dtype: str = "float32"
    rotate_in: str = "float32"
    positions: tuple[int, ...] = (3, 4, -1, 5, 40)


BATCHES = (
    Batch(name="everything"),
    Batch(name="bfloat16", dtype="bfloat16"),
    Batch(name="bfloat16 rotated in bfloat16", dtype="bfloat16", rotate_in="model"),
    Batch(name="no other heads", F=0),
    Batch(name="fewer other heads than KV heads", F=1, K=4, G=1),
    Batch(name="sixteen heads a KV head", G=16, K=1, B=2, F=1, positions=(7, 3)),
    Batch(name="no summary", P=0),
    Batch(name="no bias", has_bias=False),
    Batch(name="windows side by side", P=2, stride=2, positions=(0, 1, -1, 2, 3)),
    Batch(name="windows of one key", P=1, stride=1, positions=(0, 8, -1, 9, 100)),
    Batch(name="past the end", M=2, C=2, positions=(23, 24, -1, 5, 7)),
)


def make(key, batch):
    """Make the operands of a call, in the order of `reference`."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def normal(*shape, dtype=batch.dtype):
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    B, K, H = batch.B, batch.K, batch.H
    tail = rng.integers(0, batch.R, (B, K)).astype(np.int32)
    tail[1, -1], tail[0, 0] = -1, batch.R - 1
    return (
        normal(B, K * batch.G, H),
        normal(B, K, H),
        normal(B, K, H),
        normal(B, batch.F, H) if batch.F else None,
        normal(B, H // 2, dtype="float32"),
        normal(B, H // 2, dtype="float32"),
        jnp.array(batch.positions, jnp.int32),
        jnp.asarray(tail),
        normal(B, K, batch.R, 2, batch.W, H),
        normal(B, batch.C, K, H) if batch.P else None,
        normal(B, batch.P, K, H) if batch.P else None,
        normal(B, K, dtype="float32") if batch.has_bias else None,
        normal(B, K, batch.M, batch.W, dtype="float32") if batch.has_bias else None,
    )


def exact(f, **options):
    """Compile with rounding where the code says so, as every program of generation is."""
    return jax.jit(functools.partial(f, **options), compiler_options=EXACT)


def by_reference(batch, operands):
    call = exact(reference, pool_stride=batch.stride, rotate_in=batch.rotate_in)
    return call(*operands)


def interpreted(batch, operands):
    options = {"pool_stride": batch.stride, "rotate_in": batch.rotate_in, "tiles": Tiles()}
    return exact(kernel.append_kv_triton, interpret=True, **options)(*operands)


def by_sparda(batch, operands):
    """Compose `Appended` of sparda_jax's own functions for a chunk of one token."""
    rope_config = RopeConfig(compute_dtype=batch.rotate_in)
    q, k, v, forecast, cos, sin, positions, tail, slots, pooled, recent, importance, bias = operands

    def compose(q, k, v, forecast, cos, sin, positions, tail, slots, pooled, recent, importance, b):
        rope = Rope(positions=positions[:, None], cos=cos[:, None], sin=sin[:, None])
        q, k = (apply_rope(x[:, None], rope, rope_config) for x in (q, k))
        if forecast is not None:
            forecast = apply_rope(forecast[:, None], rope, rope_config)[:, 0]
        kv = LayerKV(slots=slots, pool=None, importance=b, summary=None)
        new = None if importance is None else importance[:, None]
        kv = append_tokens(kv, k, v[:, None], new, tail, positions)
        if pooled is not None:
            sparse = SparseConfig(
                block_size=4 * batch.stride,
                pool_size=batch.P,
                pool_stride=batch.stride,
            )
            held = PooledSummary(pooled=pooled, tail=recent)
            held = extend_pooled(held, k, positions[:, None], sparse)
            pooled, recent = held.pooled, held.tail
        return Appended(
            q=q[:, 0],
            k=k[:, 0],
            forecast=forecast,
            slots=kv.slots,
            pooled=pooled,
            recent=recent,
            bias=kv.importance,
        )

    return exact(compose)(
        q, k, v, forecast, cos, sin, positions, tail, slots, pooled, recent, importance, bias
    )


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: batch.name)
def test_the_reference_has_the_bits_of_the_plain_functions(key, batch):
    operands = make(key, batch)
    chex.assert_trees_all_equal(by_reference(batch, operands), by_sparda(batch, operands))


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: batch.name)
def test_the_interpreted_kernel_has_the_bits_of_the_reference(key, batch):
    operands = make(key, batch)
    chex.assert_trees_all_equal(interpreted(batch, operands), by_reference(batch, operands))


def test_only_the_place_of_the_token_changes(key):
    batch = dataclasses.replace(BATCHES[0], positions=(14, 14, -1, 14, 14))
    operands = make(key, batch)
    _, k, v, _, cos, sin, positions, tail, slots, pooled, recent, importance, bias = (
        np.asarray(x) for x in operands
    )
    half = batch.H // 2
    turned = np.empty_like(k)
    for b, h, i in np.ndindex(batch.B, batch.K, half):
        first, second = k[b, h, i], k[b, h, i + half]
        turned[b, h, i] = first * cos[b, i] - second * sin[b, i]
        turned[b, h, i + half] = second * cos[b, i] + first * sin[b, i]
    slots, pooled, recent, bias = (np.array(x) for x in (slots, pooled, recent, bias))
    for b in range(batch.B):
        if positions[b] < 0:
            continue
        for h in range(batch.K):
            bias[b, h, 1, 2] = importance[b, h]  # token 14 of blocks of 12
            if tail[b, h] >= 0:
                slots[b, h, tail[b, h], 0, 2] = turned[b, h]
                slots[b, h, tail[b, h], 1, 2] = v[b, h]
        recent[b] = np.concatenate([recent[b, 1:], turned[b : b + 1]])
    assert (14 + 1 - batch.P) % batch.stride  # no window ends here, so no pooled key changes
    for got in (by_reference(batch, operands), interpreted(batch, operands)):
        for name, want in (("slots", slots), ("pooled", pooled), ("recent", recent)):
            np.testing.assert_allclose(getattr(got, name), want, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(got.bias, bias)
        np.testing.assert_array_equal(got.slots[2], slots[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_appended_one_by_one_pool_like_the_whole_sequence(key, dtype):
    batch = Batch(name="long", B=1, F=0, H=16, R=3, has_bias=False, C=9, dtype=dtype)
    operands = list(make(key, dataclasses.replace(batch, B=5)))
    operands = [None if x is None else x[:1] for x in operands]
    length = 2 * batch.C + batch.P - 1
    rng = np.random.default_rng(7)
    keys = jnp.asarray(rng.standard_normal((1, length, batch.K, batch.H), np.float32), dtype)
    call = exact(
        kernel.append_kv_triton,
        pool_stride=2,
        rotate_in="float32",
        tiles=Tiles(),
        interpret=True,
    )
    rotated = []
    for token in range(length):
        operands[1] = keys[:, token]
        operands[6] = jnp.array([token], jnp.int32)
        new = call(*operands)
        operands[8], operands[9], operands[10] = new.slots, new.pooled, new.recent
        rotated.append(new.k)
    want = exact(pool_keys, pool_size=batch.P, pool_stride=2)(jnp.stack(rotated, axis=1))
    assert want.shape[1] == batch.C
    chex.assert_trees_all_equal(operands[9], want)


def test_a_call_twice_gives_the_same_bits(key):
    operands = make(key, BATCHES[0])
    chex.assert_trees_all_equal(
        interpreted(BATCHES[0], operands), interpreted(BATCHES[0], operands)
    )


def test_other_positions_do_not_trace_again(key):
    call = jax.jit(chex.assert_max_traces(n=1)(lambda *x: append_kv(*x)))
    operands = make(key, BATCHES[0])[:9]
    call(*operands)
    call(*operands[:6], jnp.array([11, 12, 13, -1, 0], jnp.int32), *operands[7:])


def _door(operands, **changes):
    given = dict(
        zip(("pooled", "recent", "importance", "bias"), operands[9:], strict=True), pool_stride=2
    )
    return append_kv(*operands[:9], **(given | changes))


@pytest.mark.parametrize(
    ("number", "shape", "message"),
    [
        (0, (5, 6, 8), r"q.shape=\(5, 6, 8\) .* slots.shape=\(5, 2, 4, 2, 12, 16\)"),
        (1, (5, 3, 16), r"k.shape=\(5, 3, 16\) .* slots.shape=\(5, 2, 4, 2, 12, 16\)"),
        (2, (5, 1, 16), r"v.shape=\(5, 1, 16\) .* slots.shape=\(5, 2, 4, 2, 12, 16\)"),
        (3, (4, 3, 16), r"forecast.shape=\(4, 3, 16\) .* slots.shape=\(5, 2, 4, 2, 12, 16\)"),
        (4, (5, 16), r"cos.shape=\(5, 16\) must be \[B H/2\] of slots.shape=\(5, 2, 4, 2, 12, 16"),
        (5, (1, 8), r"sin.shape=\(1, 8\) must be \[B H/2\] of slots.shape=\(5, 2, 4, 2, 12, 16\)"),
        (6, (4,), r"positions.shape=\(4,\) .* tail.shape=\(5, 2\)"),
        (7, (5, 3), r"positions.shape=\(5,\) .* tail.shape=\(5, 3\)"),
        (8, (5, 2, 4, 1, 12, 16), r"slots.shape=\(5, 2, 4, 1, 12, 16\) must be \[B K R 2 W H\]"),
        (9, (5, 9, 3, 16), r"pooled.shape=\(5, 9, 3, 16\) .* k.shape=\(5, 2, 16\)"),
        (10, (5, 4, 2, 8), r"recent.shape=\(5, 4, 2, 8\) .* k.shape=\(5, 2, 16\)"),
        (11, (5, 3), r"importance.shape=\(5, 3\) must be \[B K\] of k.shape=\(5, 2, 16\)"),
        (12, (5, 2, 6, 8), r"bias.shape=\(5, 2, 6, 8\) .* slots.shape=\(5, 2, 4, 2, 12, 16\)"),
    ],
)
def test_shapes_that_disagree_are_refused(key, no_shape_hook, number, shape, message):
    operands = list(make(key, BATCHES[0]))
    operands[number] = jnp.zeros(shape, operands[number].dtype)
    with pytest.raises(ValueError, match=message):
        _door(operands)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooled": None}, "pooled is None=True but recent is None=False: give both"),
        ({"bias": None}, "importance is None=False but bias is None=True: give both"),
        ({"pool_stride": 0}, "pool_stride=0 must be at least 1"),
        ({"rotate_in": "f64"}, "rotate_in='f64' must be 'float32' or 'model'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(key, no_shape_hook, changes, message):
    with pytest.raises(ValueError, match=message):
        _door(make(key, BATCHES[0]), **changes)


def test_a_summary_of_two_dtypes_is_refused(key):
    operands = make(key, BATCHES[0])
    with pytest.raises(ValueError, match=r"pooled.dtype=.*bfloat16.* recent.dtype=.*float32"):
        _door(operands, pooled=operands[9].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("q_dtype", "slot_dtype", "dim", "size", "message"),
    [
        ("int8", "bfloat16", 64, 32, "queries of bfloat16, float16, float32, not int8"),
        ("bfloat16", "int8", 64, 32, "slots of bfloat16, float16, float32, not int8"),
        ("bfloat16", "bfloat16", 96, 32, "not 96"),
        ("bfloat16", "bfloat16", 64, 24, "pool size that is a power of two up to 256, not 24"),
        ("bfloat16", "bfloat16", 64, 512, "pool size that is a power of two up to 256, not 512"),
    ],
)
def test_what_the_kernel_cannot_take_has_a_reason(q_dtype, slot_dtype, dim, size, message):
    q = jax.ShapeDtypeStruct((1, 2, dim), q_dtype)
    slots = jax.ShapeDtypeStruct((1, 1, 4, 2, 48, dim), slot_dtype)
    recent = jax.ShapeDtypeStruct((1, size, 1, dim), "bfloat16")
    assert re.search(message, kernel.shape_reason(q, slots, recent))


@pytest.mark.skipif(_backend.gpu_kind() is not None, reason="there is a GPU")
def test_the_kernel_says_that_it_needs_a_gpu(key):
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, but JAX computes on 'cpu'"):
        _door(make(key, BATCHES[0]), implementation="triton")


def test_tiles_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="warps=32 must be a power of two from 1 to 16"):
        Tiles(warps=32)


def test_the_work_is_what_is_read_and_written():
    counted = work(
        batch=2,
        heads=8,
        kv_heads=2,
        extra_heads=2,
        head_dim=64,
        itemsize=2,
        pool_size=32,
        pool_stride=16,
    )
    vectors = 2 * 10 + 5 * 2 + 2 * 32 * 2
    pooled = 2 * 2 * 64 // 16 * 2  # a mean of 64 elements once in 16 tokens
    assert counted.bytes == 2 * (vectors * 64 * 2 + 4 * 64 + 4 + 8) + pooled
    assert counted.ceiling == "copy"


def test_the_measured_cases_run_where_there_is_no_gpu():
    chosen = cases(tiny=True)
    assert chosen
    for case in chosen:
        operands = case.operands(0)
        out = jax.jit(case.call)(*operands)
        assert case.check is not None
        case.check(out, operands)
        wrong = out._replace(recent=out.recent + jnp.ones_like(out.recent))
        with pytest.raises(AssertionError):
            case.check(wrong, operands)


def _real(B, K, G, F, H, dtype, R=128, W=64, P=32, C=8191, M=2048):
    def shape(*dims, dtype=dtype):
        return jax.ShapeDtypeStruct(dims, dtype)

    return (
        shape(B, K * G, H),
        shape(B, K, H),
        shape(B, K, H),
        shape(B, F, H) if F else None,
        shape(B, H // 2, dtype="float32"),
        shape(B, H // 2, dtype="float32"),
        shape(B, dtype="int32"),
        shape(B, K, dtype="int32"),
        shape(B, K, R, 2, W, H),
        shape(B, C, K, H),
        shape(B, P, K, H),
        shape(B, K, dtype="float32"),
        shape(B, K, M, W, dtype="float32"),
    )


def _lower(shapes, rotate_in="float32"):
    assert kernel.shape_reason(shapes[0], shapes[8], shapes[10]) is None
    options = {"pool_stride": 16, "rotate_in": rotate_in, "tiles": Tiles()}
    return _compat.lowered(functools.partial(kernel.append_kv_triton, **options), *shapes).as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_the_kernel_lowers_at_real_shapes(group, dim, dtype):
    text = _lower(_real(16, 2, group, 2, dim, dtype))
    assert text.count("stablehlo.custom_call") == 1  # one launch
    assert "append_kv" in text


def test_the_kernel_lowers_past_two_to_the_31_elements():
    shapes = _real(64, 8, 4, 0, 128, "bfloat16", R=2048, M=2048)
    assert math.prod(shapes[8].shape) > 2**31
    assert "append_kv" in _lower(shapes, "model")


# The GPU: MiniCPM4.1-8B, N 32, K 2, H 128, 128 slots of 64 tokens, windows of 32 every 16.


def _on_gpu(key, batch, dtype, has_bias=False):
    keys = jax.random.split(jax.random.key(jax.random.bits(key), impl="rbg"), 12)
    K, N, F, H, R, W, P, C, M = 2, 32, 2, 128, 128, 64, 32, 511, 128

    def normal(number, *shape, dtype=dtype):
        return jax.random.normal(keys[number], shape, dtype)

    positions = jax.random.randint(keys[10], (batch,), 0, M * W)
    positions = positions.at[0].set(31).at[1].set(P + 16 * 9 - 1).at[2].set(-1)
    angle = jax.random.uniform(keys[11], (batch, H // 2), maxval=6.0)
    operands = (
        *(normal(0, batch, N, H), normal(1, batch, K, H), normal(2, batch, K, H)),
        *(normal(3, batch, F, H), jnp.cos(angle), jnp.sin(angle)),
        *(positions, jax.random.randint(keys[9], (batch, K), 0, R)),
        normal(4, batch, K, R, 2, W, H),
        *(normal(5, batch, C, K, H), normal(6, batch, P, K, H)),
    )
    if not has_bias:
        return (*operands, None, None)
    wide = normal(7, batch, K, dtype="float32"), normal(8, batch, K, M, W, dtype="float32")
    return (*operands, *wide)


def _gpu_call(operands, implementation, rotate_in="float32"):
    call = jax.jit(
        lambda *x: append_kv(
            *x[:9],
            pooled=x[9],
            recent=x[10],
            importance=x[11],
            bias=x[12],
            pool_stride=16,
            rotate_in=rotate_in,
            implementation=implementation,
        ),
        compiler_options=EXACT,
    )
    return call(*operands)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "dtype", "rotate_in", "has_bias"),
    [
        (4, "bfloat16", "float32", False),
        (16, "bfloat16", "model", True),
        (4, "float32", "float32", True),
    ],
)
def test_the_kernel_is_right_on_the_gpu(key, batch, dtype, rotate_in, has_bias):
    operands = _on_gpu(key, batch, dtype, has_bias)
    got = _gpu_call(operands, "triton", rotate_in)
    want = _gpu_call(operands, "reference", rotate_in)
    for name in ("q", "k", "forecast"):
        x, y = (np.asarray(getattr(z, name), np.float32) for z in (got, want))
        if dtype == "float32":
            assert_close_float32(x, y)
        else:  # an f32 rotation fused differently may round to the next number, rarely
            assert np.mean(x != y) < 1e-2
            np.testing.assert_allclose(x, y, rtol=2**-7, atol=1e-6)
    # What is stored is exactly what those keys make.
    positions, tail = operands[6], operands[7]
    sparse = SparseConfig()
    held = PooledSummary(pooled=operands[9], tail=operands[10])
    held = jax.jit(extend_pooled, static_argnums=3)(
        held, got.k[:, None], positions[:, None], sparse
    )
    chex.assert_trees_all_equal((got.pooled, got.recent), (held.pooled, held.tail))
    kv = LayerKV(slots=operands[8], pool=None, importance=operands[12], summary=None)
    new = None if operands[11] is None else operands[11][:, None]
    kv = jax.jit(append_tokens)(kv, got.k[:, None], operands[2][:, None], new, tail, positions)
    chex.assert_trees_all_equal((got.slots, got.bias), (kv.slots, kv.importance))


@pytest.mark.gpu
def test_the_slots_are_changed_in_place_on_the_gpu(key):
    operands = _on_gpu(key, 4, "bfloat16")
    call = jax.jit(
        lambda *x: append_kv(
            *x[:9], pooled=x[9], recent=x[10], pool_stride=16, implementation="triton"
        ),
        donate_argnums=(8, 9, 10),
    )
    compiled = call.lower(*operands[:11]).compile().as_text()
    assert not re.search(r"bf16\[4,2,(128,2|256),64,128\]\S* copy", compiled)
    place = operands[8].unsafe_buffer_pointer()
    assert call(*operands[:11]).slots.unsafe_buffer_pointer() == place


@pytest.mark.gpu
def test_two_calls_on_the_gpu_give_the_same_bits(key):
    operands = _on_gpu(key, 16, "bfloat16")
    chex.assert_trees_all_equal(_gpu_call(operands, "triton"), _gpu_call(operands, "triton"))
