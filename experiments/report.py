# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run: progress while it goes on, tables and figures when it is over."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Tell = Callable[[str, int, int], None]
"""Is told what is being done, how much of it is done, and of how much."""

TableText = tuple[str, list[str], list[list[str]]]
"""A table: its title, its header, its rows."""

STYLE = Path(__file__).parent / "sparda.mplstyle"

MODE_NAMES = {
    "dense": "nobody: dense reads all",
    "sparse": "own queries: sparse",
    "sparda": "forecast: sparda, shipped heads",
    "sparda_fresh": "forecast: sparda, fresh heads",
}

RECALL_OF = {"sparse": "query", "sparda": "forecast", "sparda_fresh": "forecast_fresh"}
"""Under which name the report holds the recall of a mode."""

RANKED_BY = {
    "query": "own queries",
    "forecast": "forecast, shipped heads",
    "forecast_fresh": "forecast, fresh heads",
    "previous_query": "previous_query",
    "random": "chance",
}


@contextlib.contextmanager
def progress() -> Iterator[Tell]:
    """Show progress: bars with a time to go on a terminal with rich, else a line per part.

    Yields:
        the function to call with a title, what is done, and what there is in all.
    """
    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        begun: set[str] = set()

        def line(what: str, done: int, total: int) -> None:
            if done >= total or what not in begun:
                begun.add(what)
                print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield advance


def print_tables(report: Mapping[str, Any]) -> None:
    """Print what a report says as tables on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, header, rows in tables(report):
        table = Table(title=title, title_justify="left")
        for place, name in enumerate(header):
            table.add_column(name, justify="left" if place == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def tables(report: Mapping[str, Any]) -> list[TableText]:
    """Lay out a report as tables: how good each mode is, recall by layer, what moved.

    Args:
        report: as `demo.main` writes it.

    Returns:
        for each table its title, its header and its rows.
    """
    samples = report["needle_samples"]
    modes = [
        [
            MODE_NAMES[name],
            f"{bits:.3f}",
            f"{report['needle_accuracy'][name]:.0%}",
            _share(report["recall"].get(RECALL_OF.get(name, ""))),
        ]
        for name, bits in report["bits_per_byte"].items()
    ]
    by_layer, order = report["recall_by_layer"], list(RANKED_BY)
    layers = [
        [RANKED_BY[name], *(f"{share:.2f}" for share in shares)]
        for name, shares in sorted(by_layer.items(), key=lambda item: order.index(item[0]))
    ]
    offload = report["offload"]
    memory = [
        ["K and V of the whole text", _mib(offload["full_kv_bytes"])],
        ["held on the device when offloaded", _mib(offload["device_kv_bytes"])],
        [
            "blocks read per token, all layers and KV heads",
            f"{offload['chosen_blocks_per_step']:.0f}",
        ],
        ["of which fetched from the host", f"{offload['fetched_blocks_per_step']:.1f}"],
        ["of which were there already (hit rate)", f"{offload['hit_rate']:.1%}"],
        ["tokens equal to those of the resident run", "all" if offload["equal_tokens"] else "NO"],
    ]
    width = len(next(iter(by_layer.values())))
    return [
        (
            "What each mode makes of the document",
            ["blocks chosen by", "bits per byte", f"needles found (of {samples})", "recall"],
            modes,
        ),
        (
            f"Recall by layer, over {report['recall_tokens']} tokens",
            ["blocks ranked by", *(str(layer) for layer in range(width))],
            layers,
        ),
        ("Generation with K and V on the host", ["", "value"], memory),
    ]


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.md`: what was done, the tables, the figures, and how to read them.

    Args:
        report: as `demo.main` writes it.
        folder: that holds the figures.
    """
    config, seconds = report["config"], report["seconds"]
    first, last = report["training"][0], report["training"][-1]
    shown = {title: _markdown(header, rows) for title, header, rows in tables(report)}
    modes, layers, memory = shown.values()
    bits = report["bits_per_byte"]
    cost = bits["sparda"] / bits["sparse"] - 1.0
    offload = report["offload"]
    share = offload["device_kv_bytes"] / offload["full_kv_bytes"]
    text = f"""# What the demo did

A language model that reads a long text must keep a key and a value (K and V) of every byte that it
has seen. SparDA lets it keep them in host memory. The text is cut into blocks; each layer of the
model has a small *Forecast head* that says, one layer ahead, which few blocks the next layer will
want to read, so that only those have to travel to the device, and can do so while this layer still
computes.

This run used a model of {report["parameters"] / 1e6:.1f} million parameters in {config["layers"]}
layers, which reads bytes, on {config["context"]} bytes of `{report["document"]}`. Each query reads
{config["selected_blocks"]} of {config["context"] // config["block_size"]} blocks of
{config["block_size"]} bytes.

## 1. Training Forecast heads from scratch

The backbone is frozen; only the heads learn. Their teacher is the model's own attention: the loss
is the KL divergence from where the next layer really looks to where the head says that it will
look. In {len(report["training"])} steps ({seconds["train"]:.0f} s) the loss went from
{first["loss"]:.3f} to {last["loss"]:.3f}, and recall from {first["recall"]:.2f} to
{last["recall"]:.2f}.

*Recall* is the attention that falls on the chosen blocks, compared with the best choice of as many.
Blocks that are always read (the first one and those just before the query) do not count.

![loss and recall while training](training.png)

## 2. Dense, sparse, sparda

*Dense* reads every block. *Sparse* ranks the blocks with the layer's own queries, which is too late
to fetch anything. *Sparda* ranks them with the forecast of the layer before: once with the heads
that come with the package, once with the heads that were trained a minute ago.

Needles are lines such as `# note bacedo = 012345`, hidden in the text and asked for at its end.
A question counts if all six digits are right: guessing is right once in a million.

{modes}

Choosing one layer ahead costs {cost:+.2%} bits per byte against sparse.

{layers}

`previous_query` needs no training: it guesses the next layer's queries by applying their
projection to this layer's input. In layer 0 there is no layer before, so it uses that layer's own
queries; means over layers leave layer 0 out.

![chosen blocks by layer](choices.png)

Every panel is a layer, every row a query, every column a block. The diagonal is the text just
before the query, the first column is the beginning of the text; both are always read. Everything
between was chosen: light blue by one KV head, dark blue by all.

## 3. Generating with K and V on the host

The same {offload["tokens"]} tokens were generated twice: with everything on the device, and with K
and V on the host, where the device keeps {share:.0%} of the bytes.

{memory}

![memory on the device](memory.png)

The prompt was the document up to its first question, whose answer is {report["answer"]}. This is
the question, and what the model wrote:

```
{report["generated"]}
```

## Where the time went

{_markdown(["part", "seconds"], [[k, f"{v:.1f}"] for k, v in seconds.items()])}

All numbers are in `report.json`.
"""
    path = folder / "report.md"
    path.write_text(text, encoding="utf-8")
    return path


