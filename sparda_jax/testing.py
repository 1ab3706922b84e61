# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What tests need: a tiny model, a tiny configuration, and the tolerances, in one place."""

from flax import nnx

from sparda_jax.config import ModelConfig, RopeConfig, SparseConfig
from sparda_jax.model import SpardaLM


def tiny_config(**changes: object) -> ModelConfig:
    """Make a configuration that runs in milliseconds: 3 layers, width 32, blocks of 8 tokens.

    Args:
        **changes: fields of `ModelConfig` to replace.
    """
    fields: dict[str, object] = {
        "vocab_size": 64,
        "width": 32,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "mlp_width": 48,
        "rope": RopeConfig(max_positions=1024, original_max_positions=1024),
        "sparse": SparseConfig(
            block_size=8,
            pool_size=4,
            pool_stride=2,
            local_blocks=1,
            selected_blocks=5,
            dense_below=0,
        ),
        "max_context": 1024,
        "dtype": "float32",
    }
    return ModelConfig(**(fields | changes))


def tiny_model(seed: int = 0, **changes: object) -> SpardaLM:
    """Make the model of `tiny_config` with random weights."""
    return SpardaLM(tiny_config(**changes), rngs=nnx.Rngs(seed))
