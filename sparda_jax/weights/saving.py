# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`SpardaLM` → a folder in Hugging Face's layout.

The folder appears complete or not at all: it is written under another name beside its place and
then renamed.
"""

import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparda_jax.model import SpardaLM
from sparda_jax.weights import sparda_torch
from sparda_jax.weights.config import config_to_json
from sparda_jax.weights.folder import HEADS, INDEX, SINGLE, TOKENIZER_FILES
from sparda_jax.weights.names import Target, expected_tensors
from sparda_jax.weights.progress import Report, reporting
from sparda_jax.weights.tensor_file import PlannedTensor, write_tensor_file

MAX_SHARD_BYTES = 4_000_000_000
"""Size of a shard that is not exceeded, unless by a single tensor."""


def save_pretrained(
    model: SpardaLM,
    folder: str | pathlib.Path,
    *,
    tokenizer_files: str | pathlib.Path | Iterable[str | pathlib.Path] = (),
    eos_ids: Sequence[int] = (),
    step: int | None = None,
    name: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Report | Literal["bar"] | None = "bar",
) -> None:
    """Save a model: config.json, the backbone in Hugging Face's names, heads.safetensors.

    `load_pretrained` of the folder gives equal parameters, bit for bit. Other programs find the
    backbone where they expect it; the heads have the original's names (`save_forecast_heads`).

    Args:
        model: to be saved; its parameters may be spread over a mesh.
        folder: to be made.
        tokenizer_files: files to copy beside the model, or a folder whose tokenizer files to copy.
        eos_ids: ids that end a text, for config.json.
        step: optimiser steps that the heads have seen, for their metadata.
        name: of the backbone, for the same.
        max_shard_bytes: a larger backbone is split into shards of at most this size.
        overwrite: replace a folder that exists.
        progress: as in `load_pretrained`.

    Raises:
        ValueError: the folder exists and `overwrite` is false, a tokenizer file is missing, or
            `max_shard_bytes` < 1.
    """
    folder = pathlib.Path(folder)
    if max_shard_bytes < 1:
        raise ValueError(f"{max_shard_bytes=} must be at least 1")
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} exists; pass overwrite=True to replace it")
    copied = _tokenizer_files(tokenizer_files)
    raw = config_to_json(model.config)
    if eos_ids:
        raw["eos_token_id"] = eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        made = pathlib.Path(scratch) / "new"
        made.mkdir()
        _write_json(made / "config.json", raw)
        with reporting(progress, "saving") as report:
            _write_backbone(made, model, max_shard_bytes, report)
        heads = sparda_torch.heads_of(model, step=step, name=name)
        sparda_torch.save_forecast_heads(made / HEADS, heads)
        for path in copied:
            shutil.copyfile(path, made / path.name)
        swap_folder(made, folder, pathlib.Path(scratch) / "old")


def swap_folder(made: pathlib.Path, folder: pathlib.Path, old: pathlib.Path) -> None:
    """Put a new folder in its place; one that is there goes aside first, and comes back on failure.

    Args:
        made: the new folder, whole.
        folder: its place.
        old: where what was there goes; does not exist.
    """
    if not folder.exists():
        made.rename(folder)
        return
    folder.rename(old)
    try:
        made.rename(folder)
    except BaseException:  # Ctrl-C too: whoever cleans up would delete the old one
        old.rename(folder)
        raise


def _tokenizer_files(
    given: str | pathlib.Path | Iterable[str | pathlib.Path],
) -> list[pathlib.Path]:
    if isinstance(given, str | pathlib.Path):
        path = pathlib.Path(given)
        if path.is_dir():
            return [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
        given = [path]
    paths = [pathlib.Path(path) for path in given]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise ValueError(f"{len(missing)} of {len(paths)} tokenizer files are missing: {missing}")
    return paths


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_backbone(
    folder: pathlib.Path, model: SpardaLM, max_shard_bytes: int, report: Report | None
) -> None:
    """Write the shards, and the index if there is more than one."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    arrays = {".".join(map(str, path)): slot.get_value() for path, slot in flat}
    dtype = jnp.dtype(model.config.dtype)
    targets = expected_tensors(model.config).values()
    total, done = sum(arrays[target.path].nbytes for target in targets), 0

    def plan(target: Target) -> PlannedTensor:
        def make() -> np.ndarray:
            nonlocal done
            host = np.asarray(target.to_torch(arrays[target.path]))  # transposed on the device
            done += host.nbytes
            if report is not None:
                report(done, total)
            return host

        return PlannedTensor(target.torch, target.torch_shape, dtype, make)

    shards = plan_shards([plan(target) for target in targets], max_shard_bytes)
    if len(shards) == 1:
        write_tensor_file(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensor_file(folder / file, shard)
        weight_map |= {tensor.name: file for tensor in shard}
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def plan_shards(
    tensors: Sequence[PlannedTensor], max_shard_bytes: int
) -> list[list[PlannedTensor]]:
    """Cut a list of tensors into shards of at most `max_shard_bytes`, in order.

    Args:
        tensors: in the order of the files.
        max_shard_bytes: limit; a larger tensor gets a shard of its own.

    Returns:
        the shards; none is empty.
    """
    shards: list[list[PlannedTensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.size_bytes > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.size_bytes
    return shards
