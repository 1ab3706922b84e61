# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Slots of a layer: seeding from a prompt, appending, inserting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.chunk import LayerCache
from sparda_jax.kv.state import (
    append_tokens,
    insert_records,
    join_layers,
    seed_resident,
    seed_slots,
    take_tail,
)

BLOCK, BLOCKS = 4, 6
LENGTHS = jnp.array([22, 9], jnp.int32)
CHOSEN = jnp.array([[[0, 2, 5], [0, 1, 5]], [[0, 2, -1], [1, 2, -1]]], jnp.int32)


@pytest.fixture
def cache(key):
    shape = (2, BLOCK * BLOCKS, 2, 3)
    keys = jax.random.split(key, 3)
    return LayerCache(
        k=jax.random.normal(keys[0], shape),
        v=jax.random.normal(keys[1], shape),
        importance=jax.random.normal(keys[2], shape[:3]),
        summary=None,
    )


def record(cache, row, head, block):
    """Cut one record out of a cache by hand."""
    tokens = slice(block * BLOCK, (block + 1) * BLOCK)
    return np.stack([np.asarray(x[row, tokens, head]) for x in (cache.k, cache.v)])


def seeded(cache, slots):
    return seed_slots(cache, CHOSEN, LENGTHS, slots=slots, block_size=BLOCK)


def test_every_block_stands_in_its_own_slot_when_resident(cache):
    kv = seed_resident(cache, block_size=BLOCK)
    assert kv.pool is None
    for row, head, block in np.ndindex(2, 2, BLOCKS):
        np.testing.assert_array_equal(kv.slots[row, head, block], record(cache, row, head, block))
        bias = cache.importance[row, block * BLOCK : (block + 1) * BLOCK, head]
        np.testing.assert_array_equal(kv.importance[row, head, block], bias)


def test_seeding_takes_the_choice_first_and_then_the_newest_blocks(cache):
    pool = seeded(cache, 4).pool
    assert pool.slot_blocks[0].tolist() == [[0, 2, 4, 5], [0, 1, 4, 5]]
    assert pool.ages[0].tolist() == [[0, 0, 4 - BLOCKS, 0], [0, 0, 4 - BLOCKS, 0]]


def test_a_short_prompt_leaves_slots_empty_and_old(cache):
    pool = seeded(cache, 4).pool
    assert pool.slot_blocks[1].tolist() == [[0, 1, 2, -1], [0, 1, 2, -1]]
    assert np.all(np.asarray(pool.ages[1, :, 3]) < -BLOCKS)


def test_an_empty_row_seeds_nothing(cache):
    none = jnp.full_like(CHOSEN, -1)
    pool = seed_slots(cache, none, jnp.zeros(2, jnp.int32), slots=4, block_size=BLOCK).pool
    assert np.all(np.asarray(pool.slot_blocks) == -1)
    assert np.all(np.asarray(pool.table) == -1)


def test_table_and_slots_of_a_seeded_layer_agree(cache):
    kv = seeded(cache, 4)
    for row, head, slot in np.ndindex(2, 2, 4):
        block = int(kv.pool.slot_blocks[row, head, slot])
        if block >= 0:
            assert int(kv.pool.table[row, head, block]) == slot
            want = record(cache, row, head, block)
            np.testing.assert_array_equal(kv.slots[row, head, slot], want)
    held = np.asarray(kv.pool.table) >= 0
    assert held.sum() == (np.asarray(kv.pool.slot_blocks) >= 0).sum()


def test_a_new_token_changes_its_place_and_nothing_else(cache):
    before = seed_resident(cache, block_size=BLOCK)
    k, v = jnp.full((2, 1, 2, 3), 7.0), jnp.full((2, 1, 2, 3), 8.0)
    tail = jnp.array([[5, 5], [-1, -1]], jnp.int32)
    after = append_tokens(before, k, v, jnp.full((2, 1, 2), 9.0), tail, jnp.array([22, -1]))
    want, bias = np.array(before.slots), np.array(before.importance)
    want[0, :, 5, 0, 2], want[0, :, 5, 1, 2], bias[0, :, 5, 2] = 7.0, 8.0, 9.0
    np.testing.assert_array_equal(after.slots, want)
    np.testing.assert_array_equal(after.importance, bias)


def test_inserted_records_land_in_their_slots_and_padding_is_dropped(key):
    slots = jnp.zeros((2, 2, 3, 2, BLOCK, 3))
    records = jax.random.normal(key, (3, 2, BLOCK, 3))
    places = jnp.array([1 * 6 + 0 * 3 + 2, 1, 12], jnp.int32)  # (1, 0, 2), (0, 0, 1), nowhere
    after = insert_records(slots, records, places)
    want = np.zeros(slots.shape, np.float32)
    want[1, 0, 2], want[0, 0, 1] = records[0], records[1]
    np.testing.assert_array_equal(after, want)


def test_the_tail_is_read_from_its_slot(cache):
    kv = seed_resident(cache, block_size=BLOCK)
    tails = take_tail(kv.slots, jnp.array([[5, 4], [2, -1]], jnp.int32))
    np.testing.assert_array_equal(tails[0, 1], record(cache, 0, 1, 4))
    np.testing.assert_array_equal(tails[1, 0], record(cache, 1, 0, 2))


def test_groups_of_rows_join_in_order(cache):
    whole = seeded(cache, 4)
    halves = [[jax.tree.map(lambda x, i=i: x[i : i + 1], whole)] for i in range(2)]
    (joined,) = join_layers(halves)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)
    assert join_layers([[whole]])[0] is whole
