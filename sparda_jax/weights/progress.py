# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""How far loading or saving has come, in bytes."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Literal

type Report = Callable[[int, int], None]
"""Told the bytes that are done and the bytes in all."""


@contextlib.contextmanager
def reporting(progress: Report | Literal["bar"] | None, title: str) -> Iterator[Report | None]:
    """Give what to call after each tensor.

    Args:
        progress: called as it is; `bar` draws a bar when standard error is a terminal and rich is
            installed; `None` stays silent.
        title: stands before the bar.

    Yields:
        the function to call with bytes done and bytes in all, or `None`.
    """
    if progress != "bar":
        yield progress
        return
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn(title), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)