def draw_training(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw loss and recall by step."""
    with _figure(path, columns=2) as (left, right):
        steps = [row["step"] for row in history]
        left.plot(steps, [row["loss"] for row in history])
        left.set(title="KL to the teacher, nats", xlabel="step", ylim=(0, None))
        right.plot(steps, [row["recall"] for row in history], color="C2")
        right.set(title="recall", xlabel="step", ylim=(0, 1))


def draw_choices(
    choices: Int[np.ndarray, "L T K J"], *, stride: int, num_blocks: int, path: Path
) -> None:
    """Draw which blocks each layer read: a panel for each layer, dark where all KV heads did.

    Args:
        choices: block ids of every `stride`-th query.
        stride: queries from one row to the next.
        num_blocks: in the text.
        path: of the figure.
    """
    layers, rows, heads, _ = choices.shape
    columns = min(layers, 4)
    with _figure(path, rows=-(-layers // columns), columns=columns, height=1.9) as panels:
        for layer, panel in enumerate(panels):
            if layer >= layers:
                panel.axis("off")
                continue
            marks = np.zeros((rows, heads, num_blocks + 1))  # the last takes `NO_BLOCK`
            np.put_along_axis(marks, choices[layer], 1.0, axis=-1)
            panel.imshow(
                marks[..., :-1].mean(axis=1),
                cmap="Blues",
                aspect="auto",
                extent=(0, num_blocks, rows * stride, 0),
            )
            panel.set(title=f"layer {layer}")
            panel.grid(visible=False)
            if layer % columns == 0:
                panel.set_ylabel("query")
            if layer + columns >= layers:
                panel.set_xlabel("block")


def draw_memory(offload: Mapping[str, Any], path: Path) -> None:
    """Draw what the device holds, with K and V there and with K and V on the host."""
    with _figure(path, height=2.2) as (panel,):
        full = offload["full_kv_bytes"] / 2**20
        panel.barh(["resident"], [full], color="C5", label="K and V of every block")
        left = 0.0
        names = {"slots": "slots for blocks", "summaries": "pooled keys", "tables": "block tables"}
        for place, (part, label) in enumerate(names.items()):
            size = offload["device_kv_parts"][part] / 2**20
            panel.barh(["offloaded"], [size], left=left, color=f"C{place}", label=label)
            left += size
        panel.set(title="K and V on the device, MiB")
        panel.invert_yaxis()
        panel.legend(loc="lower right")


@contextlib.contextmanager
def _figure(
    path: Path, *, rows: int = 1, columns: int = 1, height: float = 3.0
) -> Iterator[list["Axes"]]:
    """Open a figure with the house's style, and save it."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(STYLE):
        figure = Figure(figsize=(7.5, height * rows))
        FigureCanvasAgg(figure)
        yield list(figure.subplots(rows, columns, squeeze=False).ravel())
        figure.savefig(path)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table in Markdown: text to the left, numbers to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mib(size: float) -> str:
    return f"{size / 2**20:.2f} MiB"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
