# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The harness of the kernels: what it times, what it refuses, and that no case ends a run."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_kernels, collect, kernel_timing, records
from experiments.bench_kernels import Config
from experiments.kernel_cases.base import Case
from experiments.kernel_timing import Effort, Measured, Program, Scrub
from pallas_kernels._roofline import Work

# The processes that follow a script are forked: they send messages and compute nothing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:os.fork.. was called:RuntimeWarning", "ignore:.*use of fork:DeprecationWarning"
)


EFFORT = Effort(min_operand_bytes=1025, max_sets=4, repeats=3, seconds=0.2)
CEILINGS = {"copy": 2e9, "h2d": 1e9, "matmul": 1e12}
COMMIT = "0123abcd"
NUMBERS = ("ms", "bytes", "flops", "rate", "ceiling", "share")


def vectors(seed):
    return (jnp.full(256, seed, jnp.float32),)


def case(**changes):
    made = Case(
        op="double",
        shape="256",
        implementation="reference",
        operands=vectors,
        call=lambda x: 2.0 * x,
        work=Work(bytes=2048, flops=256),
    )
    return dataclasses.replace(made, **changes)


def sets_of(case, count):
    return [case.operands(seed) for seed in range(count)]


# --- one program over several operand sets ------------------------------------------------------


def test_the_first_output_is_that_of_the_first_set():
    program = Program(case(), sets_of(case(), 3)[::-1])
    np.testing.assert_array_equal(program.first_output(), np.full(256, 4.0))
    assert program.compile_s > 0.0


def test_an_output_keeps_its_structure_around_what_changed_in_place():
    def call(x, y):
        return {"a": x + y, "b": (x + 1.0, jnp.zeros(3))}  # `a` takes the place of x

    made = case(operands=lambda seed: (*vectors(seed), *vectors(5)), call=call, in_place=(0,))
    output = Program(made, sets_of(made, 2)).first_output()
    np.testing.assert_array_equal(output["a"], np.full(256, 5.0))
    np.testing.assert_array_equal(output["b"][0], np.full(256, 1.0))
    np.testing.assert_array_equal(output["b"][1], np.zeros(3))


def test_operands_changed_in_place_are_carried_on_until_they_are_restored():
    def call(step, pair):
        return pair[0] + step, pair[1] - step, jnp.zeros(256)

    made = case(
        operands=lambda seed: (*vectors(1), (jnp.full(256, seed, jnp.float32), jnp.zeros(256))),
        call=call,
        in_place=(1,),
    )
    sets = sets_of(made, 3)
    program = Program(made, sets)
    given = jax.tree.leaves(program._changed)
    for _ in range(4):
        jax.block_until_ready(program())
    assert all(leaf.is_deleted() for leaf in given)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(sets))
    for wanted in (5.0, 1.0):
        up, down, _ = program.first_output()
        np.testing.assert_array_equal(up, np.full(256, wanted))
        np.testing.assert_array_equal(down, np.full(256, -wanted))
        program.restore()


def test_every_sample_begins_with_the_same_operands():
    seen = []

    def call(x, y):
        jax.debug.callback(lambda x: seen.append(float(x)), x[0])
        return x + 1.0

    made = case(
        operands=lambda seed: (*vectors(0), *vectors(seed)), call=call, in_place=(0,), least_sets=2
    )
    kernel_timing.measure(made, EFFORT, None)
    jax.effects_barrier()
    assert len(seen) == 2 * (1 + 2 + 3)  # two sets: the check, two to warm up, three samples
    assert set(seen) == {0.0}


def test_an_operand_changed_in_place_without_such_an_output_is_refused():
    made = case(call=lambda x: x[:8], in_place=(0,))
    expected = r"operand 0 .* its float32\[256\]; outputs: \['float32\[8\]'\]"
    with pytest.raises(ValueError, match=expected):
        Program(made, sets_of(made, 2))


def test_every_call_waits_for_the_call_before(monkeypatch):
    seen = []
    monkeypatch.setattr(
        kernel_timing.lax, "optimization_barrier", lambda x: seen.append(len(x)) or x
    )
    made = case(
        operands=lambda seed: (*vectors(seed), jnp.zeros(1 << 19)),
        call=lambda x, large: x + large[:256],
    )
    Program(made, sets_of(made, 4))
    assert seen == [2, 2, 2]  # the small operand and the output before, never the large one


