# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: fused attention by cuDNN, and offloading to page-locked memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.attention import attend_fused, attend_masked
from sparda_jax.batcher import Batcher
from sparda_jax.config import SparseConfig
from sparda_jax.generate import generate
from sparda_jax.session import Session
from sparda_jax.shipped import heldout_texts, load_shipped
from sparda_jax.testing import assert_within_reference_rounding, tiny_model
from sparda_jax.tokenizer import ByteTokenizer

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


@pytest.mark.parametrize("mode", ["sparda", "sparse"])
def test_offloaded_is_resident_token_for_token_on_a_gpu(mode):
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
        generate(model, prompts, mode=mode, max_new_tokens=120, kv=place)
        for place in ("resident", "offload")
    ]
    assert runs[0].tokens == runs[1].tokens
    assert runs[1].traffic.fetched.sum() > 0


@pytest.mark.parametrize("host_dtype", ["int8", "float8_e4m3fn"])
def test_packed_records_give_the_same_tokens_by_both_ways_on_a_gpu(host_dtype):
    prompts = [tokens[:1500] for tokens in documents()]
    options = {"max_new_tokens": 64, "kv": "offload", "slots": 32, "host_dtype": host_dtype}
    model = load_shipped("bfloat16")
    runs = [generate(model, prompts, fetch=fetch, **options) for fetch in FETCHES]
    assert runs[0].tokens == runs[1].tokens
    assert runs[0].traffic.fetched.sum() > 0


LENGTHS = (4000, 1203, 7100)
NEW = 304  # 19 blocks of 16
FETCHES = ("in_graph", "device_put")
WAYS = (("resident", None), *(("offload", fetch) for fetch in FETCHES))


def documents():
    """Give three held-out texts cut to ragged lengths."""
    tokenizer, texts = ByteTokenizer(), heldout_texts()
    found = []
    for text, length in zip(texts, LENGTHS, strict=False):
        tokens = tokenizer.encode((text.data * 8)[:length].decode(errors="ignore"))
        found.append(tokens[:length])
    return found


def test_all_ways_give_the_shipped_model_the_same_300_tokens_in_float32():
    model = load_shipped("float32")
    with jax.default_matmul_precision("highest"):
        runs = [
            generate(model, documents(), max_new_tokens=NEW, kv=kv, fetch=fetch)
            for kv, fetch in WAYS
        ]
    for other in runs[1:]:
        assert other.tokens == runs[0].tokens
        assert other.traffic.fetched.sum() > 0
    np.testing.assert_array_equal(runs[1].traffic.fetched, runs[2].traffic.fetched)


def test_all_ways_choose_and_score_alike_in_bfloat16_when_fed_the_same_tokens():
    given = np.random.default_rng(0).integers(97, 123, (NEW, len(LENGTHS)))
    logits, ids = {}, {}
    for dtype in ("bfloat16", "float32"):
        model = load_shipped(dtype)
        for kv, fetch in WAYS if dtype == "bfloat16" else WAYS[:1]:
            with (
                jax.default_matmul_precision("highest"),
                Session(model, documents(), max_new_tokens=NEW, kv=kv, fetch=fetch) as session,
            ):
                session.prefill()
                out, chosen = [], []
                for step in range(NEW):
                    out.append(session.step(given[step]))
                    chosen.append(session.choices)
                logits[dtype, fetch] = np.stack([np.asarray(x) for x in out])
                ids[dtype, fetch] = np.array(jax.device_get(chosen))
    plain, exact = ("bfloat16", None), logits["float32", None]
    for way in (("bfloat16", "in_graph"), ("bfloat16", "device_put")):
        rows = np.all(ids[way] == ids[plain], axis=-1)
        assert rows.mean() >= 0.999
        assert_within_reference_rounding(logits[way], logits[plain], exact)


def test_a_batcher_with_the_cache_in_host_memory_gives_what_each_request_gets_alone():
    model = load_shipped("float32")
    prompts = [*documents(), documents()[1][:500]]
    with jax.default_matmul_precision("highest"):
        alone = [generate(model, [p], max_new_tokens=40).tokens[0] for p in prompts]
        with Batcher(model, 2, prompt_tokens=7100, max_new_tokens=40, kv="offload") as batcher:
            batcher.submit_all(prompts)
            found = {done.request: done.tokens for done in batcher.run()}
    assert [found[number] for number in range(len(prompts))] == alone
