# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""A session: checks, groups of rows, the end of its room, its books."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax import setting as setting_module
from sparda_jax.config import RopeConfig
from sparda_jax.errors import CapacityError
from sparda_jax.session import Session
from sparda_jax.testing import assert_close_float32, tiny_config, tiny_model

LENGTHS = (45, 3, 30)


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=2)


def prompts(lengths=LENGTHS):
    return [np.random.default_rng(n).integers(0, 64, n).tolist() for n in lengths]


def run(model, steps=6, given=None, **options):
    """Decode given tokens: logits [T+1 B V]."""
    given = prompts() if given is None else given
    with Session(model, given, max_new_tokens=steps, **options) as session:
        out = [session.prefill()]
        out += [session.step(np.arange(len(given)) + step) for step in range(steps)]
        return np.stack([np.asarray(logits) for logits in out])


@pytest.mark.parametrize("kv", ["resident", "offload"])
def test_prompts_prefilled_in_groups_give_the_same(model, kv):
    assert_close_float32(run(model, kv=kv, prefill_rows=2), run(model, kv=kv))


def test_the_order_of_rows_orders_the_results(model):
    swapped = run(model, given=prompts()[::-1], kv="resident")
    straight = run(model, kv="resident")
    assert_close_float32(swapped[0], straight[0][::-1])


def test_prompts_shorter_than_dense_below_are_dense_until_they_reach_it():
    sparse = dataclasses.replace(tiny_config().sparse, dense_below=52)
    crossing = tiny_model(layers=2, sparse=sparse)
    plain = tiny_model(layers=2)
    given = prompts((45,))
    dense = run(plain, steps=16, given=given, mode="dense", kv="resident")
    for kv in ("resident", "offload"):
        got = run(crossing, steps=16, given=given, kv=kv)
        assert_close_float32(got[:7], dense[:7])  # kv lengths 45 … 51
        assert np.abs(got[7] - dense[7]).max() > 1e-3


def test_a_short_offloaded_batch_keeps_every_block_in_slots():
    sparse = dataclasses.replace(tiny_config().sparse, dense_below=1000)
    model = tiny_model(layers=2, sparse=sparse)
    assert_close_float32(run(model, kv="offload"), run(model, kv="resident"))


def test_longrope_takes_the_factors_of_what_a_row_may_reach():
    factors = {"short_factor": (1.0, 1.1, 1.2, 1.3), "long_factor": (1.0, 2.0, 3.0, 4.0)}
    rope = RopeConfig(kind="longrope", original_max_positions=48, max_positions=48, **factors)
    both = {"short_factor": factors["long_factor"], "long_factor": factors["long_factor"]}
    always = RopeConfig(kind="longrope", original_max_positions=48, max_positions=48, **both)
    given = prompts((45,))
    crossing = run(tiny_model(layers=2, rope=rope), steps=6, given=given, kv="resident")
    long = run(tiny_model(layers=2, rope=always), steps=6, given=given, kv="resident")
    assert_close_float32(crossing, long)  # long factors from the prompt on


def test_slots_default_to_a_third_more_than_a_token_reads(model):
    assert Session(model, prompts((200,)), max_new_tokens=1, kv="offload").slots == 6
    assert Session(model, prompts((200,)), max_new_tokens=1, kv="resident").slots == 32


