# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Offloaded decoding against its plain twin: the same tokens, the same choices, bounded memory."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.config import RopeConfig
from sparda_jax.generate import generate
from sparda_jax.kv import fetch_device_put
from sparda_jax.session import Session
from sparda_jax.testing import tiny_config, tiny_model

LENGTHS = (61, 18, 150)
NEW = 304  # 38 blocks of 8
SPARSE = tiny_config().sparse
MINICPM = {
    "embed_scale": 12.0,
    "residual_scale": 0.8,
    "logit_divisor": 4.0,
    "rope": RopeConfig(
        kind="longrope",
        original_max_positions=400,
        max_positions=1024,
        short_factor=(1.0, 1.1, 1.2, 1.3),
        long_factor=(1.0, 1.5, 2.0, 3.0),
    ),
}
NOSA = {
    "token_importance": True,
    "sparse": dataclasses.replace(SPARSE, query_blocks=2, selected_blocks=6),
}
LATE = {"layers": 2, "sparse": dataclasses.replace(SPARSE, local_blocks=0, selected_blocks=4)}
PLAIN = {"layers": 2}


WAYS = (("resident", None), ("offload", "device_put"), ("offload", "in_graph"))


@functools.cache
def model_of(name):
    model = tiny_model(**{"minicpm": MINICPM, "nosa": NOSA, "late": LATE, "plain": PLAIN}[name])
    for layer in model.layers:
        if layer.attention.importance_scale is not None:
            layer.attention.importance_scale[...] = jnp.array([0.9, -0.7])
    return model


def prompts(lengths=LENGTHS):
    return [np.random.default_rng(n).integers(0, 64, n).tolist() for n in lengths]


@functools.cache
def generated(name, kv, slots=None, fetch=None):
    return generate(model_of(name), prompts(), max_new_tokens=NEW, kv=kv, slots=slots, fetch=fetch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "slots", "fetch"),
    [
        ("minicpm", 5, "in_graph"),
        ("minicpm", None, "in_graph"),
        ("minicpm", 5, "device_put"),
        ("nosa", 6, "in_graph"),
        ("nosa", 13, "device_put"),
    ],
)
def test_offloaded_generation_gives_the_resident_tokens(name, slots, fetch):
    want = generated(name, "resident")
    got = generated(name, "offload", slots, fetch)
    assert got.tokens == want.tokens
    assert [len(tokens) for tokens in got.tokens] == [NEW] * 3
    assert all(len(set(tokens)) > 3 for tokens in got.tokens)
    assert got.traffic.fetched.sum() > 0
    assert got.traffic.evicted.sum() > 0
    np.testing.assert_array_equal(got.traffic.resident + got.traffic.fetched, want.traffic.resident)
    assert got.device_kv_bytes["slots"] < want.device_kv_bytes["slots"] == want.full_kv_bytes


@pytest.mark.slow
def test_more_slots_never_fetch_more():
    few, many = (generated("minicpm", "offload", slots, "in_graph").traffic for slots in (5, None))
    assert many.fetched.sum() < few.fetched.sum()
    assert many.hit_rate > few.hit_rate


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("plain", "sparse"), ("late", "sparda")])
def test_layers_that_choose_for_themselves_give_the_resident_tokens(name, mode):
    want, *others = (
        generate(model_of(name), prompts(), max_new_tokens=60, mode=mode, kv=kv, fetch=fetch)
        for kv, fetch in WAYS
    )
    for got in others:
        assert got.tokens == want.tokens
        assert got.traffic.fetched.sum() > 0
    np.testing.assert_array_equal(others[0].traffic.fetched, others[1].traffic.fetched)


@pytest.mark.slow
def test_bfloat16_is_bit_equal_too():
    model = tiny_model(dtype="bfloat16")
    logits = []
    for kv, fetch in WAYS:
        with Session(model, prompts(), max_new_tokens=20, kv=kv, fetch=fetch) as session:
            out = [session.prefill()]
            out += [session.step(np.full((3,), step)) for step in range(20)]
            logits.append(np.stack([np.asarray(x) for x in out]))
    np.testing.assert_array_equal(logits[1], logits[0])
    np.testing.assert_array_equal(logits[2], logits[0])


@pytest.fixture(scope="module")
def small():
    """Make one small model, so that its programs are compiled once."""
    return tiny_model(layers=2)


