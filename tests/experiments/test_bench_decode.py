# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of decoding at a size that says nothing: rows, drifts, and cells that fail."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    bench_decode,
    collect,
    decode_process,
    decode_profile,
    decode_trace,
    records,
)
from experiments.bench_decode import Config, main
from experiments.decode_cells import (
    METHODS,
    Cell,
    fill_host,
    host_bytes,
    largest_batch,
    make_setting,
    make_state,
    make_weights,
    model_config,
    parse_cell,
    state_bytes,
    weight_bytes,
)
from experiments.decode_compile import Ahead, abstract_step
from experiments.decode_drift import DriftSelector
from experiments.decode_process import Wanted, drifts_of, measure_cell
from experiments.decode_timing import (
    Effort,
    FetchAlone,
    Runner,
    Steps,
    multiply_all,
    read_bytes,
)
from experiments.decode_trace import (
    SLOTS,
    fewest_fetches,
    load_trace,
    replay,
    spread,
    trace_rows,
)
from sparda_jax.decode import Decoder
from sparda_jax.kv.host import HostKV
from sparda_jax.selectors import resolve

TINY = Config(
    tiny=True,
    cells=("B2 768",),
    methods=("sparse_offload", "sparse_resident"),
    new_blocks=(4,),
    steps=6,
    repeats=2,
    warm_up=2,
    out=None,
    commit="0123abcd",
    dirty=False,
)
EFFORT = Effort(warm_up=2, steps=9, repeats=2)


def setting_of(model="minicpm4_1_8b", **changes):
    config = model_config(model, is_tiny=True)
    return make_setting(config, **({"context": 768, "batch": 2, "steps": 64} | changes))


def drifting(setting, mode="sparda"):
    return DriftSelector(setting.config, resolve(mode, setting.config, None), setting.context)


@pytest.fixture(scope="module")
def running():
    """Drive the offloaded methods of both models, one decoder each, made when asked for."""
    open_ = []
    made = {}

    def start(model, name):
        if (model, name) not in made:
            setting, method = setting_of(model), METHODS[name]
            layout, parts = made.setdefault(model, make_weights(setting.config))
            host = HostKV(setting.config, setting.batch, setting.capacity, page_lock="never")
            fill_host(host, setting.config)
            plan, state = setting.plan(method.mode), make_state(setting, method)
            decoder = Decoder(layout, parts, plan, state, host, has_lookahead=method.has_lookahead)
            open_.extend([decoder, host])
            made[model, name] = Runner(decoder, setting, plan.selector), setting, host
        return made[model, name]

    yield start
    for each in open_:
        each.close()


# --- choices that drift ---------------------------------------------------------------------------


def counts_of(runner, steps):
    return np.stack([np.asarray(runner.advance()) for _ in range(steps)])


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("minicpm4_1_8b", "sparda_offload"),
        pytest.param("nosa_8b", "sparda_offload", marks=pytest.mark.slow),
    ],
)
def test_every_step_misses_exactly_the_new_blocks(running, model, name):
    runner, setting, _ = running(model, name)
    lanes = setting.batch * setting.config.kv_heads
    for new in (4, 0, 16, 1, 2, 8, 0, 3):
        runner.restart(new)
        counts = counts_of(
            runner, 20
        )  # two block boundaries; more than the slots behind the window
        np.testing.assert_array_equal(counts[1:, :, 1], new * lanes)
        np.testing.assert_array_equal(counts[:, :, 0] + counts[:, :, 1], 24 * lanes)


def test_a_drift_goes_round_without_meeting_its_own_blocks(running):
    runner, setting, _ = running("minicpm4_1_8b", "sparda_offload")
    lanes = setting.batch * setting.config.kv_heads
    runner.restart(16)
    assert 30 * 16 > 4 * drifting(setting).turn
    np.testing.assert_array_equal(counts_of(runner, 30)[1:, :, 1], 16 * lanes)


