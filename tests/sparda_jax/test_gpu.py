# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: fused attention by cuDNN, and offloading to page-locked memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.attention import attend_fused, attend_masked
from sparda_jax.config import SparseConfig
from sparda_jax.generate import generate
from sparda_jax.testing import tiny_model

pytestmark = pytest.mark.gpu


def test_fused_attention_and_its_gradients_agree_with_the_mask(key):
    keys = jax.random.split(key, 4)
    shapes = ((2, 1024, 8, 32), (2, 1024, 2, 32), (2, 1024, 2, 32))
    q, k, v = (jax.random.normal(keys[i], shapes[i], jnp.bfloat16) for i in range(3))
    own = jnp.arange(1024)[None, :, None, None] // 16 == jnp.arange(64)[None, None, None, :]
    blocks = (jax.random.uniform(keys[3], (2, 1024, 2, 64)) < 0.3) | own
    positions = jnp.broadcast_to(jnp.arange(1024)[None, :], (2, 1024))

    def fused(*args):
        return jnp.sum(jnp.square(attend_fused(*args, blocks, block_size=16).astype(jnp.float32)))

    def masked(*args):
        out = attend_masked(*args, blocks, positions, block_size=16)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    got = jax.jit(jax.value_and_grad(fused, argnums=(0, 1, 2)))(q, k, v)
    want = jax.jit(jax.value_and_grad(masked, argnums=(0, 1, 2)))(q, k, v)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-3)
    for mine, theirs in zip(got[1], want[1], strict=True):
        error = jnp.linalg.norm((mine - theirs).astype(jnp.float32))
        assert float(error / jnp.linalg.norm(theirs.astype(jnp.float32))) < 1e-2


def test_offloaded_is_resident_token_for_token_on_a_gpu():
    sparse = SparseConfig(
        block_size=16,
        pool_size=8,
        pool_stride=4,
        local_blocks=2,
        selected_blocks=6,
        dense_below=0,
    )
    model = tiny_model(head_dim=32, sparse=sparse)  # shapes that the kernels take
    prompts = [(list(range(1, 60)) * 4)[:200], list(range(5, 25)), [7, 9]]
    runs = [
        generate(model, prompts, max_new_tokens=120, kv=place) for place in ("resident", "offload")
    ]
    assert runs[0].tokens == runs[1].tokens
    assert runs[1].traffic.fetched.sum() > 0
