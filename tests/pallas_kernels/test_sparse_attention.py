# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Attention over chosen blocks: reference against loops, kernels against it, lowering, errors."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kernel_cases.sparse_attention import cases, draw_masks
from pallas_kernels import _backend, _compat
from pallas_kernels.sparse_attention import Tiles, mosaic_gpu, sparse_attention, triton, union
from pallas_kernels.sparse_attention import api as door
from pallas_kernels.sparse_attention import reference as definition
from pallas_kernels.sparse_attention.config import padded_group, shared_bytes, work
from sparda_jax import attention
from sparda_jax.testing import assert_close_float32, assert_within_reference_rounding

TRITON = Tiles(rows=64, stages=2, num_warps=4)
MOSAIC = Tiles(rows=128, stages=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, and how blocks are chosen."""

    name: str
    B: int = 1
    T: int = 13
    S: int = 130
    K: int = 2
    G: int = 4
    H: int = 32
    W: int = 16
    kind: str = "random"
    bias: bool = False
    scale: float | None = None
    dtype: str = "float32"

    @property
    def M(self):
        return -(-self.S // self.W)

    @property
    def rule(self):
        return {"block_size": self.W, "scale": self.scale or self.H**-0.5}

    def chosen(self, rng):
        """Mark blocks, and place the queries: anywhere, or at the end of the cache."""
        bits = rng.random((self.B, self.T, self.K, self.M)) < 0.4
        positions = rng.integers(0, self.S, (self.B, self.T))
        if self.T > 1:
            positions[0, self.T // 2] = -1
        if self.kind == "everything":
            bits[:] = True
        if self.kind == "own block only":
            own = (positions // self.W)[:, :, None, None]
            bits = np.broadcast_to(np.arange(self.M) == own, bits.shape)
        if self.kind == "neighbours agree":
            bits = np.repeat(bits[:, :1], self.T, axis=1)
            positions[:] = np.arange(self.S - self.T, self.S)
        if self.kind == "one position":
            positions[:] = self.S - 1
        if self.kind == "an empty cache":
            positions[-1] = -1
        if self.kind == "nothing marked":
            bits[:, ::2] = False
        return bits, positions.astype(np.int32)

    def operands(self, seed=0):
        rng = np.random.default_rng(seed)
        bits, positions = self.chosen(rng)
        q, k, v = (
            rng.standard_normal(shape)
            for shape in (
                (self.B, self.T, self.K * self.G, self.H),
                (self.B, self.S, self.K, self.H),
                (self.B, self.S, self.K, self.H),
            )
        )
        k[0, self.S // 3] = 2.0 * q[0, 0, :: self.G]  # one match, so that selection matters
        q, k, v = (jnp.asarray(x, self.dtype) for x in (q, k, v))
        bias = None
        if self.bias:
            bias = jnp.asarray(rng.standard_normal((self.B, self.S, self.K)), jnp.float32)
        return q, k, v, jnp.asarray(packed(bits)), jnp.asarray(positions), bias


CASES = [
    Case("odd tail", B=2, T=13, S=130),
    Case("one query", T=1, S=65, K=1, G=16, kind="one position"),
    Case("sixteen heads a group", T=11, S=90, G=16, dtype="bfloat16"),
    Case("one head a group", T=70, S=50, K=1, G=1, dtype="bfloat16"),
    Case("three heads a group", T=21, S=150, K=1, G=3, H=64, W=64),
    Case("own block only", T=9, kind="own block only", dtype="bfloat16"),
    Case("everything", T=9, G=8, kind="everything"),
    Case("nothing marked", T=9, G=8, kind="nothing marked"),
    Case(
        "neighbours agree", T=12, K=1, G=16, S=130, W=32, kind="neighbours agree", dtype="bfloat16"
    ),
    Case("one position", T=9, kind="one position"),
    Case("an empty cache", B=2, T=5, kind="an empty cache"),
    Case("a bias per key", T=9, G=16, bias=True, scale=0.3, dtype="bfloat16"),
    Case("a bias per key in float32", T=9, bias=True),
    Case("many blocks", T=5, S=16 * 40, K=1, G=8),
]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def packed(bits):
    """Pack marks [… M] into uint32 words, bit m % 32 of word m // 32 for block m."""
    words = np.zeros((*bits.shape[:-1], -(-bits.shape[-1] // 32)), np.uint32)
    for m in range(bits.shape[-1]):
        words[..., m // 32] |= bits[..., m].astype(np.uint32) << np.uint32(m % 32)
    return words


def by_loops(q, k, v, words, positions, bias, *, block_size, scale):
    """Attend for one query head and one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    words, positions = np.asarray(words), np.asarray(positions)
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        head = n // group
        row = words[b, t, head]
        seen = [
            s
            for s in range(k.shape[1])
            if s <= positions[b, t]
            and int(row[s // block_size // 32]) >> (s // block_size % 32) & 1
        ]
        if not seen:
            continue
        logits = np.array([scale * np.dot(q[b, t, n], k[b, s, head]) for s in seen])
        if bias is not None:
            logits = logits + np.asarray(bias, np.float64)[b, seen, head]
        mass = np.exp(logits - logits.max())
        out[b, t, n] = (mass / mass.sum()) @ v[b, seen, head]
    return out


def in_float32(operands):
    q, k, v, *rest = operands
    return (*(x.astype(jnp.float32) for x in (q, k, v)), *rest)


compiled_reference = jax.jit(definition.sparse_attention, static_argnames=("block_size", "scale"))


def refer(case, operands):
    *operands, bias = operands
    return compiled_reference(*operands, **case.rule, key_bias=bias)


def assert_right(got, case, operands):
    """Hold a kernel to the reference: closely in f32, to its rounding in bf16."""
    assert got.dtype == operands[0].dtype
    want = refer(case, operands)
    if case.dtype == "float32":
        assert_close_float32(got, want)
    else:
        *arrays, bias = in_float32(operands)
        exact = by_loops(*arrays, bias, **case.rule)
        as_f32 = (np.asarray(x.astype(jnp.float32)) for x in (got, want))
        assert_within_reference_rounding(*as_f32, exact)
    zero = np.asarray(operands[4]) < 0
    assert not np.asarray(got.astype(jnp.float32))[zero].any()


def interpreted(name, case, operands, tiles):
    options = {**case.rule, "tiles": tiles, "interpret": True}
    if name == "mosaic_gpu":  # in one program its threads would wait for what they hold up
        return door.run_kernel.__wrapped__(name, *operands, **options)
    return door.run_kernel(name, *operands, **options)


# --- the definition -----------------------------------------------------------------------------


@named
def test_the_reference_is_the_formula_in_loops(case):
    operands = in_float32(case.operands())
    *arrays, bias = operands
    want = by_loops(*arrays, bias, **case.rule)
    np.testing.assert_allclose(refer(case, operands), want, rtol=2e-5, atol=2e-5)


LIKE_THE_LIBRARY = (
    "odd tail",
    "three heads a group",
    "an empty cache",
    "a bias per key in float32",
)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in LIKE_THE_LIBRARY], ids=lambda case: case.name
)
def test_the_reference_is_what_the_library_attends_to(case):
    q, k, v, words, positions, bias = in_float32(case.operands(seed=1))
    bits = np.asarray(words)[..., None] >> np.arange(32, dtype=np.uint32) & 1
    bits = bits.reshape(*bits.shape[:3], -1)[..., : case.M] == 1
    block = np.arange(case.M)
    ids = np.sort(np.where(bits, block, case.M), axis=-1)
    ids = jnp.asarray(np.where(ids < case.M, ids, -1), jnp.int32)
    attend = jax.jit(functools.partial(attention.attend_chosen, block_size=case.W))
    want = attend(q, k, v, ids, positions, bias)
    call = jax.jit(functools.partial(sparse_attention, block_size=case.W))
    got = call(q, k, v, words, positions, key_bias=bias)
    assert_close_float32(got, want)


def test_the_reference_is_what_the_library_attends_to_under_a_mask():
    case = Case("", B=2, T=70, S=70)
    q, k, v, words, _, _ = case.operands(seed=2)
    positions = jnp.tile(jnp.arange(70, dtype=jnp.int32)[None], (2, 1)).at[1, 60:].set(-1)
    bits = np.asarray(words)[..., None] >> np.arange(32, dtype=np.uint32) & 1
    bits = jnp.asarray(bits.reshape(*bits.shape[:3], -1)[..., : case.M] == 1)
    attend = functools.partial(attention.attend_masked, block_size=case.W, tile_q=32)
    want = jax.jit(attend)(q, k, v, bits, positions)
    got = jax.jit(functools.partial(sparse_attention, block_size=case.W))(q, k, v, words, positions)
    assert_close_float32(got, want)


# --- the lists of blocks ------------------------------------------------------------------------


def listed(bits, positions, block_size, tile_q):
    """List each tile's blocks by hand: {block: (bits of queries, some query is cut)}."""
    batch, queries, heads, blocks = bits.shape
    tiles = -(-queries // tile_q)
    found = {}
    for b, h, i in np.ndindex(batch, heads, tiles):
        entries = {}
        for m in range(blocks):
            tile = range(i * tile_q, min((i + 1) * tile_q, queries))
            who = [t for t in tile if bits[b, t, h, m] and m * block_size <= positions[b, t]]
            if who:
                is_cut = any((m + 1) * block_size - 1 > positions[b, t] for t in who)
                entries[m] = sum(1 << (t - i * tile_q) for t in who), is_cut
        found[b, h, i] = entries
    return found


@pytest.mark.parametrize(
    ("tile_q", "parts", "chunk"),
    [(4, 1, 2048), (8, 2, 16), (8, 2, 2048), (12, 3, 16), (64, 1, 2048), (128, 2, 16)],
)
def test_a_tile_lists_its_blocks_and_who_chose_them(tile_q, parts, chunk, monkeypatch):
    monkeypatch.setattr(union, "_CHUNK", chunk)
    case = Case("", B=2, T=19, S=290, W=8)
    bits, positions = case.chosen(np.random.default_rng(3))
    got = union.unite(
        jnp.asarray(packed(bits)),
        jnp.asarray(positions),
        num_blocks=case.M,
        block_size=case.W,
        tile_q=tile_q,
        parts=parts,
        interpret=True,
    )
    size = tile_q // parts
    for at, entries in listed(bits, positions, case.W, tile_q).items():
        cut, count = np.asarray(got.counts[at]).tolist()
        ids = np.asarray(got.ids[at])[:count].tolist()
        words = np.asarray(got.bits[at])[:, :count].astype(np.uint32).tolist()
        who = [sum(word[e] << (32 * w) for w, word in enumerate(words)) for e in range(count)]
        assert sorted(ids) == sorted(entries)
        assert who == [entries[m][0] for m in ids]
        assert [entries[m][1] for m in ids] == [True] * cut + [False] * (count - cut)
        wanted = [
            tuple(bool(w >> (p * size) & ((1 << size) - 1)) for p in range(parts)) for w in who
        ]
        shared = [all(row) for row in wanted[cut:]]
        assert shared == sorted(shared, reverse=True)
        if parts == 2:  # those of one part only take turns, so neither waits long for the other
            alone = [row.index(True) for row in wanted[cut:] if not all(row)]
            turns = 2 * min(alone.count(0), alone.count(1))
            assert alone[:turns] == [0, 1] * (turns // 2)


# --- the kernels in their interpreters ----------------------------------------------------------


def quick_first(cases, quick):
    """Leave to the slow tier what makes the interpreters' part long: all but the `quick` cases."""
    marks = {True: (), False: (pytest.mark.slow,)}
    return [pytest.param(c, id=c.name, marks=marks[c.name in quick]) for c in cases]


QUICK = ("odd tail", "one query", "one head a group", "everything", "a bias per key")


@pytest.mark.parametrize("case", quick_first(CASES, (*QUICK, "an empty cache", "many blocks")))
def test_the_triton_kernel_gives_the_reference(case):
    operands = case.operands(seed=4)
    tiles = dataclasses.replace(TRITON, rows=16) if case.name == "odd tail" else TRITON
    assert_right(interpreted("triton", case, operands, tiles), case, operands)


IN_MOSAIC = [
    dataclasses.replace(case, dtype="bfloat16")
    for case in CASES
    if case.name not in ("neighbours agree", "nothing marked", "a bias per key in float32")
]


@pytest.mark.parametrize("case", quick_first(IN_MOSAIC, QUICK))
def test_the_mosaic_kernel_gives_the_reference(case):
    operands = case.operands(seed=5)
    assert_right(interpreted("mosaic_gpu", case, operands, MOSAIC), case, operands)


@pytest.mark.parametrize(
    ("rows", "stages", "kind"),
    [(64, 2, "random"), (128, 5, "neighbours agree")],
)
def test_other_tiles_of_the_mosaic_kernel_give_the_reference(rows, stages, kind):
    case = Case("", T=9, S=140, K=1, G=16, kind=kind, dtype="bfloat16")
    operands = case.operands(seed=6)
    got = interpreted("mosaic_gpu", case, operands, Tiles(rows=rows, stages=stages))
    assert_right(got, case, operands)


def test_a_float16_tile_of_the_mosaic_kernel_gives_the_reference():
    case = Case("", T=5, S=70, K=1, G=8, dtype="float16")
    operands = case.operands(seed=6)
    assert_right(interpreted("mosaic_gpu", case, operands, MOSAIC), case, operands)


@pytest.mark.slow
def test_three_computing_warpgroups_of_the_mosaic_kernel_give_the_reference():
    # Four threads wait for each other, more than JAX runs at once on two cores unless told so.
    code = """
        from tests.pallas_kernels import test_sparse_attention as here
        case = here.Case("", T=29, S=140, K=1, G=16, dtype="bfloat16")
        operands = case.operands(seed=7)
        got = here.interpreted("mosaic_gpu", case, operands, here.Tiles(rows=192, stages=2))
        here.assert_right(got, case, operands)
        print("right")
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"NPROC": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.stdout == "right\n", found.stderr[-2000:]


# --- the door -----------------------------------------------------------------------------------


def test_without_a_gpu_the_reference_runs_and_is_traced_once():
    case = CASES[0]
    f = jax.jit(chex.assert_max_traces(n=1)(lambda *x: sparse_attention(*x, block_size=case.W)))
    for seed in range(2):
        *operands, _ = case.operands(seed)
        assert_close_float32(f(*operands), refer(case, (*operands, None)))


def test_the_wide_call_passes_its_bias_scale_and_tiles(monkeypatch):
    seen = {}
    monkeypatch.setattr(_backend, "resolve", lambda *_: "triton")

    def run(*operands, **named):
        seen.update(named, operands=operands)
        return operands[1]

    monkeypatch.setattr(door, "run_kernel", run)
    case = Case("", bias=True)
    *operands, bias = case.operands()
    sparse_attention(*operands, key_bias=bias, block_size=case.W, scale=0.25, tiles=TRITON)
    assert (seen["scale"], seen["tiles"], seen["block_size"]) == (0.25, TRITON, case.W)
    assert seen["operands"][0] == "triton"
    assert seen["operands"][-1] is bias


SHAPES = {
    "q": (2, 5, 4, 8),
    "k": (2, 70, 2, 8),
    "v": (2, 70, 2, 8),
    "mask": (2, 5, 2, 2),
    "positions": (2, 5),
}


def call(dtype="float32", bias=None, **changes):
    shapes = {name: changes.pop(name, shape) for name, shape in SHAPES.items()}
    q = jnp.zeros(shapes["q"], dtype)
    k, v = jnp.zeros(shapes["k"]), jnp.zeros(shapes["v"])
    bias = None if bias is None else jnp.zeros(bias)
    mask = jnp.zeros(shapes["mask"], jnp.uint32)
    positions = jnp.zeros(shapes["positions"], jnp.int32)
    return sparse_attention(q, k, v, mask, positions, key_bias=bias, **{"block_size": 2} | changes)


@pytest.mark.usefixtures("no_shape_hook")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"scale": 0.0}, "scale=0.0 must be greater than 0.0"),
        ({"q": (2, 0, 4, 8)}, "q.shape=(2, 0, 4, 8) and k.shape=(2, 70, 2, 8) must have no axis"),
        ({"v": (2, 71, 2, 8)}, "k.shape=(2, 70, 2, 8) must equal v.shape=(2, 71, 2, 8)"),
        ({"q": (2, 5, 4, 9)}, "k.shape=(2, 70, 2, 8) must agree with q.shape=(2, 5, 4, 9) in B"),
        ({"q": (2, 5, 3, 8)}, "N of q.shape=(2, 5, 3, 8) must be a multiple of K of k.shape=(2,"),
        ({"dtype": "bfloat16"}, "q.dtype=dtype(bfloat16), k.dtype=dtype('float32') and v.dtype="),
        ({"mask": (2, 5, 2, 1)}, "block_mask.shape=(2, 5, 2, 1) must be (2, 5, 2, 2): [B T K]"),
        ({"positions": (2, 4)}, "positions.shape=(2, 4) must equal [B T] of q.shape=(2, 5, 4, 8)"),
        ({"bias": (2, 70, 4)}, "key_bias.shape=(2, 70, 4) must equal [B S K] of k.shape=(2, 70"),
    ],
)
def test_a_wrong_argument_is_refused_with_both_numbers(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**arguments)


USUAL = {"group": 16, "head_dim": 128, "block_size": 64, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("kernel", "changes", "reason"),
    [
        (triton, {"dtype": "float64"}, "takes bfloat16, float16, float32, not float64"),
        (triton, {"head_dim": 96}, "a head_dim that is a power of two from 16 to 128, not 96"),
        (triton, {"block_size": 8}, "a block_size that is a power of two from 16 to 128, not 8"),
        (triton, {"tiles": Tiles(rows=192)}, "that holds a group of 16, not tiles.rows=192"),
        (triton, {"group": 200}, "that holds a group of 200, not tiles.rows=128"),
        (triton, {"tiles": Tiles(stages=9)}, "may use 163840 bytes of shared memory, but Tiles("),
        (triton, {"tiles": Tiles(stages=3)}, None),
        (mosaic_gpu, {"dtype": "float32"}, "takes bfloat16 or float16, not float32"),
        (mosaic_gpu, {"head_dim": 16}, "a head_dim that is a power of two from 32 to 128, not 16"),
        (mosaic_gpu, {"block_size": 48}, "is a power of two from 16 to 128, not 48"),
        (mosaic_gpu, {"group": 65}, "takes groups of up to 64 query heads, not 65"),
        (mosaic_gpu, {"tiles": Tiles(rows=256)}, "takes 1 to 3 times 64 rows, not tiles.rows=256"),
        (mosaic_gpu, {"tiles": Tiles(rows=96)}, "takes 1 to 3 times 64 rows, not tiles.rows=96"),
        (mosaic_gpu, {"tiles": Tiles(stages=1)}, "needs at least 2 stages, not tiles.stages=1"),
        (mosaic_gpu, {"tiles": Tiles(stages=9)}, "may use 231424 bytes of shared memory, but Ti"),
        (
            mosaic_gpu,
            {"block_size": 32, "tiles": Tiles(queries_in="shared")},
            "multiplies queries from registers if block_size=32 < 64, not tiles.queries_in='sh",
        ),
        (mosaic_gpu, {}, None),
    ],
)
def test_a_kernel_says_what_it_cannot_take(kernel, changes, reason):
    said = kernel.argument_reason(**{"tiles": Tiles()} | USUAL | changes)
    assert said is None if reason is None else reason in str(said)


def test_a_kernel_asked_for_by_name_is_never_replaced():
    for name in ("mosaic_gpu", "triton"):
        with pytest.raises(NotImplementedError, match=f"implementation='{name}' needs an NVIDIA"):
            call(implementation=name)
    assert door.PREFERRED == ("mosaic_gpu", "triton")


@pytest.mark.usefixtures("no_shape_hook")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 8}, "self.rows=8 must be a positive multiple of 16"),
        ({"rows": 100}, "self.rows=100 must be a positive multiple of 16"),
        ({"stages": 0}, "self.stages=0 must be at least 1"),
        ({"num_warps": 3}, "self.num_warps=3 must be a power of two"),
        ({"queries_in": "l2"}, "self.queries_in='l2' must be one of ('registers', 'shared')"),
    ],
)
def test_impossible_tiles_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Tiles(**changes)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("group", [1, 4, 16, 64])
def test_default_tiles_are_taken_by_their_kernels(group, block_size, head_dim):
    shape = {"group": group, "head_dim": head_dim, "block_size": block_size}
    for kernel, dtype in ((mosaic_gpu, "bfloat16"), (triton, "bfloat16"), (triton, "float32")):
        name = kernel.__name__.rpartition(".")[2]
        tiles = Tiles.default(name, **shape, itemsize=jnp.dtype(dtype).itemsize)
        assert kernel.argument_reason(**shape, dtype=dtype, tiles=tiles) is None


def test_work_counts_chosen_blocks_only():
    shape = {"queries": 100, "keys": 640, "heads": 32, "kv_heads": 2, "head_dim": 128}
    found = work(**shape, block_size=64, chosen=700, itemsize=2)
    assert found.flops == 4 * 128 * 64 * 16 * 700
    assert found.bytes == 2 * 128 * 2 * (100 * 32 + 640 * 2) + 4 * 100 * 2
    assert found.ceiling == "matmul"
    assert padded_group(9) == 16
    assert shared_bytes(Tiles(rows=192, stages=5), head_dim=128, block_size=64) == 212992


# --- lowering for CUDA --------------------------------------------------------------------------


def lower(name, *, B=1, T=131072, S=131072, K=2, G=16, H=128, W=64, dtype="bfloat16", bias=False,
          tiles=None):  # fmt: skip
    shape = jax.ShapeDtypeStruct
    arrays = [
        shape((B, T, K * G, H), dtype),
        shape((B, S, K, H), dtype),
        shape((B, S, K, H), dtype),
        shape((B, T, K, -(-S // W // 32)), jnp.uint32),
        shape((B, T), jnp.int32),
    ]
    arrays += [shape((B, S, K), jnp.float32)] if bias else []
    tiles = tiles or Tiles.default(
        name, group=G, head_dim=H, block_size=W, itemsize=jnp.dtype(dtype).itemsize
    )

    def f(*arrays):
        five, key_bias = arrays[:5], arrays[5] if bias else None
        return door.run_kernel(name, *five, key_bias, block_size=W, scale=H**-0.5, tiles=tiles)

    return _compat.lowered(f, *arrays).as_text()


CALL_OF = {"mosaic_gpu": "mosaic_gpu", "triton": "__gpu$xla.gpu.triton"}


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mosaic_gpu", "bfloat16"), ("triton", "bfloat16"), ("triton", "float32")],
)
def test_a_kernel_lowers_for_cuda_at_128k(name, dtype, group, head_dim):
    assert CALL_OF[name] in lower(name, G=group, H=head_dim, dtype=dtype)


@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize(
    "changes",
    [
        {"W": 16, "T": 8192},
        {"W": 32, "T": 8192, "bias": True},
        {"W": 128, "T": 8192},
        {"bias": True},
        {"B": 64, "T": 512},
        {"T": 777, "S": 5000, "G": 7},
        {"B": 3, "T": 1, "S": 64},
        {"T": 8192, "dtype": "float16"},
    ],
    ids=str,
)
def test_a_kernel_lowers_for_cuda_at_other_shapes(name, changes):
    assert CALL_OF[name] in lower(name, **changes)


@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(rows=64, stages=5),
        Tiles(rows=192, stages=5),
        Tiles(rows=128, stages=3, queries_in="shared"),
        Tiles(rows=192, stages=5, queries_in="shared"),
    ],
    ids=lambda tiles: f"{tiles.rows}-{tiles.stages}-{tiles.queries_in}",
)
@pytest.mark.parametrize("group", [1, 16])
def test_other_tiles_of_the_mosaic_kernel_lower_for_cuda(tiles, group):
    assert CALL_OF["mosaic_gpu"] in lower("mosaic_gpu", G=group, tiles=tiles)


# --- on a GPU -----------------------------------------------------------------------------------


MINICPM = {"block_size": 64, "sink_blocks": 1, "local_blocks": 32, "selected_blocks": 96}


def on_gpu(
    name, *, length, queries, K=2, G=16, H=128, dtype="bfloat16", bias=False, tiles=None, checked=16
):
    """Run the last queries of a prompt twice, and hold the first and last of them."""
    keys = jax.random.split(jax.random.key(0), 5)
    first = length - queries
    words = draw_masks(
        keys[0], length=length, first=first, kv_heads=K, correlation=0.993, **MINICPM
    )
    positions = jnp.arange(first, length, dtype=jnp.int32)[None].at[0, 3].set(-1)
    q = jax.random.normal(keys[1], (1, queries, K * G, H), dtype)
    k = jax.random.normal(keys[2], (1, length, K, H), dtype)
    v = jax.random.normal(keys[3], (1, length, K, H), dtype)
    key_bias = jax.random.normal(keys[4], (1, length, K)) if bias else None

    def attend(q, words, positions, k, v, **named):
        return sparse_attention(
            q, k, v, words, positions, key_bias=key_bias, block_size=64, **named
        )

    @jax.jit
    def refer(q, words, positions, k, v):
        exact = (x.astype(jnp.float32) for x in (k, v))
        return (
            attend(q.astype(jnp.float32), words, positions, *exact, implementation="reference"),
            attend(q, words, positions, k, v, implementation="reference"),
        )

    def run(*operands):
        return attend(*operands, implementation=name, tiles=tiles)

    kernel = jax.jit(chex.assert_max_traces(n=1)(run))
    got, again = (
        np.asarray(kernel(q, words, positions, k, v).astype(jnp.float32)) for _ in range(2)
    )
    np.testing.assert_array_equal(got, again)
    assert not got[0, 3].any()
    some = np.r_[: checked // 2, queries - checked // 2 : queries]
    exact, rounded = refer(q[:, some], words[:, some], positions[:, some], k, v)
    if dtype == "float32":
        assert_close_float32(got[:, some], exact)
    else:
        rounded = np.asarray(rounded.astype(jnp.float32))
        assert_within_reference_rounding(got[:, some], rounded, exact)


@pytest.mark.gpu
def test_on_a_gpu_mosaic_attends_to_a_prompt_of_32k_as_the_reference():
    on_gpu("mosaic_gpu", length=32768, queries=32768)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
def test_on_a_gpu_the_last_chunk_of_128k_is_attended_to_as_by_the_reference(name):
    on_gpu(name, length=131072, queries=4096)


@pytest.mark.gpu
def test_on_a_gpu_triton_attends_in_float32_as_the_reference():
    on_gpu("triton", length=32768, queries=1024, dtype="float32")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
def test_on_a_gpu_one_head_a_group_is_attended_to_as_by_the_reference(name):
    on_gpu(name, length=8192, queries=1024, K=32, G=1, H=64)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "G"), [("mosaic_gpu", 4), ("triton", 12)])
def test_on_a_gpu_a_bias_per_key_is_added_as_by_the_reference(name, G):
    on_gpu(name, length=16384, queries=1024, G=G, bias=True)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, 192])
def test_on_a_gpu_other_tiles_of_the_mosaic_kernel_give_the_reference(rows):
    tiles = Tiles(rows=rows, stages=5)
    on_gpu("mosaic_gpu", length=16384, queries=2048, tiles=tiles)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("odd tail", "one query", "everything")],
    ids=lambda case: case.name,
)
def test_on_a_gpu_small_cases_give_the_reference(case, name):
    if name == "mosaic_gpu":
        case = dataclasses.replace(case, dtype="bfloat16")
    operands = case.operands(seed=8)
    shape = {"group": case.G, "head_dim": case.H, "block_size": case.W}
    tiles = Tiles.default(name, **shape, itemsize=operands[1].dtype.itemsize)
    kernel = jax.jit(lambda *x: door.run_kernel(name, *x, **case.rule, tiles=tiles))
    assert_right(kernel(*operands), case, operands)


def test_drawn_choices_are_causal_and_neighbours_share_most_of_them():
    rule = {"block_size": 16, "sink_blocks": 1, "local_blocks": 2, "selected_blocks": 12}
    for correlation, least, most in ((0.993, 0.85, 0.97), (0.0, 0.0, 0.4)):
        words = draw_masks(
            jax.random.key(1), length=1024, first=512, kv_heads=2, correlation=correlation, **rule
        )
        assert words.shape == (1, 512, 2, 2)
        bits = np.asarray(words)[0, ..., None] >> np.arange(32, dtype=np.uint32) & 1
        bits = bits.reshape(512, 2, 64)
        own = np.arange(512, 1024)[:, None, None] // 16
        assert np.all(bits.sum(-1) == 12)
        block = np.arange(64)
        assert not np.any(bits * (block > own))
        free = bits * (block > 0) * (block < own - 2)
        both = (free[:-1] * free[1:]).sum(-1) / free[1:].sum(-1)
        assert least < both.mean() < most


def test_the_check_of_the_cases_refuses_a_wrong_output():
    case = cases(tiny=True)[0]
    operands = case.operands(0)
    assert case.check is not None
    with pytest.raises(AssertionError, match=re.escape("RMS error 1 of the result, at most 0.02")):
        case.check(jnp.zeros_like(operands[0]), operands)
