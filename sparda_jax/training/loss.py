# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The loss of a layer: KL(teacher ‖ student) over the cells of the supervised blocks and a rest.

The student is the softmax of the forecast over the layer's pooled keys. Supervised are the cells of
the chosen blocks that are not pinned; the mass of all other cells is one rest bucket. Only the
forecast has a gradient, and a row's gradient needs that row alone, so a tile computes both at once
and nothing is kept for a backward pass.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.config import SparseConfig
from sparda_jax.pooling import LOWEST
from sparda_jax.selectors.base import score_cells
from sparda_jax.training.teacher import EPSILON, free_blocks, normalise

FLOOR = 1e-8
"""No entry of a distribution is smaller before it is normalised."""


def supervised_cells(
    listed: Bool[Array, "B T K M"],
    positions: Int[Array, "B T"],
    count: int,
    sparse: SparseConfig,
) -> Bool[Array, "B T K C"]:
    """Mark the cells that start in a listed block that is not pinned.

    Args:
        listed: the teacher's choice; for models with token importance its query-aware share.
        positions: of the queries; −1 marks padding, which supervises nothing.
        count: C.
        sparse: blocks, cells and pinned blocks.
    """
    kept = listed & free_blocks(positions, listed.shape[-1], sparse)
    return jnp.repeat(kept, sparse.cells_per_block, axis=-1)[..., :count]


def visible_to_student(
    positions: Int[Array, "B T"], lengths: Int[Array, " B"], count: int, sparse: SparseConfig
) -> Bool[Array, "B T C"]:
    """Mark the cells in the student's softmax: those that have started, stride · c ≤ t.

    A cell that reaches past the query lies in pinned blocks and so in the rest bucket. Windows that
    the sequence does not fill are left out.
    """
    start = jnp.arange(count)[None, None, :] * sparse.pool_stride
    seen = start <= positions[:, :, None]
    return seen & (start + sparse.pool_size <= lengths[:, None, None])


def kl_rows(
    logits: Float[Array, "B T K C"],
    seen: Bool[Array, "B T C"],
    teacher: Float[Array, "B T K C"],
    kept: Bool[Array, "B T K C"],
    entries: int,
) -> Float[Array, "B T K"]:
    """Compute KL(teacher ‖ student) of each row over its supervised cells and the rest bucket.

    Both vectors have `entries` entries: the mass of every cell of every listed block, zero for
    blocks that are pinned or missing, and the rest. Each is raised to at least 1e-8 and divided by
    its sum.

    Args:
        logits: forecast · pooled / √H, f32.
        seen: cells in the student's softmax.
        teacher: on the pooled grid, not normalised.
        kept: supervised cells.
        entries: cells per block times the width of the list, plus one.

    Returns:
        The divergence in nats. A row whose teacher has no mass compares with a uniform target.

    References:
        SparDA, arXiv:2606.04511, section 4.2, equation 7.
    """
    seen = seen[:, :, None, :]
    logits = jnp.where(seen, logits, LOWEST)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=LOWEST))
    student = jnp.where(seen, jnp.exp(logits - top), 0.0)
    total = jnp.sum(student, axis=-1, keepdims=True)
    student = student / jnp.where(total > 0.0, total, 1.0)
    student = student / (jnp.sum(student, axis=-1, keepdims=True) + EPSILON)

    def vector(mass: Array) -> tuple[Array, Array, Array]:
        cells = jnp.maximum(mass, FLOOR)
        rest = jnp.maximum(jnp.sum(jnp.where(kept, 0.0, mass), axis=-1), FLOOR)
        spare = (entries - 1 - jnp.sum(kept, axis=-1)).astype(jnp.float32)  # entries at the floor
        return cells, rest, jnp.sum(jnp.where(kept, cells, 0.0), axis=-1) + rest + spare * FLOOR

    target, target_rest, target_sum = vector(normalise(teacher))
    guess, guess_rest, guess_sum = vector(student)
    parts = jnp.where(kept, target * (jnp.log(target) - jnp.log(guess)), 0.0)
    total = jnp.sum(parts, axis=-1)
    total = total + target_rest * (jnp.log(target_rest) - jnp.log(guess_rest))
    return total / target_sum - jnp.log(target_sum) + jnp.log(guess_sum)


def counted_rows(
    teacher: Float[Array, "B T K C"], positions: Int[Array, "B T"], *, keep_empty: bool
) -> Bool[Array, "B T K"]:
    """Mark the rows that count in the loss: real queries, and those whose teacher has mass.

    Args:
        teacher: on the pooled grid.
        positions: of the queries; −1 marks padding.
        keep_empty: count rows without teacher mass too, as the original does. They occur where the
            teacher is the own-query score and no window has ended yet, and add a constant.
    """
    real = (positions >= 0)[:, :, None]
    if keep_empty:
        return jnp.broadcast_to(real, teacher.shape[:3])
    return real & (jnp.sum(teacher, axis=-1) > 0.0)


def forecast_kl(
    forecast: Float[Array, "B T K H"],
    pooled: Float[Array, "B C K H"],
    teacher: Float[Array, "B T K C"],
    kept: Bool[Array, "B T K C"],
    counted: Bool[Array, "B T K"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    sparse: SparseConfig,
    *,
    width: int,
    has_gradient: bool = True,
) -> tuple[Float[Array, "B T K"], Float[Array, "B T K H"]]:
    """Compute the KL of a tile of queries, and the gradient of its sum w.r.t. the forecast.

    Args:
        forecast: rotated forecasts for this layer.
        pooled: pooled keys of this layer.
        teacher: on the pooled grid, not normalised.
        kept: supervised cells.
        counted: rows that count; the others give zero.
        positions: of the queries; −1 marks padding.
        lengths: tokens of each sequence.
        sparse: the grids.
        width: ids in the list that `kept` was made from.
        has_gradient: leave the gradient zero if false.

    Returns:
        The KL of each row, and the gradient of their sum, both f32.
    """
    seen = visible_to_student(positions, lengths, pooled.shape[1], sparse)
    scale = forecast.shape[-1] ** -0.5
    logits = score_cells(forecast, pooled)[:, :, :, 0] * scale
    entries = sparse.cells_per_block * width + 1

    def summed(logits: Array) -> tuple[Array, Array]:
        rows = jnp.where(counted, kl_rows(logits, seen, teacher, kept, entries), 0.0)
        return jnp.sum(rows), rows

    if not has_gradient:
        return summed(logits)[1], jnp.zeros(forecast.shape, jnp.float32)
    slope, rows = jax.grad(summed, has_aux=True)(logits)
    gradient = jnp.einsum("btkc,bckh->btkh", slope, pooled.astype(jnp.float32)) * scale
    return rows, gradient
