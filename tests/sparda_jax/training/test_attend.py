# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Reading listed blocks under a mask is reading them by gathering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.attention import attend_chosen
from sparda_jax.selection import block_mask
from sparda_jax.training.attend import attend_listed, map_spans, mark_blocks


@pytest.mark.parametrize("tile", [8, 30, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_masked_tiles_attend_as_gathered_blocks_do(key, tile, has_bias):
    parts = jax.random.split(key, 5)
    q = jax.random.normal(parts[0], (2, 45, 4, 8))
    k, v = (jax.random.normal(part, (2, 45, 2, 8)) for part in parts[1:3])
    ids = jnp.sort(jax.random.permutation(parts[3], jnp.arange(6))[:3])
    ids = jnp.broadcast_to(ids, (2, 45, 2, 3)).at[0, 5:9, 1].set(-1)
    at = jnp.stack([jnp.arange(45), jnp.where(jnp.arange(45) < 31, jnp.arange(45), -1)])
    bias = jax.random.normal(parts[4], (2, 45, 2)) if has_bias else None
    listed = functools.partial(attend_listed, block_size=8, tile=tile)
    found = jax.jit(listed)(q, k, v, ids, at, bias)
    wanted = jax.jit(functools.partial(attend_chosen, block_size=8))(q, k, v, ids, at, bias)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert not np.asarray(found[1, 31:]).any()


def test_marks_are_those_of_the_block_mask(key):
    ids = jax.random.randint(key, (2, 5, 2, 4), -1, 9)
    np.testing.assert_array_equal(mark_blocks(ids, 9), block_mask(ids, 9))


@pytest.mark.parametrize("spans", [None, 1, 3])
def test_a_span_bounds_the_positions_of_its_tiles_and_order_is_kept(spans):
    bounds = []

    def double(rows, end):
        bounds.append(end)
        return 2 * rows, jnp.full(rows.shape, end)

    doubled, ends = map_spans(double, jnp.arange(50)[None], 8, -1, spans=spans)
    np.testing.assert_array_equal(doubled[0], 2 * np.arange(50))
    assert (np.asarray(ends[0]) > np.arange(50)).all()
    assert sorted(set(bounds)) == ([16, 33, 50] if spans == 3 else [50])
