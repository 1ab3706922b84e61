# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The small backbone that comes with the package: weights, Forecast heads, held-out documents.

The folder holds `weights.safetensors` and `heads.safetensors`, both bf16, whose tensors are named
after the parameters (`layers.0.attention.q_proj`); a model card; what the backbone was trained on,
as a manifest of sha256 sums; and documents that it never saw.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Float

from sparda_jax.config import ModelConfig
from sparda_jax.errors import CheckpointError, DataError
from sparda_jax.layers import ForecastParam, init_forecast
from sparda_jax.model import SpardaLM

FOLDER = Path(__file__).parent
"""Where the shipped files are."""

WEIGHTS = "weights.safetensors"
HEADS = "heads.safetensors"
HELDOUT = "heldout"


@dataclasses.dataclass(frozen=True)
class HeldoutText:
    """A document that the backbone was not trained on.

    Attributes:
        name: of its file, without `.txt`.
        data: its bytes, ASCII.
    """

    name: str
    data: bytes


def load_shipped(
    dtype: Literal["float32", "bfloat16"] = "float32",
    heads: bool = True,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
) -> SpardaLM:
    """Load the small backbone and its Forecast heads.

    Args:
        dtype: of the parameters; they are stored as bf16, so f32 holds the same numbers.
        heads: whether to load the trained heads; without them fresh ones are drawn.
        seed: of fresh heads.
        folder: another folder with the same layout; the package's own if left out.

    Returns:
        the model of `ModelConfig.shipped()`.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit the configuration; the message
            names the tensor and both shapes.

    Example:
        >>> load_shipped("bfloat16").config.layers
        8
    """
    from sparda_jax.weights.huggingface import assemble

    where = FOLDER if folder is None else Path(folder)
    config = dataclasses.replace(ModelConfig.shipped(), dtype=dtype)
    backbone, ranking = _parameter_shapes(config)
    arrays = _read(where / WEIGHTS, backbone)
    if heads:
        arrays |= _read(where / HEADS, ranking)
    parameters = {name: jax.numpy.asarray(array, dtype) for name, array in arrays.items()}
    if not heads:
        keys = jax.random.split(jax.random.key(seed), len(ranking))
        parameters |= {
            name: init_forecast(key, config)[...]
            for name, key in zip(sorted(ranking), keys, strict=True)
        }
    return assemble(config, parameters)


def save_shipped(
    folder: str | Path,
    weights: str | Path | Mapping[str, Float[np.ndarray, "..."]],
    heads: SpardaLM | Mapping[str, Float[np.ndarray, "..."]],
    *,
    step: int = 0,
) -> None:
    """Write weights and heads as bf16 in the shipped layout.

    Args:
        folder: where they go; made if missing.
        weights: every parameter but the heads, by name; or the `.npz` of a backbone training run.
        heads: the Forecast heads by name, or a model that holds them.
        step: optimiser steps that the heads have seen, for their metadata.

    Raises:
        CheckpointError: the names or shapes are not those of `ModelConfig.shipped()`.
    """
    folder = Path(folder)
    config = ModelConfig.shipped()
    backbone, ranking = _parameter_shapes(config)
    if isinstance(weights, str | Path):
        with np.load(weights) as arrays:
            weights = {name: _from_npz(arrays[name]) for name in arrays.files}
        weights = {name: array for name, array in weights.items() if name not in ranking}
    _check(weights, backbone, "the given weights")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / WEIGHTS, weights, {"model": "shipped"})
    save_heads(folder, heads, step=step)


def save_heads(
    folder: str | Path,
    heads: SpardaLM | Mapping[str, Float[np.ndarray, "..."]],
    *,
    step: int = 0,
) -> None:
    """Write the heads alone as bf16 in the shipped layout; arguments as `save_shipped`.

    Raises:
        CheckpointError: the names or shapes are not those of `ModelConfig.shipped()`.
    """
    config = ModelConfig.shipped()
    if isinstance(heads, SpardaLM):
        state = nnx.to_flat_state(nnx.state(heads, ForecastParam))
        heads = {".".join(map(str, path)): np.asarray(slot.get_value()) for path, slot in state}
    _check(heads, _parameter_shapes(config)[1], "the given heads")
    rule = json.dumps(dataclasses.asdict(config.sparse))
    metadata = {"model": "shipped", "step": str(step), "sparse_config": rule}
    _write(Path(folder) / HEADS, heads, metadata)


def heldout_texts(folder: str | Path | None = None) -> tuple[HeldoutText, ...]:
    """Read the documents that the backbone never saw, 8,192 bytes each, sorted by name.

    Args:
        folder: a folder of `.txt` files with their `manifest.json`; the shipped one if left out.

    Raises:
        DataError: there is no manifest, a document is missing, or its bytes are not those that the
            manifest lists.

    Example:
        >>> len(heldout_texts()[0].data)
        8192
    """
    where = FOLDER / HELDOUT if folder is None else Path(folder)
    manifest = where / "manifest.json"
    if not manifest.is_file():
        raise DataError(f"0 of 1 manifests of held-out documents found: {manifest} is missing")
    texts = []
    listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    for entry in sorted(listed, key=lambda entry: entry["file"]):
        path = where / entry["file"]
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise DataError(
                f"{path} holds {len(data)} bytes that are not the {entry['bytes']} listed in its "
                "manifest; copy it again"
            )
        texts.append(HeldoutText(path.stem, data))
    return tuple(texts)


def _parameter_shapes(
    config: ModelConfig,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Name the parameters with their shapes: the backbone's, and the Forecast heads'."""
    model = nnx.eval_shape(lambda: SpardaLM(config, rngs=nnx.Rngs(0)))
    backbone, ranking = {}, {}
    for path, slot in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        part = ranking if isinstance(slot, ForecastParam) else backbone
        part[".".join(map(str, path))] = slot.get_value().shape
    return backbone, ranking


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Read all tensors of a file, which must be those of `shapes`."""
    from sparda_jax.weights.tensor_file import TensorFile

    file = TensorFile(path)
    arrays = {name: file.read(name) for name in file.entries}
    _check(arrays, shapes, str(path))
    return arrays


def _check(
    arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Hold names and shapes to the model's."""
    missing, unknown = sorted(shapes.keys() - arrays.keys()), sorted(arrays.keys() - shapes.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{where} has {len(arrays)} tensors, expected {len(shapes)}: missing {missing}, "
            f"unexpected {unknown}; it belongs to another model"
        )
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(arrays[name].shape)}, expected {list(shape)}; "
                "it belongs to another model"
            )


def _from_npz(array: np.ndarray) -> np.ndarray:
    """Give bf16 its name back: in an `.npz` it stands as uint16 or as two bytes without a name."""
    if array.dtype.kind in "uV" and array.dtype.itemsize == 2:
        return array.view(ml_dtypes.bfloat16)
    return array


def _write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write tensors as bf16, sorted by name; the file appears whole or not at all."""
    from sparda_jax.weights.tensor_file import PlannedTensor, write_tensor_file

    dtype = np.dtype(ml_dtypes.bfloat16)
    stored = {name: np.asarray(arrays[name]).astype(dtype) for name in sorted(arrays)}
    staged = path.with_name(f".{path.name}.new")
    try:
        write_tensor_file(
            staged,
            [
                PlannedTensor(name, array.shape, dtype, lambda array=array: array)
                for name, array in stored.items()
            ],
            metadata=metadata,
        )
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
