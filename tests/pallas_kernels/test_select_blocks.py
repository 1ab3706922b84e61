# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The choice of blocks: reference against loops, kernel against reference, lowering, errors."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _compat
from pallas_kernels.select_blocks import Tiles, select_blocks, triton
from pallas_kernels.select_blocks import api as door
from pallas_kernels.select_blocks import reference as definition
from pallas_kernels.select_blocks.config import MAX_BLOCKS, padded_blocks, work
from sparda_jax import selection
from sparda_jax.config import SparseConfig

LOWEST = -1e30
MINICPM = {"block_size": 64, "sink_blocks": 1, "local_blocks": 32, "selected_blocks": 96}


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and a rule; blocks have 4 tokens."""

    name: str
    B: int = 1
    T: int = 3
    K: int = 2
    M: int = 37
    sink: int = 1
    local: int = 2
    selected: int = 9
    width: int | None = None
    levels: int = 0
    dtype: str = "float32"
    kind: str = "normal"

    @property
    def rule(self):
        return {
            "block_size": 4,
            "sink_blocks": self.sink,
            "local_blocks": self.local,
            "selected_blocks": min(self.selected, self.M),
            "width": min(self.selected, self.M) if self.width is None else self.width,
        }

    def operands(self, seed=0):
        rng = np.random.default_rng(seed)
        scores = rng.standard_normal((self.B, self.T, self.K, self.M)).astype(np.float32)
        if self.levels:
            scores = np.round(scores * self.levels) / self.levels
        if self.kind == "unscored":
            scores[rng.random(scores.shape) < 0.8] = LOWEST
        if self.kind == "equal":
            scores[:] = -3.0
        if self.kind == "infinite":
            scores[rng.random(scores.shape) < 0.6] = -np.inf
            scores[rng.random(scores.shape) < 0.1] = np.inf
        if self.kind == "zeros":
            scores = np.where(scores > 0, 0.0, -0.0).astype(np.float32)
        positions = rng.integers(0, self.M * 4, (self.B, self.T)).astype(np.int32)
        positions[0, -1] = self.M * 4 - 1
        if self.T > 2:
            positions[0, :2] = -1, 5
        attend_all = None
        if self.width is not None:
            attend_all = jnp.asarray(rng.random(self.B) < 0.5).at[0].set(True)
        return jnp.asarray(scores, self.dtype), jnp.asarray(positions), attend_all


CASES = [
    Case("odd blocks", B=2),
    Case("one query", T=1, K=1, M=64),
    Case("ties", levels=1),
    Case("every score equal", kind="equal", selected=4),
    Case("most blocks unscored", kind="unscored"),
    Case("infinite scores", kind="infinite"),
    Case("both zeros", kind="zeros"),
    Case("fewer blocks than are selected", M=5, selected=9),
    Case("nothing pinned but the own block", sink=0, local=0, selected=1),
    Case("only pinned blocks", selected=4),
    Case("wide where all is attended", B=3, width=20),
    Case("a row of several vectors", M=300, selected=40, levels=4),
    Case("bfloat16", dtype="bfloat16", M=64),
]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def by_loops(scores, positions, attend_all, *, block_size, sink_blocks, local_blocks, **counts):
    """Choose for every row as the rule reads, with ties to the lower id and −0 below 0."""
    scores = np.asarray(scores.astype(jnp.float32))
    _, _, heads, num_blocks = scores.shape
    ids = np.full((*scores.shape[:3], counts["width"]), -1, np.int32)
    words = np.zeros((*scores.shape[:3], -(-num_blocks // 32)), np.uint32)
    for b, t in np.ndindex(*positions.shape):
        if positions[b, t] < 0:
            continue
        own = int(positions[b, t]) // block_size
        everything = attend_all is not None and attend_all[b]
        need = counts["width"] if everything else counts["selected_blocks"]
        for head in range(heads):
            row = scores[b, t, head]
            visible = range(min(own + 1, num_blocks))
            pinned = [m for m in visible if m < sink_blocks or m >= own - local_blocks]
            rest = [m for m in visible if m not in pinned and row[m] > -np.inf]
            rest.sort(key=lambda m, row=row: (-row[m], row[m] == 0 and np.signbit(row[m]), m))
            # A score of +inf is as good as pinned, so the lower ids of both go first.
            first = [m for m in visible if m in pinned or row[m] == np.inf]
            chosen = sorted((first + [m for m in rest if m not in first])[:need])
            ids[b, t, head, : len(chosen)] = chosen
            for m in chosen:
                words[b, t, head, m // 32] |= np.uint32(1 << (m % 32))
    return ids, words


def assert_same(got, want):
    for field in ("ids", "count", "mask"):
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field), err_msg=field)


@named
def test_the_reference_is_the_choice_made_by_loops(case):
    operands = case.operands()
    got = jax.jit(functools.partial(definition.select_blocks, **case.rule))(*operands)
    ids, words = by_loops(*operands, **case.rule)
    np.testing.assert_array_equal(got.ids, ids)
    np.testing.assert_array_equal(got.count, (ids >= 0).sum(-1))
    np.testing.assert_array_equal(got.mask, words)


@named
def test_the_kernel_makes_the_choice_of_the_reference(case):
    operands = case.operands(seed=1)
    kernel = jax.jit(lambda *x: triton.select_blocks(*x, **case.rule, interpret=True))
    want = jax.jit(functools.partial(definition.select_blocks, **case.rule))(*operands)
    assert_same(kernel(*operands), want)


@named
def test_the_reference_is_the_choice_of_the_library(case):
    scores, positions, attend_all = case.operands(seed=2)
    rule = dict(case.rule)
    width = rule.pop("width")
    rule["selected_blocks"] = max(case.selected, case.sink + case.local + 1)
    sparse = SparseConfig(**rule, pool_size=2, pool_stride=1, dense_below=0)
    want = selection.select_blocks(scores, positions, sparse, attend_all=attend_all, width=width)
    got = select_blocks(
        scores, positions, **rule, attend_all=attend_all, width=width, implementation="reference"
    )
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.count, want.count)
    mask = np.asarray(selection.block_mask(want.ids, case.M))
    bits = np.asarray(got.mask)[..., :, None] >> np.arange(32, dtype=np.uint32) & 1
    bits = bits.reshape(*bits.shape[:3], -1)
    np.testing.assert_array_equal(bits[..., : case.M], mask)
    assert not bits[..., case.M :].any()


def test_a_threshold_in_any_bit_is_found():
    # The J-th greatest of neighbouring floats differs from the next in the last bit only.
    start = np.array([1.0, -1.0, 1e-40, -1e-40, 3e38, -3e38], np.float32)
    bits = start.view(np.int32)[:, None] + np.arange(40, dtype=np.int32)
    scores = np.random.default_rng(3).permuted(bits, axis=1).view(np.float32)
    scores = jnp.asarray(scores).reshape(1, 6, 1, 40)
    rule = Case("", M=40, sink=0, local=0, selected=17).rule
    positions = jnp.full((1, 6), 159, jnp.int32)
    kernel = jax.jit(lambda *x: triton.select_blocks(*x, None, **rule, interpret=True))
    ids, _ = by_loops(scores, positions, None, **rule)
    np.testing.assert_array_equal(kernel(scores, positions).ids, ids)


def test_a_position_past_the_last_block_sees_every_block():
    case = Case("", T=1, M=20)
    scores, _, _ = case.operands()
    positions = jnp.full((1, 1), 1000, jnp.int32)
    kernel = jax.jit(lambda *x: triton.select_blocks(*x, None, **case.rule, interpret=True))
    assert_same(
        kernel(scores, positions), definition.select_blocks(scores, positions, None, **case.rule)
    )


def test_without_a_gpu_the_reference_runs_and_is_traced_once():
    case = CASES[0]
    rule = {key: value for key, value in case.rule.items() if key != "width"}
    f = jax.jit(chex.assert_max_traces(n=1)(lambda s, p: select_blocks(s, p, **rule)))
    for seed in range(2):
        scores, positions, _ = case.operands(seed)
        want = definition.select_blocks(scores, positions, None, **case.rule)
        assert_same(f(scores, positions), want)


LOWERED = [
    ((4, 1, 2, 2048), "float32"),
    ((64, 1, 2, 2048), "bfloat16"),
    ((1, 131072, 2, 2048), "float32"),
    ((1, 8, 2, 16384), "float32"),
    ((2, 1, 1, 513), "float32"),
    ((1, 1, 1, MAX_BLOCKS), "float16"),
]


@pytest.mark.parametrize(("shape", "dtype"), LOWERED, ids=str)
def test_the_kernel_lowers_for_cuda(shape, dtype):
    scores = jax.ShapeDtypeStruct(shape, dtype)
    positions = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    lowered = _compat.lowered(
        lambda s, p: triton.select_blocks(s, p, None, **MINICPM, width=96), scores, positions
    )
    assert "__gpu$xla.gpu.triton" in lowered.as_text()


def test_the_kernel_lowers_for_cuda_where_some_attend_to_all():
    shapes = [
        jax.ShapeDtypeStruct((4, 1, 2, 2048), jnp.float32),
        jax.ShapeDtypeStruct((4, 1), jnp.int32),
        jax.ShapeDtypeStruct((4,), bool),
    ]
    lowered = _compat.lowered(lambda *x: triton.select_blocks(*x, **MINICPM, width=128), *shapes)
    assert "__gpu$xla.gpu.triton" in lowered.as_text()


def call(scores_shape=(2, 3, 1, 20), positions_shape=(2, 3), **changes):
    rule = {"block_size": 4, "sink_blocks": 1, "local_blocks": 2, "selected_blocks": 9} | changes
    return select_blocks(jnp.zeros(scores_shape), jnp.zeros(positions_shape, jnp.int32), **rule)


@pytest.mark.usefixtures("no_shape_hook")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions_shape": (2, 4)}, r"positions.shape=(2, 4) must equal [B T] of scores.shape="),
        ({"attend_all": jnp.zeros(3, bool)}, "attend_all.shape=(3,) must equal [B] of"),
        ({"scores_shape": (2, 3, 0, 20)}, "scores.shape=(2, 3, 0, 20) must have no axis of"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"sink_blocks": -1}, "sink_blocks=-1 and local_blocks=2 must be at least 0"),
        ({"selected_blocks": 3}, "selected_blocks=3 must be at least sink_blocks + local_blocks"),
        ({"width": 8}, "width=8 must be at least min(selected_blocks, M) = 9 and at most M = 20"),
        ({"width": 21}, "width=21 must be at least min(selected_blocks, M) = 9 and at most"),
    ],
)
def test_a_wrong_argument_is_refused_with_both_numbers(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (((1, 1, 1, 8), "float64"), "takes scores in float32, bfloat16, float16, not float64"),
        (((1, 1, 1, 40000), "float32"), f"at most {MAX_BLOCKS} blocks, but M is 40000"),
        (((1, 2**30, 2, 8), "float32"), f"counts rows in int32, but B·T·K is {2**31}"),
        (((1, 1, 1, 8192), "float32", Tiles(num_warps=1)), "at most 4096 blocks a warp, but M is"),
        (((4, 1, 2, 2048), "float32", None), None),
    ],
)
def test_the_kernel_says_what_it_cannot_take(arguments, reason):
    said = triton.argument_reason(*arguments)
    assert said is None if reason is None else reason in str(said)


def test_a_kernel_asked_for_by_name_is_never_replaced():
    with pytest.raises(NotImplementedError, match="implementation='triton' needs an NVIDIA GPU"):
        call(implementation="triton")
    with pytest.raises(NotImplementedError, match="at most 4096 blocks a warp, but M is 8192"):
        triton.select_blocks(
            jnp.zeros((1, 1, 1, 8192)),
            jnp.zeros((1, 1), jnp.int32),
            None,
            **MINICPM,
            width=96,
            tiles=Tiles(num_warps=1),
        )
    assert door.PREFERRED == ("triton",)


def test_tiles_and_work_are_counted():
    with pytest.raises(ValueError, match=r"self.num_warps=3 must be a power of two from 1 to 16"):
        Tiles(num_warps=3)
    assert [Tiles.default(8, m).num_warps for m in (100, 4096, 16384)] == [4, 8, 16]
    assert [Tiles.default(10**5, m).num_warps for m in (100, 4096, 16384)] == [1, 2, 8]
    assert padded_blocks(2049) == 4096
    assert work(10, 2048, 96).bytes == 10 * 4 * (2048 + 96 + 1 + 64)
    assert work(10, 2048, 96, visible=100.5).bytes == 4020 + 10 * 4 * (96 + 1 + 64)


def by_sorting(scores, positions, *, block_size, sink_blocks, local_blocks, selected_blocks):
    """Choose for all rows at once with a stable sort, for rows too many for loops."""
    num_blocks = scores.shape[-1]
    block = np.arange(num_blocks)
    own = np.where(positions < 0, -1, positions // block_size)[:, :, None, None]
    bits = scores.astype(np.float32).view(np.int32)
    ranked = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)  # as the floats, −0 below 0
    pinned = (block >= own - local_blocks) | (block < sink_blocks)
    ranked = np.where(pinned, 0x7F800000, ranked)
    ranked = np.where(block <= own, ranked, -(2**31))
    order = np.argsort(-ranked, axis=-1, kind="stable")[..., :selected_blocks]
    real = np.take_along_axis(ranked, order, axis=-1) > -(2**31)
    ids = np.sort(np.where(real, order, num_blocks), axis=-1)
    return np.where(ids < num_blocks, ids, -1)


def test_the_sort_makes_the_choice_of_the_reference():
    case = Case("", levels=1, T=9)
    scores, positions, _ = case.operands()
    rule = {key: value for key, value in case.rule.items() if key != "width"}
    want = definition.select_blocks(scores, positions, None, **case.rule)
    got = by_sorting(np.asarray(scores), np.asarray(positions), **rule)
    np.testing.assert_array_equal(got, want.ids)


def on_gpu(shape, dtype="float32", levels=None, tiles=None):
    """Run the kernel twice on a GPU and hold it to the sort."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(shape, np.float32)
    if levels:
        scores = np.round(scores * levels) / levels
    scores = jnp.asarray(scores, dtype)
    positions = rng.integers(0, shape[-1] * 64, shape[:2]).astype(np.int32)
    positions[0, 0] = shape[-1] * 64 - 1
    positions[-1, -1] = -1
    f = jax.jit(
        chex.assert_max_traces(n=1)(
            lambda s, p: select_blocks(s, p, **MINICPM, implementation="triton", tiles=tiles)
        )
    )
    got, again = f(scores, jnp.asarray(positions)), f(scores, jnp.asarray(positions))
    assert_same(got, again)
    ids = by_sorting(np.asarray(scores.astype(jnp.float32)), positions, **MINICPM)
    np.testing.assert_array_equal(got.ids, ids)
    np.testing.assert_array_equal(got.count, (ids >= 0).sum(-1))
    bits = np.asarray(got.mask)[..., :, None] >> np.arange(32, dtype=np.uint32) & 1
    bits = bits.reshape(*shape[:3], -1)
    np.testing.assert_array_equal(bits.sum(-1), got.count)
    assert np.all(np.take_along_axis(bits, np.maximum(ids, 0), -1)[ids >= 0] == 1)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [4, 64])
