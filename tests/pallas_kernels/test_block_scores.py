# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Block scores by forecasts: reference against loops, kernels against reference, lowering."""

import dataclasses
import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _compat
from pallas_kernels.block_scores import Tiles, block_scores, triton
from pallas_kernels.block_scores import reference as definition
from pallas_kernels.block_scores.config import SHARED_BYTES, work
from sparda_jax.config import SparseConfig
from sparda_jax.pooling import LOWEST, PooledSummary, pool_scores, pooled_count
from sparda_jax.selectors.base import score_cells
from sparda_jax.selectors.forecast import ForecastSelector
from sparda_jax.selectors.query import visible_cells
from sparda_jax.testing import assert_close_float32, tiny_config

DECODE = Tiles(tile_q=1, tile_m=4)
PREFILL = Tiles(tile_q=16, tile_m=16, span=2, num_stages=1)
MINICPM = {"num_blocks": 2048, "pool_size": 32, "pool_stride": 16, "block_size": 64}


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and a grid; `positions` and `counts` may be fixed."""

    name: str
    B: int = 1
    T: int = 1
    K: int = 2
    H: int = 16
    C: int = 37
    M: int = 10
    size: int = 4
    stride: int = 2
    block: int = 8
    visible: str = "end"
    dtype: str = "float32"
    positions: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    stale: float = 0.0

    @property
    def rule(self):
        return {
            "num_blocks": self.M,
            "pool_size": self.size,
            "pool_stride": self.stride,
            "block_size": self.block,
            "visible": self.visible,
        }

    def operands(self, seed=0):
        rng = np.random.default_rng(seed)
        forecast = rng.standard_normal((self.B, self.T, self.K, self.H))
        pooled = rng.standard_normal((self.B, self.C, self.K, self.H))
        held = self.C * self.stride + self.size
        positions = rng.integers(-1, held, (self.B, self.T))
        if self.positions:
            positions = np.resize(self.positions, (self.B, self.T))
        counts = np.resize(self.counts or (self.C,), self.B)
        for row, count in enumerate(counts):
            if self.stale:
                pooled[row, count:] = self.stale
        return (
            jnp.asarray(forecast, self.dtype),
            jnp.asarray(pooled, self.dtype),
            jnp.asarray(positions, jnp.int32),
            jnp.asarray(counts, jnp.int32),
        )


CASES = [
    Case("one query", positions=(70,)),
    Case("ragged with an empty cache", B=3, counts=(37, 0, 18), positions=(77, 3, 60)),
    Case("some queries", B=2, T=3),
    Case("padding", T=3, positions=(-1, 40, -1)),
    Case("one head of 64", K=1, H=64, positions=(77,)),
    Case("windows seen from their start", T=2, visible="start", positions=(5, 41)),
    Case("one cell a block", block=2, M=40, positions=(60,)),
    Case("three cells a block", block=6, M=13, positions=(77,)),
    Case("blocks of eight cells", block=16, M=5, positions=(77,)),
    Case("fewer blocks than cells fill", M=4, positions=(77,)),
    Case("more blocks than cells fill", M=25, positions=(77,)),
    Case("what is stale is not a number", stale=np.nan, counts=(20,), positions=(77,)),
    Case("bfloat16", dtype="bfloat16", H=32, positions=(77,)),
    Case("a chunk", B=2, T=21, C=150, M=40, H=32, counts=(150, 77)),
    Case("a chunk of the past", T=17, C=130, M=33, positions=tuple(range(240, 257))),
    Case("a chunk at the beginning", T=20, C=130, M=40, positions=tuple(range(20))),
    Case("a chunk that is padded", T=24, M=9, positions=(*range(50, 60), *(14 * [-1]))),
    Case("a chunk seen from the start", T=16, M=17, C=70, visible="start"),
    Case("a chunk with stale keys", T=16, stale=np.inf, counts=(9,), positions=(77,)),
    Case("a chunk in bfloat16", T=16, dtype="bfloat16", positions=(5, 77)),
    Case("a chunk of repeated queries", T=16, positions=(33,)),
]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def by_loops(forecast, pooled, positions, counts, rule):
    """Score every block cell by cell, as the rule reads."""
    forecast, pooled = (np.asarray(x.astype(jnp.float32), np.float64) for x in (forecast, pooled))
    positions, counts = np.asarray(positions), np.asarray(counts)
    per_block = rule["block_size"] // rule["pool_stride"]
    reach = rule["pool_size"] - 1 if rule["visible"] == "end" else 0
    out = np.full((*forecast.shape[:3], rule["num_blocks"]), LOWEST)
    for b, t, k in np.ndindex(*out.shape[:3]):
        held = min(int(counts[b]), pooled.shape[1])
        cells = pooled[b, :held, k] @ forecast[b, t, k]
        for m in range(rule["num_blocks"]):
            for c in range(max(per_block * m - 1, 0), per_block * (m + 1)):
                if c < held and c * rule["pool_stride"] + reach <= positions[b, t]:
                    out[b, t, k, m] = max(out[b, t, k, m], cells[c])
    return out


def assert_same_scores(got, want):
    """Hold described blocks to the f32 bound; the others are `LOWEST` in both."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    described = want > LOWEST / 10
    np.testing.assert_array_equal(got > LOWEST / 10, described)
    np.testing.assert_array_equal(got[~described], np.float32(LOWEST))
    assert_close_float32(got[described], want[described])


