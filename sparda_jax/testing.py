# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What tests need: a tiny model, a tiny configuration, and the tolerances, in one place.

| compared | bound | by |
|---|---|---|
| f32 against a reference | `2e-5 · |want| + 2e-5 · max|want|` | `assert_close_float32` |
| bf16 against a reference | RMS error ≤ 1.5 × the reference's own rounding | \
`assert_within_reference_rounding` |
| bf16, element by element, unit scale | 99 % within 1e-2, all within 4e-2 | \
`assert_close_bfloat16` |
| block ids of one program | equal | `assert_same_choices(..., share=0.0)` |
| block ids against the original | 0.1 % of the rows may differ | `assert_same_choices` |
| values against the original | by name | `ORIGINAL_TOLERANCES` |
"""

import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from sparda_jax.config import ModelConfig, RopeConfig, SparseConfig
from sparda_jax.model import SpardaLM


def tiny_config(**changes: Any) -> ModelConfig:
    """Make a configuration that runs in milliseconds: 3 layers, width 32, blocks of 8 tokens.

    Args:
        **changes: fields of `ModelConfig` to replace.
    """
    fields: dict[str, Any] = {
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


FLOAT32_TOLERANCE = 2e-5
"""Relative to the value, and to the greatest value of the array."""

ORIGINAL_TOLERANCES: Mapping[str, float] = types.MappingProxyType(
    {
        "logits": 2e-3,
        "next_token_logprob": 2e-3,
        "hidden": 1e-3,
        "sparse_scores": 1e-4,
        "sparda_scores": 5e-3,
        "pooled_keys": 1e-3,
        "forecast": 1e-3,
        "importance": 1e-3,
    }
)
"""How far a float32 run may be from the PyTorch original's, by what is compared."""

SHORT_PROMPT = 64
"""Prompts of up to this many tokens are held `SHORT_PROMPT_FACTOR` times tighter."""

SHORT_PROMPT_FACTOR = 20.0

DIFFERING_ROWS = 1e-3
"""Share of rows of block ids that may differ from the original's, or in bf16."""


def original_tolerance(name: str, tokens: int) -> float:
    """Look up how far `name` may be from the original's value for a prompt of `tokens` tokens.

    Example:
        >>> original_tolerance("logits", 703), original_tolerance("logits", 50)
        (0.002, 0.0001)
    """
    bound = ORIGINAL_TOLERANCES[name]
    return bound / SHORT_PROMPT_FACTOR if tokens <= SHORT_PROMPT else bound


def assert_close_float32(got: ArrayLike, want: ArrayLike) -> None:
    """Hold an f32 result to its reference: |got − want| ≤ 2e-5 · (|want| + max|want|).

    Args:
        got: what is tested.
        want: the reference; finite, of the same shape.

    Raises:
        AssertionError: somewhere the bound does not hold, or the shapes differ.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{got.shape=} must equal {want.shape=}"
    scale = float(np.max(np.abs(want), initial=0.0))
    np.testing.assert_allclose(
        got, want, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE * scale, equal_nan=False
    )


def assert_close_bfloat16(got: ArrayLike, want: ArrayLike) -> None:
    """Hold a bf16 result of unit-scale inputs: 99 % within 1e-2 of the reference, all within 4e-2.

    Raises:
        AssertionError: one of the two bounds does not hold, or the shapes differ.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{got.shape=} must equal {want.shape=}"
    error = np.abs(got - want)
    near = float(np.mean(error <= 1e-2))
    worst = float(np.max(error, initial=0.0))
    assert near >= 0.99, f"{near:.2%} of the elements are within 1e-2, at least 99% must be"
    assert worst <= 4e-2, f"the greatest error is {worst:.3g}, at most 4e-2 is allowed"


def assert_within_reference_rounding(
    kernel: ArrayLike,
    reference: ArrayLike,
    exact: ArrayLike,
    *,
    factor: float = 1.5,
) -> None:
    """Hold low precision to its reference: rms(kernel − exact) ≤ factor · rms(reference − exact).

    Args:
        kernel: the low-precision result that is tested.
        reference: the plain program in the same precision.
        exact: the plain program in f32, or better.
        factor: how much worse than the reference the kernel may be.

    Raises:
        AssertionError: the bound does not hold, the shapes differ, or the reference has no error,
            so that it says nothing about precision.
    """
    kernel, reference, exact = (np.asarray(a, np.float64) for a in (kernel, reference, exact))
    shapes = (kernel.shape, reference.shape, exact.shape)
    assert len(set(shapes)) == 1, f"{shapes=} must be equal"
    error, bound = (float(np.sqrt(np.mean((a - exact) ** 2))) for a in (kernel, reference))
    assert bound > 0.0, "the reference equals the exact result: nothing to compare rounding with"
    assert error <= factor * bound, (
        f"the kernel's RMS error {error:.3g} exceeds {factor} times the reference's {bound:.3g}"
    )


def assert_same_choices(got: ArrayLike, want: ArrayLike, *, share: float = DIFFERING_ROWS) -> None:
    """Hold block ids to others: at most `share` of the rows (last axis) may differ.

    Raises:
        AssertionError: more rows differ, or the shapes do.
    """
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{got.shape=} must equal {want.shape=}"
    differ = np.any(got != want, axis=-1)
    rows, bad = differ.size, int(differ.sum())
    first = np.argwhere(differ)[:1].tolist()
    assert bad <= share * rows, (
        f"{bad} of {rows} rows differ, {share:.2%} may; the first is {first}"
    )