def test_a_seeded_pool_is_consistent_and_holds_the_first_choice():
    setting = setting_of()
    selector = drifting(setting)
    table, slot_blocks, ages = selector.seed(
        jnp.int32(1), setting.batch, setting.num_blocks, setting.slots
    )
    own = setting.context // setting.config.sparse.block_size
    for row, head in np.ndindex(2, 2):
        ids = np.asarray(slot_blocks[row, head])
        assert len(set(ids.tolist())) == setting.slots
        assert set(range(own - 3, own + 1)) | {0} <= set(ids.tolist())
        np.testing.assert_array_equal(np.asarray(table[row, head])[ids], np.arange(setting.slots))
        assert int((table[row, head] >= 0).sum()) == setting.slots
    used = np.sort(np.asarray(ages), axis=-1)[0, 0]
    np.testing.assert_array_equal(used[-24:], 0)
    np.testing.assert_array_equal(used[:8], np.arange(-8, 0))


def test_the_cycle_is_a_permutation_that_differs_by_layer_row_and_head():
    setting = setting_of()
    selector = drifting(setting)
    places = [
        np.asarray(selector.place(jnp.int32(layer), 2, setting.num_blocks)[0][..., 1:93])
        for layer in (0, 1)
    ]
    assert selector.turn == 92
    np.testing.assert_array_equal(np.sort(places[0], axis=-1)[1, 1], np.arange(92))
    flat = np.concatenate(places).reshape(-1, 92)
    assert len({tuple(row) for row in flat}) == len(flat)


def test_a_context_that_cannot_drift_is_refused():
    with pytest.raises(ValueError, match=r"self.context=770 must be a multiple of block_size=8"):
        setting_of(context=770).plan("sparda")
    with pytest.raises(ValueError, match=r"self.context=160 leaves 16 blocks to choose 19 from"):
        setting_of(context=160).plan("sparda")
    with pytest.raises(ValueError, match=r"slots=98 must be 24 to 97"):
        drifting(setting_of()).seed(jnp.int32(0), 2, 104, 98)


def test_more_new_blocks_than_a_choice_has_are_refused(running):
    runner, _, _ = running("minicpm4_1_8b", "sparda_offload")
    with pytest.raises(ValueError, match="20 new blocks must be at most 19"):
        runner.restart(20)
    with pytest.raises(ValueError, match=r"drift.shape\[0\]=3 must be at least 63"):
        runner.restart(np.ones((3, 2, 2, 2), int))


def test_a_drift_may_differ_by_step_layer_row_and_head(running):
    runner, setting, _ = running("minicpm4_1_8b", "sparda_offload")
    steps = setting.capacity - setting.context
    drift = np.random.default_rng(4).integers(20, size=(steps, 2, 2, 2))
    for _ in range(2):  # the second begins where the first has stopped
        runner.restart(drift)
        counts = counts_of(runner, 20)
        np.testing.assert_array_equal(counts[1:, :, 1], drift[:19].sum(axis=(2, 3)))


# --- cells ----------------------------------------------------------------------------------------


def test_cells_are_read_as_they_are_named():
    for text in bench_decode.CELLS:
        if text != bench_decode.TRACE:
            assert parse_cell(text).name == text
    assert parse_cell("B4 32K").methods == tuple(METHODS)
    assert parse_cell("Bmax 64K 24GiB") == Cell(
        model="minicpm4_1_8b",
        context=65536,
        batch=None,
        methods=("sparda_offload", "sparse_resident"),
        device_gib=24.0,
    )
    with pytest.raises(ValueError, match="'B4' is no cell"):
        parse_cell("B4")
    with pytest.raises(ValueError, match=r"methods=\['fast'\] are unknown; known: sparda_offload"):
        parse_cell("B4 32K", ("fast",))


@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_of_a_state_are_those_that_are_made(name):
    setting = setting_of()
    state = make_state(setting, METHODS[name])
    assert state_bytes(setting, METHODS[name]) == sum(x.nbytes for x in jax.tree.leaves(state))


def test_the_arithmetic_of_the_8b_model():
    config = model_config("minicpm4_1_8b")
    setting = make_setting(config, context=131072, batch=16, steps=320)
    assert weight_bytes(config) / 1e9 == pytest.approx(16.4, abs=0.2)
    assert host_bytes(setting) / 2**30 == pytest.approx(64, abs=0.3)
    assert setting.slots == 128
    with HostKV(setting_of().config, 2, setting_of().capacity) as host:
        assert host.nbytes == host_bytes(setting_of())
    sizes = {"context": 131072, "steps": 320}
    assert largest_batch(config, METHODS["sparda_offload"], 8 << 30, 50 << 30, **sizes) == 12
    assert largest_batch(config, METHODS["sparse_resident"], 9 << 30, 0, **sizes) == 2


