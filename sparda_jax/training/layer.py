# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""One layer of Forecast training: teacher, choices, loss and metrics, in one pass over the queries.

A tile of queries computes its teacher once and uses it for everything: the blocks that the layer
reads, the cells that are supervised, the loss with its gradient, and the recall of the forecast.
Later queries see more keys than earlier ones, so a long sequence is cut into a few spans, and the
tiles of a span see the keys up to its end.
"""

import dataclasses
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from sparda_jax.config import ModelConfig
from sparda_jax.pooling import PooledSummary
from sparda_jax.selection import BlockChoice, select_blocks
from sparda_jax.selectors import KeySummary, QuerySelector, Selector, resolve
from sparda_jax.selectors.base import round_scores
from sparda_jax.selectors.nosa import NosaSelector, NosaSummary
from sparda_jax.shapes import Mode, Parity
from sparda_jax.training.attend import map_spans, mark_blocks
from sparda_jax.training.loss import counted_rows, forecast_kl, supervised_cells
from sparda_jax.training.teacher import (
    block_mass,
    fine_keys,
    is_own_query,
    overlap_rows,
    recall_rows,
    teacher_cells,
    teacher_scores,
)

Routing = Literal["teacher", "forecast"]
"""Whose choice the layers read while training: the teacher's (the paper) or the forecast's."""


def default_tile_bytes() -> int:
    """Give the bound on a tile that suits the default device: 1 GiB on a GPU, else 8 MiB."""
    return (1 << 30) if jax.default_backend() == "gpu" else (8 << 20)


def has_kernels() -> bool:
    """Tell whether teacher and loss run as kernels: on a GPU."""
    return jax.default_backend() == "gpu"


def default_attention() -> Literal["gather", "mask"]:
    """Give the faster way to read blocks: `gather` on a GPU, `mask` on a CPU up to about 8K."""
    return "gather" if jax.default_backend() == "gpu" else "mask"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """The static part of a walk over the layers.

    Attributes:
        config: of the model.
        routing: whose blocks the layers read.
        attention: how chosen blocks are read: gathered, or under a mask over all keys; left out,
            what is faster on the default device.
        parity: `None` for the correct rules.
        tile_bytes: bound on the largest array of a tile; left out, what suits that device.
        has_gradient: compute the gradient of the loss.
        has_metrics: compute recall and overlap; without, they are not a number.
    """

    config: ModelConfig
    routing: Routing = "teacher"
    attention: Literal["gather", "mask"] = dataclasses.field(default_factory=default_attention)
    parity: Parity = None
    tile_bytes: int = dataclasses.field(default_factory=default_tile_bytes)
    has_gradient: bool = True
    has_metrics: bool = True

    def __post_init__(self) -> None:
        """Refuse what would be ignored."""
        if self.routing not in ("teacher", "forecast"):
            raise ValueError(f"{self.routing=} must be 'teacher' or 'forecast'")
        if self.attention not in ("gather", "mask"):
            raise ValueError(f"{self.attention=} must be 'gather' or 'mask'")
        if self.tile_bytes < 1:
            raise ValueError(f"{self.tile_bytes=} must be at least 1")

    def label_tile(self, batch: int, keys: int) -> int:
        """Choose how many queries to label at once: their fine logits fill `tile_bytes`.

        With kernels there are no fine logits: three arrays on the pooled grid are the largest.
        """
        sparse = self.config.sparse
        if has_kernels() and not is_own_query(sparse):
            return self._tile(3 * batch * self.config.kv_heads * max(sparse.pooled(keys), 1) * 4)
        fine = keys // sparse.teacher_pool_stride
        return self._tile(2 * batch * self.config.heads * max(fine, sparse.pooled(keys), 1) * 4)

    def attention_tile(self, batch: int, keys: int) -> int:
        """Choose for how many queries to gather or mask blocks at once within `tile_bytes`."""
        config = self.config
        if self.attention == "mask":
            return self._tile(2 * batch * config.heads * keys * 4)
        tokens = config.sparse.selected_blocks * config.sparse.block_size
        per_token = 2 * config.kv_heads * config.head_dim + config.heads
        return self._tile(batch * tokens * per_token * 4)

    def _tile(self, per_query: int) -> int:
        return max(8, min(self.tile_bytes // per_query, 4096) // 8 * 8)


@typing.no_type_check
@struct.dataclass
class LayerLabels:
    """What one pass over the queries of a layer gives.

    Attributes:
        ids: blocks that the layer reads, ascending, then `NO_BLOCK`.
        kl: KL of each row, zero where it does not count.
        counted: rows that count in the loss.
        gradient: of the sum of `kl` with respect to the rotated forecast, f32.
        recall: teacher mass on the forecast's choice, and on the best choice (`recall_rows`).
        overlap: blocks both in the forecast's and in the own-query choice, and in either.
    """

    ids: Int[Array, "B T K J"]
    kl: Float[Array, "B T K"]
    counted: Bool[Array, "B T K"]
    gradient: Float[Array, "B T K H"]
    recall: tuple[Float[Array, "B T K"], Float[Array, "B T K"]]
    overlap: tuple[Float[Array, "B T K"], Float[Array, "B T K"]]


@dataclasses.dataclass(frozen=True, slots=True)
class GivenScores(QuerySelector):
    """A selector whose probe is the block scores themselves: lets NOSA's rule rank by a teacher."""

    def score_blocks(
        self,
        probe: Float[Array, "B T K M"],
        summary: KeySummary,
        positions: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        num_blocks: int,
    ) -> Float[Array, "B T K M"]:
        """Give the probe."""
        del summary, positions, lengths, num_blocks
        return probe


