# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The categories of a decode step's kernels, and the figure of what each takes."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report import STYLE

CATEGORIES = {
    "fetch": r"gather_blocks",
    "attention": r"sparse_decode|fmha|flash",
    "scores": r"block_scores|query_scores",
    "select and plan": r"select_blocks|plan_fetch|list_misses",
    "append and store": r"append_kv|write_blocks|scatter",
    "matmul": r"gemm|gemv|nvjet|cutlass|cublas|splitk|dot|matmul|wgmma",
    "copies": r"memcpy|memset|copy",
    "other": r"",
}
"""Category → pattern of kernel names; the first that matches counts."""

IDLE = "idle"


def category_of(kernel: str) -> str:
    """Sort a kernel by its name.

    Example:
        >>> category_of("gather_blocks_k"), category_of("nvjet_tst_128x8_64x12_2x1_v_bz_TNT")
        ('fetch', 'matmul')
    """
    name = kernel.lower()
    return next(what for what, pattern in CATEGORIES.items() if re.search(pattern, name))


def draw(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draw a stacked bar for each method in each cell: ms a step by category.

    Args:
        rows: of a record.
        path: of the figure; its folder is made.
    """
    import matplotlib.pyplot as plt

    names = ("model", "context", "batch", "method")
    bars = list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 1.2 + 0.45 * len(bars)))
        left = np.zeros(len(bars))
        for number, what in enumerate((*CATEGORIES, IDLE)):
            ms = np.zeros(len(bars))
            for row in rows:
                if row["category"] == what:
                    ms[bars.index(tuple(row[name] for name in names))] = row["ms"]
            colour = "#d0d0d0" if what == IDLE else f"C{number % 6}"
            hatch = "//" if what != IDLE and number >= 6 else None
            axes.barh(range(len(bars)), ms, left=left, label=what, color=colour, hatch=hatch)
            left += ms
        labels = [f"{bar[3]}\nB{bar[2]} {bar[1] // 1024}K" for bar in bars]
        axes.set_yticks(range(len(bars)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("ms a step, kernels one after another")
        axes.set_title("Where the time of a decode step goes")
        axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.25 - 0.4 / len(bars)))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)