def test_the_floor_reads_what_was_chosen_and_the_pooled_keys():
    setting = setting_of()
    lanes, record = 2 * 2 * 2, 2 * 8 * 16 * 4
    assert read_bytes(setting, reads_all=True) == lanes * 96 * record
    assert read_bytes(setting, reads_all=False) == lanes * (24 * record + 383 * 64)


def test_the_matmuls_are_those_of_the_model():
    setting = setting_of()
    layout, parts = make_weights(setting.config)
    out = multiply_all(layout, parts, jnp.ones((2, 1, 32), jnp.float32))
    assert len(out) == 2 * 2 + 1 + 1 + 1  # k and v of two layers, forecast, entry, logits
    assert out[-1].shape == (2, 1, 64)
    assert all(bool(jnp.isfinite(x).all()) for x in out)


# --- times ----------------------------------------------------------------------------------------


def test_a_row_is_timed_and_its_fetches_are_counted(running):
    runner, setting, _ = running("minicpm4_1_8b", "sparda_offload")
    lanes = setting.config.layers * setting.batch * setting.config.kv_heads
    for new, found in zip((5, 0, 3), runner.measure((5, 0, 3), EFFORT), strict=True):
        assert found.fetched == new * lanes
        assert (len(found.seconds), len(found.each)) == (2, 2 * EFFORT.steps)
        assert min(*found.seconds, *found.each, found.host_seconds) > 0.0


def test_the_hidden_share_compares_within_a_round():
    cell = Cell(model="minicpm4_1_8b", context=768, batch=2, methods=())
    bench = decode_process.Bench(cell, Wanted(is_tiny=True))
    each = {"each": (1.0,), "host_seconds": 1.0, "fetched": 1.0}
    without = Steps(seconds=(1.0, 5.0, 2.0), **each)
    found = Steps(seconds=(1.5, 9.0, 2.5), **each)  # the second round was slow
    try:
        assert bench._fetch_numbers(found, without, 2.0)["hidden_share"] == 0.75
    finally:
        bench.close()


def test_the_fetch_alone_leaves_the_decoder_able_to_go_on(running):
    runner, setting, host = running("minicpm4_1_8b", "sparda_offload")
    alone = FetchAlone(host, setting, 6)
    assert alone.seconds(runner, 0) == 0.0
    assert alone.seconds(runner, 6) > 0.0
    for source, places in alone._lists:
        for moves in (np.asarray(source), np.asarray(places)):
            assert len(set(moves[:24].tolist())) == 24
            assert set(moves[24:].tolist()) == {-1}
    assert runner.advance().shape == (2, 3)


def test_drifts_begin_with_none_where_something_is_fetched():
    assert drifts_of(METHODS["sparda_offload_no_prefetch"], (4, 8, 16)) == [0, 4, 8]
    assert drifts_of(METHODS["dense_resident"], (4,)) == [0]


# --- traces ---------------------------------------------------------------------------------------


