# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The two tiny models of the golden data, loaded as a user loads a checkpoint."""

import dataclasses
import functools
import json
import pathlib

from sparda_jax.selectors.base import round_scores
from sparda_jax.weights import load_pretrained
from sparda_jax.weights.config import parse_sparse

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
NAMES = ("minicpm", "nosa")


def round_lowered(scores, parity, *, share):
    """Round scores as the library does, after lowering them by a share of themselves.

    In the place of `round_scores`, it lets a score that stands just above the border between two
    bf16 numbers round down, as it did in the original's run. A step of bf16 is a share of 1/256 or
    more; float32 alone makes shares of 1e-5 in the last layers.
    """
    return round_scores(scores * (1.0 - share), parity)


def golden_config(name, **changes):
    """Make the configuration of a golden model, always sparse; `changes` replace sparse fields."""
    return golden_model(name, **changes).config


@functools.cache
def golden_model(name, **changes):
    """Load a golden model in float32; `changes` replace fields of its `SparseConfig`."""
    folder = GOLDEN / name
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sparse = dataclasses.replace(parse_sparse(raw["sparse_config"]), **changes)
    return load_pretrained(
        folder, dtype="float32", sparse=sparse, heads=folder / "indexer.pt", progress=None
    )