def test_a_call_of_large_operands_only_waits_with_the_smallest(monkeypatch):
    seen = []
    monkeypatch.setattr(
        kernel_timing.lax, "optimization_barrier", lambda x: seen.append(x[0].size) or x
    )
    made = case(
        operands=lambda seed: (jnp.zeros(1 << 20), jnp.zeros(1 << 19)), call=lambda x, y: x[:4]
    )
    Program(made, sets_of(made, 2))
    assert seen == [1 << 19]


def test_a_call_whose_operands_all_change_in_place_needs_no_other():
    made = case(call=lambda x: x + 1.0, in_place=(0,))
    program = Program(made, sets_of(made, 2))
    jax.block_until_ready(program())
    np.testing.assert_array_equal(program.first_output(), np.full(256, 2.0))


# --- operand sets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("min_bytes", "max_sets", "count"),
    [(1, 4, 1), (1024, 4, 1), (3000, 4, 3), (3072, 4, 3), (1 << 30, 4, 4)],
)
def test_sets_exceed_the_bytes_asked_for_within_their_number(min_bytes, max_sets, count):
    effort = dataclasses.replace(EFFORT, min_operand_bytes=min_bytes, max_sets=max_sets)
    sets, size = kernel_timing.make_sets(case(), effort)
    assert len(sets) == count
    assert size == count * 1024
    assert [float(x[0]) for (x,) in sets] == list(range(count))


def test_a_case_may_ask_for_more_sets_than_a_run_would_make():
    assert len(kernel_timing.make_sets(case(least_sets=7), EFFORT)[0]) == 7


def test_a_row_tells_what_a_program_holds_beside_its_operands():
    made = case(
        operands=lambda seed: (jnp.full((64, 64), float(seed)),), call=lambda x: (x @ x) @ (x + 1.0)
    )
    assert kernel_timing.measure(made, EFFORT, None).temp_bytes >= 64 * 64 * 4


def test_an_array_that_all_sets_share_is_not_counted():
    shared = jnp.zeros(1 << 16)
    made = case(operands=lambda seed: (*vectors(seed), shared), call=lambda x, y: x)
    _, size = kernel_timing.make_sets(made, EFFORT)
    assert size == 2048


def test_seeds_that_give_the_same_arrays_are_refused():
    same = vectors(0)
    with pytest.raises(ValueError, match=r"share all 1 arrays, so 0 bytes differ"):
        kernel_timing.make_sets(case(operands=lambda seed: same), EFFORT)


@pytest.mark.parametrize(("free", "count"), [(1 << 20, 10), (13_312, 3), (0, 1)])
def test_sets_and_their_outputs_leave_room_on_the_device(monkeypatch, free, count):
    monkeypatch.setattr(kernel_timing, "_free_bytes", lambda: free)
    effort = dataclasses.replace(EFFORT, min_operand_bytes=10_240, max_sets=16)
    sets, _ = kernel_timing.make_sets(case(), effort)
    assert len(sets) == count  # 13312 + 2 sets, of that 0.4: three times 1024 in and 1024 out


def test_keys_count_as_nothing():
    made = case(
        operands=lambda seed: (*vectors(seed), jax.random.key(seed)),
        call=lambda x, key: x + jax.random.normal(key, x.shape),
    )
    assert kernel_timing.make_sets(made, EFFORT)[1] == 2048
    assert kernel_timing.measure(made, EFFORT, None).sets == 2


# --- times --------------------------------------------------------------------------------------


