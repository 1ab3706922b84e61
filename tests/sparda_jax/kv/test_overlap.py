# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What makes a fetch run beside matmuls, as far as a machine without a GPU can tell."""

import jax
import jax.numpy as jnp
import pytest

from sparda_jax.kv import overlap
from sparda_jax.kv.overlap import CONCURRENT_COMMANDS, compiler_options, fetch_first


def test_only_a_gpu_gets_compiler_options(monkeypatch):
    assert compiler_options() is None
    monkeypatch.setattr(overlap.jax, "default_backend", lambda: "gpu")
    assert compiler_options() == CONCURRENT_COMMANDS
    assert compiler_options() is not CONCURRENT_COMMANDS


def test_the_fetch_and_the_work_pass_one_barrier_unchanged():
    x, slots = jnp.arange(3.0), jnp.ones((2, 2))
    text = jax.jit(fetch_first).lower(x, slots).as_text()
    assert text.count("optimization_barrier") == 1
    got = jax.jit(fetch_first)(x, slots)
    assert jnp.array_equal(got[0], x)
    assert jnp.array_equal(got[1], slots)


@pytest.mark.gpu
def test_gpu_xla_knows_the_options():
    run = jax.jit(lambda x: x @ x, compiler_options=compiler_options())
    assert float(run(jnp.ones((64, 64)))[0, 0]) == 64.0
