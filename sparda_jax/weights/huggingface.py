# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders in Hugging Face's layout → `SpardaLM` and back.

Tensors pass one at a time from the file to their place on the device or the mesh, where they are
transposed; the host never holds more than the largest of them.
"""

import functools
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.layers import init_forecast
from sparda_jax.model import SpardaLM
from sparda_jax.weights import sparda_torch
from sparda_jax.weights.config import Dtype, parse_config, parse_sparse
from sparda_jax.weights.folder import HEADS, Shards, read_json, resolve_folder
from sparda_jax.weights.names import (
    Target,
    check_tensors,
    expected_tensors,
    has_importance,
    specification,
)
from sparda_jax.weights.progress import Report, reporting

_LOG = logging.getLogger(__name__)


def load_pretrained(
    path_or_id: str | pathlib.Path,
    *,
    dtype: Dtype | None = None,
    mesh: Mesh | None = None,
    sparse: SparseConfig | None = None,
    heads: str | pathlib.Path | None = None,
    seed: int = 0,
    progress: Report | Literal["bar"] | None = "bar",
) -> SpardaLM:
    """Load a model from a folder with config.json and safetensors.

    Args:
        path_or_id: a folder, or a hub id `owner/name`.
        dtype: of the parameters; `None` takes the checkpoint's.
        mesh: devices with an axis `model` over which heads, MLP width and vocabulary are spread
            where it divides them, and XLA spreads the rest of a program by them; `None` puts
            everything on the default device.
        sparse: the rule that chooses blocks; `None` reads `sparse_config` (`parse_config` says what
            holds without one).
        heads: Forecast heads, in any form that `load_forecast_heads` reads. `None` takes
            heads.safetensors of the folder, else those among the model's tensors, else draws them
            at random and says so.
        seed: of heads drawn at random.
        progress: told the bytes done and in all after each tensor; `bar` draws a bar when standard
            error is a terminal and rich is installed.

    Returns:
        the model, its parameters in `dtype`.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged or another model's; every
            missing, unexpected and misshapen tensor is named, with both shapes.
        ValueError: a mesh without an axis `model`.
    """
    if mesh is not None:
        if "model" not in mesh.shape:
            raise ValueError(f"mesh has axes {list(mesh.shape)}, expected one named 'model'")
        # `jax.make_mesh` gives explicit axes, over which a gather would have to name its result.
        automatic = (AxisType.Auto,) * len(mesh.axis_names)
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=automatic)
    folder = resolve_folder(path_or_id)
    raw = read_json(folder / "config.json")
    shards = Shards(folder)
    config = parse_config(
        raw, sparse=sparse, dtype=dtype, token_importance=has_importance(shards.entries)
    )
    found = _find_heads(folder, shards, config, heads)
    with reporting(progress, "loading") as report:
        arrays = load_backbone(shards, config, mesh=mesh, report=report)
    arrays |= _place_heads(found, config, mesh, seed, folder)
    return assemble(config, arrays)


def load_backbone(
    shards: Shards, config: ModelConfig, *, mesh: Mesh | None = None, report: Report | None = None
) -> dict[str, Float[Array, "..."]]:
    """Read every backbone tensor of a checkpoint to its place.

    Args:
        shards: the checkpoint.
        config: the model that it must fit.
        mesh: as in `load_pretrained`.
        report: told the bytes done and in all after each tensor.

    Returns:
        arrays by the path of their parameter, `layers.0.mlp.up_proj` for instance.

    Raises:
        CheckpointError: tensors that do not fit, all of them at once.
    """
    targets = expected_tensors(config)
    entries = {
        name: entry
        for name, entry in shards.entries.items()
        if not sparda_torch.is_head(name) and not _is_tied_copy(name, config, shards)
    }
    check_tensors(entries, targets, where=str(shards.folder))
    if mesh is not None:
        _note_copies(targets, mesh)
    total, done = sum(entries[name].size_bytes for name in targets), 0
    arrays: dict[str, Array] = {}
    for name in (name for name in entries if name in targets):
        arrays[targets[name].path] = _place(shards.read(name), targets[name], config.dtype, mesh)
        done += entries[name].size_bytes
        if report is not None:
            report(done, total)
    return arrays


def _is_tied_copy(name: str, config: ModelConfig, shards: Shards) -> bool:
    """Tell whether a tensor repeats the embedding that the LM head is tied to, bit for bit."""
    embedding = "model.embed_tokens.weight"
    if name != "lm_head.weight" or not config.tie_embeddings or embedding not in shards.entries:
        return False
    head, tied = shards.entries[name], shards.entries[embedding]
    if (head.shape, head.dtype) != (tied.shape, tied.dtype):
        return False
    return bool(
        np.array_equal(shards.read(name).view(np.uint8), shards.read(embedding).view(np.uint8))
    )


def _place(
    stored: np.ndarray, target: Target, dtype: str, mesh: Mesh | None
) -> Float[Array, "..."]:
    """Put a stored tensor on its devices and turn it into our parameter there."""
    split = stored.reshape(target.split)
    if mesh is None:
        placed, sharding = jax.device_put(split), None
    else:
        ours = specification(target, mesh)
        theirs: list[str | None] = [None] * len(target.split)
        for place, axis in zip(target.order, ours, strict=True):
            theirs[place] = axis
        placed = jax.device_put(split, NamedSharding(mesh, PartitionSpec(*theirs)))
        sharding = NamedSharding(mesh, ours)
    # Waiting keeps one tensor in flight, so that the host never holds two.
    return jax.block_until_ready(_transposer(target.order, dtype, sharding)(placed))


@functools.lru_cache(maxsize=128)
def _transposer(order: tuple[int, ...], dtype: str, sharding: Sharding | None) -> Callable:
    def transpose(x: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.transpose(x, order).astype(dtype)

    return jax.jit(transpose, out_shardings=sharding)


def _note_copies(targets: Mapping[str, Target], mesh: Mesh) -> None:
    copies: dict[str, int] = {}
    for target in targets.values():
        if any(letter in "NKFV" for letter in target.letters):
            if not any(specification(target, mesh)):
                copies.setdefault(target.path.rsplit(".", 1)[-1], max(target.shape))
    if copies:
        _LOG.warning(
            "the mesh axis model=%d divides no sharded axis of %s: every device holds a copy",
            mesh.shape["model"],
            sorted(copies),
        )


def _find_heads(
    folder: pathlib.Path,
    shards: Shards,
    config: ModelConfig,
    heads: str | pathlib.Path | None,
) -> sparda_torch.ForecastHeads | None:
    if heads is not None:
        return sparda_torch.load_forecast_heads(heads, config)
    if (folder / HEADS).is_file():
        return sparda_torch.load_forecast_heads(folder / HEADS, config)
    inside = [name for name in shards.entries if sparda_torch.is_head(name)]
    if inside:
        tensors = {name: shards.read(name) for name in inside}
        return sparda_torch.heads_from_tensors(tensors, config, where=str(folder))
    return None


def _place_heads(
    heads: sparda_torch.ForecastHeads | None,
    config: ModelConfig,
    mesh: Mesh | None,
    seed: int,
    folder: pathlib.Path,
) -> dict[str, Float[Array, "D K H"]]:
    paths = sparda_torch.head_paths(config)
    if heads is not None:
        _note_other_rule(heads, config)
        arrays = dict(zip(paths, (*heads.forecast, heads.entry), strict=True))
    else:
        _LOG.warning(
            "%s has no Forecast heads: they start at random (import or train them)", folder
        )
        keys = jax.random.split(jax.random.key(seed), len(paths))
        arrays = {
            path: init_forecast(key, config)[...] for path, key in zip(paths, keys, strict=True)
        }
    where = None
    if mesh is not None:
        shared = mesh.shape["model"]
        spec = PartitionSpec(None, "model" if config.kv_heads % shared == 0 else None, None)
        where = NamedSharding(mesh, spec)
    dtype = jnp.dtype(config.dtype)
    return {path: jax.device_put(array.astype(dtype), where) for path, array in arrays.items()}


def _note_other_rule(heads: sparda_torch.ForecastHeads, config: ModelConfig) -> None:
    """Say so when heads were trained on another grid of blocks or pooled keys than the model's."""
    if not heads.sparse_config:
        return
    rule = parse_sparse(heads.sparse_config)
    for name in ("block_size", "pool_size", "pool_stride"):
        theirs, ours = getattr(rule, name), getattr(config.sparse, name)
        if theirs != ours:
            _LOG.warning("the heads were trained with %s=%d, the model has %d", name, theirs, ours)


def assemble(config: ModelConfig, arrays: Mapping[str, Float[Array, "..."]]) -> SpardaLM:
    """Make a model of given parameters, without first making random ones.

    Args:
        config: of the model.
        arrays: every parameter by its path, Forecast heads included.

    Returns:
        the model; it holds the arrays themselves.

    Raises:
        ValueError: the paths, shapes or dtypes are not the model's.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: SpardaLM(config, rngs=nnx.Rngs(0))))
    flat = [(path, ".".join(map(str, path)), slot) for path, slot in nnx.to_flat_state(state)]
    names = {name for _, name, _ in flat}
    if names != arrays.keys():
        raise ValueError(
            f"{len(arrays)} arrays for {len(names)} parameters: missing "
            f"{sorted(names - arrays.keys())}, unexpected {sorted(arrays.keys() - names)}"
        )
    filled = []
    for path, name, slot in flat:
        array, want = arrays[name], slot.get_value()
        if (array.shape, array.dtype) != (want.shape, want.dtype):
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}, expected "
                f"{want.dtype}{list(want.shape)}"
            )
        filled.append((path, slot.replace(array)))
    return nnx.merge(graph, nnx.from_flat_state(filled))