class Clock:
    """A clock that stands still until something takes time."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def program(self, seconds, runs):
        def run():
            self.now += seconds
            runs.append(seconds)
            return jnp.zeros(())

        run.restore = lambda: None
        return run


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(kernel_timing, "time", made)
    return made


def test_the_time_of_what_runs_in_front_is_subtracted(clock):
    scrub = clock.program(0.003, [])
    scrub.seconds = 0.003
    found = kernel_timing._sample(clock.program(0.05, []), EFFORT, scrub, most_runs=8)
    assert found == pytest.approx([0.05] * 3)


def test_what_runs_in_front_lasts_twice_as_long_as_issuing_takes(clock):
    issued = []
    scrub = clock.program(1 / 256, issued)  # a power of two, so that no sum is rounded
    scrub.seconds = 1 / 256
    effort = dataclasses.replace(EFFORT, repeats=1, seconds=0.001)
    kernel_timing._sample(clock.program(1 / 128, []), effort, scrub, most_runs=1)
    assert len(issued) == 2 * 4  # of one sample: 4 with the program, 4 without


def test_a_program_that_lasts_seconds_is_run_once(clock):
    taken = []
    assert kernel_timing._sample(clock.program(1.5, taken), EFFORT, None, most_runs=8) == [1.5]
    assert len(taken) == 1


@pytest.mark.parametrize(("seconds", "most_runs", "runs"), [(1e-4, 8, 8), (8e-4, 8, 3), (1, 8, 1)])
def test_a_sample_repeats_a_short_program(clock, seconds, most_runs, runs):
    taken = []
    effort = dataclasses.replace(EFFORT, repeats=1, seconds=0.0)
    found = kernel_timing._sample(clock.program(seconds, taken), effort, None, most_runs=most_runs)
    assert len(taken) == 2 + runs
    assert found == pytest.approx([seconds])


@pytest.mark.parametrize(("seconds", "samples"), [(0.01, 20), (0.03, 6), (0.1, 3), (0.3, 1)])
def test_samples_stop_when_the_time_is_up(clock, seconds, samples):
    effort = dataclasses.replace(EFFORT, repeats=20)
    found = kernel_timing._sample(clock.program(seconds, []), effort, None, most_runs=1)
    assert abs(len(found) - samples) <= (seconds == 0.03)


def test_a_case_has_a_time_for_each_sample():
    made = case(operands=lambda seed: (jnp.full((64, 64), float(seed)),), call=lambda x: x @ x)
    found = kernel_timing.measure(made, EFFORT, None)
    assert len(found.seconds) == 3
    assert min(found.seconds) > 0.0
    assert found.sets == 1  # of 16 KiB, more than was asked for
    assert found.check_error is None


def test_a_case_is_timed_behind_a_copy_too():
    made = case(operands=lambda seed: (jnp.full((512, 512), float(seed)),), call=lambda x: x @ x)
    scrub = Scrub(1 << 12)
    assert scrub.seconds > 0.0
    assert np.median(kernel_timing.measure(made, EFFORT, scrub).seconds) > 0.0


def test_a_scrub_reads_and_writes_its_memory():
    scrub = Scrub(1 << 12)
    before = np.array(scrub())
    np.testing.assert_array_equal(scrub(), before + 1.0)
    assert before.nbytes == 1 << 12


def test_what_is_too_short_to_time_is_refused(monkeypatch):
    monkeypatch.setattr(kernel_timing, "_sample", lambda *_, **__: [-2e-6, -1e-6, 5e-6])
    with pytest.raises(ValueError, match=r"2 calls took -1.0e-06 s .* spread of 7.0e-06 s"):
        kernel_timing.measure(case(), EFFORT, None)


def test_nothing_is_repeated_from_the_caches_or_on_its_own_output(monkeypatch):
    seen = []
    monkeypatch.setattr(
        kernel_timing, "_sample", lambda *_, most_runs: seen.append(most_runs) or [1.0]
    )
    kernel_timing.measure(case(), EFFORT, None)
    kernel_timing.measure(case(), dataclasses.replace(EFFORT, min_operand_bytes=1 << 20), None)
    kernel_timing.measure(case(in_place=(0,)), EFFORT, None)
    assert seen == [8, 1, 1]


def test_a_check_sees_the_first_set_once_and_alone_at_highest_precision(monkeypatch):
    seen = []

    def precision():
        return jax.config.jax_default_matmul_precision

    def check(output, operands):
        seen.append((float(output[0]), float(operands[0][0]), precision()))

    def call(x):
        timed.append(precision())
        return 2.0 * x

    timed = []
    made = case(check=check, call=call, operands=lambda seed: vectors(seed + 3))
    with jax.default_matmul_precision("default"):
        kernel_timing.measure(made, EFFORT, None)
    assert seen == [(6.0, 3.0, "highest")]
    assert set(timed) == {"default"}


def test_a_check_sees_operands_as_they_were_before_they_changed():
    seen = []
    made = case(
        call=lambda x: x + 1.0,
        in_place=(0,),
        check=lambda output, operands: seen.append((float(output[0]), float(operands[0][0]))),
    )
    kernel_timing.measure(made, EFFORT, None)
    assert seen == [(1.0, 0.0)]


def test_ceilings_name_their_work():
    found = kernel_timing.measure_ceilings(is_tiny=True)
    assert set(found) == {"copy", "h2d", "matmul"}
    assert all(seconds > 0.0 for _, seconds, _, _ in found.values())
    assert found["copy"][2:] == (2 << 20, 0)
    assert found["matmul"][2:] == (3 * 2 * 128 * 128, 2 * 128**3)


def test_a_cpu_needs_nothing_in_front():
    assert kernel_timing.default_scrub() is None


# --- rows ---------------------------------------------------------------------------------------


def row_of(made, **changes):
    config = Config(repeats=3, case_seconds=0.1, min_operand_bytes=1, **changes)
    return bench_kernels.measure_row(made, config, CEILINGS, None)


def test_a_row_says_what_was_reached_of_which_ceiling(monkeypatch):
    seconds = tuple(1e-6 * np.arange(1.0, 12.0))
    measured = Measured(seconds=seconds, sets=2, operand_bytes=9, compile_s=1.234)
    monkeypatch.setattr(bench_kernels, "measure", lambda *_: measured)
    row = row_of(case())
    assert list(row)[:10] == ["op", "shape", "implementation", *NUMBERS, "status"]
    assert (row["op"], row["shape"], row["implementation"]) == ("double", "256", "reference")
    assert (row["bytes"], row["flops"], row["bound"], row["status"]) == (2048, 256, "copy", "ok")
    assert (row["p10_ms"], row["ms"], row["p90_ms"]) == pytest.approx((2e-3, 6e-3, 10e-3))
    assert row["rate"] == pytest.approx(2048 / 6e-6)
    assert row["share"] == pytest.approx(row["rate"] / 2e9)
    assert row["ceiling"] == 2e9
    assert row["samples"] == 11
    assert row["compile_s"] == 1.23
    assert row["is_checked"] is False


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotImplementedError("needs compute capability 9.0"), "unsupported"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "out of memory"),
        (MemoryError("host"), "out of memory"),
        (ValueError("tile_q=3"), "failed"),
    ],
)
def test_a_case_that_cannot_run_is_a_row_with_its_reason(capsys, error, status):
    def call(x):
        raise error

    row = row_of(case(call=call))
    assert row["status"] == status
    assert row["error"] == f"{type(error).__name__}: {error}"
    assert not set(NUMBERS) & set(row)
    assert str(error) in capsys.readouterr().err


def test_operands_that_cannot_be_made_are_a_row_too():
    def operands(seed):
        raise RuntimeError(f"no operands of seed {seed}")

    assert row_of(case(operands=operands))["error"] == "RuntimeError: no operands of seed 0"


def test_a_wrong_result_is_timed_and_named():
    def check(output, operands):
        np.testing.assert_array_equal(output, operands[0] + 1.0)

    row = row_of(case(check=check))
    assert row["status"] == "wrong result"
    assert row["error"].startswith("AssertionError: Arrays are not equal")
    assert row["ms"] > 0.0
    assert row["is_checked"] is True


def test_a_check_that_fails_by_itself_is_no_wrong_result():
    def check(output, operands):
        raise KeyError("oracle")

    assert row_of(case(check=check))["status"] == "check failed"


def test_an_error_is_told_in_one_short_line_without_folders():
    top = "/" + "opt"
    text = bench_kernels.error_text(ValueError(f"at {top}/a b/c.py:3\n  and '{top}/x/y.py'"))
    assert text == "ValueError: at a b/c.py:3 and 'y.py'"
    assert bench_kernels.error_text(ValueError("3/4 of https://a.org/b/c")).endswith("a.org/b/c")
    assert len(bench_kernels.error_text(ValueError("x" * 9999))) == 400


# --- cases --------------------------------------------------------------------------------------

MODULE = """
import time, os
import jax.numpy as jnp
from experiments.kernel_cases.base import Case
from pallas_kernels._roofline import Work

