# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Records of one byte a number: how far they are off, and that every way to fetch reads them so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.batcher import Batcher
from sparda_jax.generate import generate
from sparda_jax.kv.pack import pack_records, unpack_records
from sparda_jax.session import Session
from sparda_jax.testing import tiny_config, tiny_model

DTYPES = ("int8", "float8_e4m3fn")
FETCHES = ("in_graph", "device_put")
LENGTHS = (61, 18)


@pytest.fixture(scope="module")
def small():
    """Make one small model, so that its programs are compiled once."""
    return tiny_model(layers=2)


def prompts():
    return [np.random.default_rng(n).integers(0, 64, n).tolist() for n in LENGTHS]


def replay(session, steps):
    """Feed given tokens; logits [steps+1 B V]."""
    out = [np.asarray(session.prefill())]
    out += [np.asarray(session.step(np.full((2,), step % 64))) for step in range(steps)]
    return np.stack(out)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 1e-4, 1e4])
def test_a_number_is_off_by_half_a_step_at_most(key, dtype, spread):
    records = jax.random.normal(key, (3, 2, 2, 8, 16)) * spread
    packed, scales = pack_records(records, dtype)
    assert (packed.dtype, scales.shape) == (jnp.dtype(dtype), (3, 2, 2))
    got = np.asarray(unpack_records(packed, scales, jnp.dtype("float32")))
    wide, scale = np.asarray(records), np.asarray(scales)[..., None, None]
    step = scale * np.ones_like(wide)
    if dtype == "float8_e4m3fn":  # 3 bits of mantissa, no finer than 2^-9
        step = np.maximum(2.0 ** (np.floor(np.log2(np.abs(wide / scale))) - 3), 2.0**-9) * scale
    assert (np.abs(got - wide) <= step * 0.5001).all()
    assert (np.abs(got - wide).max(axis=(-2, -1)) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_number_of_a_record_is_kept_and_zeros_are_zeros(dtype):
    records = jnp.zeros((1, 2, 4, 4)).at[0, 0, 1, 2].set(-3.7).at[0, 0, 0, 0].set(3.7)
    packed, scales = pack_records(records, dtype)
    got = np.asarray(unpack_records(packed, scales, jnp.dtype("float32")))
    np.testing.assert_allclose(got[0, 0, 1, 2], -3.7, rtol=1e-6)
    np.testing.assert_allclose(got[0, 0, 0, 0], 3.7, rtol=1e-6)
    np.testing.assert_array_equal(got[0, 1], 0.0)
    assert float(scales[0, 1]) == 1.0


def test_keys_and_values_have_scales_of_their_own():
    records = jnp.stack([jnp.full((4, 4), 1e-3), jnp.full((4, 4), 1e3)])[None]
    packed, scales = pack_records(records, "int8")
    np.testing.assert_array_equal(np.abs(packed), 127)
    np.testing.assert_allclose(scales, [[1e-3 / 127, 1e3 / 127]], rtol=1e-6)


# --- a batch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_to_fetch_read_the_same_records(small, dtype):
    options = {"max_new_tokens": 40, "kv": "offload", "slots": 5, "host_dtype": dtype}
    want, got = (generate(small, prompts(), fetch=fetch, **options) for fetch in FETCHES)
    assert got.tokens == want.tokens
    np.testing.assert_array_equal(got.traffic.fetched, want.traffic.fetched)
    assert got.traffic.fetched.sum() > 0
    config = small.config
    assert got.traffic.record_bytes == 2 * config.sparse.block_size * config.head_dim


@pytest.mark.parametrize("fetch", FETCHES)
def test_a_block_that_never_left_its_slot_is_exact(small, fetch):
    options = {"max_new_tokens": 40, "kv": "offload", "fetch": fetch, "slots": 13}
    with Session(small, prompts(), host_dtype="int8", **options) as session:
        got = replay(session, 36)
        assert session.traffic().fetched.sum() == 0
    with Session(small, prompts(), max_new_tokens=40, kv="resident") as session:
        np.testing.assert_array_equal(got, replay(session, 36))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fetch", FETCHES)
def test_what_is_fetched_is_what_was_packed(small, fetch, dtype):
    """Packed by hand in the host memory of a plain session, the same logits come out."""
    options = {"max_new_tokens": 40, "kv": "offload", "fetch": fetch, "slots": 5}
    with Session(small, prompts(), host_dtype=dtype, **options) as session:
        got = replay(session, 6)
        assert session.traffic().fetched.sum() > 0
    with Session(small, prompts(), **options) as session:
        session.prefill()
        for layer in range(2):
            view = session._host.view(layer)
            packed, scales = pack_records(jnp.asarray(view.copy()), dtype)
            view[...] = np.asarray(unpack_records(packed, scales, jnp.dtype("float32")))
        steps = [np.asarray(session.step(np.full((2,), step))) for step in range(6)]
    np.testing.assert_array_equal(got[1:], np.stack(steps))
    with Session(small, prompts(), **options) as session:
        assert np.any(replay(session, 6)[1:] != got[1:])


@pytest.mark.parametrize("fetch", FETCHES)
def test_a_block_that_is_completed_is_packed_with_a_scale_of_its_own(small, fetch):
    options = {"max_new_tokens": 40, "kv": "offload", "fetch": fetch, "slots": 13}
    with Session(small, prompts(), host_dtype="int8", **options) as session:
        replay(session, 36)
        lengths = session.lengths
        for layer, kv in enumerate(session._decoder.state.layers):
            host, scales = jnp.asarray(session._host.view(layer).copy()), kv.scales
            held = np.asarray(unpack_records(host, scales, jnp.dtype("float32")))
            for row, length in enumerate(lengths):
                for block in range(length // 8):
                    want = np.asarray(kv.slots[row, :, np.asarray(kv.pool.table[row, 0, block])])
                    error = np.abs(held[row, :, block] - want).max(axis=(-2, -1))
                    assert (error <= np.asarray(scales[row, :, block]) * 0.5001).all()


@pytest.mark.parametrize("fetch", FETCHES)
def test_a_request_of_a_batcher_gets_what_it_gets_alone(small, fetch):
    options = {"kv": "offload", "fetch": fetch, "slots": 5, "host_dtype": "float8_e4m3fn"}
    want = [
        generate(small, [prompt], max_new_tokens=20, **options).tokens[0]
        for prompt in [*prompts(), [5, 6, 7]]
    ]
    with Batcher(small, 2, prompt_tokens=61, max_new_tokens=20, **options) as batcher:
        for prompt in [*prompts(), [5, 6, 7]]:
            batcher.submit(prompt)
        got = {done.request: done.tokens for done in batcher.run()}
    assert [got[request] for request in range(3)] == want


def test_what_cannot_be_packed_is_refused(small):
    with pytest.raises(ValueError, match=r"unknown host_dtype='int4'; known: int8, float8_e4m3fn"):
        generate(small, prompts(), max_new_tokens=1, kv="offload", host_dtype="int4")
    with pytest.raises(ValueError, match=r"host_dtype='int8' has nothing to pack: .*kv='auto'"):
        generate(small, prompts(), max_new_tokens=1, host_dtype="int8")


def test_the_host_holds_a_byte_a_number(small):
    sizes = []
    for dtype in (None, "int8"):
        with Session(
            small, prompts(), max_new_tokens=3, kv="offload", slots=5, host_dtype=dtype
        ) as session:
            session.prefill()
            sizes.append(session._host.nbytes)
            tables = session.device_kv_bytes()["tables"]
    assert sizes[0] == 4 * sizes[1]
    blocks = tiny_config().sparse.blocks(session.capacity)
    pool = 2 * 2 * 2 * (blocks + 2 * 5) * 4
    assert tables == pool + 2 * 2 * 2 * blocks * 2 * 4
