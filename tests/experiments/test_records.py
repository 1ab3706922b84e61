# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Records: complete, finite, of a clean tree; and the tables made from them."""

import dataclasses
import datetime
import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import collect, records

COMMITTED = sorted(records.RESULTS.glob("*.json"))


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = 8
    sizes: tuple[int, ...] = (1, 2)


def record(**changes):
    made = records.collect(
        "bench_nothing",
        "python -m experiments.bench_nothing",
        Settings(),
        [{"op": "gather", "ms": 1.5}, {"op": "scatter", "ms": 2.5}],
        commit="0123abcd",
        dirty=False,
        date="2026-11-23",
    )
    return dataclasses.replace(made, **changes)


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Give a small repository that `records` takes for its own."""
    root = tmp_path / "repository"
    (root / "experiments" / "results").mkdir(parents=True)
    (root / "pyproject.toml").write_bytes((records.ROOT / "pyproject.toml").read_bytes())
    git(root.parent, "init", "--quiet", str(root))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    monkeypatch.setattr(records, "ROOT", root)
    return root


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_every_committed_record_is_complete_and_clean(path):
    found = records.read(path)
    assert found.rows
    assert (records.ROOT / "experiments" / f"{found.experiment}.py").exists()


def test_collect_fills_in_where_and_with_what_it_ran():
    found = record()
    assert found.device == jax.devices()[0].device_kind
    assert found.devices == jax.device_count()
    assert found.versions["jax"] == jax.__version__
    assert set(found.versions) == set(records.VERSIONED)
    assert found.config == {"steps": 8, "sizes": [1, 2]}


def test_collect_asks_git_for_the_commit_and_takes_today(repository):
    found = records.collect("e", "c", {}, [{"ms": 1.0}])
    assert len(found.commit) == 40
    assert found.dirty is False
    age = datetime.datetime.now(datetime.UTC).date() - datetime.date.fromisoformat(found.date)
    assert age.days in (0, 1)  # a run over midnight


def test_a_changed_file_makes_the_tree_dirty_and_a_new_result_does_not(repository):
    (repository / "experiments" / "results" / "e.cpu.json").write_text("{}")
    assert records.collect("e", "c", {}, [{"ms": 1.0}]).dirty is False
    (repository / "new.py").write_text("")
    assert records.collect("e", "c", {}, [{"ms": 1.0}]).dirty is True
    assert records.collect("e", "c", {}, [{"ms": 1.0}], commit="0123abcd").dirty is True


def test_without_git_the_commit_must_be_given_and_vouches_for_the_tree(repository):
    (repository / ".git").rename(repository / "no_git")
    with pytest.raises(ValueError, match="commit=None: git knows no commit here; pass commit="):
        records.collect("e", "c", {}, [{"ms": 1.0}])
    found = records.collect("e", "c", {}, [{"ms": 1.0}], commit="0123abcd")
    assert (found.commit, found.dirty) == ("0123abcd", False)


def test_the_commit_of_a_repository_around_this_one_is_not_taken(repository, monkeypatch):
    inner = repository / "experiments"
    (inner / "pyproject.toml").write_bytes((repository / "pyproject.toml").read_bytes())
    monkeypatch.setattr(records, "ROOT", inner)
    with pytest.raises(ValueError, match="git knows no commit here"):
        records.collect("e", "c", {}, [{"ms": 1.0}])


def test_what_is_written_is_read_back(tmp_path):
    path = records.write(record(), tmp_path / "results")
    assert records.read(path) == record()
    assert [file.name for file in path.parent.iterdir()] == ["bench_nothing.cpu.json"]


def test_a_file_is_named_after_experiment_and_device():
    named = record(experiment="bench_decode", device="NVIDIA H100 80GB HBM3 (PCIe)")
    path = records.path_of(named, "results")
    assert path == pathlib.Path("results/bench_decode.nvidia_h100_80gb_hbm3_pcie.json")


def test_each_row_is_one_line_of_the_file(tmp_path):
    text = records.write(record(), tmp_path).read_text()
    assert '\n    {"op": "gather", "ms": 1.5},\n    {"op": "scatter", "ms": 2.5}\n  ]\n}\n' in text


def test_array_scalars_and_arrays_become_plain_numbers(tmp_path):
    rows = [{"a": np.float32(0.5), "b": jnp.int32(3), "c": np.arange(2), "d": (1, None)}]
    found = records.collect("e", "c", {"path": pathlib.Path("a/b")}, rows, commit="0123abcd")
    assert found.rows == [{"a": 0.5, "b": 3, "c": [0, 1], "d": [1, None]}]
    assert found.config == {"path": "a/b"}


def test_a_value_that_json_has_no_word_for_is_refused():
    with pytest.raises(ValueError, match="of type object has no place in a record"):
        records.collect("e", "c", {}, [{"a": object()}], commit="0123abcd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dirty": True}, "dirty=True; commit the changes and run again"),
        ({"commit": "main"}, "commit='main' must be 7 to 40 hex digits"),
        ({"date": "23 November"}, "date='23 November' must be a day such as 2026-11-23"),
        ({"command": " "}, "command must not be empty"),
        ({"device": ""}, "device must not be empty"),
        ({"devices": 0}, "devices=0 must be at least 1"),
        ({"devices": True}, "devices=True must be of type int"),
        ({"experiment": "../up"}, "experiment='../up' must name a module"),
        ({"versions": {"python": "3.12"}}, r"versions lacks \['jax', 'jaxlib', 'flax', 'sparda"),
        ({"rows": []}, "rows must hold at least one row, and no empty one"),
        ({"rows": [{}]}, "rows must hold at least one row, and no empty one"),
        ({"rows": {}}, "rows={} must be of type list"),
        ({"rows": [{"ms": float("nan")}]}, "holds a number that is not finite: .*nan"),
        ({"config": {"rate": float("inf")}}, "holds a number that is not finite: .*inf"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_record_that_cannot_be_traced_is_not_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        records.write(record(**changes), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_record_leaves_the_earlier_file_as_it_was(tmp_path):
    path = records.write(record(), tmp_path)
    with pytest.raises(ValueError, match="dirty=True"):
        records.write(record(dirty=True), tmp_path)
    assert records.read(path) == record()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(records.Record)])
def test_a_file_that_lacks_a_field_is_refused(field, tmp_path):
    path = records.write(record(), tmp_path)
    content = json.loads(path.read_text())
    del content[field]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"bench_nothing\.cpu\.json must have exactly the fields"):
        records.read(path)


def test_a_file_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json must have exactly the fields .*, not list"):
        records.read(tmp_path / "a.json")


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"experiment": ')
    with pytest.raises(ValueError, match=r"a\.json is not JSON: .*line 1"):
        records.read(tmp_path / "a.json")


def test_a_file_under_another_name_is_refused(tmp_path):
    path = records.write(record(), tmp_path).rename(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"other\.json must be named bench_nothing\.cpu\.json"):
        records.read(path)


def test_appended_rows_keep_where_they_came_from():
    later = record(commit="89abcdef", date="2026-11-24", rows=[{"op": "add", "ms": 3.5}])
    both = records.append(record(), later)
    assert (both.commit, both.date) == ("89abcdef", "2026-11-24")
    assert [row["op"] for row in both.rows] == ["gather", "scatter", "add"]
    assert [row.get("commit") for row in both.rows] == ["0123abcd", "0123abcd", None]
    assert [row.get("date") for row in both.rows] == ["2026-11-23", "2026-11-23", None]
    assert all("command" not in row for row in both.rows)


def test_rows_appended_over_three_runs_keep_each_its_own_commit():
    runs = [record(commit=digit * 7, rows=[{"op": digit}]) for digit in "abc"]
    merged = records.append(records.append(runs[0], runs[1]), runs[2])
    assert [row.get("commit", merged.commit) for row in merged.rows] == ["a" * 7, "b" * 7, "c" * 7]


def test_a_cell_that_ran_again_replaces_its_old_row():
    later = record(commit="89abcdef", rows=[{"op": "gather", "ms": 0.5}])
    both = records.append(record(), later, replace_by=["op"])
    assert [(row["op"], row["ms"]) for row in both.rows] == [("scatter", 2.5), ("gather", 0.5)]


def test_a_row_without_the_column_that_identifies_it_is_refused():
    with pytest.raises(KeyError, match="shape"):
        records.append(record(), record(), replace_by=["shape"])


def test_another_device_gets_a_record_of_its_own():
    with pytest.raises(ValueError, match=r"'cpu'\) and \('bench_nothing', 'NVIDIA X'\) are two"):
        records.append(record(), record(device="NVIDIA X"))


def test_a_table_has_a_column_for_every_name_and_an_empty_cell_for_a_missing_one():
    rows = [{"op": "a|b", "ms": 0.123456}, {"op": "c", "bytes": 12_345_678, "shape": [2, 64]}]
    text = collect.table(record(rows=rows, devices=4))
    assert "4 × cpu; jax " in text
    assert "commit 0123abcd; 2026-11-23." in text
    assert text.splitlines()[-4:] == [
        "| op | ms | bytes | shape |",
        "| --- | --- | --- | --- |",
        "| a\\|b | 0.1235 |  |  |",
        "| c |  | 12345678 | 2×64 |",
    ]


def test_rows_of_several_runs_name_their_commits_and_stand_by_cell():
    row = {"model": "m", "method": "a", "batch": 4, "context": 64, "device_gib": None}
    runs = [
        record(experiment="bench_decode", commit=digit * 40, rows=[row | {"batch": batch}])
        for digit, batch in (("a", 16), ("b", 4))
    ]
    text = collect.table(records.append(*runs))
    assert text.splitlines()[-4:] == [
        "| model | method | context | batch | device_gib | commit |",
        "| --- | --- | --- | --- | --- | --- |",
        "| m | a | 64 | 4 |  | bbbbbbbb |",
        "| m | a | 64 | 16 |  | aaaaaaaa |",
    ]


def test_main_puts_the_tables_between_the_markers_and_again_changes_nothing(tmp_path, capsys):
    records.write(record(), tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"# Before\n{collect.START}\nold\n{collect.END}\nafter\n")
    config = collect.Config(results=tmp_path, readme=readme)
    markdown = collect.main(config)
    assert capsys.readouterr().out == markdown + "\n"
    assert "| scatter | 2.5 |" in markdown
    first = readme.read_text()
    assert first.startswith("# Before\n")
    assert first.endswith("\nafter\n")
    assert markdown in first
    assert "old" not in first
    collect.main(config)
    assert readme.read_text() == first


def test_main_without_a_readme_only_prints(tmp_path, capsys):
    records.write(record(), tmp_path)
    collect.main(collect.Config(results=tmp_path, readme=tmp_path / "README.md"))
    assert "### bench_nothing on cpu" in capsys.readouterr().out
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("no marker", "0 and 0"),
        (collect.START, "1 and 0"),
        (f"{collect.END} {collect.START}", "1 and 1"),
        (f"{collect.START} {collect.START} {collect.END}", "2 and 1"),
    ],
)
def test_a_readme_without_its_two_markers_in_order_is_refused(text, found):
    with pytest.raises(ValueError, match=f"must appear once each, in this order; found {found}"):
        collect.insert(text, "table")
