# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Rotary positions in the half-split layout: plain, or stretched in four published ways.

`rope(x) = x · cos + rotate_half(x) · sin`, where `rotate_half` swaps the halves of the head dim and
negates the first. Frequencies are a pure function of the configuration and of the length that a
sequence is meant to reach: no table is kept, so a long call never changes a short one.
"""

import math
import typing

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from sparda_jax.config import RopeConfig


@typing.no_type_check
@struct.dataclass
class Rope:
    """Rotations of some query positions.

    Attributes:
        positions: position in the sequence, tokens from 0; −1 marks padding.
        cos: cosines, f32, times the attention factor.
        sin: sines, f32, times the attention factor.
    """

    positions: Int[Array, "B T"]
    cos: Float[Array, "B T H/2"]
    sin: Float[Array, "B T H/2"]


def base_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Compute θ^(−2i/H) · (s_i / factor + 1 − s_i), i = 0 … H/2 − 1, in f32.

    The share s_i by which a frequency is slowed is 0 for `default` and `longrope`, whose factors
    divide positions, and 1 for `linear`. `llama3` and `yarn` slow only frequencies that turn rarely
    over `original_max_positions`: `llama3` ramps linearly in the number of turns, from `slow_turns`
    to `fast_turns`; `yarn` linearly in i, between the dimensions that turn once and 32 times.

    Every step is rounded to f32, the power before its reciprocal: so plain, LongRoPE's and YaRN's
    frequencies are the PyTorch original's bit for bit. The last bit of one is an angle of up to
    0.008 at token 131072.

    References:
        YaRN, arXiv:2309.00071, section 3.2; Llama 3, arXiv:2407.21783, whose checkpoints state the
        ramp in config.json; linear: Position Interpolation, arXiv:2306.15595.
    """
    half = head_dim // 2
    power = rope.theta ** (np.arange(half, dtype=np.float64) / half)
    inverse = np.float32(1.0) / power.astype(np.float32)
    slowed = np.zeros(half, np.float32)
    if rope.kind == "linear":
        slowed = np.ones(half, np.float32)
    elif rope.kind == "llama3":
        turns = rope.original_max_positions * inverse / (2 * math.pi)
        slowed = np.clip((rope.fast_turns - turns) / (rope.fast_turns - rope.slow_turns), 0.0, 1.0)
    elif rope.kind == "yarn":

        def dimension(turns: float) -> float:
            span = rope.original_max_positions / (turns * 2 * math.pi)
            return head_dim * math.log(span) / (2 * math.log(rope.theta))

        low = max(math.floor(dimension(32.0)), 0)
        high = min(math.ceil(dimension(1.0)), head_dim - 1)
        ramp = (np.arange(half, dtype=np.float32) - low) / max(high - low, 0.001)
        slowed = np.clip(ramp, 0.0, 1.0)
    return inverse / rope.factor * slowed + inverse * (1.0 - slowed)


def make_rope(
    rope: RopeConfig,
    head_dim: int,
    positions: Int[Array, "B T"],
    reach: Int[Array, " B"],
) -> Rope:
    """Make the rotations of `positions`: angle(p, i) = p · (1 / factor_i) · θ^(−2i/H), in f32.

    LongRoPE takes its long factors for a sequence with `reach > original_max_positions`, at all
    of its positions and in all layers.

    Args:
        rope: the configuration.
        head_dim: H.
        positions: tokens from 0; −1 for padding.
        reach: the length, in tokens, that each sequence has (evaluation) or may grow to
            (generation). It selects LongRoPE's factors and nothing else.

    Returns:
        Tables in f32; rounding to the model's dtype is `apply_rope`'s business.

    References:
        LongRoPE, arXiv:2402.13753; MiniCPM4's table for 128K uses the same rule.
    """
    inverse = jnp.asarray(base_frequencies(rope, head_dim))[None, None, :]  # [1 1 H/2]
    at = positions[:, :, None].astype(jnp.float32)  # [B T 1]
    if rope.kind == "longrope":
        is_long = (reach > rope.original_max_positions)[:, None]
        long, short = (
            np.float32(1.0) / np.asarray(factors, np.float32)[None, :]
            for factors in (rope.long_factor, rope.short_factor)
        )
        at = at * jnp.where(is_long, long, short)[:, None, :]
    angle = at * inverse
    scale = rope.attention_factor
    return Rope(positions=positions, cos=jnp.cos(angle) * scale, sin=jnp.sin(angle) * scale)


def apply_rope(
    x: Float[Array, "B T N H"], rope: Rope, config: RopeConfig
) -> Float[Array, "B T N H"]:
    """Rotate queries, keys or forecasts: x · cos + rotate_half(x) · sin.

    Args:
        x: heads to rotate.
        rope: rotations of the same positions.
        config: `compute_dtype` says whether the rotation runs in f32 or in the dtype of `x`.

    Returns:
        The rotated heads in the dtype of `x`.
    """
    dtype = jnp.float32 if config.compute_dtype == "float32" else x.dtype
    cos = rope.cos[:, :, None, :].astype(dtype)
    sin = rope.sin[:, :, None, :].astype(dtype)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
