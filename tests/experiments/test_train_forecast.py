# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The training script: what it writes, how it resumes after a kill, and what it refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.train_forecast import Config, main, make_mesh
from sparda_jax.errors import CheckpointError, DataError
from sparda_jax.testing import tiny_model
from sparda_jax.weights import load_forecast_heads

ROOT = Path(__file__).resolve().parents[2]
MODEL = tiny_model(vocab_size=259)


@pytest.fixture
def text(tmp_path):
    """A folder of sixteen documents of 300 letters."""
    folder = tmp_path / "text"
    folder.mkdir()
    letters = np.frombuffer(b"abcdefgh ", np.uint8)
    rng = np.random.default_rng(0)
    for number in range(16):
        (folder / f"{number}.txt").write_bytes(rng.choice(letters, 300).tobytes())
    return folder


def config_for(text, output, **changes):
    fields = {
        "data": text,
        "output": output,
        "dtype": "float32",
        "seq_len": 64,
        "steps": 4,
        "learning_rate": 1e-2,
        "evaluate_every": 2,
        "save_every": 2,
        "heldout_batches": 1,
        "trackers": ("jsonl",),
        "progress": False,
    }
    return Config(**(fields | changes))


def lines_of(output):
    with (output / "metrics.jsonl").open() as file:
        return [json.loads(line) for line in file]


def test_a_run_writes_metrics_checkpoints_and_heads(text, tmp_path):
    output = tmp_path / "run"
    config = config_for(text, output, trackers=("jsonl", "tensorboard"))
    result = main(config, model=MODEL)
    assert [line["step"] for line in lines_of(output)] == [0, 1, 2, 3, 4]
    assert {"train/kl/layer_0", "heldout/recall"} <= set(lines_of(output)[2])
    assert list(output.glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["2", "4"]
    heads = load_forecast_heads(output / "heads.safetensors", MODEL.config)
    np.testing.assert_array_equal(heads.entry, result.state.heads.entry)
    assert heads.step == 4
    noted = json.loads((output / "hyperparameters.json").read_text())
    assert noted["learning_rate"] == 1e-2
    # The folder is taken now; going on needs more steps and the same settings.
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints up to step 4; pass --resume"):
        main(config, model=MODEL)
    again = dataclasses.replace(config, resume=True, steps=6, learning_rate=2e-2)
    with pytest.raises(CheckpointError, match=r"learning_rate: 0\.01 there, 0\.02 here"):
        main(again, model=MODEL)


CHILD = """
    import sys, time
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    from pathlib import Path
    from experiments.train_forecast import main
    from sparda_jax.testing import tiny_model
    from tests.experiments.test_train_forecast import config_for

    text, output, steps, resume = sys.argv[1:]
    config = config_for(Path(text), Path(output), steps=int(steps), resume=resume == "yes")
    main(config, model=tiny_model(vocab_size=259))
"""


def start(text, output, steps, resume):
    code = textwrap.dedent(CHILD)
    arguments = [sys.executable, "-c", code, str(text), str(output), str(steps), resume]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(text, tmp_path):
    output = tmp_path / "killed"
    child = start(text, output, 4000, "no")  # it will not get that far
    end = time.monotonic() + 120
    while time.monotonic() < end and child.poll() is None:
        saved = [path for path in output.glob("checkpoints/*") if path.name.isdigit()]
        if len(saved) > 1:
            break
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    said = child.communicate()[0].decode()
    assert child.returncode == -signal.SIGKILL, said
    reached = max(int(p.name) for p in output.glob("checkpoints/*") if p.name.isdigit())
    steps = reached + 3
    child = start(text, output, steps, "yes")
    said = child.communicate()[0].decode()
    assert child.returncode == 0, said
    whole = main(config_for(text, tmp_path / "whole", steps=steps), model=MODEL)
    resumed = load_forecast_heads(output / "heads.safetensors", MODEL.config)
    assert resumed.step == steps
    np.testing.assert_array_equal(resumed.entry, whole.state.heads.entry)
    for mine, theirs in zip(resumed.forecast, whole.state.heads.forecast, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    lines, whole_lines = lines_of(output), lines_of(tmp_path / "whole")
    assert [line["step"] for line in lines] == list(range(steps + 1))
    for mine, theirs in zip(lines, whole_lines, strict=True):
        for name in set(theirs) - {"wall_time", "train/tokens_per_s"}:
            assert mine[name] == theirs[name], (mine["step"], name)


def test_resuming_nothing_is_refused(text, tmp_path):
    config = config_for(text, tmp_path / "none", resume=True)
    with pytest.raises(CheckpointError, match="holds 0 checkpoints"):
        main(config, model=MODEL)


def test_text_that_the_model_cannot_read_is_refused(text, tmp_path):
    with pytest.raises(DataError, match="the tokenizer has 259 ids, the model 64"):
        main(config_for(text, tmp_path / "run"), model=tiny_model())
    with pytest.raises(DataError, match="fewer than one window of seq_len=9000"):
        main(config_for(text, tmp_path / "run", seq_len=9000), model=MODEL)


def test_heads_are_fresh_or_the_models_own(text, tmp_path):
    config = config_for(
        text, tmp_path / "run", steps=1, heads="model", learning_rate=1e-9, heldout_batches=0
    )
    result = main(config, model=MODEL)
    own = MODEL.layers[0].attention.entry_forecast_proj[...]
    np.testing.assert_allclose(result.state.heads.entry, own, atol=1e-7)
    assert result.heldout is None
    fresh = main(dataclasses.replace(config, heads="fresh", output=tmp_path / "other"), model=MODEL)
    assert np.abs(np.asarray(fresh.state.heads.entry) - np.asarray(own)).max() > 0.01


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size=3 must be a multiple of self\.devices=2"):
        Config(data=tmp_path, batch_size=3, devices=2)
    with pytest.raises(ValueError, match=r"heldout_batches=-1 and self\.tile_mb=0 must be"):
        Config(data=tmp_path, heldout_batches=-1)
    assert make_mesh(1) is None
    count = len(jax.devices()) + 1
    with pytest.raises(ValueError, match=f"devices={count} were asked for, {count - 1} are there"):
        make_mesh(count)


def test_the_help_explains_every_option(capsys):
    tyro = pytest.importorskip("tyro", reason="tyro is not installed: extra `demo`")
    with pytest.raises(SystemExit):
        tyro.cli(Config, args=["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert field.name in (Config.__doc__ or "")
