# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""SparDA: the Forecast of layer l ranks the blocks that layer l + 1 will read.

score[k, t, c] = forecast[k, t] · pooled[k, c], raw, one forecast head per KV head; a block's score
is the max over its cells. Layer 0 has no predecessor and ranks its blocks by its entry forecast.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels
from sparda_jax.pooling import LOWEST, PooledSummary, pool_scores, pooled_count
from sparda_jax.rope import Rope, apply_rope
from sparda_jax.selectors.base import Decoder, Source, register, round_scores, score_cells
from sparda_jax.selectors.query import PooledKeys, visible_cells


@register("forecast")
@dataclasses.dataclass(frozen=True, slots=True)
class ForecastSelector(PooledKeys):
    """The learned lookahead of SparDA: the sparda mode.

    References:
        SparDA, arXiv:2606.04511, section 4.1 and equation 4.
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
    ) -> Float[Array, "B T K H"]:
        """Project and rotate the forecast: RoPE(W a), a the normalised input of the layer."""
        del q
        block = model.layers[layer]
        attention = block.attention
        weight = attention.entry_forecast_proj if target == 0 else attention.forecast_proj
        normed = block.input_norm(x)
        forecast = jnp.einsum("btd,dkh->btkh", normed, weight[...].astype(normed.dtype))
        return apply_rope(forecast, rope, self.config.rope)

    def score_blocks(
        self,
        probe: Float[Array, "B T K H"],
        summary: PooledSummary,
        positions: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        num_blocks: int,
    ) -> Float[Array, "B T K M"]:
        """Score blocks by raw inner products, the max over the cells of each.

        A window that reaches past the query is invisible, and so is one that is not pooled yet: a
        lookahead scores a layer before its newest key is there. The original shows a window in
        prefill as soon as it starts (parity mode); with local blocks longer than a window that
        moves pinned blocks only, and the place of one future block.
        """
        sparse = self.config.sparse
        count = summary.pooled.shape[1]
        if self.parity is None:
            return pallas_kernels.block_scores(
                probe,
                summary.pooled,
                positions,
                pooled_count(lengths, sparse),
                num_blocks=num_blocks,
                pool_size=sparse.pool_size,
                pool_stride=sparse.pool_stride,
                block_size=sparse.block_size,
            )
        cells = score_cells(probe, summary.pooled)[:, :, :, 0]  # [B T K C]
        if positions.shape[1] > 1:
            cell = jnp.arange(count)[None, None, :]
            held = pooled_count(lengths, sparse)[:, None, None]
            visible = (cell * sparse.pool_stride <= positions[:, :, None]) & (cell < held)
        else:
            visible = visible_cells(positions, count, sparse)
        cells = jnp.where(visible[:, :, None, :], round_scores(cells, self.parity), LOWEST)
        return pool_scores(cells, num_blocks, sparse.cells_per_block)
