# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: where one lies, its config.json, and the headers of all its shards."""

import json
import pathlib
import re
from typing import Any

import numpy as np

from sparda_jax.errors import CheckpointError
from sparda_jax.weights.tensor_file import TensorEntry, TensorFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADS = "heads.safetensors"
"""Forecast heads, beside the backbone."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What belongs to the tokenizer; copied by `save_pretrained`."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_WANTED = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*.safetensors"]
"""The same weights once more, under the names of other programs."""


def resolve_folder(path_or_id: str | pathlib.Path) -> pathlib.Path:
    """Find a checkpoint folder: a local path as it is, a hub id through huggingface-hub.

    Args:
        path_or_id: a folder, or `owner/name` where no such folder exists.

    Returns:
        the folder on this machine.

    Raises:
        CheckpointError: neither a folder nor downloadable, and why.
    """
    path = pathlib.Path(path_or_id)
    if path.is_dir():
        return path
    name = str(path_or_id)
    if path.exists() or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name} is not a folder; give a checkpoint folder or an owner/name")
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{name} is not a folder, and downloading it needs huggingface-hub: "
            "pip install 'sparda-jax[train]'"
        ) from error
    try:
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
        return pathlib.Path(found)
    except Exception as error:  # network, access and naming errors share no base class
        why = " ".join(str(error).split())  # in one line
        raise CheckpointError(
            f"{name} is not a folder and could not be downloaded ({type(error).__name__}: {why}); "
            "download it elsewhere and give its folder"
        ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, or is not a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


class Shards:
    """The tensors of a checkpoint folder, whatever file each lies in.

    Attributes:
        folder: of the checkpoint.
        entries: of all tensors, by name, in the order in which reading them is sequential.

    Raises:
        CheckpointError: no safetensors, a shard that the index names is missing, a tensor that lies
            in two shards, or an unreadable shard.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._file_of: dict[str, TensorFile] = {}
        self.entries: dict[str, TensorEntry] = {}
        for path in _shard_paths(folder):
            file = TensorFile(path)
            for name, entry in sorted(file.entries.items(), key=lambda item: item[1].start):
                if name in self.entries:
                    raise CheckpointError(
                        f"{name} lies in both {self._file_of[name].path.name} and {path.name}"
                    )
                self.entries[name] = entry
                self._file_of[name] = file

    def read(self, name: str) -> np.ndarray:
        """Read one tensor into fresh memory."""
        return self._file_of[name].read(name)

    @property
    def size_bytes(self) -> int:
        """Count the bytes of all tensors."""
        return sum(entry.size_bytes for entry in self.entries.values())


def _shard_paths(folder: pathlib.Path) -> list[pathlib.Path]:
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        held = sorted(path.name for path in folder.iterdir())[:20]
        raise CheckpointError(
            f"{folder} has neither {INDEX} nor {SINGLE}, but {held}; convert other formats to "
            "safetensors first"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if outside := [name for name in names if pathlib.PurePath(name).name != name]:
        raise CheckpointError(f"{index} names files outside its folder: {outside}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}"
        )
    return [folder / name for name in names]
