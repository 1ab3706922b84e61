# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Fetch plans against a pool that is a dictionary, and their properties over many steps."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.errors import CapacityError
from sparda_jax.kv.plan import plan_fetch
from sparda_jax.kv.state import EMPTY, SlotPool

BLOCKS, SLOTS, WIDTH = 12, 5, 4
plan_once = jax.jit(plan_fetch)


def empty_pool(batch=1, heads=1, slots=SLOTS):
    return SlotPool(
        table=jnp.full((batch, heads, BLOCKS), -1, jnp.int32),
        slot_blocks=jnp.full((batch, heads, slots), -1, jnp.int32),
        ages=jnp.full((batch, heads, slots), EMPTY, jnp.int32),
    )


def choice(*rows):
    """Pad sorted choices to [B 1 J]."""
    padded = [[*sorted(row), *[-1] * (WIDTH - len(row))] for row in rows]
    return jnp.array(padded, jnp.int32)[:, None]


def run(pool, blocks, own, step):
    return plan_once(choice(blocks), pool, jnp.array([own], jnp.int32), jnp.int32(step))


def test_empty_slots_go_first_then_the_one_used_longest_ago():
    _, pool = run(empty_pool(), [0, 1, 2], 2, 1)
    _, pool = run(pool, [0, 2, 3], 3, 2)
    assert pool.slot_blocks.tolist() == [[[0, 1, 2, 3, -1]]]
    plan, pool = run(pool, [0, 2, 4, 5], 5, 3)
    assert pool.slot_blocks.tolist() == [[[0, 5, 2, 3, 4]]]  # 4 takes the empty slot, 5 evicts 1
    assert plan.counts.tolist() == [3, 1, 1]  # 0, 2 and the tail; 4 came; 1 went


def test_at_equal_ages_the_lower_slot_goes():
    _, pool = run(empty_pool(), [0, 1, 2, 3], 3, 1)
    _, pool = run(pool, [0, 1, 4], 4, 2)
    plan, pool = run(pool, [0, 4, 5], 5, 3)
    assert pool.slot_blocks.tolist() == [[[0, 1, 5, 3, 4]]]
    assert plan.places.tail.tolist() == [[2]]


def test_entering_a_block_takes_a_slot_but_moves_nothing():
    _, pool = run(empty_pool(), [0, 1], 1, 1)
    plan, pool = run(pool, [0, 1, 2], 2, 2)
    assert np.all(np.asarray(plan.misses) == -1)
    assert plan.miss_count.tolist() == [0]
    assert plan.places.tail.tolist() == [[2]]
    assert pool.table[0, 0, 2] == 2
    assert plan.counts.tolist() == [3, 0, 0]


def test_a_row_that_does_nothing_changes_nothing():
    _, before = run(empty_pool(), [0, 1], 1, 1)
    plan, after = run(before, [], -1, 2)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert plan.counts.tolist() == [0, 0, 0]
    assert plan.places.tail.tolist() == [[-1]]


def test_fewer_slots_than_a_choice_are_refused():
    with pytest.raises(CapacityError, match=r"3 slots .* cannot hold the 4 blocks"):
        plan_fetch(choice([0]), empty_pool(slots=3), jnp.array([0]), jnp.int32(1))


@st.composite
def histories(draw):
    """Draw what two rows choose over some steps: a tail that moves on, and earlier blocks."""
    steps = draw(st.integers(2, 12))
    tails = [draw(st.integers(0, 3)) for _ in range(2)]
    out = []
    for _ in range(steps):
        rows = []
        for row in range(2):
            if draw(st.integers(0, 9)) == 0:
                rows.append((-1, []))
                continue
            tails[row] = min(tails[row] + draw(st.integers(0, 1)), BLOCKS - 1)
            size = draw(st.integers(0, min(WIDTH - 1, tails[row])))
            past = draw(st.permutations(range(tails[row])))[:size]
            rows.append((tails[row], sorted([*past, tails[row]])))
        out.append(rows)
    return out


@hypothesis.given(histories(), st.integers(WIDTH, SLOTS + 2))
@hypothesis.settings(max_examples=60)
def test_a_plan_makes_the_choice_resident_and_never_takes_a_chosen_slot(history, slots):
    pool = empty_pool(batch=2, slots=slots)
    for step, rows in enumerate(history, start=1):
        own = jnp.array([tail for tail, _ in rows], jnp.int32)
        ids = choice(*(blocks for _, blocks in rows))
        plan, after = plan_once(ids, pool, own, jnp.int32(step))
        for row, (tail, blocks) in enumerate(rows):
            before = {b: s for s, b in enumerate(pool.slot_blocks[row, 0].tolist()) if b >= 0}
            held = [b for b in after.slot_blocks[row, 0].tolist() if b >= 0]
            assert len(held) == len(set(held))  # no block twice
            table = after.table[row, 0].tolist()
            assert sorted(b for b in range(BLOCKS) if table[b] >= 0) == sorted(held)
            assert all(after.slot_blocks[row, 0, table[b]] == b for b in held)

            records, to = np.asarray(plan.misses)[:, : int(plan.miss_count[0])]
            mine = records // BLOCKS == row  # one KV head: record row · M + block
            fetched = (records[mine] % BLOCKS).tolist()
            resident = set(blocks) & set(before)
            missing = set(blocks) - set(before)
            assert set(fetched) == missing - {tail}
            assert resident | missing == set(blocks)
            assert all(before[b] == table[b] for b in resident)  # nothing chosen was moved
            targets = (to[mine] - row * slots).tolist()
            assert len(targets) == len(set(targets))
            assert all(0 <= slot < slots for slot in targets)
            assert targets == [table[b] for b in fetched]
            assert [table[b] for b in blocks] == plan.places.slots[row, 0, : len(blocks)].tolist()
            assert int(plan.places.tail[row, 0]) == (table[tail] if blocks else -1)
        counts = plan.counts.tolist()
        chosen = sum(len(blocks) for _, blocks in rows)
        assert counts[0] + counts[1] == chosen
        pool = after
