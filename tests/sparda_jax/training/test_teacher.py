# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The teacher against loops; recall and overlap by numbers that a hand can check."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.config import SparseConfig
from sparda_jax.testing import tiny_config
from sparda_jax.training.teacher import (
    align_mass,
    block_mass,
    fine_keys,
    fine_mass,
    is_own_query,
    normalise,
    overlap_rows,
    recall_rows,
    rows_with_a_choice,
    teacher_cells,
)

TINY = tiny_config().sparse


def mass_by_loops(q, k, length, size, stride):
    """Fine mass of one sequence: [K T fine], f64."""
    queries, heads, dim = q.shape
    kv_heads = k.shape[1]
    count = (length - size) // stride + 1
    mass = np.zeros((kv_heads, queries, count))
    for head in range(heads):
        kv = head // (heads // kv_heads)
        for t in range(length):
            starts = [stride * u for u in range(count) if stride * u <= t]
            logits = [q[t, head] @ k[s : s + size, kv].mean(0) / np.sqrt(dim) for s in starts]
            weights = np.exp(np.array(logits) - max(logits))
            mass[kv, t, : len(starts)] += weights / weights.sum()
    return mass


@pytest.mark.parametrize(("size", "stride"), [(2, 1), (3, 1), (4, 2)])
def test_fine_mass_is_the_summed_softmax_over_fine_keys_that_have_started(size, stride):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 12, 4, 8)), rng.normal(size=(2, 12, 2, 8))
    sparse = SparseConfig(teacher_pool_size=size, teacher_pool_stride=stride, pool_stride=16)
    lengths = np.array([12, 9])
    at = np.where(np.arange(12)[None] < lengths[:, None], np.arange(12)[None], -1)
    f32 = [jnp.asarray(x, jnp.float32) for x in (q, k)]
    mass = fine_mass(
        f32[0], fine_keys(f32[1], sparse), jnp.asarray(at), jnp.asarray(lengths), sparse
    )
    for row, length in enumerate(lengths):
        wanted = mass_by_loops(q[row], k[row], length, size, stride)
        found = np.asarray(mass[row])
        np.testing.assert_allclose(found[..., : wanted.shape[-1]], wanted, atol=2e-6)
        assert not found[..., wanted.shape[-1] :].any()
        assert not found[:, length:].any()


@pytest.mark.parametrize("mode", ["max", "mean"])
@pytest.mark.parametrize(("ratio", "given"), [(1, 7), (2, 13), (4, 30), (4, 17)])
def test_alignment_looks_at_the_fine_keys_around_each_cell(mode, ratio, given):
    sparse = SparseConfig(
        block_size=16,
        pool_size=16,
        pool_stride=8,
        teacher_pool_size=2,
        teacher_pool_stride=8 // ratio,
        teacher_alignment=mode,
        dense_below=0,
    )
    mass = np.random.default_rng(1).uniform(size=(1, 2, 3, given)).astype(np.float32)
    count = 6
    found = align_mass(jnp.asarray(mass), count, sparse)
    for c in range(count):
        if ratio == 1:
            wanted = mass[..., c]
        else:
            near = [u for u in range(ratio * c - 1, ratio * c + ratio) if 0 <= u < given]
            picked = mass[..., near] if near else np.zeros((*mass.shape[:3], 1), np.float32)
            wanted = picked.max(-1) if mode == "max" else picked.sum(-1) / (ratio + 1)
        np.testing.assert_allclose(found[:, :, :, c], wanted.transpose(0, 2, 1), atol=1e-6)


def test_fine_keys_beyond_a_tiles_bound_are_not_needed():
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.normal(size=(1, 40, 4, 8)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(1, 40, 2, 8)), jnp.float32)
    config = tiny_config()
    at, lengths = jnp.arange(40)[None], jnp.array([40])
    pooled = fine_keys(k, SparseConfig(teacher_pool_size=4, teacher_pool_stride=2))
    fine = fine_keys(k, config.sparse)
    whole = teacher_cells(q, fine, pooled, at, lengths, config)
    part = teacher_cells(q[:, :20], fine[:, :20], pooled, at[:, :20], lengths, config)
    np.testing.assert_allclose(part, whole[:, :20], atol=1e-7)


