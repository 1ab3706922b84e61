# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The record of a result: what was run, where, with which versions, and what came out.

One JSON file per experiment and device, `<experiment>.<device>.json`. A record that lacks a field,
holds a number that is not finite, or comes from a tree with uncommitted changes is refused, so a
number in a README can always be traced to the commit and the command that made it.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import tomllib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
"""The root of the repository."""

RESULTS = ROOT / "experiments" / "results"
"""Where committed records live."""

VERSIONED = ("python", "jax", "jaxlib", "flax", "sparda_jax")
"""What `versions` must name."""

PER_RUN = ("command", "commit", "date", "config", "devices", "versions")
"""What a row states itself when it comes from another run than the head of its record."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What one experiment gave on one device.

    Attributes:
        experiment: name of the module under `experiments`.
        command: the exact command that repeats the run.
        commit: hash of the commit that ran, 7 to 40 hexadecimal digits.
        dirty: whether the tree differed from that commit; a written record says `False`.
        date: day of the run, ISO 8601.
        device: what JAX calls the device.
        devices: how many devices the run used.
        versions: Python and package versions, at least those of `VERSIONED`.
        config: the settings that all rows share.
        rows: one mapping per measured cell.
    """

    experiment: str
    command: str
    commit: str
    dirty: bool
    date: str
    device: str
    devices: int
    versions: dict[str, str]
    config: dict[str, Any]
    rows: list[dict[str, Any]]


def collect(
    experiment: str,
    command: str,
    config: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    commit: str | None = None,
    dirty: bool | None = None,
    date: str | None = None,
    devices: int | None = None,
) -> Record:
    """Collect a record: the given rows, with device, versions, commit and date filled in.

    A `commit` given by hand, for a machine without git, vouches that the tree is that commit: then
    `dirty` is `False` unless git is there to look or the caller says otherwise. Files under
    `experiments/results` never make a tree dirty: a run writes them.

    Args:
        experiment: name of the module under `experiments`.
        command: the exact command that repeats the run.
        config: the shared settings, a mapping or a dataclass instance.
        rows: one mapping per measured cell.
        commit: hash of the commit; `None` asks git.
        dirty: whether the tree differs from the commit; `None` asks git.
        date: day of the run, ISO 8601; `None` is today (UTC).
        devices: how many devices the run used; `None` counts those JAX sees.

    Returns:
        the record, not yet checked: `write` does that.

    Raises:
        ValueError: if `commit` is `None` and git cannot tell it.
    """
    if dirty is None:
        status = _git("status", "--porcelain", "--", ".", ":!experiments/results")
        dirty = bool(status)  # without git only a commit given by hand passes the next check
    if commit is None:
        commit = _git("rev-parse", "HEAD")
        if commit is None:
            raise ValueError(f"{commit=}: git knows no commit here; pass commit= (and dirty=)")
    return Record(
        experiment=experiment,
        command=command,
        commit=commit,
        dirty=dirty,
        date=date or datetime.datetime.now(datetime.UTC).date().isoformat(),
        device=jax.devices()[0].device_kind,
        devices=jax.device_count() if devices is None else devices,
        versions=_versions(),
        config=_plain(config),
        rows=[_plain(row) for row in rows],
    )


def command_of(experiment: str, config: Any, *, unnamed: Sequence[str] = ()) -> str:
    """Spell the command that repeats a run: the fields that differ from their defaults.

    Args:
        experiment: name of the module under `experiments`.
        config: a dataclass instance.
        unnamed: fields that say nothing of the result, beside those that every benchmark has.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Config:
        ...     cells: tuple[str, ...] = ()
        ...     steps: int = 64
        ...     tiny: bool = False
        ...     out: str = "results"
        >>> command_of("bench_decode", Config(cells=("B8 64K",), tiny=True, out="elsewhere"))
        "python -m experiments.bench_decode --cells 'B8 64K' --tiny"
    """
    words = [f"python -m experiments.{experiment}"]
    hidden = {"commit", "dirty", "date", "out", "earlier", *unnamed}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in hidden or value == field.default:
            continue
        words.append("--" + field.name.replace("_", "-"))
        if isinstance(value, tuple):
            words += [shlex.quote(str(item)) for item in value]
        elif not isinstance(value, bool):
            words.append(shlex.quote(str(value)))
    return " ".join(words)


def head_of(
    experiment: str, config: Any, settings: Sequence[str], *, unnamed: Sequence[str] = ()
) -> Record:
    """Collect a benchmark's record without its rows, and refuse one that could not be written.

    Args:
        experiment: name of the module under `experiments`.
        config: a dataclass instance with `commit`, `dirty`, `date` and `out`.
        settings: fields that all rows share.
        unnamed: as in `command_of`.

    Raises:
        ValueError: the tree differs from the commit, though the record is to be written.
    """
    head = collect(
        experiment,
        command_of(experiment, config, unnamed=unnamed),
        {name: getattr(config, name) for name in settings},
        [],
        commit=config.commit,
        dirty=config.dirty,
        date=config.date,
        devices=1,
    )
    if config.out is not None and head.dirty:
        raise ValueError(
            f"the tree differs from commit {head.commit}, so its record would be refused; commit "
            "first, or measure without a record with out=None"
        )
    return head