@pytest.mark.parametrize("fetch", ["device_put", "in_graph"])
def test_the_host_holds_every_completed_block_and_the_slots_agree_with_it(small, fetch):
    lengths = (21, 6)
    with Session(
        small, prompts(lengths), max_new_tokens=40, kv="offload", fetch=fetch, slots=5
    ) as session:
        session.prefill()
        for step in range(37):
            session.step(np.array([step, step + 1]))
        with Session(small, prompts(lengths), max_new_tokens=40, kv="resident") as twin:
            twin.prefill()
            for step in range(37):
                twin.step(np.array([step, step + 1]))
            for layer, (kv, full) in enumerate(
                zip(session._decoder.state.layers, twin._decoder.state.layers, strict=True)
            ):
                records, host = np.asarray(full.slots), session._host.view(layer)
                for row, held in enumerate(session.lengths):
                    done = held // 8
                    np.testing.assert_allclose(
                        host[row, :, :done], records[row, :, :done], atol=1e-5
                    )
                blocks = np.asarray(kv.pool.slot_blocks)
                for row, head, slot in np.ndindex(*blocks.shape):
                    block = blocks[row, head, slot]
                    if 0 <= block < session.lengths[row] // 8:
                        got = np.asarray(kv.slots)[row, head, slot]
                        np.testing.assert_array_equal(got, host[row, head, block])


@pytest.mark.parametrize("fetch", ["device_put", "in_graph"])
def test_the_first_step_fetches_only_what_is_new(small, fetch):
    with Session(
        small, prompts((150,)), max_new_tokens=2, kv="offload", fetch=fetch, slots=5
    ) as session:
        session.prefill()
        before = [set(np.ravel(kv.pool.slot_blocks[0, 0])) for kv in session._decoder.state.layers]
        session.step(np.array([1]))
        traffic = session.traffic_of(0)
        for layer, seeded in enumerate(before):
            chosen = {b for b in np.ravel(session.choices[layer][0, 0]).tolist() if b >= 0}
            assert len(chosen & {int(b) for b in seeded}) >= 3  # at least what is pinned
        assert traffic.fetched.sum() < 2 * 2 * 5


@pytest.mark.parametrize("fetch", ["device_put", "in_graph"])
def test_device_memory_grows_with_context_by_summaries_and_tables_only(small, fetch):
    sizes = {}
    for length in (100, 220, 460):
        with Session(
            small, prompts((length,)), max_new_tokens=4, kv="offload", fetch=fetch
        ) as session:
            session.prefill()
            session.step(np.array([1]))
            sizes[length] = session.device_kv_bytes() | {"full": session.full_kv_bytes}
    slots = {size["slots"] for size in sizes.values()}
    assert len(slots) == 1
    assert sizes[460]["summaries"] > sizes[220]["summaries"] > sizes[100]["summaries"]
    assert sizes[460]["full"] > 3 * sizes[100]["full"]
    record = 2 * 8 * 8 * 4
    for size in sizes.values():  # a table entry for each record
        assert size["tables"] < size["full"] // record * 4 + 2 * 2 * 2 * 6 * 4 + 1


@pytest.mark.parametrize("fetch", ["device_put", "in_graph"])
def test_rows_that_have_ended_neither_read_nor_fetch(small, fetch):
    with Session(
        small, prompts((61, 150)), max_new_tokens=12, kv="offload", fetch=fetch, slots=5
    ) as session:
        session.prefill()
        for _ in range(12):
            session.step(np.array([3, 4]), jnp.array([True, False]))
            assert np.all(np.asarray(session.choices[1])[1] == -1)
        traffic = session.traffic()
        assert np.all(traffic.resident + traffic.fetched <= 2 * 5)  # one row, two heads
        assert session.lengths.tolist() == [73, 150]
        resumed = np.asarray(session._decoder.state.layers[0].pool.ages)[1]
        assert resumed.max() == 0  # as seeded


def test_counters_give_the_bytes_that_moved(small, monkeypatch):
    moved = []
    original = fetch_device_put.DevicePut.fetch

    def noted(self, layer, misses):
        moved.append(int((misses[0] >= 0).sum()))
        return original(self, layer, misses)

    monkeypatch.setattr(fetch_device_put.DevicePut, "fetch", noted)
    with Session(small, prompts((61, 150)), max_new_tokens=9, kv="offload", slots=5) as session:
        session.prefill()
        for step in range(9):
            session.step(np.array([step, step]))
        traffic = session.traffic()
    assert traffic.fetched.sum() == sum(moved) > 0
    assert traffic.fetched_bytes.sum() == sum(moved) * 2 * 8 * 8 * 4
    assert traffic.fetched.shape == (9, 2)


def test_steps_reuse_their_programs_across_boundaries(small):
    with Session(small, prompts((61, 18)), max_new_tokens=30, kv="offload") as session:
        session.prefill()
        session.step(np.array([1, 2]))
        decoder = session._decoder
        programs = [*decoder._begin.values(), *decoder._finish.values(), decoder._open]
        before = [program._cache_size() for program in programs]
        for step in range(29):
            session.step(np.array([step, step]))
        assert [program._cache_size() for program in programs] == before


def test_a_step_without_missing_blocks_moves_nothing(small, monkeypatch):
    def never(*arguments):
        raise AssertionError("records moved though every block has a slot")

    with Session(small, prompts((20,)), max_new_tokens=9, kv="offload", slots=99) as session:
        session.prefill()
        monkeypatch.setattr("sparda_jax.decode_staged._insert_records", never)
        for step in range(9):
            session.step(np.array([step]))
        assert session.traffic().hit_rate == 1.0
