# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Block scores by queries: reference against loops, kernels against reference, lowering."""

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
from pallas_kernels.query_scores import Tiles, query_scores, triton
from pallas_kernels.query_scores import reference as definition
from pallas_kernels.query_scores.config import SHARED_BYTES, work
from sparda_jax.config import SparseConfig
from sparda_jax.pooling import LOWEST, PooledSummary, pool_scores, pooled_count
from sparda_jax.selectors.query import QuerySelector, score_by_queries, visible_cells
from sparda_jax.testing import assert_close_float32, tiny_config

DECODE = Tiles(tile_q=1, tile_c=16, tile_m=16, span=2)
MINICPM = {"num_blocks": 2048, "pool_size": 32, "pool_stride": 16, "block_size": 64}


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and a grid; `positions` and `counts` may be fixed."""

    name: str
    B: int = 1
    T: int = 1
    K: int = 2
    G: int = 2
    H: int = 16
    C: int = 37
    M: int = 10
    size: int = 4
    stride: int = 2
    block: int = 8
    dtype: str = "float32"
    positions: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    stale: float = 0.0
    loud: float = 1.0
    scale: float = 0.25

    @property
    def rule(self):
        return {
            "num_blocks": self.M,
            "pool_size": self.size,
            "pool_stride": self.stride,
            "block_size": self.block,
            "scale": self.scale,
        }

    def operands(self, seed=0):
        rng = np.random.default_rng(seed)
        q = rng.standard_normal((self.B, self.T, self.K * self.G, self.H)) * self.loud
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
            jnp.asarray(q, self.dtype),
            jnp.asarray(pooled, self.dtype),
            jnp.asarray(positions, jnp.int32),
            jnp.asarray(counts, jnp.int32),
        )


CASES = [
    Case("one query", positions=(70,)),
    Case("a group of sixteen", G=16, K=1, positions=(77,)),
    Case("a group of one", G=1, positions=(77,)),
    Case("a group of three", G=3, positions=(77,)),
    Case("ragged with an empty cache", B=3, counts=(37, 0, 18), positions=(77, 3, 60)),
    Case("some queries and padding", T=3, positions=(-1, 40, 3)),
    Case("one cell a block", block=2, M=40, positions=(60,)),
    Case("three cells a block", block=6, M=13, positions=(77,)),
    Case("fewer blocks than cells fill", M=4, positions=(77,)),
    Case("more blocks than cells fill", M=25, positions=(77,)),
    Case("what is stale is not a number", stale=np.nan, counts=(20,), positions=(77,)),
    Case("one head takes it all", loud=100.0, positions=(77,)),
    Case("another scale", scale=1.7, positions=(77,)),
    Case("bfloat16", dtype="bfloat16", H=32, G=4, positions=(77,)),
    Case("a chunk", B=2, T=21, C=150, M=40, H=32, counts=(150, 77)),
    Case("a chunk of a group of sixteen", T=17, K=1, G=16, C=70, M=18),
    Case("a chunk of a group of three", T=16, K=1, G=3, C=70, M=18),
    Case("a chunk of a group of one", T=16, G=1, C=70, M=18),
    Case("a chunk at the beginning", T=20, C=130, M=40, positions=tuple(range(20))),
    Case("a chunk that is padded", T=24, M=9, positions=(*range(50, 60), *(14 * [-1]))),
    Case("a chunk with stale keys", T=16, stale=np.nan, counts=(9,), positions=(77,)),
    Case("a loud chunk", T=16, loud=100.0, positions=(5, 77)),
    Case("a chunk in bfloat16", T=16, dtype="bfloat16", positions=(5, 77)),
]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def by_loops(q, pooled, positions, counts, rule):
    """Score every block head by head and cell by cell, as the rule reads."""
    q, pooled = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, pooled))
    positions, counts = np.asarray(positions), np.asarray(counts)
    batch, queries, heads, _ = q.shape
    kv_heads = pooled.shape[2]
    per_block = rule["block_size"] // rule["pool_stride"]
    out = np.full((batch, queries, kv_heads, rule["num_blocks"]), LOWEST)
    for b, t, k in np.ndindex(*out.shape[:3]):
        held = min(int(counts[b]), pooled.shape[1])
        past = int(positions[b, t]) - rule["pool_size"] + 1
        seen = min(past // rule["pool_stride"] + 1, held) if past >= 0 else 0
        if seen == 0:
            continue
        probs = np.zeros(seen)
        for n in range(k * heads // kv_heads, (k + 1) * heads // kv_heads):
            logits = pooled[b, :seen, k] @ q[b, t, n] * rule["scale"]
            mass = np.exp(logits - logits.max())
            probs += mass / mass.sum()
        for m in range(rule["num_blocks"]):
            cells = probs[max(per_block * m - 1, 0) : per_block * (m + 1)]
            if cells.size:
                out[b, t, k, m] = cells.max()
    return out


def assert_same_scores(got, want):
    """Hold described blocks to the f32 bound; the others are `LOWEST` in both."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    described = want > LOWEST / 10
    np.testing.assert_array_equal(got > LOWEST / 10, described)
    np.testing.assert_array_equal(got[~described], np.float32(LOWEST))
    assert_close_float32(got[described], want[described])


