# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Fetch plans: reference against a dictionary and the library, kernel against reference."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _compat
from pallas_kernels.plan_fetch import Plan, Tiles, plan_fetch, triton
from pallas_kernels.plan_fetch import api as door
from pallas_kernels.plan_fetch import reference as definition
from pallas_kernels.plan_fetch.config import MAX_ROWS, MAX_SLOTS, work
from sparda_jax.kv import plan as library
from sparda_jax.kv.state import EMPTY, SlotPool

FIELDS = tuple(field.name for field in dataclasses.fields(Plan))


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, and the blocks that each sequence fills at first (−1: a row that does nothing)."""

    name: str
    own: tuple[int, ...]
    K: int = 2
    J: int = 5
    M: int = 37
    R: int = 8
    steps: int = 6
    stay: float = 0.6  # share of a choice that the next one keeps
    step_size: int = 1

    def pool(self):
        rows = (len(self.own), self.K)
        table = jnp.full((*rows, self.M), -1, jnp.int32)
        slots = jnp.full((*rows, self.R), -1, jnp.int32)
        return table, slots, jnp.full(slots.shape, EMPTY, jnp.int32)

    def choices(self, seed=0):
        """Yield the ids, the own blocks and the step number of one step after another."""
        rng = np.random.default_rng(seed)
        own = np.array(self.own, np.int32)
        before = {}
        for step in range(1, self.steps + 1):
            ids = np.full((len(own), self.K, self.J), -1, np.int32)
            for b, k in np.ndindex(len(own), self.K):
                if own[b] < 0:
                    continue
                kept = [m for m in before.get((b, k), []) if rng.random() < self.stay]
                new = [int(m) for m in rng.permutation(own[b]) if m not in kept]
                chosen = sorted({*(kept + new)[: self.J - 1], int(own[b])})
                ids[b, k, : len(chosen)] = chosen
                before[b, k] = [m for m in chosen if m != own[b]]
            yield jnp.asarray(ids), jnp.asarray(own), jnp.int32(step * self.step_size)
            if step % 2 == 0:  # into the next block
                own = np.where(own >= 0, np.minimum(own + 1, self.M - 1), own).astype(np.int32)


CASES = [
    Case("a ragged batch", own=(30, 3, 12)),
    Case("a row that does nothing", own=(9, -1)),
    Case("as many slots as blocks are chosen", own=(20, 33), R=5, stay=0.3),
    Case("one block, one slot", own=(4,), K=1, J=1, R=1, stay=0.0),
    Case("everything changes", own=(36,), R=16, J=8, stay=0.0),
    Case("nothing changes but the tail", own=(25, 6), stay=1.0),
    Case("more slots than blocks", own=(3, 7), K=1, J=6, M=10, R=20, step_size=1000),
    Case("several tiles of slots", own=(35,), K=3, J=11, R=37),
]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def by_dictionary(ids, table, slot_blocks, ages, own, step):
    """Plan as the rule reads, row by row, on copies of the pool."""
    ids, own = np.asarray(ids), np.asarray(own)
    table, slot_blocks, ages = (np.array(x) for x in (table, slot_blocks, ages))
    num_blocks, num_slots = table.shape[-1], ages.shape[-1]
    slots = np.full(ids.shape, -1, np.int32)
    tail = np.full(ids.shape[:2], -1, np.int32)
    misses, resident, evicted = [], 0, 0
    for row, (b, k) in enumerate(np.ndindex(*ids.shape[:2])):
        chosen = [int(m) for m in ids[b, k] if m >= 0]
        place = {int(m): r for r, m in enumerate(slot_blocks[b, k]) if m >= 0}
        free = [r for r in range(num_slots) if slot_blocks[b, k, r] not in chosen]
        free.sort(key=lambda r: (slot_blocks[b, k, r] >= 0, ages[b, k, r], r))
        for m in chosen:
            if m not in place:
                r = free.pop(0)
                if slot_blocks[b, k, r] >= 0:
                    table[b, k, slot_blocks[b, k, r]] = -1
                    evicted += 1
                place[m] = r
                slot_blocks[b, k, r], table[b, k, m] = m, r
                if m != own[b]:
                    misses.append((row * num_blocks + m, row * num_slots + r))
                    resident -= 1
            resident += 1
        for j, m in enumerate(chosen):
            slots[b, k, j] = place[m]
            ages[b, k, place[m]] = step
            if m == own[b]:
                tail[b, k] = place[m]
    listed = np.full((2, ids.size), -1, np.int32)
    listed[:, : len(misses)] = np.array(misses, np.int32).reshape(-1, 2).T
    counts = np.array([resident, len(misses), evicted])
    return Plan(slots, tail, table, slot_blocks, ages, listed, np.array([len(misses)]), counts)


def assert_same(got, want, fields=FIELDS):
    for field in fields:
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field), err_msg=field)


def follow(case, plan, other, seed=0, fields=FIELDS):
    """Take all steps of a case and hold the plans of both to each other."""
    pool = case.pool()
    moved = 0
    for ids, own, step in case.choices(seed):
        got, want = plan(ids, *pool, own, step), other(ids, *pool, own, step)
        assert_same(got, want, fields)
        pool = got.table, got.slot_blocks, got.ages
        moved += int(got.miss_count[0])
    return moved


@named
def test_the_reference_is_the_plan_made_with_a_dictionary(case):
    moved = follow(case, jax.jit(definition.plan_fetch), by_dictionary)
    assert moved > 0 or case.J == 1


@named
def test_the_kernel_makes_the_plan_of_the_reference(case):
    tiles = Tiles(tile_slots=16)
    kernel = jax.jit(lambda *x: triton.plan_fetch(*x, tiles=tiles, interpret=True))
    follow(case, kernel, jax.jit(definition.plan_fetch), seed=1)


@named
def test_the_reference_is_the_plan_of_the_library(case):
    @jax.jit
    def planned(ids, table, slot_blocks, ages, own, step):
        pool = SlotPool(table=table, slot_blocks=slot_blocks, ages=ages)
        plan, after = library.plan_fetch(ids, pool, own, step)
        return Plan(
            slots=plan.places.slots,
            tail=plan.places.tail,
            table=after.table,
            slot_blocks=after.slot_blocks,
            ages=after.ages,
            misses=plan.misses,
            miss_count=plan.miss_count,
            counts=plan.counts,
        )

    follow(case, jax.jit(definition.plan_fetch), planned, seed=2)


def test_a_plan_leaves_what_is_chosen_resident_and_moves_nothing_twice():
    case = Case("", own=(36, 17), J=8, R=10, steps=12, stay=0.5)
    pool = case.pool()
    for ids, own, step in case.choices():
        plan = plan_fetch(ids, *pool, own, step)
        table, blocks = np.asarray(plan.table), np.asarray(plan.slot_blocks)
        count = int(plan.miss_count[0])
        records, places = np.asarray(plan.misses)
        assert (records[:count] >= 0).all()
        assert (records[count:] == -1).all()
        assert (places[count:] == -1).all()
        assert len(set(places[:count])) == count
        rows = records[:count] // case.M
        assert (rows == places[:count] // case.R).all()
        assert (np.asarray(own)[rows // case.K] != records[:count] % case.M).all()
        for b, k in np.ndindex(2, 2):
            chosen = np.asarray(ids)[b, k]
            chosen = chosen[chosen >= 0]
            assert (blocks[b, k][np.asarray(plan.slots)[b, k, : len(chosen)]] == chosen).all()
            held = np.flatnonzero(table[b, k] >= 0)
            assert (blocks[b, k][table[b, k][held]] == held).all()
            assert len(held) == (blocks[b, k] >= 0).sum()
        pool = plan.table, plan.slot_blocks, plan.ages


def test_at_equal_ages_the_lower_slot_goes_in_the_kernel_too():
    blocks = jnp.array([[[7, 3, 9, 1, -1, 5]]], jnp.int32)
    table = (
        jnp.full((1, 1, 12), -1, jnp.int32)
        .at[0, 0, jnp.array([7, 3, 9, 1, 5])]
        .set(jnp.array([0, 1, 2, 3, 5], jnp.int32))
    )
    ages = jnp.array([[[4, 2, 2, 9, 77, 2]]], jnp.int32)  # of the empty slot any age
    operands = (
        jnp.array([[[0, 2, 3, 6, 8]]], jnp.int32),
        table,
        blocks,
        ages,
        jnp.array([8], jnp.int32),
        jnp.int32(10),
    )
    plan = triton.plan_fetch(*operands, interpret=True)
    assert plan.slots.tolist() == [[[4, 2, 1, 5, 0]]]
    assert plan.tail.tolist() == [[0]]
    assert plan.misses[:, :4].tolist() == [[0, 2, 6, -1], [4, 2, 5, -1]]
    assert plan.counts.tolist() == [2, 3, 3]
    assert_same(plan, by_dictionary(*operands))


def test_without_a_gpu_the_reference_runs_and_is_traced_once():
    case = CASES[0]
    f = jax.jit(chex.assert_max_traces(n=1)(plan_fetch))
    assert follow(case, f, by_dictionary) > 0


def shapes(batch, heads, width, blocks, slots):
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    return (
        integers(batch, heads, width),
        integers(batch, heads, blocks),
        integers(batch, heads, slots),
        integers(batch, heads, slots),
        integers(batch),
        integers(),
    )


@pytest.mark.parametrize(
    "sizes",
    [(4, 2, 96, 2048, 128), (64, 2, 96, 512, 96), (128, 2, 128, 16384, 256), (1, 1, 1, 3, 1)],
    ids=str,
)
def test_the_kernels_lower_for_cuda(sizes):
    text = _compat.lowered(triton.plan_fetch, *shapes(*sizes)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
    assert "output_operand_aliases" in text  # the pool is updated in place


def call(ids=(2, 3, 4), table=(2, 3, 9), blocks=(2, 3, 5), ages=(2, 3, 5), own=(2,), step=(), **to):
    operands = [jnp.zeros(shape, jnp.int32) for shape in (ids, table, blocks, ages, own, step)]
    return plan_fetch(*operands, **to)


@pytest.mark.usefixtures("no_shape_hook")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"table": (2, 2, 9)}, "table.shape=(2, 2, 9) must begin with [B K] of ids.shape=(2, 3, 4"),
        ({"blocks": (1, 3, 5)}, "slot_blocks.shape=(1, 3, 5) must begin with [B K] of ids.shape"),
        ({"ages": (2, 3, 6)}, "ages.shape=(2, 3, 6) must equal slot_blocks.shape=(2, 3, 5)"),
        ({"own": (3,)}, "own.shape=(3,) must equal [B] of ids.shape=(2, 3, 4)"),
        ({"step": (1,)}, "step.shape=(1,) must be ()"),
        ({"table": (2, 3, 0)}, "ids.shape=(2, 3, 4) and table.shape=(2, 3, 0) must have no axis"),
        ({"ids": (2, 3, 6)}, "5 slots per (sequence, KV head) cannot hold the 6 blocks"),
    ],
)
def test_a_wrong_argument_is_refused_with_both_numbers(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**arguments)


@pytest.mark.parametrize(("axis", "blocks", "slots"), [("M", 2**30, 4), ("R", 9, 2**30)])
def test_more_records_than_int32_can_count_are_refused(axis, blocks, slots):
    message = rf"B·K·{axis} = {2**31} must be less than 2\*\*31 = {2**31}; split the batch"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(plan_fetch, *shapes(1, 2, 4, blocks, slots))


def test_a_kernel_asked_for_by_name_is_never_replaced():
    with pytest.raises(NotImplementedError, match="implementation='triton' needs an NVIDIA GPU"):
        call(implementation="triton")
    with pytest.raises(NotImplementedError, match=f"at most {MAX_SLOTS} slots, not 2000"):
        jax.eval_shape(triton.plan_fetch, *shapes(1, 1, 4, 9, 2000))
    reason = triton.argument_reason((MAX_ROWS, 2, 4), 8)
    assert f"at most {MAX_ROWS}, but B·K is {2 * MAX_ROWS}" in str(reason)
    assert triton.argument_reason((128, 2, 128), 256) is None
    assert door.PREFERRED == ("triton",)


def test_tiles_and_work_are_counted():
    with pytest.raises(ValueError, match=r"self.num_warps=3 must be a power of two from 1 to 8"):
        Tiles(num_warps=3)
    with pytest.raises(ValueError, match=r"self.tile_slots=8 must be a power of two from 16 to"):
        Tiles(tile_slots=8)
    assert [Tiles.default(r).num_warps for r in (1, 40, 128, 1000)] == [1, 2, 4, 8]
    assert work(1, 10, 20, 3).bytes == 4 * (10 + 10 + 20 + 20 + 20 + 1 + 12 + 20)


GPU_CASES = [
    Case("decode at 128K, batch 4", own=(2040,) * 4, J=96, M=2048, R=128, steps=4, stay=0.95),
    Case(
        "a ragged batch of 64",
        own=(*range(0, 500, 8), -1),
        J=96,
        M=512,
        R=96,
        steps=3,
        stay=0.9,
    ),
    Case("a million tokens", own=(16000, 90), J=128, M=16384, R=256, steps=3, stay=0.5),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_on_a_gpu_the_kernel_plans_as_a_dictionary_does(case):
    f = jax.jit(chex.assert_max_traces(n=1)(lambda *x: plan_fetch(*x, implementation="triton")))
    assert follow(case, f, by_dictionary) > 0


@pytest.mark.gpu
@named
def test_on_a_gpu_the_small_cases_are_planned_as_with_a_dictionary(case):
    follow(case, jax.jit(lambda *x: plan_fetch(*x, implementation="triton")), by_dictionary)


@pytest.mark.gpu
def test_on_a_gpu_two_runs_are_the_same_and_the_pool_is_updated_in_place():
    case = GPU_CASES[0]
    pool = case.pool()
    f = jax.jit(lambda *x: plan_fetch(*x, implementation="triton"), donate_argnums=(1, 2, 3))
    for ids, own, step in case.choices():
        first = f(ids, *(jnp.array(x) for x in pool), own, step)
        mine = [jnp.array(x) for x in pool]
        addresses = [x.unsafe_buffer_pointer() for x in mine]
        again = f(ids, *mine, own, step)
        assert_same(first, again)
        pool = again.table, again.slot_blocks, again.ages
        assert [x.unsafe_buffer_pointer() for x in pool] == addresses
        assert all(x.is_deleted() for x in mine)
