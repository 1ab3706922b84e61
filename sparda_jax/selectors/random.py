# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The lower bound: blocks ranked by a hash of (layer, position, head, block)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from sparda_jax.pooling import PooledSummary
from sparda_jax.rope import Rope
from sparda_jax.selectors.base import Decoder, Source, register
from sparda_jax.selectors.query import PooledKeys


def _mix(x: UInt[Array, "*S"]) -> UInt[Array, "*S"]:
    """Scramble 32-bit integers (two rounds of xor-shift and multiply)."""
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(multiplier)
    return x ^ (x >> jnp.uint32(15))


@register("random")
@dataclasses.dataclass(frozen=True, slots=True)
class RandomSelector(PooledKeys):
    """Chooses at random beyond the pinned blocks: what any useful selector must beat.

    Attributes:
        seed: changes the choice; equal seeds choose alike in prefill and in decode.
    """

    seed: int = 0

    def source(self, layer: int) -> Source:
        """Each layer ranks its own blocks."""
        return Source(layer)

    def probe(
        self,
        model: Decoder,
        layer: int,
        target: int,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        rope: Rope,
    ) -> UInt[Array, "B T"]:
        """Hash the layer and the position."""
        del model, layer, x, q
        start = jnp.uint32((self.seed * 1_000_003 + target) & 0xFFFFFFFF)
        return _mix(rope.positions.astype(jnp.uint32) + _mix(start[None, None]))

    def score_blocks(
        self,
        probe: UInt[Array, "B T"],
        summary: PooledSummary,
        positions: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        num_blocks: int,
    ) -> Float[Array, "B T K M"]:
        """Score blocks by 24 random bits."""
        del summary, positions, lengths
        shape = (*probe.shape, self.config.kv_heads, num_blocks)
        heads = jnp.uint32(self.config.kv_heads)
        cell = jax.lax.broadcasted_iota(jnp.uint32, shape, 3) * heads
        cell = cell + jax.lax.broadcasted_iota(jnp.uint32, shape, 2)
        return (_mix(probe[:, :, None, None] + _mix(cell)) >> jnp.uint32(8)).astype(jnp.float32)
