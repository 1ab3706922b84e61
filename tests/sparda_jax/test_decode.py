# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""A decode step with everything resident: the same as running the longer sequence at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparda_jax import decode, prefill
from sparda_jax.chunk import make_plan
from sparda_jax.decode_blocks import Way
from sparda_jax.decode_layer import Now, choices_made_at, resident_places, scores_early
from sparda_jax.generate import generate
from sparda_jax.model import forward
from sparda_jax.rope import Rope
from sparda_jax.selectors import ForecastSelector
from sparda_jax.session import Session
from sparda_jax.testing import assert_close_float32, tiny_config, tiny_model

LENGTHS = (37, 3, 16)
STEPS = 24
TOKENS = np.random.default_rng(0).integers(0, 64, (len(LENGTHS), max(LENGTHS) + STEPS))
SPARSE = tiny_config().sparse
NOSA = {"token_importance": True, "sparse": dataclasses.replace(SPARSE, query_blocks=2)}
NO_LOCAL = {"sparse": dataclasses.replace(SPARSE, local_blocks=0, selected_blocks=3)}


def make_model(changes):
    """Make a tiny model whose token importance, if it has any, is not zero."""
    model = tiny_model(**changes)
    for layer in model.layers:
        if layer.attention.importance_scale is not None:
            layer.attention.importance_scale[...] = jnp.array([0.9, -0.7])
    return model


def prompts():
    return [TOKENS[row, :length].tolist() for row, length in enumerate(LENGTHS)]


def replay(model, **options):
    """Feed the given tokens: logits [B T+1 V], block ids [T L B K J]."""
    with Session(model, prompts(), max_new_tokens=STEPS, kv="resident", **options) as session:
        logits, ids = [np.asarray(session.prefill())], []
        for step in range(STEPS):
            tokens = np.array([TOKENS[row, n + step] for row, n in enumerate(LENGTHS)])
            logits.append(np.asarray(session.step(tokens)))
            ids.append(np.array([np.asarray(layer) for layer in session.choices]))
        assert session.lengths.tolist() == [n + STEPS for n in LENGTHS]
    return np.stack(logits, axis=1), np.array(ids)


CASES = [
    pytest.param("dense", {}, None, id="dense"),
    pytest.param("sparse", {}, None, id="query"),
    pytest.param("sparda", {}, None, id="forecast"),
    pytest.param("sparse", {}, "random", id="random"),
    pytest.param("sparda", NOSA, None, id="nosa with forecast"),
    pytest.param("dense", NOSA, None, id="dense with importance"),
    pytest.param("sparda", NO_LOCAL, None, id="forecast without local blocks"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "changes", "selector"), CASES)
def test_step_by_step_is_forward_on_the_longer_sequence(mode, changes, selector):
    model = make_model(changes)
    logits, ids = replay(model, mode=mode, selector=selector)
    lengths = np.array(LENGTHS)
    run = jax.jit(forward, static_argnames=("mode", "selector", "return_choices"))
    want, chosen = run(
        model,
        jnp.array(TOKENS),
        lengths=jnp.array(lengths + STEPS),
        mode=mode,
        selector=selector,
        return_choices=True,
    )
    for row, length in enumerate(LENGTHS):
        assert_close_float32(logits[row], want[row, length - 1 : length + STEPS])
        if mode != "dense":
            at = slice(length, length + STEPS)
            got = np.moveaxis(ids[:, :, row], 1, 0)  # [L T K J]
            np.testing.assert_array_equal(got[..., : chosen.shape[-1]], chosen[:, row, at])


TRACED = []


@dataclasses.dataclass(frozen=True, slots=True)
class Counting(ForecastSelector):
    """A forecast that notes each time it is traced."""

    def probe(self, model, layer, target, x, q, rope):
        TRACED.append(target)
        return ForecastSelector.probe(self, model, layer, target, x, q, rope)


def test_block_and_window_boundaries_do_not_retrace():
    model = tiny_model(layers=2)
    counts = []
    with Session(
        model, prompts(), max_new_tokens=STEPS, selector=Counting(model.config), kv="resident"
    ) as session:
        session.prefill()
        TRACED.clear()
        for _ in range(STEPS):
            session.step(np.array([1, 2, 3]))
            counts.append(len(TRACED))
    assert counts == [2] * STEPS  # once per layer, in the first step
    TRACED.clear()
    with Session(
        model,
        [[1] * 11, [2] * 30, [3] * 36],
        max_new_tokens=STEPS,
        selector=Counting(model.config),
        kv="resident",
    ) as session:
        session.prefill()
        session.step(np.array([1, 2, 3]))
    assert not TRACED  # another batch of near lengths finds everything compiled


@pytest.mark.slow
def test_a_thousand_tokens_run_through_one_program():
    model = tiny_model(layers=2)
    TRACED.clear()
    result = generate(
        model,
        [[1] * 9],
        max_new_tokens=1010,
        selector=Counting(model.config),
        kv="offload",
        fetch="in_graph",
        slots=6,
    )
    assert len(result.tokens[0]) == 1010
    assert sorted(TRACED) == [0, 0, 1, 1]  # each layer once in prefill and once in the step


