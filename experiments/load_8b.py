# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""How long loading a checkpoint of MiniCPM4.1-8B's size takes, and how much host memory it needs.

    python -m experiments.load_8b --folder runs/load_8b
    python -m experiments.load_8b --folder runs/load_8b --layers 24

It writes a sharded bf16 checkpoint of random numbers in the real shapes, one tensor at a time,
loads it in a process of its own, compares the loaded numbers with those written, and removes it.
The whole model needs 16.4 GB of disk and, on a CPU, 18 GB of memory.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import pathlib
import resource
import shutil
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from experiments import records
from sparda_jax.config import ModelConfig
from sparda_jax.errors import CapacityError
from sparda_jax.weights import load_pretrained
from sparda_jax.weights.config import config_to_json
from sparda_jax.weights.folder import INDEX
from sparda_jax.weights.names import Target, expected_tensors
from sparda_jax.weights.saving import plan_shards
from sparda_jax.weights.tensor_file import PlannedTensor, write_tensor_file

_DTYPE = np.dtype(ml_dtypes.bfloat16)
_DRAWN = 1 << 20  # numbers drawn for a tensor; larger ones repeat them


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What is written, where, and where the record goes.

    Attributes:
        folder: of the checkpoint; must not exist.
        layers: of the 32 that the real model has.
        shard_bytes: largest size of a file.
        keep: leave the checkpoint there afterwards.
        commit: hash of the commit that runs; None asks git.
        dirty: whether the tree differs from it; None asks git.
        date: of the run; None asks the clock.
        out: folder of the record.
    """

    folder: pathlib.Path
    layers: int = 32
    shard_bytes: int = 4_000_000_000
    keep: bool = False
    commit: str | None = None
    dirty: bool | None = None
    date: str | None = None
    out: pathlib.Path = records.RESULTS


def random_tensor(target: Target) -> np.ndarray:
    """Make the numbers of one tensor, always the same for its name."""
    rng = np.random.default_rng(zlib.crc32(target.torch.encode()))
    drawn = (0.02 * rng.standard_normal(_DRAWN, np.float32)).astype(_DTYPE)
    return np.resize(drawn, target.torch_shape)


def write_checkpoint(folder: pathlib.Path, config: ModelConfig, shard_bytes: int) -> int:
    """Write a checkpoint of random bf16 numbers, holding one tensor at a time.

    Args:
        folder: to be made.
        config: of the model.
        shard_bytes: largest size of a file, unless a single tensor is larger.

    Returns:
        the bytes of all tensors.

    Raises:
        CapacityError: the disk has too little room.
    """
    planned = [
        PlannedTensor(
            target.torch, target.torch_shape, _DTYPE, lambda target=target: random_tensor(target)
        )
        for target in expected_tensors(config).values()
    ]
    total = sum(tensor.size_bytes for tensor in planned)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < total + (1 << 30):
        folder.rmdir()
        raise CapacityError(
            f"the checkpoint has {total} bytes and 1 GiB must stay free, but the disk has {free} "
            "left; write fewer --layers or choose another --folder"
        )
    shards = plan_shards(planned, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensor_file(folder / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config_to_json(config)), encoding="utf-8")
    return total


def peak_host_bytes() -> int:
    """Tell the most memory that this process has held so far."""
    status = pathlib.Path("/proc/self/status")
    if status.is_file():  # unlike `getrusage`, it does not count what the parent held
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_load(folder: pathlib.Path) -> dict[str, Any]:
    """Load a checkpoint that `write_checkpoint` made, and compare one tensor of each kind.

    The extra host memory is the growth of this process's peak while loading; on a CPU, whose
    device memory is the host's, without the model itself.

    Args:
        folder: of the checkpoint.

    Returns:
        `seconds`, `gb_per_s`, `model_bytes`, `extra_host_bytes`, `largest_tensor_bytes` and
        `compared_tensors`.

    Raises:
        ValueError: a loaded tensor is not the one written.
    """
    warm = jax.jit(lambda x: jnp.transpose(x))(jnp.ones((8, 8), jnp.bfloat16))
    jax.block_until_ready(warm)
    before = peak_host_bytes()
    begin = time.perf_counter()
    model = load_pretrained(folder, progress=None)
    jax.block_until_ready(nnx.state(model))
    seconds = time.perf_counter() - begin
    grown = peak_host_bytes() - before
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    arrays = {".".join(map(str, path)): slot.get_value() for path, slot in flat}
    held = sum(array.nbytes for array in arrays.values())
    targets = expected_tensors(model.config)
    kinds = {target.path.rsplit(".", 1)[-1]: target for target in targets.values()}
    for target in kinds.values():
        if not np.array_equal(
            np.asarray(target.to_torch(arrays[target.path])), random_tensor(target)
        ):
            raise ValueError(f"{target.torch} is not what was written, of {len(kinds)} compared")
    return {
        "seconds": round(seconds, 2),
        "gb_per_s": round(held / 1e9 / seconds, 3),
        "model_bytes": held,
        "extra_host_bytes": grown - (held if jax.default_backend() == "cpu" else 0),
        "largest_tensor_bytes": max(array.nbytes for array in arrays.values()),
        "compared_tensors": len(kinds),
    }


def run(config: Config, model_config: ModelConfig) -> dict[str, Any]:
    """Write, load and remove one checkpoint.

    Args:
        config: where and how.
        model_config: of the model; its layers are those of `config`.

    Returns:
        the row of the record.

    Raises:
        ValueError: the folder exists.
    """
    if config.folder.exists():
        raise ValueError(f"{config.folder} exists and would be removed; name a new folder")
    model_config = dataclasses.replace(model_config, layers=config.layers)
    try:
        begin = time.perf_counter()
        total = write_checkpoint(config.folder, model_config, config.shard_bytes)
        write_seconds = time.perf_counter() - begin
        shards = len(list(config.folder.glob("*.safetensors")))
        # A fresh process: its peak is that of loading alone.
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
            found = pool.submit(measure_load, config.folder).result()
    finally:
        if not config.keep:
            shutil.rmtree(config.folder, ignore_errors=True)
    return {
        "layers": config.layers,
        "shards": shards,
        "checkpoint_bytes": total,
        "write_seconds": round(write_seconds, 2),
        **found,
        "status": "ok",
    }


def main(config: Config, model_config: ModelConfig | None = None) -> pathlib.Path:
    """Measure, print the row and write the record.

    Args:
        config: what to write and where.
        model_config: another model; MiniCPM4.1-8B if left out.

    Returns:
        the record's path.

    Raises:
        ValueError: the tree differs from the commit, or the folder exists.
    """
    head = records.head_of("load_8b", config, ("shard_bytes",), unnamed=("keep",))
    row = run(config, model_config or ModelConfig.minicpm4_1_8b())
    print(json.dumps(row, indent=2))
    shared = {"model": "minicpm4_1_8b", "dtype": "bfloat16"} | head.config
    record = dataclasses.replace(head, config=shared, rows=[row])
    path = records.path_of(record, config.out)
    if path.is_file():
        record = records.append(records.read(path), record, replace_by=["layers"])
    return records.write(record, config.out)


if __name__ == "__main__":
    import tyro

    print(main(tyro.cli(Config)))