def test_too_few_slots_are_refused_before_work_starts(model):
    with pytest.raises(CapacityError, match=r"slots=4 .* cannot hold the 5 blocks .* slots=5"):
        Session(model, prompts(), max_new_tokens=1, kv="offload", slots=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": "resident", "slots": 8}, "slots=8 is for kv='offload'"),
        ({"kv": "resident", "fetch": "device_put"}, "fetch='device_put' has nothing to fetch"),
        ({"prefill_rows": 0}, "prefill_rows=0 must be at least 1"),
        ({"prefill_chunk": 12}, "chunk=12 must be a positive multiple of block_size=8"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        Session(model, prompts(), max_new_tokens=1, **options)


def test_an_unknown_fetch_is_refused_before_work_starts(model):
    with pytest.raises(ValueError, match="unknown fetch='dma'; known: in_graph, device_put"):
        Session(model, prompts(), max_new_tokens=1, kv="offload", fetch="dma")


def test_an_open_choice_falls_to_copies_where_kernels_cannot_see_the_memory(
    model, monkeypatch, caplog
):
    asked = []
    real = setting_module.HostKV

    def unlocked(*arguments, page_lock, **options):
        asked.append(page_lock)
        return real(*arguments, page_lock="never", **options)

    monkeypatch.setattr(setting_module, "HostKV", unlocked)
    monkeypatch.setattr(setting_module, "resolve_fetch", lambda *settled: "in_graph")
    monkeypatch.setattr(setting_module.jax, "default_backend", lambda: "gpu")
    for fetch in (None, "in_graph"):
        session = Session(model, prompts(), max_new_tokens=1, kv="offload", fetch=fetch)
        host, setting = setting_module.open_host(session.setting)
        host.close()
        assert setting.fetch == "device_put"
    assert asked == ["auto", "require"]  # a name is a promise: HostKV raises the reason
    assert "fetch='device_put', because" in caplog.text


def test_feeding_more_than_was_asked_for_is_refused(model):
    with Session(model, prompts(), max_new_tokens=1, kv="resident") as session:
        session.prefill()
        session.step(np.zeros(3, np.int32))
        with pytest.raises(CapacityError, match="all 1 of max_new_tokens have been fed"):
            session.step(np.zeros(3, np.int32))


def test_a_session_is_prefilled_once_and_before_it_steps(model):
    with Session(model, prompts(), max_new_tokens=1, kv="offload") as session:
        with pytest.raises(ValueError, match="call prefill first"):
            session.step(np.zeros(3, np.int32))
        session.prefill()
        with pytest.raises(ValueError, match="prefill runs once"):
            session.prefill()
    with pytest.raises(ValueError, match="prefilled, open session"):
        session.step(np.zeros(3, np.int32))


def test_an_exception_frees_the_host_memory(model):
    hosts = []

    def interrupted():
        with Session(model, prompts(), max_new_tokens=1, kv="offload") as session:
            session.prefill()
            hosts.append(session._host)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert hosts[0].is_closed


@pytest.mark.parametrize("fetch", ["in_graph", "device_put"])
def test_a_step_that_took_the_state_with_it_still_frees_the_host_memory(model, fetch):
    session = Session(model, prompts(), max_new_tokens=1, kv="offload", fetch=fetch)
    session.prefill()
    host = session._host
    for leaf in jax.tree.leaves(session._decoder.state):
        leaf.delete()
    session.close()
    assert host.is_closed


def test_offloaded_prompts_are_prefilled_in_groups_that_fit(model, monkeypatch):
    full = setting_module.full_kv_bytes(model.config, 1, 64)
    monkeypatch.setattr(setting_module, "free_device_bytes", lambda: 4 * full)
    with Session(model, prompts(), max_new_tokens=6, kv="auto") as session:
        assert session.place == "offload"
        assert session.setting.prefill_rows == 2


def test_the_books_are_kept_for_every_step(model):
    steps = 70  # more than are kept on the device
    with Session(model, prompts((9,)), max_new_tokens=steps, kv="resident") as session:
        session.prefill()
        assert session.traffic().resident.shape == (0, 2)
        for step in range(steps):
            session.step(np.array([step % 64]))
        traffic = session.traffic()
        assert traffic.resident.shape == (steps, 2)
        assert not traffic.fetched.any()
        blocks = np.minimum((9 + np.arange(steps)) // 8 + 1, 5)
        np.testing.assert_array_equal(traffic.resident[:, 0], 2 * blocks)
        np.testing.assert_array_equal(session.traffic_of(69).resident, traffic.resident[69:])


def test_the_books_do_not_pile_up_on_the_device(model):
    def held():
        gc.collect()
        return sum(x.shape == (2, 3) for x in jax.live_arrays())

    before = held()
    with Session(model, prompts((9,)), max_new_tokens=9, kv="resident") as session:
        session.prefill()
        for step in range(9):
            session.step(np.array([step]))
        assert held() - before <= 2
        session.traffic_of(6)  # done long ago: newer books may still be written
        assert held() - before == 2


def test_the_books_of_dense_mode_count_every_block(model):
    with Session(model, prompts((9,)), max_new_tokens=9, mode="dense", kv="resident") as session:
        session.prefill()
        for _ in range(9):
            session.step(np.array([1]))
        blocks = (9 + np.arange(9)) // 8 + 1
        np.testing.assert_array_equal(session.traffic().resident[:, 1], 2 * blocks)
        assert session.choices == ()


def test_another_selector_may_rank_for_the_prompt(model):
    options = {"kv": "resident", "mode": "sparda"}
    other = run(model, prefill_selector="query", **options)
    query = run(model, kv="resident", mode="sparse")
    assert_close_float32(other[0], query[0])
    assert np.abs(other[0] - run(model, **options)[0]).max() > 1e-4
    assert jnp.all(jnp.isfinite(other))