def test_a_replay_fetches_what_is_in_no_slot():
    ids = [[0, 1, 9], [0, 2, 9], [0, 1, 9], [0, 3, 9], [0, 2, 9], [1, 9, -1]]
    choices = jnp.array(ids)[:, None, None, :]
    own = jnp.full((6, 1), 9)
    counts, each = map(np.asarray, replay(choices, own, slots=4, num_blocks=10))
    # the own block 9 is never fetched; 3 takes the slot of 2, 2 that of 1, 1 that of 3
    np.testing.assert_array_equal(counts[:, 1], [2, 1, 0, 1, 1, 1])
    np.testing.assert_array_equal(counts[:, 2], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(each[:, 0, 0], counts[:, 1])
    few, _ = replay(choices, own, slots=3, num_blocks=10)
    np.testing.assert_array_equal(few[:, 1], [2, 1, 1, 1, 1, 1])


def test_a_replay_counts_each_pool_by_itself():
    ids = jnp.array([[[0, 1, 9], [2, 3, 9]], [[0, 1, 9], [0, 3, 9]], [[2, 4, 9], [0, 3, 9]]])
    choices = jnp.stack([ids, ids[::-1]], axis=1)  # [steps lanes K J]
    counts, each = replay(choices, jnp.full((3, 2), 9), slots=4, num_blocks=10)
    np.testing.assert_array_equal(each[:, 0], [[2, 2], [0, 1], [2, 0]])
    np.testing.assert_array_equal(each[:, 1], [[2, 2], [2, 0], [0, 1]])
    np.testing.assert_array_equal(np.sum(each, axis=(1, 2)), counts[:, 1])


def test_no_order_of_eviction_fetches_less_than_one_that_knows_the_future():
    rng = np.random.default_rng(6)
    steps, blocks, slots = 7, 6, 3
    choices = np.sort(np.stack([rng.permutation(blocks)[:2] for _ in range(steps)]), axis=1)
    choices[4, 1] = -1
    own = np.full(steps, 5)

    def fewest(step, held):  # tries every set of blocks that may stay
        if step == steps:
            return 0
        read = {int(block) for block in choices[step] if block >= 0}
        new = len(read - held - {5})
        rest = sorted((held | read) - read)
        keep = min(slots - len(read), len(rest))
        sets = itertools.combinations(rest, keep)
        return new + min(fewest(step + 1, read | set(stay)) for stay in sets)

    both = np.stack([choices, choices[::-1]], axis=1)
    found = fewest_fetches(both, own, slots=slots, num_blocks=blocks)
    assert found.shape == (steps, 2)
    assert found[:, 0].sum() == fewest(0, set())
    counts, _ = replay(both[:, :1, None], jnp.full((steps, 1), 5), slots=slots, num_blocks=blocks)
    assert fewest(0, set()) <= int(counts[:, 1].sum())
    ample = fewest_fetches(both, own, slots=blocks, num_blocks=blocks)
    assert ample[:, 0].sum() == len(set(choices.ravel()) - {-1, 5})


def test_a_trace_is_dealt_by_depth_and_in_stretches():
    step, layer, document, head = np.ogrid[:50, :4, :3, :2]
    fetched = 1000 * step + 100 * layer + 10 * document + head
    dealt = spread(fetched, layers=8, batch=5, kv_heads=2, steps=12)
    assert dealt.shape == (12, 8, 5, 2)
    np.testing.assert_array_equal(np.diff(dealt, axis=0), 1000)
    np.testing.assert_array_equal(dealt[0, :, :, 1] % 10, 1)
    assert (dealt[0, ..., 0] // 100 % 10 == np.repeat(range(4), 2)[:, None]).all()
    assert len(np.unique(dealt[0, ..., 0] // 1000)) > 10  # where the stretches begin
    assert set(np.unique(dealt // 10 % 10)) == {0, 1, 2}
    wide = spread(fetched, layers=4, batch=1, kv_heads=4, steps=50)
    np.testing.assert_array_equal(wide % 10, np.broadcast_to([0, 1, 0, 1], wide.shape))
    with pytest.raises(ValueError, match="a trace of 50 steps is too short for 51"):
        spread(fetched, layers=4, batch=1, kv_heads=2, steps=51)


def test_a_missing_trace_says_how_to_make_it(tmp_path):
    path = tmp_path / "trace.npz"
    with pytest.raises(FileNotFoundError, match=r"python -m experiments\.decode_trace --out"):
        load_trace(path, "sparda")
    np.savez(path, sparda=np.ones((2, 1, 1, 1), int))
    assert load_trace(path, "sparda").shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"has traces of \['sparda'\], none of 'sparse'"):
        load_trace(path, "sparse")


def test_the_rows_that_follow_a_trace_fetch_what_it_says(tmp_path):
    path = tmp_path / "trace.npz"
    rng = np.random.default_rng(5)
    trace = np.where(rng.random((60, 2, 3, 2)) < 0.2, rng.integers(20, size=(60, 2, 3, 2)), 0)
    np.savez(path, sparda=trace)
    cell = parse_cell("B2 768", ("sparda_offload",))
    effort = Effort(warm_up=1, steps=3, repeats=1)
    wanted = Wanted(effort=effort, new_blocks=(2,), is_tiny=True, trace=path)
    rows = [row for _, row in measure_cell(cell, wanted) if row is not None]
    named = [(row["selections"], row["new_blocks_per_step"], row["status"]) for row in rows]
    assert named == [("drift", 0, "ok"), ("drift", 2, "ok"), ("trace", None, "ok")]
    dealt = spread(trace, layers=2, batch=2, kv_heads=2, steps=16)
    assert rows[2]["misses"] == pytest.approx(dealt[:4].sum(axis=(1, 2, 3)).mean() / 8)
    assert rows[2]["fetch_ms"] > 0.0


@pytest.mark.slow
def test_a_trace_is_written_and_is_what_the_pools_fetched(rows_of_trace, tmp_path, capsys):
    decode_trace.main(decode_trace.Config(out=tmp_path / "new" / "trace.npz", tiny=True))
    assert "sparda: " in capsys.readouterr().out
    trace = load_trace(tmp_path / "new" / "trace.npz", "sparda")
    assert trace.shape == (36, 8, 1, 2)
    misses = {row["slots"]: row["misses"] for row in rows_of_trace[:4]}  # of sparda
    fewer, more = misses[40], misses[48]
    assert fewer >= trace.mean() >= more > 0.0


@pytest.fixture(scope="module")
def rows_of_trace():
    return list(trace_rows(is_tiny=True))


@pytest.mark.slow
def test_more_slots_never_miss_more_on_the_shipped_model(rows_of_trace):
    rows = rows_of_trace
    assert [row["slots"] for row in rows] == [*SLOTS, *SLOTS]
    assert all(set(bench_decode.KEY) <= set(row) for row in rows)
    for mine in (rows[:4], rows[4:]):
        misses = [row["misses"] for row in mine]
        assert misses == sorted(misses, reverse=True)
        assert 0.0 <= misses[-1] <= misses[0] < 23
        assert all(row["fewest_misses"] <= row["misses"] for row in mine)


# --- profiles -------------------------------------------------------------------------------------


def test_kernels_are_sorted_by_their_names():
    kernels = {
        "gather_blocks": "fetch",
        "sparse_decode_split": "attention",
        "query_scores_pool": "scores",
        "list_misses": "select and plan",
        "input_scatter_fusion_3": "append and store",
        "sm90_xmma_gemm_bf16bf16": "matmul",
        "MemcpyD2D": "copies",
        "loop_add_fusion": "other",
    }
    assert {name: decode_profile.category_of(name) for name in kernels} == kernels


def test_a_profile_adds_up_to_the_time_from_first_to_last():
    events = [("gemm", 0, 4e6), ("gather_blocks", 3e6, 5e6), ("gemm", 7e6, 9e6), ("add", 9e6, 1e7)]
    found = decode_profile.summarise(events[::-1], steps=2)
    assert found["matmul"] == (3.0, 1.0)
    assert found["fetch"] == (1.0, 0.5)
    assert found["other"] == (0.5, 0.5)
    assert found["idle"] == (1.0, 0.0)


def test_the_python_side_of_a_call_is_what_the_runtime_does_not_take():
    run = "CommonPjRtLoadedExecutable::Execute"
    events = [
        ("advance", 0.0, 100e6),
        ("PjitFunction(step)", 10e6, 90e6),
        (run + "Helper", 20e6, 80e6),
        (run + "Prepare", 20e6, 30e6),  # within the one above
        ("advance", 100e6, 140e6),
        (run + "Helper", 105e6, 125e6),
    ]
    assert decode_profile.python_time(events[::-1]) == (40 + 20) / 2
    assert decode_profile.python_time(events[:2]) is None


@pytest.mark.slow
def test_a_profile_of_a_machine_without_kernels_is_idle(tmp_path, capsys):
    config = decode_profile.Config(
        cells=("B2 768",),
        methods=("dense_resident",),
        new_blocks=0,
        steps=2,
        tiny=True,
        commit="0123abcd",
        dirty=False,
        out=tmp_path,
    )
    record = decode_profile.main(config)
    assert [row["category"] for row in record.rows] == ["idle"]
    rows = [
        record.rows[0] | {"category": "matmul", "ms": 3.0},
        record.rows[0] | {"method": "sparda_offload", "category": "fetch", "ms": 1.0},
    ]
    records.write(dataclasses.replace(record, rows=rows), tmp_path)
    collect.main(collect.Config(results=tmp_path, readme=tmp_path / "none", kernels_readme=None))
    assert "decode_profile" in capsys.readouterr().out
    assert (tmp_path / "figures" / "decode_profile.cpu.png").stat().st_size > 1000


def test_a_profile_needs_a_batch_and_kernels_that_it_can_see(monkeypatch):
    with pytest.raises(ValueError, match="'Bmax 768' leaves the batch open"):
        decode_profile.main(decode_profile.Config(cells=("Bmax 768",), tiny=True))
    monkeypatch.setattr(decode_profile.jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="set XLA_FLAGS=--xla_gpu_enable_command_buffer="):
        decode_profile.main(decode_profile.Config(tiny=True))


def test_the_table_shows_the_columns_that_matter():
    record = records.collect(
        "bench_decode",
        "c",
        {},
        [{"model": "m", "batch": 4, "read_ms": 1.0, "device_gib": None}],
        commit="0123abcd",
        dirty=False,
    )
    assert "| model | batch | device_gib |" in collect.table(record)
    assert "| m | 4 |  |" in collect.table(record)


@pytest.mark.parametrize("method", ["sparda_offload", "sparse_resident"])
def test_what_is_compiled_ahead_is_what_a_cell_runs(method):
    bench = decode_process.Bench(parse_cell("B2 256"), Wanted(is_tiny=True))
    setting = bench.setting(2)
    program, arguments = abstract_step(setting, METHODS[method])
    ahead = program.lower(*arguments).as_text()
    lowered = []
    runner = bench.start(METHODS[method], setting)

    class Lowering:
        def __call__(self, *given):
            lowered.append(program.lower(*given).as_text())
            raise InterruptedError  # that is all there is to see

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparda_jax.decode.draw_program", lambda *_: Lowering())
        with pytest.raises(InterruptedError):
            runner.advance()
    bench.close()
    assert lowered == [ahead]


def test_a_step_that_cannot_be_lowered_is_left_to_its_row(monkeypatch):
    def refuse(setting, method):
        raise NotImplementedError(method.name)

    monkeypatch.setattr("experiments.decode_compile.abstract_step", refuse)
    setting = make_setting(model_config("nosa_8b", is_tiny=True), context=64, batch=1, steps=1)
    assert Ahead(setting, [METHODS["sparda_offload"]]).wait() == {}


# --- rows and records -----------------------------------------------------------------------------


@pytest.mark.slow
def test_every_method_gives_rows():
    cell = parse_cell("B2 768", tuple(METHODS))
    wanted = Wanted(effort=Effort(warm_up=1, steps=3, repeats=1), new_blocks=(2,), is_tiny=True)
    found = list(measure_cell(cell, wanted))
    assert [name for name, row in found if row is None] == list(METHODS)
    rows = [row for _, row in found if row is not None]
    assert [row["status"] for row in rows] == ["ok"] * 9
    for row in rows:
        assert {*bench_decode.KEY, "tokens_per_s", "p99_ms", "floor_ratio"} <= set(row)
        assert row["tokens_per_s"] == pytest.approx(2 / row["ms_per_step"] * 1e3)
        assert row["device_bytes"] > 0
        is_offloaded = row["method"].partition("_")[2].startswith("offload")
        assert (row["host_bytes"] > 0) == is_offloaded
        assert row["misses"] == (row["new_blocks_per_step"] if is_offloaded else 0)
    by = {(row["method"], row["new_blocks_per_step"]): row for row in rows}
    row, without = by["sparda_offload", 2], by["sparda_offload", 0]
    hidden = 1 - (row["ms_per_step"] - without["ms_per_step"]) / row["fetch_ms"]
    assert row["hidden_share"] == pytest.approx(hidden)
    assert row["h2d_gb_per_s"] == pytest.approx(row["fetched_bytes"] / row["ms_per_step"] / 1e6)


@pytest.mark.slow
def test_packed_records_move_a_quarter_of_the_bytes_of_float32():
    cell = parse_cell("B2 768", ("sparda_offload",))
    effort = Effort(warm_up=1, steps=3, repeats=1)
    wanted = Wanted(effort=effort, new_blocks=(2,), host_dtype="int8", is_tiny=True)
    rows = [row for _, row in measure_cell(cell, wanted) if row is not None]
    assert [(row["status"], row["kv_dtype"]) for row in rows] == [("ok", "int8")] * 2
    setting = setting_of()
    assert rows[1]["misses"] == 2
    lanes = setting.config.layers * setting.batch * setting.config.kv_heads
    assert rows[1]["fetched_bytes"] == 2 * lanes * 2 * 8 * 16
    assert rows[1]["host_bytes"] * 4 == host_bytes(
        make_setting(setting.config, context=768, batch=2, steps=effort.total + 1)
    )
    assert rows[1]["fetch_ms"] > 0.0


def test_a_cell_that_the_host_cannot_hold_is_named():
    cell = parse_cell("B2 768", ("sparda_offload",))
    wanted = Wanted(host_gb=1e-6, is_tiny=True)
    (row,) = (row for _, row in measure_cell(cell, wanted) if row is not None)
    assert row["status"] == "skipped: needs 0 GB of host memory"


def test_out_of_memory_tries_a_smaller_batch_and_ends_as_a_row(monkeypatch):
    tried = []

    def fail(self, method, setting, first):
        tried.append(setting.batch)
        raise RuntimeError("RESOURCE_EXHAUSTED: out of device memory")
        yield

    monkeypatch.setattr(decode_process.Bench, "_measure", fail)
    monkeypatch.setattr(decode_process.Bench, "batches", lambda self, method: [5, 3])
    cell = parse_cell("Bmax 768 24GiB", ("sparse_resident",))
    (row,) = (row for _, row in measure_cell(cell, Wanted(is_tiny=True)) if row is not None)
    assert tried == [5, 3]
    assert (row["status"], row["batch"], row["device_gib"]) == ("out of memory", 3, 24.0)


def test_the_largest_batch_is_tried_first():
    cell = parse_cell("Bmax 768", ("sparda_offload",))
    bench = decode_process.Bench(cell, Wanted(is_tiny=True, host_gb=2e-2))
    batches = bench.batches(METHODS["sparda_offload"])
    bench.close()
    assert batches == sorted(batches, reverse=True)
    assert batches[0] > batches[-1] >= 1
    assert batches[0] == 2e7 // host_bytes(bench.setting(1))


@pytest.mark.slow
def test_the_record_keeps_rows_of_other_cells(tmp_path, capfd):
    earlier = dict.fromkeys(bench_decode.KEY) | {"method": "dense_resident", "ms_per_step": 1.0}
    earlier |= {"cell": "B2 768", "commit": "0123abcd"}
    first = records.collect("bench_decode", "c", {}, [earlier], commit="0123abcd", dirty=False)
    records.write(first, tmp_path)
    second = {"commit": "abcd0123", "cache": tmp_path / "cache", "methods": ("sparse_resident",)}
    record = main(dataclasses.replace(TINY, out=tmp_path, **second))
    assert "1 of 1 steps compiled" in capfd.readouterr().out
    assert [row["method"] for row in record.rows] == ["dense_resident", "sparse_resident"]
    assert record.rows[0]["commit"] == "0123abcd"
    assert records.read(records.path_of(record, tmp_path)) == record
    assert "--cells 'B2 768'" in record.command
    assert "--tiny" in record.command
    assert all(math.isfinite(row["ms_per_step"]) for row in record.rows)


def test_a_method_that_takes_its_process_down_is_a_row(monkeypatch):
    asked = []

    def supervise(self, cell):
        self._head = bench_decode.head_of(TINY)
        asked.append(cell.methods)
        return cell.methods[0] if len(asked) == 1 else True

    monkeypatch.setattr(bench_decode._Run, "_supervise", supervise)
    record = main(TINY)
    assert asked == [("sparse_offload", "sparse_resident"), ("sparse_resident",)]
    assert [(r["method"], r["status"]) for r in record.rows] == [("sparse_offload", "crashed")]


def test_a_run_without_rows_and_a_dirty_tree_are_refused(monkeypatch):
    monkeypatch.setattr(bench_decode._Run, "_supervise", lambda self, cell: False)
    with pytest.raises(ValueError, match="0 rows came of 1 cells"):
        main(TINY)
    with pytest.raises(ValueError, match="the tree differs from commit 0123abcd"):
        bench_decode.head_of(dataclasses.replace(TINY, dirty=True, out=records.RESULTS))


def test_a_cap_becomes_a_share_of_the_memory_that_the_device_has(monkeypatch):
    variable = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    monkeypatch.setenv(variable, "unset")
    answer = type("Answer", (), {"stdout": "81559\n"})
    monkeypatch.setattr(bench_decode.subprocess, "run", lambda *a, **k: answer)
    bench_decode.set_memory_fraction(24.0)
    assert float(bench_decode.os.environ[variable]) == pytest.approx(24 * 1024 / 81559, abs=1e-4)
    bench_decode.set_memory_fraction(None)
    assert float(bench_decode.os.environ[variable]) == 0.94
