# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Forecast heads between SparDA's own indexer checkpoints and our parameters.

This is the one file that spells the original's tensor names. Its checkpoints have one tensor more
than ours: a Forecast of the last layer, which is never trained and never read. Exports hold zeros
there, imports accept and drop it.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.errors import CheckpointError
from sparda_jax.layers import ForecastParam
from sparda_jax.model import SpardaLM
from sparda_jax.weights.config import sparse_to_json
from sparda_jax.weights.folder import HEADS
from sparda_jax.weights.tensor_file import PlannedTensor, TensorFile, write_tensor_file
from sparda_jax.weights.torch_pickle import StoredTensor, TorchFile, write_torch_file

_HEAD = re.compile(
    r"(?:^|\.)layers\.(?P<layer>\d+)\.self_attn\.(?P<kind>q_future|q_curr)_proj\.weight$"
)
_NAME = "model.layers.{layer}.self_attn.{kind}_proj.weight"
_WRAPPERS = ("model_state_dict", "state_dict", "model", "net", "weights")
_FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ForecastHeads:
    """All Forecast weights of a model.

    Attributes:
        forecast: of layers 0 … L−2; layer l ranks the blocks of layer l+1.
        entry: of layer 0, ranks its own blocks.
        step: optimiser steps taken, if known.
        sparse_config: the rule they were trained with, in the original's words, if known.
        model: the backbone they belong to, if known.
    """

    forecast: tuple[Float[Array, "D K H"], ...]
    entry: Float[Array, "D K H"]
    step: int | None = None
    sparse_config: Mapping[str, Any] | None = None
    model: str | None = None


def is_head(name: str) -> bool:
    """Tell whether a tensor name is a Forecast head's."""
    return _HEAD.search(name) is not None


def head_paths(config: ModelConfig) -> list[str]:
    """List the parameter paths of the heads: the Forecasts by layer, then the entry forecast."""
    paths = [f"layers.{layer}.attention.forecast_proj" for layer in range(config.layers - 1)]
    return [*paths, "layers.0.attention.entry_forecast_proj"]


def load_forecast_heads(path: str | pathlib.Path, config: ModelConfig) -> ForecastHeads:
    """Load Forecast heads: an indexer checkpoint `.pt`, a safetensors file, or a folder of these.

    Args:
        path: a `.pt` of the original's trainer (read without torch; only the weights, the sparse
            rule and the step are used), a safetensors file, or a folder with heads.safetensors or
            with other safetensors that hold heads.
        config: the model that they must fit.

    Returns:
        the heads in their stored dtype.

    Raises:
        CheckpointError: the file is missing, damaged or names code to run; or heads are missing,
            unexpected, misshapen or not floats: all of them in one message with both shapes.
    """
    tensors, notes = read_indexer(path)
    heads = heads_from_tensors(tensors, config, where=str(path))
    return dataclasses.replace(heads, **notes)