def interpreted(case):
    tiles = DECODE if case.T < 16 else PREFILL
    return jax.jit(lambda *x: triton.block_scores(*x, **case.rule, tiles=tiles, interpret=True))


@named
def test_the_reference_is_what_loops_compute(case):
    operands = case.operands()
    got = jax.jit(functools.partial(definition.block_scores, **case.rule))(*operands)
    assert_same_scores(got, by_loops(*operands, case.rule))


@named
def test_a_kernel_gives_what_the_reference_gives(case):
    operands = case.operands(seed=1)
    want = jax.jit(functools.partial(definition.block_scores, **case.rule))(*operands)
    assert_same_scores(interpreted(case)(*operands), want)


def test_both_kernels_score_alike():
    case = Case("", B=2, T=16, C=70, M=20)
    operands = case.operands()
    few = jax.jit(lambda *x: triton.block_scores(*x, **case.rule, tiles=DECODE, interpret=True))
    assert_same_scores(interpreted(case)(*operands), few(*operands))


@pytest.mark.parametrize("parity", [None, "reference"])
def test_the_reference_is_the_rule_of_the_library(parity):
    sparse = SparseConfig(
        block_size=8, pool_size=4, pool_stride=2, local_blocks=1, selected_blocks=4, dense_below=0
    )
    case = Case("", B=2, T=5, C=31, M=9, visible="end" if parity is None else "start")
    forecast, pooled, positions, _ = case.operands()
    lengths = jnp.array([64, 41], jnp.int32)
    counts = pooled_count(lengths, sparse)
    seen = (jnp.arange(31)[None] < counts[:, None])[:, None]
    if parity is None:
        seen &= visible_cells(positions, 31, sparse)
    else:
        seen &= (jnp.arange(31) * 2)[None, None] <= positions[:, :, None]
    cells = jnp.where(seen[:, :, None], score_cells(forecast, pooled)[:, :, :, 0], LOWEST)
    want = pool_scores(cells, 9, sparse.cells_per_block)
    got = definition.block_scores(forecast, pooled, positions, counts, **case.rule)
    np.testing.assert_array_equal(got, want)
    selector = ForecastSelector(tiny_config(sparse=sparse, kv_heads=2, head_dim=16), parity)
    summary = PooledSummary(pooled=pooled, tail=jnp.zeros((2, 4, 2, 16)))
    np.testing.assert_array_equal(
        selector.score_blocks(forecast, summary, positions, lengths, 9), want
    )


def test_a_future_block_scores_lowest():
    case = Case("", T=16, C=300, M=75, positions=tuple(range(100, 116)))
    scores = np.asarray(interpreted(case)(*case.operands()))
    own = np.arange(100, 116) // case.block
    for t, block in enumerate(own):
        assert np.all(scores[0, t, :, block + 1 :] == np.float32(LOWEST))
        assert np.all(scores[0, t, :, : block - 1] > LOWEST)


