# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from experiments import bench_scaling, records
from sparda_jax.testing import tiny_model


def test_a_timed_step_has_time_and_memory():
    found = bench_scaling.time_step(tiny_model(), np.arange(64, dtype=np.int32), 1)
    assert found["step_s"] > 0.0
    assert found["temporary_bytes"] > 0


@pytest.mark.slow
def test_the_record_holds_every_length(tmp_path, monkeypatch):
    model = tiny_model(vocab_size=259)
    monkeypatch.setattr(bench_scaling, "load_shipped", lambda dtype: model)
    config = bench_scaling.Config(
        lengths=(128,), repeats=1, new_tokens=2, commit="0123abcd", dirty=False, out=tmp_path
    )
    rows = records.read(bench_scaling.main(config)).rows
    assert [row["tokens"] for row in rows] == [128]
    assert all(row["step_s"] > 0 for row in rows)