def read_indexer(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the head tensors of a file or folder without asking what model they fit.

    Args:
        path: as in `load_forecast_heads`.

    Returns:
        the tensors in torch layout by their stored names, and what is known of `step`,
        `sparse_config` and `model`.

    Raises:
        CheckpointError: as in `load_forecast_heads`, shapes aside.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        inside = [path / HEADS] if (path / HEADS).is_file() else sorted(path.glob("*.safetensors"))
        if not inside:
            raise CheckpointError(f"{path} holds no safetensors; name the .pt file itself")
    elif path.is_file():
        inside = [path]
    else:
        raise CheckpointError(
            f"{path} does not exist; expected Forecast heads (.pt or safetensors)"
        )
    if inside[0].suffix in (".pt", ".pth", ".bin"):
        return _read_torch(inside[0])
    tensors: dict[str, np.ndarray] = {}
    notes: dict[str, Any] = {}
    for name in inside:
        file = TensorFile(name)
        tensors |= {key: file.read(key) for key in file.entries if is_head(key)}
        notes |= _parse_notes(file)
    return tensors, notes


def _parse_notes(file: TensorFile) -> dict[str, Any]:
    """Read the metadata that `save_forecast_heads` writes."""
    held = file.metadata
    try:
        notes: dict[str, Any] = {"model": held["model"]} if "model" in held else {}
        if "step" in held:
            notes["step"] = int(held["step"])
        if "sparse_config" in held:
            notes["sparse_config"] = json.loads(held["sparse_config"])
    except ValueError as error:
        raise CheckpointError(f"{file.path} has unreadable metadata: {error}") from error
    return notes


def _read_torch(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    file = TorchFile(path)
    value = file.value
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a dictionary")
    wrapped = [value[name] for name in _WRAPPERS if isinstance(value.get(name), Mapping)]
    state = wrapped[0] if wrapped else value
    tensors = {
        name: file.read(tensor)
        for name, tensor in state.items()
        if isinstance(name, str) and is_head(name) and isinstance(tensor, StoredTensor)
    }
    notes: dict[str, Any] = {}
    if isinstance(value.get("step"), int):
        notes["step"] = value["step"]
    if isinstance(value.get("sparse_config"), Mapping):
        notes["sparse_config"] = dict(value["sparse_config"])
    if isinstance(value.get("base_model_path"), str):
        notes["model"] = value["base_model_path"]
    return tensors, notes


def heads_from_tensors(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, *, where: str
) -> ForecastHeads:
    """Turn tensors with the original's names into heads, matching names by their end.

    Args:
        tensors: in torch layout, [K·H, D] each; a prefix such as `module.` does not matter.
        config: the model that they must fit.
        where: their origin, for the message.

    Returns:
        the heads; the last layer's Forecast, which nobody reads, is dropped.

    Raises:
        CheckpointError: faults in any tensor, all of them in one message.
    """
    want = [config.kv_heads * config.head_dim, config.width]
    wanted = [("q_future", layer) for layer in range(config.layers - 1)] + [("q_curr", 0)]
    found: dict[tuple[str, int], np.ndarray] = {}
    faults: list[str] = []
    for name, tensor in tensors.items():
        match = _HEAD.search(name)
        if match is None:
            continue
        key = match["kind"], int(match["layer"])
        if key in found:
            faults.append(f"twice: {name}")
        elif key not in wanted and key != ("q_future", config.layers - 1):
            faults.append(f"unexpected: {name}, found {list(tensor.shape)}")
        elif list(tensor.shape) != want:
            faults.append(f"misshapen: {name}, found {list(tensor.shape)}, expected {want}")
        elif tensor.dtype.name not in _FLOATS:
            faults.append(f"of the wrong dtype: {name}, found {tensor.dtype.name}, expected floats")
        found[key] = tensor
    for kind, layer in wanted:
        if (kind, layer) not in found:
            faults.append(f"missing: {_NAME.format(layer=layer, kind=kind)}, expected {want}")
    if faults:
        raise CheckpointError(
            f"{where} does not fit a model of {config.layers} layers: {len(faults)} faults\n  "
            + "\n  ".join(faults)
        )
    arrays = [jnp.asarray(_from_torch(found[key], config)) for key in wanted]
    return ForecastHeads(forecast=tuple(arrays[:-1]), entry=arrays[-1])


def _from_torch(stored: np.ndarray, config: ModelConfig) -> np.ndarray:
    """[K·H, D] → [D K H]."""
    split = stored.reshape(config.kv_heads, config.head_dim, config.width)
    if split.dtype == np.float64:
        split = split.astype(np.float32)
    return np.ascontiguousarray(split.transpose(2, 0, 1))


def _to_torch(ours: Float[Array, "D K H"]) -> np.ndarray:
    """[D K H] → [K·H, D]."""
    host = np.asarray(ours)
    return np.ascontiguousarray(host.transpose(1, 2, 0).reshape(-1, host.shape[0]))


def _head_slots(model: SpardaLM) -> list[ForecastParam]:
    """List the parameters of the heads in the order of `head_paths`."""
    attentions = [layer.attention for layer in model.layers]
    slots = [attention.forecast_proj for attention in attentions]
    slots += [attention.entry_forecast_proj for attention in attentions]
    return [slot for slot in slots if slot is not None]


def heads_of(model: SpardaLM, *, step: int | None = None, name: str | None = None) -> ForecastHeads:
    """Take the Forecast heads of a model.

    Args:
        model: whose heads to take.
        step: optimiser steps taken, if known.
        name: the backbone's name, if known.

    Returns:
        its heads (the arrays themselves) with the model's sparse rule.
    """
    *forecast, entry = (slot[...] for slot in _head_slots(model))
    return ForecastHeads(
        forecast=tuple(forecast),
        entry=entry,
        step=step,
        sparse_config=sparse_to_json(model.config.sparse),
        model=name,
    )


def apply_forecast_heads(model: SpardaLM, heads: ForecastHeads) -> None:
    """Put heads into a model, in its dtype and at the place where its own heads lay.

    Args:
        model: changed in place.
        heads: as many as the model has, of its shape.

    Raises:
        CheckpointError: another number of layers or another shape.
    """
    slots = _head_slots(model)
    arrays = (*heads.forecast, heads.entry)
    if len(arrays) != len(slots):
        raise CheckpointError(f"{len(arrays)} heads for a model of {len(slots)}")
    for number, (slot, array) in enumerate(zip(slots, arrays, strict=True)):
        if array.shape != slot[...].shape:
            raise CheckpointError(
                f"head {number} is {list(array.shape)}, the model's is {list(slot[...].shape)}"
            )
    for slot, array in zip(slots, arrays, strict=True):
        slot.set_value(jnp.asarray(array, slot[...].dtype, device=slot[...].sharding))


def save_forecast_heads(
    path: str | pathlib.Path,
    heads: ForecastHeads,
    *,
    sparse: SparseConfig | None = None,
    form: Literal["safetensors", "torch"] | None = None,
) -> None:
    """Save heads so that the original's loaders and ours read them.

    Args:
        path: of the new file. Beside safetensors a `.json` of the same name repeats step, model and
            sparse rule.
        heads: in any float dtype, which is kept.
        sparse: the rule to write; `None` writes `heads.sparse_config`.
        form: `safetensors`, or `torch`: what `torch.load` reads. `None` decides by the suffix.

    Raises:
        ValueError: `form` is `None` and the suffix is neither `.safetensors` nor `.pt`.
    """
    path = pathlib.Path(path)
    if form is None:
        known: dict[str, Literal["safetensors", "torch"]] = {
            ".safetensors": "safetensors",
            ".pt": "torch",
        }
        if path.suffix not in known:
            raise ValueError(f"{path.suffix=} must be one of {list(known)}, or pass form=")
        form = known[path.suffix]
    rule = heads.sparse_config if sparse is None else sparse_to_json(sparse)
    tensors = _export(heads)
    if form == "torch":
        known_notes = {"step": heads.step, "sparse_config": rule, "base_model_path": heads.model}
        notes = {name: value for name, value in known_notes.items() if value is not None}
        write_torch_file(path, {"model_state_dict": tensors, **notes})
        return
    known_notes = {"step": heads.step, "sparse_config": rule, "model": heads.model}
    notes = {name: value for name, value in known_notes.items() if value is not None}
    metadata = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in notes.items()
    }
    planned = [
        PlannedTensor(name, array.shape, array.dtype, lambda array=array: array)
        for name, array in tensors.items()
    ]
    write_tensor_file(path, planned, metadata=metadata)
    path.with_suffix(".json").write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")


def _export(heads: ForecastHeads) -> dict[str, np.ndarray]:
    """Name all tensors as the original does, with zeros for the last layer's Forecast."""
    entry = _to_torch(heads.entry)
    tensors = [_to_torch(array) for array in heads.forecast]
    tensors.append(np.zeros_like(entry))
    named = {
        _NAME.format(layer=layer, kind="q_future"): tensor for layer, tensor in enumerate(tensors)
    }
    return named | {_NAME.format(layer=0, kind="q_curr"): entry}