def append(old: Record, new: Record, *, replace_by: Sequence[str] = ()) -> Record:
    """Append the rows of a later run: the head is the new run's, old rows keep their own.

    A row of the earlier run states itself whatever differs from the new head (commit, date,
    command, configuration, versions), so that every number keeps its origin.

    Args:
        old: what was recorded so far.
        new: the later run, of the same experiment on the same device.
        replace_by: columns that identify a cell. An old row is dropped if a new one has the same
            values there. Empty keeps all.

    Returns:
        one record with the rows of both, old ones first.

    Raises:
        ValueError: if experiment or device differ.
        KeyError: if a row lacks a column of `replace_by`.
    """
    if (old.experiment, old.device) != (new.experiment, new.device):
        raise ValueError(
            f"{(old.experiment, old.device)} and {(new.experiment, new.device)} are two records; "
            "write each to its own file"
        )
    head, earlier = dataclasses.asdict(new), dataclasses.asdict(old)
    own = {name: earlier[name] for name in PER_RUN if earlier[name] != head[name]}
    replaced = [[row[name] for name in replace_by] for row in new.rows] if replace_by else []
    kept = [
        own | row
        for row in earlier["rows"]
        if not replace_by or [row[name] for name in replace_by] not in replaced
    ]
    return dataclasses.replace(new, rows=kept + head["rows"])


def path_of(record: Record, folder: str | os.PathLike[str] = RESULTS) -> pathlib.Path:
    """Name the file of a record: `<experiment>.<device>.json`, the device in `lower_case`.

    Args:
        record: only its experiment and device matter.
        folder: where it lies.

    Returns:
        for example `bench_decode.nvidia_h100_80gb_hbm3.json` in `folder`.
    """
    device = re.sub(r"[^a-z0-9]+", "_", record.device.lower()).strip("_")
    return pathlib.Path(folder) / f"{record.experiment}.{device}.json"


def write(record: Record, folder: str | os.PathLike[str] = RESULTS) -> pathlib.Path:
    """Write a record to its file, whole or not at all, and give the path.

    A file of that name is replaced; `append` to what `read` gives to keep its rows.

    Args:
        record: what `collect` or `append` gave.
        folder: made if it is missing.

    Returns:
        the path written.

    Raises:
        ValueError: if the record is incomplete, not finite, or of a dirty tree.
    """
    content = dataclasses.asdict(record)
    _check(content, where="this record")
    path = path_of(record, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(_dump(content), encoding="utf-8")
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return path


def read(path: str | os.PathLike[str]) -> Record:
    """Read a record and check it like `write` does, and that the file is named after it.

    Args:
        path: a file that `write` made.

    Returns:
        the record.

    Raises:
        ValueError: if the file is not JSON, not a complete record, or misnamed.
    """
    path = pathlib.Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    _check(content, where=path.name)
    record = Record(**content)
    if path_of(record, path.parent) != path:
        raise ValueError(f"{path.name} must be named {path_of(record).name}, after what it holds")
    return record


def _check(content: Any, *, where: str) -> None:
    """Raise a `ValueError` that names the first thing that keeps `content` from being a record."""
    names = [field.name for field in dataclasses.fields(Record)]
    if not isinstance(content, dict) or set(content) != set(names):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{where} must have exactly the fields {sorted(names)}, not {found}")
    for name, hint in typing.get_type_hints(Record).items():
        kind, value = typing.get_origin(hint) or hint, content[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{where}: {name}={value!r} must be of type {kind.__name__}")
    if content["dirty"]:
        raise ValueError(f"{where}: dirty=True; commit the changes and run again")
    if not re.fullmatch(r"[A-Za-z_]\w*", content["experiment"]):
        raise ValueError(f"{where}: experiment={content['experiment']!r} must name a module")
    if not re.fullmatch(r"[0-9a-f]{7,40}", content["commit"]):
        raise ValueError(f"{where}: commit={content['commit']!r} must be 7 to 40 hex digits")
    for name in ("command", "device"):
        if not content[name].strip():
            raise ValueError(f"{where}: {name} must not be empty")
    if content["devices"] < 1:
        raise ValueError(f"{where}: devices={content['devices']} must be at least 1")
    _check_day(content["date"], where)
    missing = [name for name in VERSIONED if not content["versions"].get(name)]
    if missing:
        raise ValueError(f"{where}: versions lacks {missing}, it must name {list(VERSIONED)}")
    rows = content["rows"]
    if not rows or not all(isinstance(row, dict) and row for row in rows):
        raise ValueError(f"{where}: rows must hold at least one row, and no empty one")
    try:
        _dump(content)
    except ValueError as error:
        raise ValueError(f"{where} holds a number that is not finite: {error}") from error


def _check_day(date: str, where: str) -> None:
    try:
        datetime.date.fromisoformat(date)
    except ValueError as error:
        raise ValueError(f"{where}: date={date!r} must be a day such as 2026-11-23") from error


def _dump(content: dict[str, Any]) -> str:
    """Give JSON with one row a line: a re-run cell is one line of a diff."""
    head = {name: value for name, value in content.items() if name != "rows"}
    rows = [json.dumps(row, allow_nan=False, ensure_ascii=False) for row in content["rows"]]
    text = json.dumps(head, indent=2, allow_nan=False, ensure_ascii=False)
    return text.removesuffix("\n}") + ',\n  "rows": [\n    ' + ",\n    ".join(rows) + "\n  ]\n}\n"


def _plain(value: Any) -> Any:
    """Turn NumPy and JAX scalars, tuples, paths and dataclasses into what JSON has."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return pathlib.PurePath(value).as_posix()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise ValueError(f"{value!r} of type {type(value).__name__} has no place in a record")


def _versions() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return {"python": platform.python_version(), **packages, "sparda_jax": project["version"]}


def _git(*arguments: str) -> str | None:
    """Ask git about this repository; `None` where there is no git, or another project's."""
    answers = []
    for question in (["rev-parse", "--show-prefix"], arguments):
        try:
            run = subprocess.run(
                ["git", *question], cwd=ROOT, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        answers.append(run.stdout.strip())
    prefix, answer = answers
    return None if prefix else answer
