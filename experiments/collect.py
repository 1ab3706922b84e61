# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""From `results/*.json` to markdown tables, printed and put between the markers of a README."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from experiments import records

START = "<!-- results: written by python -m experiments.collect -->"
"""The line after which the tables stand in a README."""

END = "<!-- results: end -->"
"""The line before which they end."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What to collect.

    Attributes:
        results: folder of the records.
        readme: file whose text between the markers is replaced; left alone if it does not exist.
    """

    results: pathlib.Path = records.RESULTS
    readme: pathlib.Path = records.ROOT / "experiments" / "README.md"


def main(config: Config) -> str:
    """Print a table per record and rewrite the tables of the README.

    Args:
        config: folder and README.

    Returns:
        the markdown that was printed.

    Raises:
        ValueError: if a record is invalid, or the README lacks one of the markers.
    """
    markdown = "\n".join(
        table(records.read(path)) for path in sorted(config.results.glob("*.json"))
    )
    print(markdown)
    if config.readme.exists():
        text = config.readme.read_text(encoding="utf-8")
        config.readme.write_text(insert(text, markdown), encoding="utf-8")
    return markdown


def table(record: records.Record) -> str:
    """Lay out a record: where its numbers come from, then one row per cell.

    A column stands where its name first appears. A cell that a row lacks is empty.

    Args:
        record: what `records.read` gave.

    Returns:
        markdown that ends with a newline.
    """
    columns = list(dict.fromkeys(name for row in record.rows for name in row))
    devices = f"{record.devices} × {record.device}" if record.devices > 1 else record.device
    versions = ", ".join(f"{name} {record.versions[name]}" for name in ("jax", "sparda_jax"))
    lines = [
        f"### {record.experiment} on {record.device}",
        "",
        f"{devices}; {versions}; commit {record.commit[:8]}; {record.date}.",
        "",
        f"    {record.command}",
        "",
        _line(columns),
        _line(["---"] * len(columns)),
        *(_line([_cell(row.get(name, "")) for name in columns]) for row in record.rows),
    ]
    return "\n".join(lines) + "\n"


def insert(text: str, markdown: str) -> str:
    """Replace what stands between the two markers of `text`.

    Args:
        text: a document that holds `START` and, after it, `END`, each once.
        markdown: what to put between them.

    Returns:
        the document; inserting twice changes nothing more.

    Raises:
        ValueError: if a marker is missing, doubled, or in the wrong order.
    """
    counts = (text.count(START), text.count(END))
    if counts != (1, 1) or text.index(START) > text.index(END):
        raise ValueError(
            f"the markers {START!r} and {END!r} must appear once each, in this order; "
            f"found {counts[0]} and {counts[1]}"
        )
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n\n{markdown}\n{END}{after}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    """Show four significant digits of a fraction, all of a whole number, shapes with ×."""
    if isinstance(value, float):
        text = f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    elif isinstance(value, list):
        is_shape = all(isinstance(item, int) for item in value)
        text = ("×" if is_shape else " ").join(map(_cell, value))
    elif isinstance(value, dict):
        text = ", ".join(f"{name} {_cell(item)}" for name, item in value.items())
    else:
        text = str(value)
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
