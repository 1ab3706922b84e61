# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The loss against loops and against automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.pooling import LOWEST
from sparda_jax.testing import tiny_config
from sparda_jax.training.loss import (
    counted_rows,
    forecast_kl,
    kl_rows,
    kl_slope,
    student_probs,
    supervised_cells,
    visible_to_student,
)

SPARSE = tiny_config().sparse
FLOOR = 1e-8


def rows_of(key, *, batch=2, queries=40, heads=2, cells=18, sharp=2.0):
    """Random logits and a teacher over started cells, and random supervised cells."""
    parts = jax.random.split(key, 3)
    shape = (batch, queries, heads, cells)
    at = jnp.broadcast_to(jnp.arange(queries)[None], (batch, queries))
    seen = visible_to_student(at, jnp.full((batch,), queries), cells, SPARSE)
    logits = sharp * jax.random.normal(parts[0], shape)
    teacher = jnp.where(seen[:, :, None], jax.random.uniform(parts[1], shape), 0.0)
    kept = (jax.random.uniform(parts[2], shape) < 0.3) & seen[:, :, None]
    return logits, seen, teacher, kept


def kl_by_loops(logits, seen, teacher, kept, entries):
    """KL of one row, f64, from the vectors themselves."""
    visible = np.flatnonzero(seen)
    student = np.zeros(len(logits))
    if visible.size:
        weights = np.exp(logits[visible] - logits[visible].max())
        student[visible] = weights / weights.sum()
    target = teacher / (teacher.sum() + FLOOR)

    def vector(mass):
        listed = [mass[c] for c in np.flatnonzero(kept)]
        rest = max(0.0, mass.sum() - sum(listed))
        row = np.array([*listed, *[0.0] * (entries - 1 - len(listed)), rest])
        row = np.maximum(row, FLOOR)
        return row / row.sum()

    y, p = vector(target), vector(student)
    return float((y * (np.log(y) - np.log(p))).sum())


def test_the_divergence_of_every_row_is_that_of_the_vectors_written_out(key):
    logits, seen, teacher, kept = rows_of(key)
    found = np.asarray(kl_rows(student_probs(logits, seen), teacher, kept, 21))
    for index in np.ndindex(found.shape):
        b, t, h = index
        row = (np.asarray(x, np.float64)[b, t, h] for x in (logits, teacher))
        row_logits, row_teacher = row
        wanted = kl_by_loops(
            row_logits, np.asarray(seen)[b, t], row_teacher, np.asarray(kept)[index], 21
        )
        assert found[index] == pytest.approx(wanted, abs=3e-6)


def test_a_row_without_teacher_mass_compares_with_a_uniform_target():
    nothing = jnp.zeros((1, 1, 1, 4))
    seen = jnp.ones((1, 1, 4), bool)
    kept = jnp.zeros((1, 1, 1, 4), bool)
    found = float(kl_rows(student_probs(nothing, seen), nothing, kept, 25)[0, 0, 0])
    assert found == pytest.approx(-np.log(25) - 24 / 25 * np.log(1e-8), rel=1e-5)


@pytest.mark.parametrize("sharp", [1.0, 8.0, 40.0])
def test_the_slope_is_the_derivative_of_the_divergence(key, sharp):
    logits, seen, teacher, kept = rows_of(key, sharp=sharp)

    def total(logits):
        return jnp.sum(kl_rows(student_probs(logits, seen), teacher, kept, 21))

    wanted = jax.grad(total)(logits)
    found = kl_slope(student_probs(logits, seen), teacher, kept, 21)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert np.isfinite(np.asarray(found)).all()


def test_the_gradient_of_a_forecast_is_that_of_the_plain_formula(key):
    parts = jax.random.split(key, 3)
    forecast = jax.random.normal(parts[0], (2, 40, 2, 8))
    pooled = jax.random.normal(parts[1], (2, 18, 2, 8))
    _, seen, teacher, kept = rows_of(parts[2])
    at = jnp.broadcast_to(jnp.arange(40)[None], (2, 40))
    lengths = jnp.array([40, 40])
    counted = jnp.ones((2, 40, 2), bool).at[0, 7].set(False)

    def plain(forecast):
        logits = jnp.einsum("btkh,bckh->btkc", forecast, pooled) / jnp.sqrt(8.0)
        rows = kl_rows(
            jax.nn.softmax(jnp.where(seen[:, :, None], logits, LOWEST)), teacher, kept, 21
        )
        return jnp.sum(jnp.where(counted, rows, 0.0))

    rows, gradient = forecast_kl(
        forecast, pooled, teacher, kept, counted, at, lengths, SPARSE, width=5
    )
    value, wanted = jax.value_and_grad(plain)(forecast)
    assert float(rows.sum()) == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(gradient, wanted, atol=3e-6)
    assert not np.asarray(gradient)[0, 7].any()
    alone = forecast_kl(
        forecast,
        pooled,
        teacher,
        kept,
        counted,
        at,
        lengths,
        SPARSE,
        width=5,
        has_gradient=False,
    )
    np.testing.assert_array_equal(alone[0], rows)
    assert not np.asarray(alone[1]).any()


def test_a_forecast_that_is_the_teacher_has_neither_loss_nor_gradient(key):
    logits, seen, _, kept = rows_of(key, sharp=1.0)
    student = student_probs(logits, seen)
    kept &= seen.any(-1)[:, :, None, None]
    some = np.asarray(seen.any(-1))
    rows = np.asarray(kl_rows(student, 3.0 * student, kept, 21))
    slope = np.asarray(kl_slope(student, 3.0 * student, kept, 21))
    np.testing.assert_allclose(rows[some], 0.0, atol=1e-6)
    np.testing.assert_allclose(slope[some], 0.0, atol=1e-6)


def test_supervised_are_the_cells_of_listed_blocks_that_are_not_pinned():
    listed = jnp.zeros((1, 1, 1, 8), bool).at[0, 0, 0, jnp.array([0, 2, 4, 6, 7])].set(True)
    kept = supervised_cells(listed, jnp.array([[60]]), 31, SPARSE)  # pinned: 0, 6, 7
    assert np.flatnonzero(kept[0, 0, 0]).tolist() == [8, 9, 10, 11, 16, 17, 18, 19]
    padding = supervised_cells(listed, jnp.array([[-1]]), 31, SPARSE)
    assert not np.asarray(padding).any()


def test_the_student_sees_started_cells_that_its_sequence_fills():
    seen = visible_to_student(jnp.array([[0, 5, 11, -1]]), jnp.array([12]), 6, SPARSE)
    assert np.asarray(seen[0]).sum(-1).tolist() == [1, 3, 5, 0]


def test_rows_without_teacher_mass_count_only_where_the_original_counts_them():
    teacher = jnp.ones((1, 3, 1, 2)).at[0, 1].set(0.0)
    at = jnp.array([[0, 1, -1]])
    assert counted_rows(teacher, at, keep_empty=False)[0, :, 0].tolist() == [True, False, False]
    assert counted_rows(teacher, at, keep_empty=True)[0, :, 0].tolist() == [True, True, False]
