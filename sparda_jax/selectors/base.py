# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What every selector offers, and the registry that finds one by name."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparda_jax.config import ModelConfig
from sparda_jax.rope import Rope
from sparda_jax.shapes import PARITIES, Mode, Parity

Probe = Any
"""A pytree of arrays whose leading axes are [B T]: what a layer offers to rank blocks with."""

Decoder = Any
"""A `SpardaLM`; selectors stand below the model and cannot name it."""

KeySummary = Any
"""A pytree of arrays: what a selector keeps on the device about the keys of a layer."""


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Whose probe ranks a layer's blocks: `probe_layer` is the layer itself or an earlier one."""

    probe_layer: int


@runtime_checkable
class Selector(Protocol):
    """Ranks the KV blocks of a layer. Knows scores; knows nothing of memory.

    A selector is a frozen, hashable dataclass, because compiled programs are kept per selector.
    """

    def source(self, layer: int) -> Source:
        """Name the layer whose probe ranks the blocks of `layer`."""

    def init_summary(self, batch: int, capacity: int, dtype: str) -> KeySummary:
        """Make the empty summary of a layer for `capacity` tokens a sequence."""

    def extend_summary(
        self,
        summary: KeySummary,
        k: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
        importance: Float[Array, "B T K"] | None = None,
    ) -> KeySummary:
        """Add new keys; in pieces or at once gives the same summary. −1 marks padding."""

    def probe(
        self,
        model: Decoder,
        layer: int,
        target: int,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        rope: Rope,
    ) -> Probe:
        """Make what `layer` offers to rank the blocks of `target`.

        Args:
            model: the decoder.
            layer: the layer that runs; `source(target).probe_layer`.
            target: the layer whose blocks are ranked.
            x: input of `layer`, before its norm.
            q: rotated queries of `layer`.
            rope: rotations of these positions.
        """

    def score_blocks(
        self,
        probe: Probe,
        summary: KeySummary,
        positions: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        num_blocks: int,
    ) -> Float[Array, "B T K M"]:
        """Score every block; finite, only the order matters.

        Args:
            probe: of these queries.
            summary: of the layer whose blocks are ranked.
            positions: of these queries; −1 for padding.
            lengths: tokens that the summary holds of each sequence.
            num_blocks: M.
        """


_REGISTRY: dict[str, Callable[..., Selector]] = {}


def register[T](name: str) -> Callable[[T], T]:
    """Register a selector class under `name`."""

    def add(cls: T) -> T:
        _REGISTRY[name] = cast(Any, cls)
        return cls

    return add


def names() -> tuple[str, ...]:
    """List the registered selectors."""
    return tuple(sorted(_REGISTRY))


def get(name: str, config: ModelConfig, **options: object) -> Selector:
    """Make the selector called `name` for a model.

    Args:
        name: one of `names()`.
        config: the model's configuration.
        **options: fields of that selector.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown selector {name!r}; known: {', '.join(names())}")
    return _REGISTRY[name](config, **options)


def resolve(
    mode: Mode, config: ModelConfig, selector: str | Selector | None, parity: Parity = None
) -> Selector | None:
    """Find the selector that a mode means: none for `dense`, else the rule of the model.

    `sparse` is `query` and `sparda` is `forecast`; a model with token importance wraps either in
    its two-step rule `nosa`.

    Args:
        mode: `dense`, `sparse` or `sparda`.
        config: the model's configuration.
        selector: overrides what ranks the blocks in the sparse modes; a name or an object.
        parity: passed on to selectors made here.

    Raises:
        ValueError: mode, parity or name is unknown, or `dense` comes with a selector.
    """
    if mode not in ("dense", "sparse", "sparda"):
        raise ValueError(f"{mode=} must be 'dense', 'sparse' or 'sparda'")
    if parity is not None and parity not in PARITIES:
        raise ValueError(f"{parity=} must be None or one of {', '.join(PARITIES)}")
    if mode == "dense":
        if selector is not None:
            raise ValueError(f"mode='dense' reads every block, so {selector=} would never be asked")
        return None
    if selector is None:
        selector = "query" if mode == "sparse" else "forecast"
    if not isinstance(selector, str):
        return selector
    if config.token_importance and selector != "nosa":
        return get("nosa", config, inner=get(selector, config, parity=parity), parity=parity)
    return get(selector, config, parity=parity)


def score_cells(
    probe: Float[Array, "B T N H"], pooled: Float[Array, "B C K H"]
) -> Float[Array, "B T K G C"]:
    """Multiply probes with pooled keys, accumulating in f32: each head with its group's keys."""
    batch, queries, heads, dim = probe.shape
    kv_heads = pooled.shape[2]
    grouped = probe.reshape(batch, queries, kv_heads, heads // kv_heads, dim)
    return jnp.einsum("btkgh,bckh->btkgc", grouped, pooled, preferred_element_type=jnp.float32)


def round_scores(scores: Float[Array, "*S"], parity: Parity) -> Float[Array, "*S"]:
    """Round scores to bf16 where the original does (`parity="reference_bf16_scores"`)."""
    if parity == "reference_bf16_scores":
        return jax.lax.reduce_precision(scores, exponent_bits=8, mantissa_bits=7)
    return scores
