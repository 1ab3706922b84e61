# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""NOSA's two-step rule: a query-aware share first, then the blocks that matter to every query.

1. The `sink + local + query_blocks` best blocks by an inner selector (pinned ones included).
2. The rest of the budget goes to the blocks with the greatest token importance, pooled like keys.

A two-step rule is a rank too: blocks of the first step score above every importance.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

import pallas_kernels
from sparda_jax.config import ModelConfig
from sparda_jax.pooling import (
    LOWEST,
    PooledSummary,
    extend_pooled,
    init_pooled,
    pool_scores,
)
from sparda_jax.rope import Rope
from sparda_jax.selection import pinned_blocks
from sparda_jax.selectors.base import Decoder, KeySummary, Probe, Selector, Source, get, register
from sparda_jax.selectors.query import visible_cells
from sparda_jax.shapes import Parity

_SHORTLISTED = 1e30
"""Above every importance, below nothing: the score of a block of the query-aware share."""


@typing.no_type_check
@struct.dataclass
class NosaSummary:
    """The inner selector's summary and the pooled token importance [B C K 1]."""

    inner: KeySummary
    importance: PooledSummary


@register("nosa")
@dataclasses.dataclass(frozen=True, slots=True)
class NosaSelector:
    """NOSA's rule over any inner selector: `query` in sparse mode, `forecast` in sparda mode.

    Attributes:
        config: of the model; `config.token_importance` must hold.
        inner: ranks the query-aware share; `query` if left out.
        parity: as everywhere.

    References:
        NOSA, arXiv:2510.13602.
    """

    config: ModelConfig
    inner: Selector | None = None
    parity: Parity = None

    def __post_init__(self) -> None:
        """Refuse a model that has no token importance; fill in the inner selector."""
        if not self.config.token_importance:
            raise ValueError(
                "selector 'nosa' needs a model with token importance, but "
                f"{self.config.token_importance=}; use 'query' or 'forecast'"
            )
        if self.inner is None:
            object.__setattr__(self, "inner", get("query", self.config, parity=self.parity))

    @property
    def ranker(self) -> Selector:
        """What ranks the query-aware share."""
        assert self.inner is not None  # filled in above
        return self.inner

    def source(self, layer: int) -> Source:
        """Whatever the inner selector asks."""
        return self.ranker.source(layer)

    def init_summary(self, batch: int, capacity: int, dtype: str) -> NosaSummary:
        """Make room for the inner summary and for pooled importance in f32."""
        config = self.config
        return NosaSummary(
            inner=self.ranker.init_summary(batch, capacity, dtype),
            importance=init_pooled(batch, capacity, config.kv_heads, 1, config.sparse, "float32"),
        )

    def extend_summary(
        self,
        summary: NosaSummary,
        k: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
        importance: Float[Array, "B T K"] | None = None,
    ) -> NosaSummary:
        """Add new keys and their importance."""
        if importance is None:
            raise ValueError("selector 'nosa' needs the importance of the new tokens, got None")
        return NosaSummary(
            inner=self.ranker.extend_summary(summary.inner, k, positions),
            importance=extend_pooled(
                summary.importance, importance[..., None], positions, self.config.sparse
            ),
        )

    def probe(
        self,
        model: Decoder,
        layer: int,
        target: int,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        rope: Rope,
    ) -> Probe:
        """Whatever the inner selector offers."""
        return self.ranker.probe(model, layer, target, x, q, rope)

    def importance_scores(
        self, summary: NosaSummary, positions: Int[Array, "B T"], num_blocks: int
    ) -> Float[Array, "B T K M"]:
        """Pool token importance to block scores; a window counts once it lies in the past."""
        sparse = self.config.sparse
        pooled = summary.importance.pooled[..., 0]  # [B C K]
        visible = visible_cells(positions, pooled.shape[1], sparse)[:, :, None, :]
        cells = jnp.where(visible, jnp.swapaxes(pooled, 1, 2)[:, None], LOWEST)
        return pool_scores(cells, num_blocks, sparse.cells_per_block)

    def score_blocks(
        self,
        probe: Probe,
        summary: NosaSummary,
        positions: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        num_blocks: int,
    ) -> Float[Array, "B T K M"]:
        """Score the query-aware share above everything, other blocks by their importance."""
        sparse = self.config.sparse
        scores = self.ranker.score_blocks(probe, summary.inner, positions, lengths, num_blocks)
        block = jnp.arange(num_blocks)[None, None, None, :]
        past = block <= (positions // sparse.block_size)[:, :, None, None]
        share = sparse.query_blocks or 0  # never 0: `__post_init__` has seen the configuration
        wanted = sparse.sink_blocks + sparse.local_blocks + share
        if self.parity is None:
            choice = pallas_kernels.select_blocks(
                scores,
                positions,
                block_size=sparse.block_size,
                sink_blocks=sparse.sink_blocks,
                local_blocks=sparse.local_blocks,
                selected_blocks=wanted,
            )
            block = jnp.arange(num_blocks)
            bit = (block % 32).astype(jnp.uint32)[None, None, None, :]
            listed = (choice.mask[..., block // 32] >> bit) & 1 == 1
        else:
            pinned = pinned_blocks(positions, num_blocks, sparse)[:, :, None, :]
            ranked = jnp.where(pinned, jnp.inf, scores)
            best, ids = jax.lax.top_k(ranked, min(wanted, num_blocks))  # ties to the lower id
            ids = jnp.where(best > -jnp.inf, ids, num_blocks)
            listed = jnp.any(ids[..., None] == block[..., None, :], axis=-2)
        importance = jnp.where(past, self.importance_scores(summary, positions, num_blocks), LOWEST)
        return jnp.where(listed, _SHORTLISTED, importance)
