# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""InfLLM-V2's rule: the layer's own queries against the pooled keys.

score[k, t, c] = Σ over the query heads n of group k of softmax_c(q[n, t] · pooled[k, c] / √H) over
the windows that t can see; a block's score is the max over its cells.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.pooling import (
    LOWEST,
    PooledSummary,
    extend_pooled,
    init_pooled,
    pool_scores,
    pooled_count,
)
from sparda_jax.rope import Rope
from sparda_jax.selectors.base import Decoder, Source, register, round_scores, score_cells
from sparda_jax.shapes import Parity


def visible_cells(
    positions: Int[Array, "B T"], count: int, sparse: SparseConfig
) -> Bool[Array, "B T C"]:
    """Mark the windows that lie wholly in the past: stride·c + size − 1 ≤ t."""
    last = jnp.arange(count)[None, None, :] * sparse.pool_stride + sparse.pool_size - 1
    return last <= positions[:, :, None]


@dataclasses.dataclass(frozen=True, slots=True)
class PooledKeys:
    """What all selectors share that rank by pooled keys: one summary per layer.

    Attributes:
        config: of the model.
        parity: `None` for the correct rules.
    """

    config: ModelConfig
    parity: Parity = None

    def init_summary(self, batch: int, capacity: int, dtype: str) -> PooledSummary:
        """Make the empty summary of a layer for `capacity` tokens a sequence."""
        config = self.config
        return init_pooled(batch, capacity, config.kv_heads, config.head_dim, config.sparse, dtype)

    def extend_summary(
        self,
        summary: PooledSummary,
        k: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
        importance: Float[Array, "B T K"] | None = None,
    ) -> PooledSummary:
        """Pool the windows that the new keys complete."""
        del importance
        return extend_pooled(summary, k, positions, self.config.sparse)


def score_by_queries(
    q: Float[Array, "B T N H"],
    pooled: Float[Array, "B C K H"],
    visible: Bool[Array, "B T C"],
) -> Float[Array, "B T K C"]:
    """Sum over each group's heads the softmax of q · pooled / √H over the visible cells.

    Rows with something visible sum to G; rows with nothing visible are zero.
    """
    logits = score_cells(q, pooled) * q.shape[-1] ** -0.5  # [B T K G C]
    seen = visible[:, :, None, None, :]
    logits = jnp.where(seen, logits, LOWEST)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=LOWEST))
    mass = jnp.where(seen, jnp.exp(logits - top), 0.0)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    return jnp.sum(mass / jnp.where(total > 0.0, total, 1.0), axis=3)


@register("query")
@dataclasses.dataclass(frozen=True, slots=True)
class QuerySelector(PooledKeys):
    """InfLLM-V2's own-query rule: the sparse mode of models without token importance.

    References:
        InfLLM-V2, arXiv:2509.24663; SparDA, arXiv:2606.04511, section 3.
    """

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
    ) -> Float[Array, "B T N H"]:
        """Give the layer's rotated queries."""
        del model, layer, target, x, rope
        return q

    def visible(
        self, positions: Int[Array, "B T"], lengths: Int[Array, " B"], count: int
    ) -> Bool[Array, "B T C"]:
        """Mark the pooled cells of the past; in parity mode by the original's rule for prefill.

        A lookahead scores a layer before the newest key is pooled there: that cell is left out.

        There, n_vis(t) = min(C, ⌊(t − 15)/16⌉ + C − ⌊(S − 15)/16⌉), rounded towards zero, for the
        32/16 grid: at S mod 16 = 15 every query loses its newest cell. Decode is not affected.
        """
        sparse = self.config.sparse
        if self.parity is None or positions.shape[1] == 1:
            pooled = jnp.arange(count)[None, :] < pooled_count(lengths, sparse)[:, None]
            return visible_cells(positions, count, sparse) & pooled[:, None, :]
        lag = sparse.pool_size - 1 - sparse.pool_stride
        held = pooled_count(lengths, sparse)[:, None]
        stride = jnp.int32(sparse.pool_stride)
        shift = held - jax.lax.div(lengths - lag, stride)[:, None]
        seen = jnp.minimum(held, jax.lax.div(positions - lag, stride) + shift)
        return jnp.arange(count)[None, None, :] < seen[:, :, None]

    def score_blocks(
        self,
        probe: Float[Array, "B T N H"],
        summary: PooledSummary,
        positions: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        num_blocks: int,
    ) -> Float[Array, "B T K M"]:
        """Score blocks by summed softmax mass, the max over the cells of each."""
        sparse = self.config.sparse
        if self.parity is None:
            return pallas_kernels.query_scores(
                probe,
                summary.pooled,
                positions,
                pooled_count(lengths, sparse),
                num_blocks=num_blocks,
                pool_size=sparse.pool_size,
                pool_stride=sparse.pool_stride,
                block_size=sparse.block_size,
            )
        visible = self.visible(positions, lengths, summary.pooled.shape[1])
        mass = round_scores(score_by_queries(probe, summary.pooled, visible), self.parity)
        cells = jnp.where(visible[:, :, None, :], mass, LOWEST)
        return pool_scores(cells, num_blocks, sparse.cells_per_block)