def selector_of(
    mode: Mode, config: ModelConfig, parity: Parity = None, *, by: str | Selector | None = None
) -> Selector:
    """Find the selector of a sparse mode, as `selectors.resolve`; `by` overrides it."""
    selector = resolve(mode, config, by, parity)
    assert selector is not None  # only the dense mode has none
    return selector


def pooled_of(summary: KeySummary) -> PooledSummary:
    """Find the pooled keys in the summary of `query`, `forecast`, or NOSA's rule over either."""
    return summary.inner if isinstance(summary, NosaSummary) else summary


def choose(
    plan: LayerPlan,
    selector: Selector,
    probe: Any,
    summary: KeySummary,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    num_blocks: int,
) -> BlockChoice:
    """Choose blocks by a selector; always sparse, whatever `dense_below` says."""
    scores = selector.score_blocks(probe, summary, positions, lengths, num_blocks)
    return select_blocks(scores, positions, plan.config.sparse, parity=plan.parity)


def teacher_choices(
    plan: LayerPlan,
    cells: Float[Array, "B T K C"],
    summary: KeySummary,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    num_blocks: int,
) -> tuple[BlockChoice, BlockChoice]:
    """Choose blocks by the teacher: those to read, and the list whose cells are supervised.

    The two are one, unless the model has token importance: then the first is its two-step rule with
    the teacher as the query-aware score, the second the query-aware share alone.
    """
    config = plan.config
    scores = teacher_scores(round_scores(cells, plan.parity), num_blocks, config.sparse)
    if not config.token_importance:
        choice = select_blocks(scores, positions, config.sparse, parity=plan.parity)
        return choice, choice
    sparse = config.sparse
    rule = NosaSelector(config, inner=GivenScores(config), parity=plan.parity)
    read = choose(plan, rule, scores, summary, positions, lengths, num_blocks)
    assert sparse.query_blocks is not None  # goes with token importance
    share = sparse.sink_blocks + sparse.local_blocks + sparse.query_blocks
    narrow = dataclasses.replace(sparse, selected_blocks=share, query_blocks=None)
    return read, select_blocks(scores, positions, narrow, parity=plan.parity)


