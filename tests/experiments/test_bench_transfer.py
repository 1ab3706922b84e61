# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the host link, at sizes that say nothing, and the sums it rests on."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_transfer, records
from experiments.bench_transfer import Config, main, make_step, make_weights, moves, shrink
from pallas_kernels.gather_blocks import Tiles
from sparda_jax.kv.overlap import compiler_options

TINY = Config(tiny=True, commit="0123abcd", dirty=False)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return main(dataclasses.replace(TINY, out=tmp_path_factory.mktemp("results")))


def test_every_table_is_in_the_record(record):
    kinds = [row["what"] for row in record.rows]
    assert [kind.partition(":")[0] for kind in dict.fromkeys(kinds)] == [
        *("h2d", "h2d", "d2h", "gather", "overlap", "write")
    ]
    for row in record.rows:
        if row["what"] != "overlap":
            assert row["gb_per_s"] == pytest.approx(row["mib"] * 2**20 / row["ms"] / 1e6)
        if row["what"] == "gather":
            ceiling = max(r["gb_per_s"] for r in record.rows if r["what"].startswith("h2d"))
            assert row["share"] == pytest.approx(row["gb_per_s"] / ceiling)


def test_the_hidden_share_is_what_its_definition_says(record):
    (row,) = (row for row in record.rows if row["what"] == "overlap")
    hidden = 1 - (row["both_ms"] - row["compute_ms"]) / row["fetch_ms"]
    assert row["hidden_share"] == pytest.approx(hidden)
    assert row["fetch_share"] == pytest.approx(row["fetch_ms"] / row["compute_ms"])


def test_the_record_can_be_written_and_read(record, tmp_path):
    assert records.read(records.write(record, tmp_path)).rows == record.rows
    assert "tiny" in record.command
    assert record.config["pool_mib"] == 1


def test_a_run_without_a_folder_writes_nothing(monkeypatch):
    monkeypatch.setattr(
        bench_transfer, "measure_all", lambda config: [iter([{"what": "x", "n": 1}])]
    )
    monkeypatch.setattr(records, "write", None)
    assert main(dataclasses.replace(TINY, out=None)).rows == [{"what": "x", "n": 1}]


@pytest.mark.parametrize("has_compute", [True, False])
def test_the_step_fetches_into_the_slots_of_the_next_layer(has_compute):
    config = dataclasses.replace(shrink(Config()), layers=3)
    view = (jnp.arange(config.pool) % 64).astype(jnp.bfloat16).reshape(-1, 1, 1, 1)
    view = jnp.broadcast_to(view, (config.pool, *config.record))
    lists = [moves(config, 6, seed) for seed in range(3)]
    x = jnp.ones((config.batch, config.width), jnp.bfloat16)
    weights = make_weights(config, jax.random.key(0))
    slots = [jnp.full((6, *config.record), -1, jnp.bfloat16)] * 3
    rest = (weights, view, lists, jnp.array([4]))
    step = jax.jit(make_step(config, has_compute=has_compute, tiles=Tiles()))
    after, filled = step(x, slots, *rest)
    assert jnp.isfinite(after.astype(jnp.float32)).all()
    for (source, places), got in zip(lists, filled, strict=True):
        want = np.full(6, -1)
        want[np.asarray(places)[:4]] = np.asarray(source)[:4] % 64
        np.testing.assert_array_equal(np.asarray(got[:, 1, 3, 5], np.float32), want)
    step = jax.jit(make_step(config, has_compute=has_compute, tiles=None))
    plain, untouched = step(x, slots, *rest)
    assert jnp.array_equal(plain, after)
    assert all(jnp.array_equal(got, want) for got, want in zip(untouched, slots, strict=True))


def test_the_weights_of_the_step_are_those_of_the_8b_model():
    matrices = 4096 * (4096 + 3 * 256) + 4096 * 4096 + 3 * 4096 * 16384
    assert bench_transfer.weight_bytes(Config()) == 2 * matrices


def test_records_that_move_are_scattered_and_distinct():
    source, places = moves(shrink(Config()), 50, seed=1)
    assert len(set(source.tolist())) == 50
    assert sorted(places.tolist()) == list(range(50))
    assert not np.all(np.diff(np.asarray(source)) == 1)


@pytest.mark.gpu
def test_gpu_the_step_copies_neither_records_nor_slots():
    config = dataclasses.replace(shrink(Config()), layers=3)
    step = make_step(config, has_compute=True, tiles=Tiles(parts=1))
    program = jax.jit(step, donate_argnums=(0, 1), compiler_options=compiler_options())
    slots = [jnp.zeros((37, *config.record), jnp.bfloat16) for _ in range(3)]
    compiled = program.lower(
        jnp.ones((config.batch, config.width), jnp.bfloat16),
        slots,
        make_weights(config, jax.random.key(0)),
        jnp.ones((config.pool, *config.record), jnp.bfloat16),
        [moves(config, 37, seed) for seed in range(3)],
        jnp.array([37]),
    ).compile()
    copied = re.findall(r"bf16\[(\d+),2,\d+,\d+\]\S* copy", str(compiled.as_text()))
    assert copied == []
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(x.nbytes for x in slots)