def test_on_a_gpu_a_decode_step_at_128k_chooses_as_a_sort_does(batch):
    on_gpu((batch, 1, 2, 2048))


@pytest.mark.gpu
@pytest.mark.parametrize("num_warps", [1, 2, 4])
def test_on_a_gpu_a_chunk_of_prefill_at_128k_chooses_as_a_sort_does(num_warps):
    on_gpu((1, 1024, 2, 2048), tiles=Tiles(num_warps=num_warps))


@pytest.mark.gpu
def test_on_a_gpu_ties_go_to_the_lower_id():
    on_gpu((1, 1024, 2, 2048), levels=2)


@pytest.mark.gpu
def test_on_a_gpu_a_bfloat16_row_of_another_length_is_chosen_from():
    on_gpu((3, 5, 2, 777), dtype="bfloat16")


@pytest.mark.gpu
def test_on_a_gpu_a_row_of_a_million_tokens_is_chosen_from():
    on_gpu((2, 3, 2, 16384))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_a_gpu_the_small_cases_are_chosen_as_by_loops(case):
    operands = case.operands(seed=4)
    kernel = jax.jit(lambda *x: triton.select_blocks(*x, **case.rule))
    got = kernel(*operands)
    ids, words = by_loops(*operands, **case.rule)
    np.testing.assert_array_equal(got.ids, ids)
    np.testing.assert_array_equal(got.mask, words)
