# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run: progress while it goes on, tables and figures when it is over."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator

Tell = Callable[[str, int, int], None]
"""Is told what is being done, how much of it is done, and of how much."""


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
        tasks: dict[str, int] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield advance