def test_without_a_gpu_the_reference_runs_and_is_traced_once():
    case = CASES[1]
    f = jax.jit(chex.assert_max_traces(n=1)(lambda *x: block_scores(*x, **case.rule)))
    for seed in range(2):
        operands = case.operands(seed)
        np.testing.assert_array_equal(f(*operands), definition.block_scores(*operands, **case.rule))


def test_nothing_is_pooled_yet():
    case = Case("", C=0, M=3, positions=(1,), counts=(0,))
    got = block_scores(*case.operands(), **case.rule)
    np.testing.assert_array_equal(got, np.full((1, 1, 2, 3), LOWEST, np.float32))


# --- lowering -----------------------------------------------------------------------------------


def shapes(batch, queries, kv_heads, dim, cells, dtype):
    return (
        jax.ShapeDtypeStruct((batch, queries, kv_heads, dim), dtype),
        jax.ShapeDtypeStruct((batch, cells, kv_heads, dim), dtype),
        jax.ShapeDtypeStruct((batch, queries), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )


LOWERED = [
    *itertools.product((1, 8192), (32, 64, 128), ("bfloat16", "float32")),
    (1, 256, "float16"),
    (131072, 128, "bfloat16"),
]


@pytest.mark.parametrize(("queries", "dim", "dtype"), LOWERED)
def test_the_default_tiles_lower_for_cuda(queries, dim, dtype):
    tiles = Tiles.default(queries=queries, head_dim=dim, cells_per_block=4, dtype=dtype)
    f = functools.partial(triton.block_scores, **MINICPM, visible="end", tiles=tiles)
    lowered = _compat.lowered(f, *shapes(4 if queries == 1 else 1, queries, 2, dim, 8191, dtype))
    assert "__gpu$xla.gpu.triton" in lowered.as_text()


@pytest.mark.parametrize("block_size", [16, 128])
def test_other_blocks_lower_for_cuda(block_size):
    rule = MINICPM | {"block_size": block_size, "visible": "start"}
    for queries in (1, 100):
        tiles = Tiles.default(
            queries=queries, head_dim=128, cells_per_block=block_size // 16, dtype=jnp.bfloat16
        )
        f = functools.partial(triton.block_scores, **rule, tiles=tiles)
        lowered = _compat.lowered(f, *shapes(2, queries, 3, 128, 501, "bfloat16"))
        assert "__gpu$xla.gpu.triton" in lowered.as_text()


def test_a_cache_past_four_gigabytes_lowers_for_cuda():
    f = functools.partial(triton.block_scores, **MINICPM, visible="end", tiles=DECODE)
    lowered = _compat.lowered(f, *shapes(130, 1, 2, 128, 65535, "bfloat16"))
    assert "__gpu$xla.gpu.triton" in lowered.as_text()


# --- what is refused ----------------------------------------------------------------------------


def call(**changes):
    fields = {
        "forecast": jnp.zeros((2, 3, 2, 16)),
        "pooled": jnp.zeros((2, 9, 2, 16)),
        "positions": jnp.zeros((2, 3), jnp.int32),
        "counts": jnp.zeros(2, jnp.int32),
        "num_blocks": 3,
        "pool_size": 4,
        "pool_stride": 2,
        "block_size": 8,
    }
    fields |= changes
    return block_scores(*[fields.pop(name) for name in tuple(fields)[:4]], **fields)


@pytest.mark.usefixtures("no_shape_hook")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooled": jnp.zeros((2, 9, 3, 16))}, "(2, 9, 3, 16) must equal forecast.shape=(2, 3, 2,"),
        ({"positions": jnp.zeros((2, 4), jnp.int32)}, "positions.shape=(2, 4) must equal [B T] of"),
        ({"counts": jnp.zeros(3, jnp.int32)}, "counts.shape=(3,) must equal [B] of forecast.shape"),
        ({"pooled": jnp.zeros((2, 9, 2, 16), jnp.bfloat16)}, "dtype(bfloat16) must equal forecast"),
        ({"num_blocks": 0}, "num_blocks=0, pool_size=4 and pool_stride=2 must be at least 1"),
        ({"pool_stride": 0}, "num_blocks=3, pool_size=4 and pool_stride=0 must be at least 1"),
        ({"block_size": 7}, "block_size=7 must be a multiple of pool_stride=2"),
        ({"block_size": 0}, "block_size=0 must be a multiple of pool_stride=2"),
        ({"visible": "middle"}, "visible='middle' must be 'end' or 'start'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_wrong_argument_is_refused_with_both_numbers(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**changes)


def test_no_query_is_refused():
    with pytest.raises(ValueError, match=r"forecast.shape=\(2, 0, 2, 16\) must have no axis of"):
        call(forecast=jnp.zeros((2, 0, 2, 16)), positions=jnp.zeros((2, 0), jnp.int32))


@pytest.mark.parametrize(
    ("dim", "dtype", "cells", "tiles", "reason"),
    [
        (128, "float8_e4m3fn", 4, DECODE, "takes bfloat16, float16 or float32, not float8_e4m3fn"),
        (
            96,
            "float32",
            4,
            DECODE,
            "needs a head dim that is a power of two from 16 to 256",
        ),
        (64, "float32", 17, DECODE, "takes at most 16 pooled keys a block, not 17"),
        (
            128,
            "float32",
            8,
            Tiles(tile_q=64, tile_m=64),
            f"holds about {64 * 512 + 18 * 64 * 512 + 64 * 64 * 4} bytes in shared memory, at most",
        ),
        (128, "float32", 4, DECODE, None),
    ],
)
def test_the_kernels_say_what_they_cannot_take(dim, dtype, cells, tiles, reason):
    said = triton.shape_reason(jax.ShapeDtypeStruct((1, 1, 1, dim), dtype), cells, tiles)
    assert said is None if reason is None else reason in str(said)


def test_a_kernel_asked_for_by_name_is_never_replaced():
    with pytest.raises(NotImplementedError, match="implementation='triton' needs an NVIDIA GPU"):
        call(implementation="triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_q": 3}, "self.tile_q=3 must be a power of two"),
        ({"tile_m": 0}, "self.tile_m=0 must be a power of two, at least 1"),
        ({"num_warps": 6}, "self.num_warps=6 must be a power of two"),
        ({"tile_q": 8}, "self.tile_q=8 and self.tile_m=16 must be at least 16 if tile_q > 1"),
        ({"span": 0}, "self.span=0 and self.num_stages=2 must be at least 1"),
    ],
)
def test_tiles_are_checked(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Tiles(**({"tile_q": 1, "tile_m": 16} | changes))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("cells", [1, 4, 8, 16])
@pytest.mark.parametrize("dim", [16, 128, 256])
def test_default_tiles_fit(dim, cells, dtype):
    tiles = Tiles.default(queries=100, head_dim=dim, cells_per_block=cells, dtype=dtype)
    assert tiles.shared_bytes(dim, cells, jnp.dtype(dtype).itemsize) <= SHARED_BYTES


def test_work_is_counted():
    sizes = {"cells": 10, "kv_heads": 2, "head_dim": 4, "num_blocks": 3, "itemsize": 2}
    decode = work(batch=5, queries=1, **sizes)
    assert decode.bytes == 5 * 10 * 2 * 4 * 2 + 5 * 2 * 4 * 2 + 5 * 2 * 3 * 4
    assert decode.flops == 2 * 5 * 10 * 2 * 4
    assert decode.ceiling == "copy"
    prefill = work(batch=1, queries=16, **sizes, pairs=77)
    assert (prefill.flops, prefill.ceiling) == (2 * 77 * 2 * 4, "matmul")


# --- on a GPU -----------------------------------------------------------------------------------


def on_gpu(batch, queries, dtype="bfloat16", dim=128, blocks=2048, tiles=None, **rule):
    """Run the kernel twice at the end of ragged sequences and hold it to the reference."""
    chex.clear_trace_counter()  # a test may come here twice, and chex counts by source text
    rule = MINICPM | {"num_blocks": blocks} | rule
    per_block = rule["block_size"] // 16
    cells = blocks * per_block - 1
    keys = jax.random.split(jax.random.key(0), 2)
    forecast = jax.random.normal(keys[0], (batch, queries, 2, dim), dtype)
    pooled = jax.random.normal(keys[1], (batch, cells, 2, dim), dtype)
    tokens = blocks * rule["block_size"]
    lengths = np.resize((tokens, tokens // 3, 100), batch)
    positions = np.maximum(lengths[:, None] - queries + np.arange(queries)[None], -1)
    counts = jnp.asarray((lengths - 32) // 16 + 1, jnp.int32)
    pooled = jnp.where(
        jnp.arange(cells)[None, :, None, None] < counts[:, None, None, None], pooled, jnp.nan
    ).astype(dtype)
    operands = (forecast, pooled, jnp.asarray(positions, jnp.int32), counts)
    call = functools.partial(block_scores, **rule, implementation="triton", tiles=tiles)
    f = jax.jit(chex.assert_max_traces(n=1)(lambda *x: call(*x)))
    got, again = f(*operands), f(*operands)
    np.testing.assert_array_equal(got, again)
    wide = (forecast.astype(jnp.float32), pooled.astype(jnp.float32), *operands[2:])
    with jax.default_matmul_precision("highest"):
        want = jax.jit(functools.partial(definition.block_scores, **rule))(*wide)
    assert_same_scores(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu_a_decode_step_at_128k_scores_as_the_reference(dtype):
    on_gpu(4, 1, dtype)


@pytest.mark.gpu
def test_on_a_gpu_a_few_queries_score_as_the_reference():
    on_gpu(3, 5, dim=64, blocks=333)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 128])
def test_on_a_gpu_other_blocks_score_as_the_reference(block_size):
    on_gpu(3, 1, blocks=500, block_size=block_size)
    on_gpu(1, 64, blocks=500, block_size=block_size)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu_a_chunk_at_128k_scores_as_the_reference(dtype):
    on_gpu(1, 1024, dtype)


@pytest.mark.gpu
def test_on_a_gpu_a_ragged_chunk_of_odd_length_scores_as_the_reference():
    on_gpu(3, 333, dim=32, blocks=517)


@pytest.mark.gpu
def test_on_a_gpu_windows_are_seen_from_their_start():
    on_gpu(1, 200, blocks=200, visible="start")


@pytest.mark.gpu
def test_on_a_gpu_a_wide_tile_scores_as_the_reference():
    on_gpu(1, 512, tiles=Tiles(tile_q=128, tile_m=64, span=8, num_warps=8, num_stages=2))


@pytest.mark.gpu
def test_on_a_gpu_rows_past_four_gigabytes_are_found():
    cells, last = 8_400_000, 4096  # 4.3 GB of pooled keys
    tail = jax.random.normal(jax.random.key(1), (2, last, 1, 128), jnp.bfloat16)
    pooled = jnp.zeros((2, cells, 1, 128), jnp.bfloat16).at[:, -last:].set(tail)
    forecast = jax.random.normal(jax.random.key(2), (2, 1, 1, 128), jnp.bfloat16)
    counts = jnp.full((2,), cells, jnp.int32)
    positions = jnp.full((2, 1), cells * 16 + 16, jnp.int32)
    rule = MINICPM | {"num_blocks": cells // 4}
    call = functools.partial(block_scores, **rule, implementation="triton")
    got = jax.jit(call)(forecast, pooled, positions, counts)
    scores = jnp.einsum("btkh,bckh->btkc", forecast.astype(jnp.float32), tail.astype(jnp.float32))
    want = pool_scores(scores, last // 4, 4)
    assert_close_float32(got[..., 1 - last // 4 :], want[..., 1:])
    assert np.all(np.asarray(got[..., : -last // 4 - 1]) == 0.0)
