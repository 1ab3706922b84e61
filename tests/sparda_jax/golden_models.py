# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The two tiny models of the golden data, loaded as a user loads a checkpoint."""

import dataclasses
import functools
import json
import pathlib

from sparda_jax.weights import load_pretrained
from sparda_jax.weights.config import parse_sparse

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
NAMES = ("minicpm", "nosa")


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
