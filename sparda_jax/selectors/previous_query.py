# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The training-free lookahead: the next layer's query projection on this layer's input.

The residual stream changes little from layer to layer, so W_q of layer l, applied to the input of
layer l − 1 (normalised as layer l would), resembles the queries of layer l. Scored as `query`.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparda_jax.rope import Rope, apply_rope
from sparda_jax.selectors.base import Decoder, Source, register
from sparda_jax.selectors.query import QuerySelector


@register("previous_query")
@dataclasses.dataclass(frozen=True, slots=True)
class PreviousQuerySelector(QuerySelector):
    """Guesses the next layer's queries; layer 0 uses its own.

    References:
        ScoutAttention, arXiv:2603.27138.
    """

    def source(self, layer: int) -> Source:
        """The layer before; layer 0 asks itself."""
        return Source(max(layer - 1, 0))

    def probe(
        self,
        model: Decoder,
        layer: int,
        target: int,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        rope: Rope,
    ) -> Float[Array, "B T N H"]:
        """Project this layer's input with the target's norm and query projection."""
        if target == layer:
            return q
        block = model.layers[target]
        normed = block.input_norm(x)
        guess = jnp.einsum("btd,dnh->btnh", normed, block.attention.q_proj[...])
        return apply_rope(guess, rope, self.config.rope)
