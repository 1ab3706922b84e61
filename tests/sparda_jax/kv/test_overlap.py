# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What makes a fetch run beside matmuls, as far as a machine without a GPU can tell."""

import jax
import jax.numpy as jnp
import pytest

from sparda_jax.kv import overlap
from sparda_jax.kv.overlap import (
    CONCURRENT_COMMANDS,
    SERIAL_COMMANDS,
    begin_graph,
    compiler_options,
    fetch_first,
    graphs_of_step,
    hold_lists,
)
from sparda_jax.kv.plan import FetchPlan, Places


def test_only_a_gpu_gets_compiler_options(monkeypatch):
    assert compiler_options() is None
    monkeypatch.setattr(overlap.jax, "default_backend", lambda: "gpu")
    assert compiler_options() == CONCURRENT_COMMANDS
    assert compiler_options() is not CONCURRENT_COMMANDS
    assert compiler_options(is_concurrent=False) == SERIAL_COMMANDS


def test_the_fetch_and_the_work_pass_one_barrier_unchanged():
    x, slots = jnp.arange(3.0), jnp.ones((2, 2))
    text = jax.jit(fetch_first).lower(x, slots).as_text()
    assert text.count("optimization_barrier") == 1
    got = jax.jit(fetch_first)(x, slots)
    assert jnp.array_equal(got[0], x)
    assert jnp.array_equal(got[1], slots)


def test_only_a_gpu_runs_a_step_as_several_graphs(monkeypatch):
    assert graphs_of_step() == 1
    monkeypatch.setattr(overlap.jax, "default_backend", lambda: "gpu")
    assert graphs_of_step() > 1


def test_a_loop_that_xla_keeps_stands_between_two_graphs():
    x, step = jnp.arange(3.0), jnp.int32(41)
    program = jax.jit(begin_graph).lower(x, step).compile()
    assert " while(" in (program.as_text() or "")
    got = program(x, step)
    assert jnp.array_equal(got[0], x)
    assert int(got[1]) == 42


def make_plan(misses, count):
    tail = jnp.array([[3, 1], [-1, -1]])
    places = Places(ids=jnp.arange(8).reshape(2, 2, 2), slots=jnp.zeros((2, 2, 2), int), tail=tail)
    counts = jnp.zeros((3,), int)
    return FetchPlan(
        places=places, misses=jnp.array(misses), miss_count=jnp.array([count]), counts=counts
    )


@pytest.mark.parametrize("misses", [[[5, -1], [0, -1]], [[-1, -1], [-1, -1]]])
def test_holding_the_lists_of_a_fetch_changes_no_place(misses):
    plan = make_plan(misses, 1)
    held = jax.jit(hold_lists)(plan)
    for got, wanted in zip(jax.tree.leaves(held), jax.tree.leaves(plan.places), strict=True):
        assert jnp.array_equal(got, wanted)


@pytest.mark.parametrize("lists", [([[-2], [0]], 1), ([[0], [-2]], 1), ([[0], [0]], -1)])
def test_the_tail_is_read_from_all_lists_of_the_fetch(lists):
    assert (hold_lists(make_plan(*lists)).tail == -1).all()  # no plan has such lists


@pytest.mark.gpu
@pytest.mark.parametrize("is_concurrent", [True, False])
def test_gpu_xla_knows_the_options(is_concurrent):
    options = compiler_options(is_concurrent=is_concurrent)
    run = jax.jit(lambda x: x @ x, compiler_options=options)
    assert float(run(jnp.ones((64, 64)))[0, 0]) == 64.0
