# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What Forecast training changes: the heads in f32, the optimiser's moments, the step."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sparda_jax.config import ModelConfig
from sparda_jax.layers import init_forecast
from sparda_jax.model import SpardaLM
from sparda_jax.parts import commit


@typing.no_type_check
@struct.dataclass
class Heads:
    """The Forecast heads as they are trained: f32, whatever the model's dtype.

    Attributes:
        forecast: of layers 0 … L − 2; layer l ranks the blocks of layer l + 1.
        entry: of layer 0, ranks its own blocks.
    """

    forecast: tuple[Float[Array, "D K H"], ...]
    entry: Float[Array, "D K H"]

    def of(self, layer: int) -> Float[Array, "D K H"]:
        """Give the weight that ranks the blocks of `layer`."""
        return self.entry if layer == 0 else self.forecast[layer - 1]


def heads_from(model: SpardaLM) -> Heads:
    """Copy the heads of a model to f32."""
    attentions: list[Any] = [layer.attention for layer in model.layers]
    return Heads(
        forecast=tuple(jnp.array(a.forecast_proj[...], jnp.float32) for a in attentions[:-1]),
        entry=jnp.array(attentions[0].entry_forecast_proj[...], jnp.float32),
    )


def init_heads(config: ModelConfig, key: PRNGKeyArray) -> Heads:
    """Draw fresh heads in f32, each from U(−1/√D, 1/√D)."""
    wide = dataclasses.replace(config, dtype="float32")
    keys = jax.random.split(key, config.layers)
    drawn = [init_forecast(key, wide)[...] for key in keys]
    return Heads(forecast=tuple(drawn[1:]), entry=drawn[0])


def put_heads(model: SpardaLM, heads: Heads) -> None:
    """Write heads into a model, in its dtype."""
    attentions: list[Any] = [layer.attention for layer in model.layers]
    slots = [a.forecast_proj for a in attentions[:-1]] + [attentions[0].entry_forecast_proj]
    for slot, weight in zip(slots, [*heads.forecast, heads.entry], strict=True):
        slot[...] = weight.astype(slot[...].dtype)


@typing.no_type_check
@struct.dataclass
class TrainState:
    """What training changes: heads, the optimiser's moments, and the number of steps taken."""

    heads: Heads
    optimizer: Any
    step: Int[Array, ""]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW with clipping; the defaults are the paper's.

    Attributes:
        learning_rate: constant after the warm-up.
        warmup_steps: steps over which it rises linearly from zero.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        clip_norm: bound on the global L2 norm of the gradient; 0 does not clip.

    References:
        SparDA, arXiv:2606.04511, table 5.
    """

    learning_rate: float = 5e-4
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip_norm: float = 0.5

    def __post_init__(self) -> None:
        """Refuse numbers that no optimiser could use."""
        if self.learning_rate <= 0.0:
            raise ValueError(f"{self.learning_rate=} must be above 0")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")

    def make(self) -> optax.GradientTransformation:
        """Make the optimiser."""
        rate: Any = self.learning_rate
        if self.warmup_steps:
            rate = optax.warmup_constant_schedule(0.0, self.learning_rate, self.warmup_steps)
        adamw = optax.adamw(
            rate, b1=self.beta1, b2=self.beta2, eps=self.eps, weight_decay=self.weight_decay
        )
        if not self.clip_norm:
            return adamw
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)


def init_state(heads: Heads, optimizer: OptimizerConfig) -> TrainState:
    """Start training from these heads; they are copied, because a step donates its state."""
    heads = jax.tree.map(jnp.array, heads)
    tree: Any = heads  # a pytree like any other to optax
    state = TrainState(
        heads=heads, optimizer=optimizer.make().init(tree), step=jnp.zeros((), jnp.int32)
    )
    return commit(state, heads)
