# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What grows with the context: a training step, and the KV that decoding keeps on the device.

    python -m experiments.bench_scaling

One row per length: seconds and temporary memory of a training step of the shipped model (teacher,
loss, gradient and routing of all layers, one sequence), and the bytes of each part of the KV state
while it generates from a prompt of that length with K and V on the host.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import records
from sparda_jax.generate import generate
from sparda_jax.model import SpardaLM
from sparda_jax.shipped import heldout_texts, load_shipped
from sparda_jax.training.layer import LayerPlan, default_attention, default_tile_bytes
from sparda_jax.training.state import OptimizerConfig, heads_from, init_state
from sparda_jax.training.step import make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured.

    Attributes:
        lengths: tokens of the context.
        repeats: timed steps at each length, after one that compiles; the median counts.
        new_tokens: tokens generated at each length.
        dtype: of the backbone.
        commit: hash of the commit that runs; None asks git.
        dirty: whether the tree differs from it; None asks git.
        date: of the run; None asks the clock.
        out: folder for the record.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192)
    repeats: int = 3
    new_tokens: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    commit: str | None = None
    dirty: bool | None = None
    date: str | None = None
    out: Path = records.RESULTS


def time_step(model: SpardaLM, tokens: np.ndarray, repeats: int) -> dict[str, float]:
    """Time a training step on one sequence, and read its temporary memory off the compiler."""
    plan = LayerPlan(
        config=model.config,
        attention=default_attention(),
        tile_bytes=default_tile_bytes(),
        has_metrics=False,
    )
    optimizer = OptimizerConfig()
    step: Any = make_step(plan, optimizer)
    state = init_state(heads_from(model), optimizer)
    batch = (jnp.asarray(tokens)[None, None], jnp.full((1, 1), len(tokens), jnp.int32))
    begun = time.perf_counter()
    compiled = step.lower(state, model, *batch).compile()
    compile_seconds = time.perf_counter() - begun
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        state, metrics = compiled(state, model, *batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begun)
    return {
        "compile_s": compile_seconds,
        "step_s": float(np.median(seconds[1:])),
        "step_spread_s": float(np.ptp(seconds[1:])),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def main(config: Config) -> Path:
    """Measure every length and write the record.

    Returns:
        The record's path.

    Raises:
        ValueError: the tree differs from the commit.
    """
    head = records.head_of("bench_scaling", config, ("lengths", "repeats", "new_tokens", "dtype"))
    model = load_shipped(config.dtype)
    text = np.frombuffer(b"".join(text.data for text in heldout_texts()), np.uint8)
    rows: list[dict[str, Any]] = []
    for length in config.lengths:
        tokens = text[:length].astype(np.int32)
        result = generate(model, [tokens.tolist()], max_new_tokens=config.new_tokens, kv="offload")
        row = {"tokens": length} | time_step(model, tokens, config.repeats)
        row |= {f"device_{part}_bytes": size for part, size in result.device_kv_bytes.items()}
        rows.append(row | {"full_kv_bytes": result.full_kv_bytes})
        print(rows[-1], flush=True)
    return records.write(dataclasses.replace(head, rows=rows), config.out)


if __name__ == "__main__":
    import tyro

    print(main(tyro.cli(Config)))