def operands(seed):
    return (jnp.full(256, seed, jnp.float32),)

def made(implementation, shape="256", call=lambda x: 2.0 * x):
    return Case(op=__name__.rpartition(".")[2], shape=shape, implementation=implementation,
                operands=operands, call=call, work=Work(bytes=2048, flops=256))

def cases(*, tiny=False):
    return {}
"""


@pytest.fixture
def package(tmp_path, monkeypatch, request):
    """Make a package of cases from bodies: op → what its `cases` returns."""
    name = f"cases_{abs(hash(request.node.nodeid))}"
    folder = tmp_path / "path" / name
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(folder.parent))

    def write(**bodies):
        (folder / "__init__.py").write_text('"""Cases of a test."""\n')
        (folder / "base.py").write_text("raise RuntimeError('not an op')\n")
        for op, body in bodies.items():
            (folder / f"{op}.py").write_text(MODULE.format(body))
        return name

    return write


def labels(found):
    return [item["op"] if isinstance(item, dict) else item.implementation for item in found]


def test_variants_run_on_request(package):
    name = package(a='[made("triton"), made("triton[tile_q=8]")]')
    assert labels(bench_kernels.load_cases(Config(cases=name))) == ["triton"]
    found = bench_kernels.load_cases(Config(cases=name, variants=True))
    assert labels(found) == ["triton", "triton[tile_q=8]"]


def test_ops_and_matches_choose_the_cases(package):
    name = package(a='[made("x", "B1"), made("y", "B2")]', b='[made("z", "B2 tiny" * tiny)]')
    assert bench_kernels.known_ops(name) == ("a", "b")
    assert labels(bench_kernels.load_cases(Config(cases=name))) == ["x", "y", "z"]
    assert labels(bench_kernels.load_cases(Config(cases=name, ops=("b",)))) == ["z"]
    assert labels(bench_kernels.load_cases(Config(cases=name, match="B2 [xy]"))) == ["y"]
    assert bench_kernels.load_cases(Config(cases=name, tiny=True))[-1].shape == "B2 tiny"


def test_an_op_without_cases_is_refused(package):
    name = package(a='[made("x")]', b="[]")
    with pytest.raises(ValueError, match=r"ops=\['c'\] have no cases .* known: \['a', 'b'\]"):
        bench_kernels.load_cases(Config(cases=name, ops=("a", "c")))


def test_a_run_without_a_case_is_refused(package):
    name = package(a='[made("x[tile=1]")]')
    with pytest.raises(ValueError, match=r"0 cases of 1 ops .* match='' and variants=False"):
        bench_kernels.load_cases(Config(cases=name))


def test_an_op_whose_cases_cannot_be_made_is_a_row(package):
    name = package(a="[][1]", b='[made("x")]')
    broken, good = bench_kernels.load_cases(Config(cases=name))
    assert broken == {
        "op": "a",
        "shape": "none",
        "implementation": "none",
        "status": "failed",
        "error": "IndexError: list index out of range",
    }
    assert good.implementation == "x"


def test_the_repeated_command_names_what_differs():
    assert records.command_of("bench_kernels", Config()) == "python -m experiments.bench_kernels"
    config = Config(ops=("a", "b"), match="B4 .*", variants=True, repeats=5, commit=COMMIT)
    assert records.command_of("bench_kernels", config) == (
        "python -m experiments.bench_kernels --ops a b --match 'B4 .*' --variants --repeats 5"
    )


# --- the run, in this process -------------------------------------------------------------------


def told(config, first=0, ceilings=()):
    return list(bench_kernels.measure_all(config, first, ceilings))


def config_of(name, tmp_path, **changes):
    options = {"tiny": True, "repeats": 3, "case_seconds": 0.1, "min_operand_bytes": 1}
    options |= {"cases": name, "commit": COMMIT, "dirty": False, "out": tmp_path}
    return Config(**(options | changes))


CEILING_ROWS = [
    {"op": "ceiling", "shape": "s", "implementation": name, "rate": rate, "status": "ok"}
    for name, rate in CEILINGS.items()
]


def test_a_run_tells_of_each_case_before_and_after(package, tmp_path):
    name = package(a='[made("x"), made("y")]', b="[][1]")
    messages = told(config_of(name, tmp_path))
    assert [(m.kind, m.number) for m in messages] == [
        ("head", -1),
        *[("row", -1)] * 3,
        *[("case", 0), ("row", 0), ("case", 1), ("row", 1), ("row", 2), ("end", -1)],
    ]
    head = messages[0].head
    assert (head.experiment, head.commit, head.rows) == ("bench_kernels", COMMIT, [])
    ceilings = {m.row["implementation"]: m.row for m in messages[1:4]}
    assert ceilings["copy"]["rate"] == pytest.approx((2 << 20) / (1e-3 * ceilings["copy"]["ms"]))
    assert ceilings["matmul"]["rate"] == ceilings["matmul"]["ceiling"]
    assert messages[5].row["ceiling"] == ceilings["copy"]["rate"]
    assert messages[5].row["status"] == "ok"


def test_a_run_goes_on_from_a_case_with_the_ceilings_it_has(package, tmp_path):
    name = package(a='[made("x"), made("y")]')
    messages = told(config_of(name, tmp_path), 1, CEILING_ROWS)
    assert [(m.kind, m.number) for m in messages] == [
        *[("head", -1), ("case", 1), ("row", 1), ("end", -1)]
    ]
    assert messages[2].row["ceiling"] == CEILINGS["copy"]


def test_a_run_ends_after_a_case_that_broke_the_device(package, tmp_path, monkeypatch):
    name = package(a='[made("x", call=lambda x: 1 / 0), made("y")]')
    config = config_of(name, tmp_path)
    assert told(config, 0, CEILING_ROWS)[-1].kind == "end"
    monkeypatch.setattr(bench_kernels, "is_healthy", lambda: False)
    messages = told(config, 0, CEILING_ROWS)
    assert [(m.kind, m.number) for m in messages[-2:]] == [("row", 0), ("broken", 1)]


def test_a_device_that_computes_is_healthy_and_another_is_not(monkeypatch, capsys):
    assert bench_kernels.is_healthy()
    monkeypatch.setattr(jnp, "ones", lambda _: 1 / 0)
    assert not bench_kernels.is_healthy()
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_tree_that_is_not_its_commit_is_measured_without_a_record_only(package, tmp_path):
    name = package(a='[made("x")]')
    with pytest.raises(ValueError, match=rf"differs from commit {COMMIT}.*out=None"):
        told(config_of(name, tmp_path, dirty=True))
    assert told(config_of(name, tmp_path, dirty=True, out=None))[0].head.dirty is True


# --- the run, with a process that follows a script ----------------------------------------------


def row(op="a", number=0, **changes):
    return {"op": op, "shape": f"B{number}", "implementation": "x", "status": "ok"} | changes


def measured_row(op="a", number=0, **changes):
    numbers = {"ms": 0.5, "bytes": 3_000_000, "flops": 0, "rate": 6e9, "ceiling": 8e9}
    numbers |= {"share": 0.75, "bound": "copy", "p10_ms": 0.4, "p90_ms": 0.6}
    return row(op, number, **(numbers | changes))


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Run `main` on scripts of messages, one a process: `str` kills it, `None` hangs it."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(bench_kernels.multiprocessing, "get_context", lambda _: context)
    head = records.collect(
        "bench_kernels", "c", {}, [], commit="a" * 40, dirty=False, date="2026-11-23"
    )

    def run(*scripts, **changes):
        started = itertools.count()
        firsts = context.SimpleQueue()

        def work(sender, config, first, ceilings, platforms):
            firsts.put((first, len(ceilings)))
            for step in scripts[place[0]]:
                if step is None:
                    time.sleep(100)
                if isinstance(step, str):
                    os._exit(3)
                kind, number, content = step
                message = bench_kernels._Message(kind, number, content)
                sender.send(dataclasses.replace(message, head=head if kind == "head" else None))
            sender.close()

        place = [-1]
        supervise = bench_kernels._Run.supervise

        def counted(self, first):
            place[0] = next(started)
            return supervise(self, first)

        monkeypatch.setattr(bench_kernels._Run, "supervise", counted)
        monkeypatch.setattr(bench_kernels, "_work", work)
        options = {"out": tmp_path, "case_limit_s": 1.5} | changes
        try:
            return bench_kernels.main(Config(**options))
        finally:
            run.firsts = []
            while not firsts.empty():
                run.firsts.append(firsts.get())

    return run


HEAD = ("head", -1, {})
CEILING = ("row", -1, row("ceiling"))
END = ("end", -1, {})


def told_case(number, op="a"):
    return ("case", number, {"op": op, "shape": f"B{number}", "implementation": "x"})


def statuses(record):
    return [(r["op"], r["shape"], r["status"]) for r in record.rows]


def test_a_case_that_hangs_is_a_row_and_the_next_runs(scripted, tmp_path):
    first = [HEAD, CEILING, told_case(0), None]
    second = [HEAD, told_case(1), ("row", 1, row(number=1)), END]
    record = scripted(first, second)
    assert statuses(record) == [("ceiling", "B0", "ok"), ("a", "B0", "hung"), ("a", "B1", "ok")]
    assert record.rows[1]["error"] == "no result in 1.5 s"
    assert scripted.firsts == [(0, 0), (1, 1)]
    assert records.read(records.path_of(record, tmp_path)) == record


def test_a_case_that_kills_its_process_is_a_row_and_the_next_runs(scripted):
    first = [HEAD, told_case(0), "killed"]
    second = [HEAD, told_case(1), ("row", 1, row(number=1)), END]
    record = scripted(first, second)
    assert statuses(record) == [("a", "B0", "crashed"), ("a", "B1", "ok")]
    assert record.rows[0]["error"] == "exit code 3"


def test_a_broken_device_is_left_for_a_new_process(scripted):
    first = [HEAD, CEILING, told_case(0), ("row", 0, row(status="failed")), ("broken", 1, {})]
    second = [HEAD, told_case(1), ("row", 1, row(number=1)), END]
    record = scripted(first, second)
    assert statuses(record)[1:] == [("a", "B0", "failed"), ("a", "B1", "ok")]
    assert scripted.firsts == [(0, 0), (1, 1)]


def test_a_run_stops_when_its_time_is_up(scripted):
    messages = [HEAD, told_case(0), ("row", 0, row()), told_case(1), None]
    record = scripted(messages, case_limit_s=60.0, run_seconds=1.5)
    assert statuses(record) == [("a", "B0", "ok"), ("a", "B1", "out of time")]
    assert record.rows[1]["error"] == "1.5 s of the run are up"


def test_time_that_is_up_between_two_cases_costs_no_row(scripted):
    messages = [HEAD, told_case(0), ("row", 0, row()), None]
    record = scripted(messages, case_limit_s=60.0, run_seconds=1.5)
    assert statuses(record) == [("a", "B0", "ok")]


def test_a_process_lost_outside_any_case_ends_the_run_and_keeps_its_rows(scripted, tmp_path):
    with pytest.raises(RuntimeError, match="after 2 rows: crashed, exit code 3"):
        scripted([HEAD, CEILING, told_case(0), ("row", 0, row()), "killed"])
    (path,) = tmp_path.glob("bench_kernels.*.json")
    assert statuses(records.read(path)) == [("ceiling", "B0", "ok"), ("a", "B0", "ok")]


def test_a_refusal_in_the_process_reaches_the_caller(scripted, tmp_path):
    with pytest.raises(ValueError, match="ops=7 of 8"):
        scripted([("refused", -1, {"error": "ops=7 of 8"})])
    assert not list(tmp_path.glob("*.json"))


def test_what_an_op_gave_is_written_before_the_next_op_starts(scripted, monkeypatch):
    written = []
    kept = records.write
    monkeypatch.setattr(records, "write", lambda r, folder: written.append(r) or kept(r, folder))
    scripted([HEAD, ("row", 0, row()), ("row", 1, row(number=1)), ("row", 2, row("b")), END])
    first, last = written
    assert statuses(first) == [("a", "B0", "ok"), ("a", "B1", "ok")]
    assert statuses(last) == [*statuses(first), ("b", "B0", "ok")]


def test_rows_of_other_ops_stay_with_their_own_commit(scripted, tmp_path):
    scripted([HEAD, ("row", 0, measured_row(ms=1.0)), ("row", 1, measured_row("b", ms=2.0)), END])
    (path,) = tmp_path.glob("*.json")
    old = records.read(path)
    records.write(dataclasses.replace(old, commit="b" * 40), tmp_path)
    record = scripted([HEAD, ("row", 0, measured_row(number=7, ms=3.0)), END])
    assert record.commit == "a" * 40
    assert [(r["op"], r["shape"], r["ms"], r.get("commit")) for r in record.rows] == [
        ("b", "B0", 2.0, "b" * 40),
        ("a", "B7", 3.0, None),
    ]


def test_a_match_replaces_only_its_cases(scripted, tmp_path):
    scripted(
        [HEAD, ("row", 0, measured_row(ms=1.0)), ("row", 1, measured_row("a", 1, ms=2.0)), END]
    )
    record = scripted([HEAD, ("row", 0, measured_row(number=1, ms=3.0)), END], match="B1")
    assert [r["ms"] for r in record.rows] == [1.0, 3.0]


def test_earlier_rows_may_lie_in_another_folder(scripted, tmp_path):
    scripted([HEAD, ("row", 0, row()), END])
    out = tmp_path / "out"
    record = scripted([HEAD, ("row", 0, row("b")), END], out=out, earlier=tmp_path)
    assert [r["op"] for r in record.rows] == ["a", "b"]
    assert records.read(records.path_of(record, out)) == record


def test_a_run_without_a_folder_writes_nothing(scripted, tmp_path, capsys):
    record = scripted([HEAD, ("row", 0, row()), END], out=None)
    assert statuses(record) == [("a", "B0", "ok")]
    assert not list(tmp_path.glob("*.json"))
    assert "a  B0  x" in capsys.readouterr().out


def test_a_run_survives_every_kind_of_case(package, tmp_path, capsys):
    name = package(
        a='[made("good"), made("bad", call=lambda x: 1 / 0), made("good", "B2")]',
        b='[made("fatal", call=lambda x: os._exit(5)), made("good")]',
    )
    record = bench_kernels.main(config_of(name, tmp_path))
    found = [(r["op"], r["implementation"], r["status"]) for r in record.rows[3:]]
    assert found == [
        ("a", "good", "ok"),
        ("a", "bad", "failed"),
        ("a", "good", "ok"),
        ("b", "fatal", "crashed"),
        ("b", "good", "ok"),
    ]
    assert json.loads(records.path_of(record, tmp_path).read_text())["rows"] == record.rows
    assert "exit code 5" in capsys.readouterr().out


# --- tables -------------------------------------------------------------------------------------


def test_a_row_is_shown_with_units():
    assert collect.kernel_cells(measured_row()) == (
        *("a", "B0", "x", "0.5", "0.4 to 0.6", "6 GB/s", "75.0%", "ok"),
    )
    assert collect.kernel_cells(measured_row(bound="matmul", rate=4e14))[5] == "400 TFLOP/s"
    assert collect.kernel_cells(row(status="hung", error="why"))[3:] == (*[""] * 4, "hung: why")


@pytest.mark.parametrize("has_rich", [True, False])
def test_rows_are_printed_with_and_without_rich(monkeypatch, capsys, has_rich):
    if has_rich:
        pytest.importorskip("rich", reason="needs rich")
    else:
        monkeypatch.setattr(collect.importlib.util, "find_spec", lambda _: None)
    collect.print_kernels([measured_row(), measured_row(implementation="x[tile_q=8]")])
    text = capsys.readouterr().out
    assert ("━" in text) is has_rich
    assert "x[tile_q=8]" in text
    assert len(re.findall(r"6 GB/s .*75\.0%", text)) == 2


def test_kernels_and_their_gaps_are_listed(tmp_path):
    for op, backends in {"a": ("x",), "b": ("triton",)}.items():
        (tmp_path / op).mkdir()
        for name in (*backends, "reference"):
            (tmp_path / op / f"{name}.py").write_text("")
    rows = [measured_row(), measured_row(implementation="x[tile=2]"), row("b", commit="c" * 40)]
    rows[2]["implementation"] = "reference"
    head = records.collect("bench_kernels", "c", {}, rows, commit="a" * 40, date="2026-11-23")
    text = collect.kernel_tables([head], tmp_path)
    assert "### cpu" in text
    assert "commit aaaaaaaa; 2026-11-23" in text
    assert "| a | B0 | x | 0.5 | 0.4 to 0.6 | 6 GB/s | 75.0% | ok |" in text
    assert "x[tile=2]" not in text
    assert "| b | B0 | reference |  |  |  |  | ok (cccccccc) |" in text
    missing = text[text.index("### Not measured yet") :]
    assert "| a | reference |" in missing
    assert "| b | triton |" in missing
    assert "| b | reference |" not in missing
    assert "| a | x |" not in missing


def test_no_op_and_no_record_is_said(tmp_path):
    assert collect.kernel_tables([], tmp_path) == "Nothing is measured yet.\n"


def test_collecting_fills_the_readme_of_the_kernels(tmp_path, scripted):
    scripted([HEAD, ("row", 0, measured_row()), END])
    readme = tmp_path / "pallas_kernels" / "README.md"
    readme.parent.mkdir()
    readme.write_text(f"# Kernels\n{collect.START}\nold\n{collect.END}\n")
    collect.main(collect.Config(results=tmp_path, readme=tmp_path / "experiments" / "README.md"))
    text = readme.read_text()
    assert "old" not in text
    assert "| a | B0 | x | 0.5 |" in text
    other = tmp_path / "KERNELS.md"
    other.write_text(f"{collect.START}\n{collect.END}\n")
    config = collect.Config(results=tmp_path, readme=tmp_path / "none.md", kernels_readme=other)
    collect.main(config)
    assert "| a | B0 | x | 0.5 |" in other.read_text()


def test_the_star_import_gives_what_a_command_line_needs():
    names = types.SimpleNamespace()
    exec("from experiments.bench_kernels import *", names.__dict__)
    assert names.Config is Config
    assert names.main is bench_kernels.main