def label_layer(
    plan: LayerPlan,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    forecast: Float[Array, "B T K H"],
    summary: KeySummary,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> LayerLabels:
    """Label one layer: what it reads, the loss of the forecast that ranks it, and how good that is.

    Args:
        plan: the static part.
        q: rotated queries of the layer.
        k: its rotated keys, T of them: whole sequences.
        forecast: rotated forecasts for this layer: of the layer before, or the entry forecast.
        summary: of this layer's keys, by the selector that `sparda` means.
        positions: of the queries, in tokens from 0; −1 marks padding at the end of a row.
        lengths: tokens of each sequence.

    Returns:
        One row for each query and KV head.

    References:
        SparDA, arXiv:2606.04511, section 4.2.
    """
    num_blocks = plan.config.sparse.blocks(positions.shape[1])
    fine = fine_keys(k, plan.config.sparse)

    def label(rows: tuple[Array, Array, Array], end: int) -> LayerLabels:
        held = fine[:, : -(-end // plan.config.sparse.teacher_pool_stride)]
        return _label_tile(plan, rows, held, summary, lengths, num_blocks)

    tile = plan.label_tile(*positions.shape)
    # A kernel passes over keys of the future by itself; more spans would be more programs.
    spans = 1 if is_own_query(plan.config.sparse) or has_kernels() else None
    return map_spans(label, (q, forecast, positions), tile, (0, 0, -1), spans=spans)


def _teacher(
    plan: LayerPlan,
    q: Float[Array, "B T N H"],
    fine: Float[Array, "B fine K H"],
    pooled: Float[Array, "B C K H"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> Float[Array, "B T K C"]:
    """Compute the teacher of a tile, by a kernel where there is one."""
    sparse = plan.config.sparse
    if is_own_query(sparse) or not has_kernels():
        return teacher_cells(q, fine, pooled, positions, lengths, plan.config, parity=plan.parity)
    return pallas_kernels.teacher_mass(
        q,
        fine,
        positions,
        lengths,
        num_cells=pooled.shape[1],
        pool_stride=sparse.pool_stride,
        teacher_pool_size=sparse.teacher_pool_size,
        teacher_pool_stride=sparse.teacher_pool_stride,
        alignment=sparse.teacher_alignment,
    )


def _loss(
    plan: LayerPlan,
    forecast: Float[Array, "B T K H"],
    pooled: Float[Array, "B C K H"],
    cells: Float[Array, "B T K C"],
    listed: Int[Array, "B T K J"],
    counted: Bool[Array, "B T K"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    num_blocks: int,
) -> tuple[Float[Array, "B T K"], Float[Array, "B T K H"]]:
    """Compute the loss of a tile and its gradient, by a kernel where there is one."""
    sparse, has_gradient = plan.config.sparse, plan.has_gradient
    if has_kernels() and not is_own_query(sparse):
        return pallas_kernels.forecast_kl_and_gradient(
            forecast,
            pooled,
            cells,
            listed,
            counted,
            positions,
            lengths,
            block_size=sparse.block_size,
            pool_size=sparse.pool_size,
            pool_stride=sparse.pool_stride,
            sink_blocks=sparse.sink_blocks,
            local_blocks=sparse.local_blocks,
            has_gradient=has_gradient,
        )
    kept = supervised_cells(mark_blocks(listed, num_blocks), positions, pooled.shape[1], sparse)
    return forecast_kl(
        forecast,
        pooled,
        cells,
        kept,
        counted,
        positions,
        lengths,
        sparse,
        width=listed.shape[-1],
        has_gradient=has_gradient,
    )


@jax.named_scope("label_tile")
def _label_tile(
    plan: LayerPlan,
    rows: tuple[Array, Array, Array],
    fine: Float[Array, "B fine K H"],
    summary: KeySummary,
    lengths: Int[Array, " B"],
    num_blocks: int,
) -> LayerLabels:
    """Label the queries of one tile."""
    config, sparse = plan.config, plan.config.sparse
    q, forecast, positions = rows
    pooled = pooled_of(summary).pooled
    cells = _teacher(plan, q, fine, pooled, positions, lengths)
    read, listed = teacher_choices(plan, cells, summary, positions, lengths, num_blocks)
    counted = counted_rows(cells, positions, keep_empty=plan.parity is not None)
    kl, gradient = _loss(
        plan, forecast, pooled, cells, listed.ids, counted, positions, lengths, num_blocks
    )
    zeros = jnp.zeros(kl.shape, jnp.float32)
    recall = overlap = (zeros, zeros)
    if plan.routing == "forecast" or plan.has_metrics:

        def by(mode: Mode, probe: Array) -> BlockChoice:
            selector = selector_of(mode, config, plan.parity)
            return choose(plan, selector, probe, summary, positions, lengths, num_blocks)

        mine = by("sparda", forecast)
        if plan.routing == "forecast":
            read = mine
        if plan.has_metrics:
            marked = mark_blocks(mine.ids, num_blocks)
            own = mark_blocks(by("sparse", q).ids, num_blocks)
            mass = block_mass(cells, num_blocks, sparse)
            recall = recall_rows(mass, marked, positions, sparse)
            overlap = overlap_rows(marked, own, positions, sparse)
    return LayerLabels(
        ids=read.ids,
        kl=kl,
        counted=counted,
        gradient=gradient,
        recall=recall,
        overlap=overlap,
    )
