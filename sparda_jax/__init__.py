# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Sparse decoupled attention with a Forecast projection, in JAX."""

from sparda_jax.batcher import Batcher, Finished
from sparda_jax.config import ModelConfig, RopeConfig, SparseConfig
from sparda_jax.errors import (
    BackendError,
    CapacityError,
    CheckpointError,
    DataError,
    SpardaError,
)
from sparda_jax.generate import Generation, Progress, generate
from sparda_jax.model import SpardaLM, forward
from sparda_jax.sampling import GREEDY, Sampling
from sparda_jax.shipped import heldout_texts, load_shipped
from sparda_jax.tokenizer import ByteTokenizer, HuggingFaceTokenizer, StreamDecoder, Tokenizer
from sparda_jax.weights import load_pretrained, save_pretrained

__version__ = "0.1.0"

__all__ = [
    "GREEDY",
    "BackendError",
    "Batcher",
    "ByteTokenizer",
    "CapacityError",
    "CheckpointError",
    "DataError",
    "Finished",
    "Generation",
    "HuggingFaceTokenizer",
    "ModelConfig",
    "Progress",
    "RopeConfig",
    "Sampling",
    "SpardaError",
    "SpardaLM",
    "SparseConfig",
    "StreamDecoder",
    "Tokenizer",
    "forward",
    "generate",
    "heldout_texts",
    "load_pretrained",
    "load_shipped",
    "save_pretrained",
]
