# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""From `results/*.json` to markdown tables, printed and put between the markers of a README."""

import dataclasses
import importlib.util
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import decode_categories, records

START = "<!-- results: written by python -m experiments.collect -->"
"""The line after which the tables stand in a README."""

END = "<!-- results: end -->"
"""The line before which they end."""

KERNEL_HEADER = ("op", "shape", "implementation", "ms", "p10 to p90", "rate", "share", "status")
"""The columns of a table of kernels."""

SHOWN = {
    "bench_decode": (
        *("model", "method", "context", "batch", "slots", "kv_dtype", "selections"),
        "new_blocks_per_step",
        *("misses", "fewest_misses", "tokens_per_s", "ms_per_step", "p99_ms", "host_ms"),
        *("h2d_gb_per_s", "hidden_share", "floor_ms", "floor_ratio", "device_gib", "status"),
    ),
}
"""The columns of experiments whose rows hold more than a table can show; others show all."""

CELL = {"bench_decode": ("model", "device_gib", "context", "batch")}
"""By what the rows of a record that grew over several runs are ordered."""

BACKENDS = ("mosaic_gpu", "triton")
"""The files of an op folder that hold a kernel."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What to collect.

    Attributes:
        results: folder of the records.
        readme: file whose text between the markers is replaced; left alone if it does not exist.
        kernels_readme: the same for a table of the kernels, in the folder of the ops; `None` is
            `pallas_kernels/README.md` beside the folder of `readme`.
    """

    results: pathlib.Path = records.RESULTS
    readme: pathlib.Path = records.ROOT / "experiments" / "README.md"
    kernels_readme: pathlib.Path | None = None


def main(config: Config) -> str:
    """Print a table per record, rewrite the tables of the READMEs, and draw what has a figure.

    Args:
        config: folder and READMEs.

    Returns:
        the markdown that was printed.

    Raises:
        ValueError: if a record is invalid, or the README lacks one of the markers.
    """
    found = [records.read(path) for path in sorted(config.results.glob("*.json"))]
    markdown = "\n".join(map(table, found))
    print(markdown)
    for record in found:
        if record.experiment == "decode_profile":
            figure = records.path_of(record, config.results / "figures").with_suffix(".png")
            decode_categories.draw(record.rows, figure)
    kernels_readme = config.kernels_readme
    if kernels_readme is None:
        kernels_readme = config.readme.parent.parent / "pallas_kernels" / "README.md"
    measured = [record for record in found if record.experiment == "bench_kernels"]
    kernels = kernel_tables(measured, kernels_readme.parent)
    for readme, content in ((config.readme, markdown), (kernels_readme, kernels)):
        if readme.exists():
            text = readme.read_text(encoding="utf-8")
            readme.write_text(insert(text, content), encoding="utf-8")
    return markdown


def table(record: records.Record) -> str:
    """Lay out a record: where its numbers come from, then one row per cell.

    A column stands where its name first appears, or as `SHOWN` says. A cell that a row lacks is
    empty. A row of another run than the head names its commit; the rest of what it states of that
    run stays in the record. The kernels have a table of their own, see `kernel_tables`.

    Args:
        record: what `records.read` gave.

    Returns:
        markdown that ends with a newline.
    """
    if record.experiment == "bench_kernels":
        return (
            f"### {record.experiment} on {record.device}\n\n{len(record.rows)} rows, laid out in "
            "[pallas_kernels/](../pallas_kernels/README.md).\n"
        )
    columns = list(dict.fromkeys(name for row in record.rows for name in row))
    if record.experiment in SHOWN:
        columns = [name for name in SHOWN[record.experiment] if name in columns]
    columns = [name for name in columns if name not in records.PER_RUN]
    rows = record.rows
    if any("commit" in row for row in rows):
        columns.append("commit")
        rows = [row | {"commit": row.get("commit", record.commit)[:8]} for row in rows]
    cell = CELL.get(record.experiment, ())
    rows = sorted(rows, key=lambda row: [(row.get(x) is not None, row.get(x)) for x in cell])
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
        *(_line([_cell(row.get(name, "")) for name in columns]) for row in rows),
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


def kernel_tables(measured: Sequence[records.Record], folder: pathlib.Path) -> str:
    """Lay out what was measured of each op and backend, and name those that were not.

    Variants of tiles stay in the record. A row of an earlier run names its commit.

    Args:
        measured: records of `bench_kernels`, one a device.
        folder: of the op folders.

    Returns:
        markdown that ends with a newline.
    """
    parts = []
    for record in measured:
        rows = [row for row in record.rows if "[" not in row["implementation"]]
        parts += [
            f"### {record.device}",
            "",
            f"jax {record.versions['jax']}; commit {record.commit[:8]}; {record.date}.",
            "",
            *_markdown(KERNEL_HEADER, [(*kernel_cells(row)[:-1], _origin(row)) for row in rows]),
            "",
        ]
    seen = {(row["op"], row["implementation"]) for record in measured for row in record.rows}
    missing = [
        (op.parent.name, backend)
        for op in sorted(folder.glob("*/reference.py"))
        for backend in (*BACKENDS, "reference")
        if (op.parent / f"{backend}.py").exists() and (op.parent.name, backend) not in seen
    ]
    if missing:
        parts += ["### Not measured yet", "", *_markdown(("op", "implementation"), missing), ""]
    return "\n".join(parts[:-1]) + "\n" if parts else "Nothing is measured yet.\n"


def kernel_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Show a row of `bench_kernels` in the columns of `KERNEL_HEADER`, with units.

    Example:
        >>> row = {"op": "f", "shape": "B1", "implementation": "triton"}
        >>> kernel_cells(row | {"status": "hung", "error": "no result in 9 s"})[-1]
        'hung: no result in 9 s'
    """
    names = (row["op"], row["shape"], row["implementation"])
    status = row["status"] + (f": {row['error']}" if "error" in row else "")
    if "ms" not in row:
        return (*names, "", "", "", "", status)
    unit, scale = ("TFLOP/s", 1e12) if row["bound"] == "matmul" else ("GB/s", 1e9)
    spread = f"{row['p10_ms']:.4g} to {row['p90_ms']:.4g}" if "p10_ms" in row else ""
    rate = f"{row['rate'] / scale:.4g} {unit}"
    return (*names, f"{row['ms']:.4g}", spread, rate, f"{row['share']:.1%}", status)


def print_kernels(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of `bench_kernels`: with rich where it is installed, else in plain columns.

    Args:
        rows: as `kernel_cells` takes them.
    """
    lines = [kernel_cells(row) for row in rows]
    if importlib.util.find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(KERNEL_HEADER, *lines, strict=True)]
        for line in (KERNEL_HEADER, *lines):
            print("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    layout = Table(title="kernels", title_justify="left")
    for place, name in enumerate(KERNEL_HEADER):
        layout.add_column(name, justify="right" if 3 <= place <= 6 else "left", overflow="fold")
    for line in lines:
        layout.add_row(*map(Text, line))  # as text: a variant's brackets are no markup
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(layout)


def _origin(row: Mapping[str, Any]) -> str:
    """Give a row's status, with the commit where it is not that of the record's head."""
    return f"{row['status']} ({row['commit'][:8]})" if "commit" in row else row["status"]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(header), _line(["---"] * len(header)), *(_line([*map(_cell, r)]) for r in rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    """Show four significant digits of a fraction, all of a whole number, shapes with ×."""
    if value is None:
        text = ""
    elif isinstance(value, float):
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