@pytest.mark.parametrize("is_committed", [False, True], ids=["free", "committed"])
@pytest.mark.parametrize("kv", ["resident", "offload"])
def test_every_program_is_compiled_once_whether_or_not_arrays_are_committed(
    monkeypatch, kv, is_committed
):
    model = tiny_model(layers=2, width=24 if is_committed else 40)
    if is_committed:  # as a caller may do
        nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    before, programs = {}, set()

    def noting(make):
        def note(*settled):
            program = make(*settled)
            before.setdefault(program, program._cache_size())
            programs.add(program)
            return program

        return note

    monkeypatch.setattr(decode, "draw_program", noting(decode.draw_program))
    monkeypatch.setattr(prefill, "_chunk_program", noting(prefill._chunk_program))
    fetch = {"fetch": "in_graph"} if kv == "offload" else {}
    generate(model, prompts(), max_new_tokens=5, kv=kv, prefill_chunk=8, **fetch)
    assert len(programs) == 2
    assert all(program._cache_size() - before[program] <= 1 for program in programs)


def test_a_row_that_is_not_active_keeps_its_state():
    with Session(tiny_model(layers=2), prompts(), max_new_tokens=3, kv="resident") as session:
        session.prefill()
        layers = session._decoder.state.layers
        before = jax.tree.map(np.array, layers)
        session.step(np.array([5, 6, 7]), jnp.array([True, False, True]))
        after = jax.tree.map(np.array, session._decoder.state.layers)
        assert session.lengths.tolist() == [38, 3, 17]
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(old[1], new[1])
            assert np.any(old[0] != new[0])
        assert np.all(np.asarray(session.choices[0])[1] == -1)


@pytest.mark.parametrize(("graphs", "cuts"), [(2, {1}), (3, {1, 2}), (5, {1, 2})])
def test_a_step_of_several_graphs_is_the_step_of_one(monkeypatch, graphs, cuts):
    model = tiny_model(layers=3)
    taken = []
    run = decode.Decoder.step

    def step(self, *arguments):
        done = run(self, *arguments)
        taken.append(int(self.state.step))
        return done

    monkeypatch.setattr(decode.Decoder, "step", step)
    want, _ = replay(model)
    monkeypatch.setattr(decode, "graphs_of_step", lambda: graphs)
    begun = []
    begin = decode.begin_graph
    monkeypatch.setattr(decode, "begin_graph", lambda x, step: begun.append(1) or begin(x, step))
    got, _ = replay(model)
    np.testing.assert_array_equal(got, want)
    assert taken[:STEPS] == taken[STEPS:] == list(range(taken[0], taken[0] + STEPS))
    assert len(begun) == len(cuts)
    plan = make_plan(model.config, "sparda", max_length=64)
    assert Way(plan=plan, graphs=graphs).cuts == cuts


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_without_a_choice_ahead_a_step_is_one_graph_of_commands_in_a_row(monkeypatch, mode):
    monkeypatch.setattr("sparda_jax.kv.overlap.jax.default_backend", lambda: "gpu")
    config = tiny_config(layers=4)
    plans = [
        make_plan(config, mode, max_length=64),
        make_plan(config, "sparda", max_length=64),
        make_plan(tiny_config(**NO_LOCAL), "sparda", max_length=64),  # scores when its turn comes
    ]
    ways = [Way(plan=plan, graphs=2) for plan in plans]
    assert [way.is_concurrent for way in ways] == [False, True, False]
    assert [way.cuts for way in ways] == [frozenset(), {2}, frozenset()]
    key = "xla_gpu_command_buffer_scheduling_mode"
    modes = [decode._options(way)[key] for way in ways]
    assert modes == ["SERIALIZE", "CONCURRENT", "SERIALIZE"]


def test_without_a_choice_every_block_up_to_the_own_one_is_read():
    plan = make_plan(tiny_config(), "dense", max_length=64)
    positions = jnp.array([17, -1])
    rope = Rope(positions=positions[:, None], cos=None, sin=None)
    now = Now(rope=rope, lengths=None, own=jnp.array([2, -1]), attend_all=None, step=None)
    places = resident_places(plan, None, now, 4)
    assert places.ids[:, 0].tolist() == [[0, 1, 2, -1], [-1, -1, -1, -1]]
    assert places.tail.tolist() == [[2, 2], [-1, -1]]


def test_a_later_layer_chooses_for_itself_where_windows_outreach_the_pinned_blocks():
    early = make_plan(tiny_config(), "sparda", max_length=64)
    late = make_plan(tiny_config(**NO_LOCAL), "sparda", max_length=64)
    assert scores_early(early)
    assert not scores_early(late)
    assert [choices_made_at(early, layer) for layer in range(3)] == [(0, 1), (2,), ()]
    assert [choices_made_at(late, layer) for layer in range(3)] == [(0,), (1,), (2,)]
    dense = make_plan(tiny_config(), "dense", max_length=64)
    assert choices_made_at(dense, 0) == ()
