# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Look into checkpoints, and carry Forecast heads between the original's files and ours.

python -m experiments.convert inspect --path MODEL_FOLDER_OR_HEADS
python -m experiments.convert import --heads ckpt-2000.pt --model MODEL_FOLDER
python -m experiments.convert export --heads heads.safetensors --model MODEL_FOLDER --out heads.pt
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

from sparda_jax.config import ModelConfig
from sparda_jax.errors import CheckpointError
from sparda_jax.weights import load_forecast_heads, save_forecast_heads
from sparda_jax.weights.config import parse_config, parse_eos_ids
from sparda_jax.weights.folder import HEADS, Shards, read_json, resolve_folder
from sparda_jax.weights.names import check_tensors, expected_tensors, has_importance
from sparda_jax.weights.sparda_torch import is_head, read_indexer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inspect:
    """Say what a checkpoint holds and whether it is complete, reading headers only.

    Attributes:
        path: a model folder or hub id, or Forecast heads (`.pt` or safetensors).
    """

    path: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """Turn the original's indexer checkpoint into heads.safetensors.

    Attributes:
        heads: a `.pt` of the original's trainer, safetensors, or a folder of these.
        model: the folder or hub id of the backbone that they must fit.
        out: file to write; `None` puts heads.safetensors into the model's folder, where
            `load_pretrained` finds it.
        overwrite: replace a file that exists.
    """

    heads: pathlib.Path
    model: str
    out: pathlib.Path | None = None
    overwrite: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Turn heads into a file that the original loads: `.pt`, or `.safetensors` with a `.json`.

    Attributes:
        heads: safetensors, a folder with heads.safetensors, or a `.pt`.
        model: the folder or hub id of their backbone.
        out: file to write; its suffix decides the form.
        overwrite: replace a file that exists.
    """

    heads: pathlib.Path
    model: str
    out: pathlib.Path
    overwrite: bool = False


type Config = Inspect | Import | Export


def main(config: Config) -> dict[str, Any]:
    """Run one of the three commands and print what it found or did, as JSON.

    Args:
        config: which command, and its arguments.

    Returns:
        what was printed.

    Raises:
        CheckpointError: a checkpoint is missing, damaged or does not fit.
        ValueError: the file to write exists, or its suffix is unknown.
    """
    if isinstance(config, Inspect):
        summary = inspect(config.path)
    else:
        out = config.out if config.out is not None else resolve_folder(config.model) / HEADS
        summary = convert(config.heads, config.model, out, overwrite=config.overwrite)
    print(json.dumps(summary, indent=2))
    return summary


def convert(
    heads: pathlib.Path, model: str, out: pathlib.Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Read heads in any form, check them against a model, write them in the form of `out`.

    Args:
        heads: in any form that `load_forecast_heads` reads.
        model: folder or hub id of the backbone.
        out: `.safetensors` or `.pt`.
        overwrite: replace a file that exists.

    Returns:
        what was written.

    Raises:
        CheckpointError: heads that are missing, damaged or do not fit the model.
        ValueError: `out` exists and `overwrite` is false, or has another suffix.
    """
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; pass --overwrite to replace it")
    config, _ = _read_model(resolve_folder(model))
    found = load_forecast_heads(heads, config)
    save_forecast_heads(out, found)
    written, _ = read_indexer(out)
    return {
        "read": str(heads),
        "wrote": str(out),
        "tensors": len(written),
        "shape": [config.kv_heads * config.head_dim, config.width],
        "dtype": found.entry.dtype.name,
        "step": found.step,
        "sparse_config": dict(found.sparse_config or {}),
    }


def inspect(path: str) -> dict[str, Any]:
    """Describe a checkpoint.

    Args:
        path: a model folder or hub id, or Forecast heads.

    Returns:
        of a model: its configuration, sizes, and `faults` (`None` if every tensor is there and
        fits); of heads: their tensors and what is known of their training.

    Raises:
        CheckpointError: neither can be read.
    """
    local = pathlib.Path(path)
    if local.is_file() or (local.is_dir() and not (local / "config.json").is_file()):
        tensors, notes = read_indexer(local)
        shapes = {name: f"{array.dtype.name}{list(array.shape)}" for name, array in tensors.items()}
        return {"kind": "heads", "path": path, "tensors": shapes, **notes}
    folder = resolve_folder(path)
    config, shards = _read_model(folder)
    backbone = {name: entry for name, entry in shards.entries.items() if not is_head(name)}
    targets = expected_tensors(config)
    try:
        faults = None
        check_tensors(backbone, targets, where=str(folder))
    except CheckpointError as error:
        faults = str(error)
    return {
        "kind": "model",
        "path": str(folder),
        "config": dataclasses.asdict(config),
        "eos_ids": list(parse_eos_ids(read_json(folder / "config.json"))),
        "tensors": len(shards.entries),
        "gigabytes": round(shards.size_bytes / 1e9, 3),
        "has_heads": (folder / HEADS).is_file() or len(backbone) < len(shards.entries),
        "faults": faults,
    }


def _read_model(folder: pathlib.Path) -> tuple[ModelConfig, Shards]:
    shards = Shards(folder)
    raw = read_json(folder / "config.json")
    return parse_config(raw, token_importance=has_importance(shards.entries)), shards


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Inspect | Import | Export))
    except (CheckpointError, ValueError) as error:
        sys.exit(f"error: {error}")