def reference(case):
    return jax.jit(functools.partial(definition.query_scores, **case.rule))


def interpreted(case, tiles=None):
    if tiles is None:
        rows = max(2, 16 // case.G)
        prefill = Tiles(tile_q=1 << (rows - 1).bit_length(), tile_c=16, tile_m=16)
        tiles = DECODE if case.T < 16 else prefill
    return jax.jit(lambda *x: triton.query_scores(*x, **case.rule, tiles=tiles, interpret=True))


@named
def test_the_reference_is_what_loops_compute(case):
    operands = case.operands()
    assert_same_scores(reference(case)(*operands), by_loops(*operands, case.rule))


@named
def test_a_kernel_gives_what_the_reference_gives(case):
    operands = case.operands(seed=1)
    assert_same_scores(interpreted(case)(*operands), reference(case)(*operands))


@pytest.mark.parametrize("span", [1, 3, 9])
def test_shares_of_any_length_are_joined(span):
    case = Case("", B=2, C=70, M=19, counts=(70, 31), positions=(143, 143))
    tiles = Tiles(tile_q=1, tile_c=16, tile_m=16, span=span)
    operands = case.operands()
    assert_same_scores(interpreted(case, tiles)(*operands), reference(case)(*operands))


def test_both_kernels_score_alike():
    case = Case("", B=2, T=16, C=70, M=20)
    operands = case.operands()
    assert_same_scores(interpreted(case)(*operands), interpreted(case, DECODE)(*operands))


def test_the_reference_is_the_rule_of_the_library():
    sparse = SparseConfig(
        block_size=8, pool_size=4, pool_stride=2, local_blocks=1, selected_blocks=4, dense_below=0
    )
    case = Case("", B=2, T=5, C=31, M=9)
    q, pooled, positions, _ = case.operands()
    lengths = jnp.array([64, 41], jnp.int32)
    counts = pooled_count(lengths, sparse)
    seen = visible_cells(positions, 31, sparse) & (jnp.arange(31)[None] < counts[:, None])[:, None]
    cells = jnp.where(seen[:, :, None], score_by_queries(q, pooled, seen), LOWEST)
    want = pool_scores(cells, 9, sparse.cells_per_block)
    got = definition.query_scores(q, pooled, positions, counts, **case.rule)
    np.testing.assert_array_equal(got, want)
    selector = QuerySelector(tiny_config(sparse=sparse, heads=4, kv_heads=2, head_dim=16))
    summary = PooledSummary(pooled=pooled, tail=jnp.zeros((2, 4, 2, 16)))
    np.testing.assert_array_equal(selector.score_blocks(q, summary, positions, lengths, 9), want)


def test_the_scale_is_the_root_of_the_head_dim_unless_given():
    case = Case("", H=64, T=2, positions=(50, 77))
    rule = {name: size for name, size in case.rule.items() if name != "scale"}
    got = query_scores(*case.operands(), **rule)
    want = query_scores(*case.operands(), **rule, scale=0.125)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("queries", [1, 16])
def test_the_probabilities_of_a_group_sum_to_its_heads(queries):
    case = Case("", T=queries, G=3, C=40, M=40, block=2, size=2, positions=(79,))
    # Windows side by side and one cell a block: a score is the greater of two neighbours.
    scores = np.asarray(interpreted(case)(*case.operands()), np.float64)
    q, pooled, positions, counts = case.operands()
    first = by_loops(q, pooled, positions, counts, case.rule)
    np.testing.assert_allclose(scores.sum(-1), first.sum(-1), rtol=1e-6)
    assert scores.max() <= 3.0 + 1e-6
    alone = interpreted(dataclasses.replace(case, M=1))(q, pooled, positions, jnp.array([1]))
    np.testing.assert_allclose(alone, 3.0, rtol=1e-6)


def test_a_future_block_scores_lowest():
    case = Case("", T=16, C=300, M=75, positions=tuple(range(100, 116)))
    scores = np.asarray(interpreted(case)(*case.operands()))
    for t, block in enumerate(np.arange(100, 116) // case.block):
        assert np.all(scores[0, t, :, block + 1 :] == np.float32(LOWEST))
        assert np.all(scores[0, t, :, : block - 1] >= 0.0)


def test_without_a_gpu_the_reference_runs_and_is_traced_once():
    case = CASES[4]
    f = jax.jit(chex.assert_max_traces(n=1)(lambda *x: query_scores(*x, **case.rule)))
    for seed in range(2):
        operands = case.operands(seed)
        np.testing.assert_array_equal(f(*operands), reference(case)(*operands))


def test_nothing_is_pooled_yet():
    case = Case("", C=0, M=3, positions=(1,), counts=(0,))
    got = query_scores(*case.operands(), **case.rule)
    np.testing.assert_array_equal(got, np.full((1, 1, 2, 3), LOWEST, np.float32))


# --- lowering -----------------------------------------------------------------------------------


def shapes(batch, queries, group, dim, cells, dtype, kv_heads=2):
    return (
        jax.ShapeDtypeStruct((batch, queries, kv_heads * group, dim), dtype),
        jax.ShapeDtypeStruct((batch, cells, kv_heads, dim), dtype),
        jax.ShapeDtypeStruct((batch, queries), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )


def default_tiles(q, pooled, cells_per_block=4):
    return Tiles.default(
        batch=q.shape[0],
        queries=q.shape[1],
        cells=pooled.shape[1],
        kv_heads=pooled.shape[2],
        group=q.shape[2] // pooled.shape[2],
        head_dim=q.shape[3],
        cells_per_block=cells_per_block,
        dtype=q.dtype,
    )


LOWERED = [
    *itertools.product((1, 8192), (1, 16), (32, 64, 128), ("bfloat16",)),
    *itertools.product((1, 8192), (4,), (128,), ("bfloat16", "float32")),
    (1, 16, 128, "float32"),
    (8192, 16, 128, "float32"),
    (1, 3, 256, "float16"),
]


@pytest.mark.parametrize(("queries", "group", "dim", "dtype"), LOWERED)
def test_the_default_tiles_lower_for_cuda(queries, group, dim, dtype):
    operands = shapes(4 if queries == 1 else 1, queries, group, dim, 8191, dtype)
    rule = MINICPM | {"scale": 0.1, "tiles": default_tiles(*operands[:2])}
    lowered = _compat.lowered(functools.partial(triton.query_scores, **rule), *operands)
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == (2 if queries == 1 else 1)


@pytest.mark.parametrize("block_size", [16, 128])
def test_other_blocks_lower_for_cuda(block_size):
    for queries in (1, 100):
        operands = shapes(2, queries, 6, 128, 501, "bfloat16", kv_heads=3)
        tiles = default_tiles(*operands[:2], cells_per_block=block_size // 16)
        rule = MINICPM | {"block_size": block_size, "scale": 0.1, "tiles": tiles}
        lowered = _compat.lowered(functools.partial(triton.query_scores, **rule), *operands)
        assert "__gpu$xla.gpu.triton" in lowered.as_text()


# --- what is refused ----------------------------------------------------------------------------


def call(**changes):
    fields = {
        "q": jnp.zeros((2, 3, 4, 16)),
        "pooled": jnp.zeros((2, 9, 2, 16)),
        "positions": jnp.zeros((2, 3), jnp.int32),
        "counts": jnp.zeros(2, jnp.int32),
        "num_blocks": 3,
        "pool_size": 4,
        "pool_stride": 2,
        "block_size": 8,
    }
    fields |= changes
    return query_scores(*[fields.pop(name) for name in tuple(fields)[:4]], **fields)


@pytest.mark.usefixtures("no_shape_hook")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooled": jnp.zeros((3, 9, 2, 16))}, "(3, 9, 2, 16) must equal q.shape=(2, 3, 4, 16) in"),
        (
            {"pooled": jnp.zeros((2, 9, 3, 16))},
            "N of q.shape=(2, 3, 4, 16) must be a multiple of",
        ),
        ({"positions": jnp.zeros((2, 4), jnp.int32)}, "positions.shape=(2, 4) must equal [B T] of"),
        ({"counts": jnp.zeros(3, jnp.int32)}, "counts.shape=(3,) must equal [B] of q.shape=(2, 3,"),
        ({"pooled": jnp.zeros((2, 9, 2, 16), jnp.bfloat16)}, "dtype(bfloat16) must equal q.dtype="),
        ({"q": jnp.zeros((2, 0, 4, 16))}, "q.shape=(2, 0, 4, 16) must have no axis of length 0"),
        ({"num_blocks": 0}, "num_blocks=0, pool_size=4 and pool_stride=2 must be at least 1"),
        ({"pool_size": 0}, "num_blocks=3, pool_size=0 and pool_stride=2 must be at least 1"),
        ({"block_size": 7}, "block_size=7 must be a multiple of pool_stride=2"),
        ({"block_size": 0}, "block_size=0 must be a multiple of pool_stride=2"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_wrong_argument_is_refused_with_both_numbers(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**changes)


@pytest.mark.parametrize(
    ("group", "dim", "dtype", "cells", "tiles", "reason"),
    [
        (2, 128, "float8_e4m3fn", 4, DECODE, "takes bfloat16, float16 or float32, not float8_e4m3"),
        (2, 96, "float32", 4, DECODE, "needs a head dim that is a power of two from 16 to 256"),
        (65, 64, "float32", 4, DECODE, "takes at most 64 query heads a KV head, not 65"),
        (2, 64, "float32", 17, DECODE, "takes at most 16 pooled keys a block, not 17"),
        (3, 64, "float32", 4, Tiles(tile_q=2), "tiles.tile_q=2 and G = 3 make 8"),
        (16, 64, "float32", 4, DECODE, "joins 3125 shares of 16 heads, at most 16384"),
        (16, 256, "float32", 4, Tiles(tile_q=8), "bytes in shared memory, at most"),
        (16, 128, "float32", 4, Tiles(tile_q=4, tile_m=16), None),
    ],
)
def test_the_kernels_say_what_they_cannot_take(group, dim, dtype, cells, tiles, reason):
    q = jax.ShapeDtypeStruct((1, 1, 2 * group, dim), dtype)
    pooled = jax.ShapeDtypeStruct((1, 100_000, 2, dim), dtype)
    said = triton.shape_reason(q, pooled, cells, tiles)
    assert said is None if reason is None else reason in str(said)


def test_a_kernel_asked_for_by_name_is_never_replaced():
    with pytest.raises(NotImplementedError, match="implementation='triton' needs an NVIDIA GPU"):
        call(implementation="triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_q": 3}, "self.tile_q=3 must be a power of two"),
        ({"tile_c": 0}, "self.tile_c=0 must be a power of two, at least 1"),
        ({"tile_m": 8}, "self.tile_c=64 and self.tile_m=8 must be at least 16"),
        ({"num_warps": 6}, "self.num_warps=6 must be a power of two"),
        ({"span": 0}, "self.span=0 and self.num_stages=2 must be at least 1"),
    ],
)
def test_tiles_are_checked(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Tiles(**({"tile_q": 1} | changes))


@pytest.mark.parametrize("queries", [1, 100])
@pytest.mark.parametrize("group", [1, 3, 16, 64])
@pytest.mark.parametrize("dim", [16, 128, 256])
def test_default_tiles_are_taken(queries, group, dim):
    for dtype, cells_per_block in itertools.product(("bfloat16", "float32"), (1, 4, 16)):
        q = jax.ShapeDtypeStruct((1, queries, group, dim), dtype)
        pooled = jax.ShapeDtypeStruct((1, 65_535, 1, dim), dtype)
        tiles = default_tiles(q, pooled, cells_per_block)
        held = tiles.shared_bytes(group, dim, cells_per_block, q.dtype.itemsize)
        assert held <= SHARED_BYTES
        reason = triton.shape_reason(q, pooled, cells_per_block, tiles)
        assert reason is None or "joins" in reason


def test_work_is_counted():
    sizes = {"cells": 10, "heads": 6, "kv_heads": 2, "head_dim": 4, "num_blocks": 3, "itemsize": 2}
    decode = work(batch=5, queries=1, **sizes)
    assert decode.bytes == 2 * 5 * 10 * 2 * 4 * 2 + 5 * 6 * 4 * 2 + 5 * 2 * 3 * 4
    assert decode.flops == 4 * 5 * 10 * 6 * 4
    assert decode.ceiling == "copy"
    prefill = work(batch=1, queries=16, **sizes, pairs=77)
    assert (prefill.flops, prefill.ceiling) == (4 * 77 * 6 * 4, "matmul")


# --- on a GPU -----------------------------------------------------------------------------------


def on_gpu(batch, queries, dtype="bfloat16", group=16, dim=128, blocks=2048, tiles=None, **rule):
    """Run the kernels twice at the end of ragged sequences and hold them to the reference."""
    chex.clear_trace_counter()  # a test may come here twice, and chex counts by source text
    rule = MINICPM | {"num_blocks": blocks, "scale": dim**-0.5} | rule
    cells = blocks * (rule["block_size"] // 16) - 1
    keys = jax.random.split(jax.random.key(0), 2)
    q = jax.random.normal(keys[0], (batch, queries, 2 * group, dim), dtype)
    pooled = jax.random.normal(keys[1], (batch, cells, 2, dim), dtype)
    tokens = blocks * rule["block_size"]
    lengths = np.resize((tokens, tokens // 3, 100), batch)
    positions = np.maximum(lengths[:, None] - queries + np.arange(queries)[None], -1)
    counts = jnp.asarray((lengths - 32) // 16 + 1, jnp.int32)
    pooled = jnp.where(
        jnp.arange(cells)[None, :, None, None] < counts[:, None, None, None], pooled, jnp.nan
    ).astype(dtype)
    operands = (q, pooled, jnp.asarray(positions, jnp.int32), counts)
    call = functools.partial(query_scores, **rule, implementation="triton", tiles=tiles)
    f = jax.jit(chex.assert_max_traces(n=1)(lambda *x: call(*x)))
    got, again = f(*operands), f(*operands)
    np.testing.assert_array_equal(got, again)
    wide = (q.astype(jnp.float32), pooled.astype(jnp.float32), *operands[2:])
    with jax.default_matmul_precision("highest"):
        want = jax.jit(functools.partial(definition.query_scores, **rule))(*wide)
    assert_same_scores(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu_a_decode_step_at_128k_scores_as_the_reference(dtype):
    on_gpu(4, 1, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 3])
def test_on_a_gpu_other_groups_score_as_the_reference(group):
    on_gpu(3, 2, group=group, dim=64, blocks=333)
    on_gpu(1, 50, group=group, dim=64, blocks=333)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 128])
def test_on_a_gpu_other_blocks_score_as_the_reference(block_size):
    on_gpu(3, 1, blocks=500, block_size=block_size)
    on_gpu(1, 64, blocks=500, block_size=block_size)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu_a_chunk_at_128k_scores_as_the_reference(dtype):
    on_gpu(1, 128, dtype)


@pytest.mark.gpu
def test_on_a_gpu_a_ragged_chunk_of_odd_length_scores_as_the_reference():
    on_gpu(3, 133, group=4, dim=32, blocks=517)


@pytest.mark.gpu
def test_on_a_gpu_a_wide_tile_scores_as_the_reference():
    on_gpu(1, 100, tiles=Tiles(tile_q=8, num_warps=8), blocks=512)
