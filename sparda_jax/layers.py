# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The parts of a decoder layer that know nothing of attention, and the two parameter types.

Every parameter carries `axes`, its logical axis letters, so that a mesh can be laid over the model
without touching it. A `ForecastParam` is what training changes; everything else is frozen.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from sparda_jax.config import ModelConfig


class ForecastParam(nnx.Param):
    """A weight of the Forecast heads: the only kind that Forecast training changes."""


def init_weight(
    key: PRNGKeyArray, shape: tuple[int, ...], axes: str, fan_in: int, dtype: str
) -> nnx.Param:
    """Draw a projection from a normal with standard deviation 1/√fan_in."""
    weight = jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5
    return nnx.Param(weight.astype(dtype), axes=axes)


def init_forecast(key: PRNGKeyArray, config: ModelConfig) -> ForecastParam:
    """Draw a Forecast projection [D K H] from U(−1/√D, 1/√D).

    References:
        SparDA, arXiv:2606.04511: missing Forecast heads start there, not from the query projection.
    """
    bound = config.width**-0.5
    shape = (config.width, config.kv_heads, config.head_dim)
    weight = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    return ForecastParam(weight.astype(config.dtype), axes="DKH")


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + ε) in f32, cast back, then times the scale."""

    def __init__(self, width: int, epsilon: float, dtype: str) -> None:
        self.scale = nnx.Param(jnp.ones((width,), dtype), axes="D")
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalise over the width; statistics in f32."""
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(variance + self.epsilon)).astype(x.dtype)
        return normed * self.scale[...][None, None, :]


class MLP(nnx.Module):
    """down(silu(gate x) · up x)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        wide, narrow, dtype = config.mlp_width, config.width, config.dtype
        self.gate_proj = init_weight(rngs.params(), (narrow, wide), "DF", narrow, dtype)
        self.up_proj = init_weight(rngs.params(), (narrow, wide), "DF", narrow, dtype)
        self.down_proj = init_weight(rngs.params(), (wide, narrow), "FD", wide, dtype)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the SwiGLU block."""
        gate = jnp.einsum("btd,df->btf", x, self.gate_proj[...])
        up = jnp.einsum("btd,df->btf", x, self.up_proj[...])
        return jnp.einsum("btf,fd->btd", jax.nn.silu(gate) * up, self.down_proj[...])