def test_a_teacher_on_the_pooled_grid_is_the_own_query_score():
    assert not is_own_query(TINY)
    own = SparseConfig(pool_size=4, pool_stride=2, teacher_pool_size=4, teacher_pool_stride=2)
    assert is_own_query(own)
    config = tiny_config(
        sparse=SparseConfig(
            block_size=8,
            pool_size=4,
            pool_stride=2,
            local_blocks=1,
            selected_blocks=5,
            dense_below=0,
            teacher_pool_size=4,
            teacher_pool_stride=2,
        )
    )
    key = jax.random.key(0)
    q = jax.random.normal(key, (1, 10, 4, 8))
    pooled = jax.random.normal(key, (1, 4, 2, 8))
    cells = teacher_cells(q, pooled, pooled, jnp.arange(10)[None], jnp.array([10]), config)
    sums = np.asarray(cells.sum(-1))[0]
    assert not sums[:3].any()  # the first window ends at token 3
    np.testing.assert_allclose(sums[3:], config.group, rtol=1e-6)


def test_a_normalised_row_sums_to_one_and_an_empty_one_stays_empty():
    cells = jnp.zeros((1, 2, 1, 4)).at[0, 0, 0].set(jnp.array([1.0, 2.0, 3.0, 2.0]))
    rows = normalise(cells)
    np.testing.assert_allclose(rows[0, 0, 0], [0.125, 0.25, 0.375, 0.25], atol=1e-6)
    assert not np.asarray(rows[0, 1]).any()


def test_block_mass_sums_the_cells_that_start_in_a_block():
    cells = jnp.arange(1.0, 8.0).reshape(1, 1, 1, 7)
    mass = block_mass(cells, 2, TINY)  # four cells a block; the eighth does not exist
    np.testing.assert_allclose(mass.ravel(), [10 / 28, 18 / 28], rtol=1e-6)


def marks(blocks, count):
    return jnp.zeros((1, 1, 1, count), bool).at[0, 0, 0, jnp.array(blocks)].set(True)


def test_recall_is_the_mass_of_free_blocks_over_the_best_of_as_many():
    # Query 60 owns block 7; pinned are 0, 6, 7; of 1 … 5 a choice has two places.
    mass = jnp.array([0.3, 0.05, 0.1, 0.02, 0.2, 0.08, 0.15, 0.1]).reshape(1, 1, 1, 8)
    at = jnp.array([[60]])
    held, best = recall_rows(mass, marks([0, 1, 4, 6, 7], 8), at, TINY)
    assert float(held[0, 0, 0]) == pytest.approx(0.25)
    assert float(best[0, 0, 0]) == pytest.approx(0.30)
    held, best = recall_rows(mass, marks([0, 2, 4, 6, 7], 8), at, TINY)
    assert float(held[0, 0, 0]) == pytest.approx(float(best[0, 0, 0]))


def test_queries_that_see_no_more_than_the_budget_are_not_counted():
    at = jnp.array([[39, 40, -1]])  # five blocks are the budget; 40 is in the sixth
    assert rows_with_a_choice(at, TINY)[0].tolist() == [False, True, False]
    mass = jnp.full((1, 3, 1, 8), 0.125)
    chosen = jnp.ones((1, 3, 1, 8), bool)
    held, best = recall_rows(mass, chosen, at, TINY)
    assert [bool(x) for x in best[0, :, 0]] == [False, True, False]
    assert [bool(x) for x in held[0, :, 0]] == [False, True, False]
    assert [float(x) for x in overlap_rows(chosen, chosen, at, TINY)[1][0, :, 0]] == [0, 3, 0]


def test_overlap_leaves_pinned_blocks_out():
    at = jnp.array([[60]])
    both, either = overlap_rows(marks([0, 1, 4, 6, 7], 8), marks([0, 2, 4, 6, 7], 8), at, TINY)
    assert (float(both[0, 0, 0]), float(either[0, 0, 0])) == (1, 3)
