# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Trackers: what was logged can be read back, each step once, and nothing is missing in silence."""

import importlib
import json
import math
import pathlib
import subprocess
import sys
import types

import jax.numpy as jnp
import pytest

from sparda_jax import tracking


def lines(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def run(folder, steps, **more):
    tracker = tracking.JsonlTracker(folder, **more)
    for step in steps:
        tracker.log({"loss": 10.0 * step}, step=step)
    tracker.finish()


def test_each_step_is_one_line_with_its_numbers_and_a_wall_time(tmp_path):
    run(tmp_path / "new" / "folder", [3, 4], start_step=3)
    found = lines(tmp_path / "new" / "folder")
    assert [(line["step"], line["loss"]) for line in found] == [(3, 30.0), (4, 40.0)]
    assert found[0]["wall_time"] <= found[1]["wall_time"]


def test_a_resumed_run_logs_each_step_once(tmp_path):
    run(tmp_path, range(6))
    run(tmp_path, [4, 5, 6], start_step=4)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]


def test_a_line_torn_by_a_crash_does_not_survive_the_resume(tmp_path):
    run(tmp_path, range(3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    run(tmp_path, [3], start_step=3)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]


def test_a_complete_looking_line_without_its_newline_counts_as_torn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}')
    run(tmp_path, [2], start_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [0, 2]


def test_a_line_is_on_disk_before_log_returns(tmp_path):
    tracker = tracking.JsonlTracker(tmp_path)
    tracker.log({"loss": 1.0}, step=0)
    assert [line["loss"] for line in lines(tmp_path)] == [1.0]
    tracker.finish()


def test_numbers_that_are_not_finite_stay_valid_json_and_read_back(tmp_path):
    tracker = tracking.JsonlTracker(tmp_path)
    tracker.log({"a": math.nan, "b": math.inf, "c": jnp.float32(-jnp.inf)}, step=0)
    tracker.finish()
    (line,) = lines(tmp_path)
    assert (line["a"], line["b"], line["c"]) == ("nan", "inf", "-inf")
    assert float(line["c"]) == -math.inf


def test_device_scalars_and_whole_numbers_are_numbers(tmp_path):
    tracker = tracking.JsonlTracker(tmp_path)
    tracker.log({"loss": jnp.float32(0.25), "tokens": 7}, step=0)
    tracker.finish()
    (line,) = lines(tmp_path)
    assert (line["loss"], line["tokens"]) == (0.25, 7.0)


def test_a_metric_may_not_take_the_name_of_the_step(tmp_path):
    tracker = tracking.JsonlTracker(tmp_path)
    with pytest.raises(ValueError, match=r"must not be named \['step'\]"):
        tracker.log({"step": 1.0}, step=0)
    tracker.finish()


def test_a_finished_file_takes_no_more(tmp_path):
    tracker = tracking.JsonlTracker(tmp_path)
    tracker.finish()
    tracker.finish()
    with pytest.raises(ValueError, match="closed"):
        tracker.log({"loss": 1.0}, step=0)


def test_hyperparameters_are_written_with_paths_as_text(tmp_path):
    tracker = tracking.JsonlTracker(tmp_path)
    tracker.log_hyperparameters({"rate": 0.1, "data": pathlib.PurePosixPath("some/text")})
    tracker.finish()
    found = json.loads((tmp_path / "hyperparameters.json").read_text())
    assert found == {"rate": 0.1, "data": "some/text"}
    assert {path.name for path in tmp_path.iterdir()} == {"hyperparameters.json", "metrics.jsonl"}


def events(path):
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    kind = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
    return [kind.FromString(record) for record in RawEventFileLoader(str(path)).Load()]


def test_tensorboard_reads_the_scalars_and_the_settings_back(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: extra `train`")
    tracker = tracking.TensorBoardTracker(tmp_path, start_step=5)
    tracker.log_hyperparameters({"rate": 0.5})
    tracker.log({"loss": jnp.float32(0.25), "recall": 1}, step=5)
    tracker.finish()
    tracker.finish()
    (path,) = tmp_path.iterdir()
    version, start, settings, scalars = events(path)
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (start.session_log.START, 5)
    (text,) = settings.summary.value
    assert text.metadata.plugin_data.plugin_name == "text"
    assert b"| rate | 0.5 |" in text.tensor.string_val[0]
    found = {value.tag: value.simple_value for value in scalars.summary.value}
    assert (scalars.step, found) == (5, {"loss": 0.25, "recall": 1.0})


def test_tensorboard_shows_a_resumed_step_once(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: extra `train`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop, value in ((0, 4, 1.0), (2, 5, 2.0)):
        tracker = tracking.TensorBoardTracker(tmp_path, start_step=start)
        for step in range(start, stop):
            tracker.log({"loss": value}, step=step)
        tracker.finish()
    accumulator = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in accumulator.Scalars("loss")]
    assert found == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]


def test_tensorboard_files_are_written_without_torch_or_tensorflow(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: extra `train`")
    code = f"""
import sys
sys.modules["torch"] = sys.modules["tensorflow"] = None  # an import of either now fails
from sparda_jax import tracking
assert "tensorboard" not in sys.modules
tracker = tracking.make_tracker(["tensorboard"], {str(tmp_path)!r})
tracker.log({{"loss": 1.0}}, step=0)
tracker.finish()
"""
    root = pathlib.Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
    (path,) = tmp_path.iterdir()
    assert len(events(path)) == 3


class Service(types.ModuleType):
    """Stands for wandb or trackio: notes what it is told."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def init(self, **arguments):
        self.calls.append(("init", arguments))

    def log(self, metrics, step):
        self.calls.append(("log", metrics, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_run_starts_with_its_settings_and_ends_once(name, tmp_path, monkeypatch):
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    tracker = tracking.make_tracker([name], tmp_path / "mine", start_step=7)
    tracker.log_hyperparameters({"rate": 0.1})
    tracker.log({"loss": jnp.float32(0.5)}, step=7)
    tracker.finish()
    tracker.finish()
    start = {"project": "sparda_jax", "name": "mine-from-step-7", "config": {"rate": 0.1}}
    assert service.calls == [("init", start), ("log", {"loss": 0.5}, 7), ("finish",)]


def test_a_service_run_without_settings_starts_at_its_first_numbers(tmp_path, monkeypatch):
    service = Service("wandb")
    monkeypatch.setitem(sys.modules, "wandb", service)
    tracker = tracking.make_tracker(["wandb"], tmp_path / "mine")
    assert service.calls == []
    tracker.log({"loss": 1.0}, step=0)
    assert service.calls[0] == ("init", {"project": "sparda_jax", "name": "mine", "config": {}})


@pytest.mark.parametrize(
    ("name", "pip_name"),
    [("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", r"'sparda-jax\[train\]'")],
)
def test_a_missing_package_is_named_with_how_to_get_it(name, pip_name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=f"'{name}' needs .* pip install {pip_name}"):
        tracking.make_tracker([name], tmp_path)


def test_a_package_broken_inside_is_not_reported_as_missing(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        tracking.make_tracker(["wandb"], tmp_path)


def test_several_trackers_are_told_the_same(tmp_path, monkeypatch):
    service = Service("trackio")
    monkeypatch.setitem(sys.modules, "trackio", service)
    tracker = tracking.make_tracker(["jsonl", "trackio"], tmp_path)
    tracker.log_hyperparameters({"rate": 0.1})
    tracker.log({"loss": 2.0}, step=0)
    tracker.finish()
    assert lines(tmp_path)[0]["loss"] == 2.0
    assert json.loads((tmp_path / "hyperparameters.json").read_text()) == {"rate": 0.1}
    assert [call[0] for call in service.calls] == ["init", "log", "finish"]


def test_a_tracker_that_fails_to_finish_does_not_keep_the_others_open(tmp_path):
    class Failing(tracking.NoTracker):
        def finish(self):
            raise OSError("disk full")

    jsonl = tracking.JsonlTracker(tmp_path)
    with pytest.raises(OSError, match="disk full"):
        tracking.CompositeTracker([Failing(), jsonl]).finish()
    with pytest.raises(ValueError, match="closed"):
        jsonl.log({"loss": 1.0}, step=0)


def test_trackers_made_before_a_missing_one_are_closed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    closed = []
    monkeypatch.setattr(tracking.JsonlTracker, "finish", lambda self: closed.append(self))
    with pytest.raises(ModuleNotFoundError, match="wandb"):
        tracking.make_tracker(["jsonl", "wandb"], tmp_path)
    (jsonl,) = closed
    jsonl._file.close()


@pytest.mark.parametrize("names", [[], ["none"]])
def test_no_tracker_leaves_no_trace(names, tmp_path):
    tracker = tracking.make_tracker(names, tmp_path / "run")
    tracker.log_hyperparameters({"rate": 0.1})
    tracker.log({"loss": 1.0}, step=0)
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"\['clu'\]; known are \['jsonl', 'none', .*'wandb'\]"):
        tracking.make_tracker(["jsonl", "clu"], tmp_path)


@pytest.mark.parametrize("names", [["jsonl", "jsonl"], ["none", "jsonl"]])
def test_a_name_twice_or_beside_none_is_refused(names, tmp_path):
    with pytest.raises(ValueError, match="must name each tracker once, and 'none' alone"):
        tracking.make_tracker(names, tmp_path)
