# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The loss of a layer: KL(teacher ‖ student) over the cells of the supervised blocks and a rest.

The student is the softmax of the forecast over the layer's pooled keys. Supervised are the cells of
the chosen blocks that are not pinned; the mass of all other cells is one rest bucket. Only the
forecast has a gradient, and a row's gradient needs that row alone, so a tile computes both at once
and nothing is kept for a backward pass.
"""

import typing

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.config import SparseConfig
from sparda_jax.pooling import LOWEST
from sparda_jax.selectors.base import score_cells
from sparda_jax.training.teacher import free_blocks, normalise

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


@typing.no_type_check
@struct.dataclass
class _Vector:
    """A distribution before it is divided by `total`: cells raised to the floor, and the rest."""

    cells: Float[Array, "B T K C"]
    rest: Float[Array, "B T K"]
    total: Float[Array, "B T K"]


def _vector(mass: Float[Array, "B T K C"], kept: Bool[Array, "B T K C"], entries: int) -> _Vector:
    """Collect supervised cells and the rest; other entries of the list are at the floor."""
    cells = jnp.maximum(mass, FLOOR)
    rest = jnp.maximum(jnp.sum(jnp.where(kept, 0.0, mass), axis=-1), FLOOR)
    spare = (entries - 1 - jnp.sum(kept, axis=-1)).astype(jnp.float32)
    total = jnp.sum(jnp.where(kept, cells, 0.0), axis=-1) + rest + spare * FLOOR
    return _Vector(cells=cells, rest=rest, total=total)


def student_probs(
    logits: Float[Array, "B T K C"], seen: Bool[Array, "B T C"]
) -> Float[Array, "B T K C"]:
    """Compute the student: softmax over the cells seen; a row that sees none is zero."""
    seen = seen[:, :, None, :]
    logits = jnp.where(seen, logits, LOWEST)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=LOWEST))
    mass = jnp.where(seen, jnp.exp(logits - top), 0.0)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    return mass / jnp.where(total > 0.0, total, 1.0)


def kl_rows(
    student: Float[Array, "B T K C"],
    teacher: Float[Array, "B T K C"],
    kept: Bool[Array, "B T K C"],
    entries: int,
) -> Float[Array, "B T K"]:
    """Compute KL(teacher ‖ student) of each row over its supervised cells and the rest bucket.

    Both vectors have `entries` entries: the mass of every cell of every listed block, zero for
    blocks that are pinned or missing, and the rest. Each is raised to at least 1e-8 and divided by
    its sum.

    Args:
        student: what `student_probs` gives.
        teacher: on the pooled grid, not normalised.
        kept: supervised cells.
        entries: cells per block times the width of the list, plus one.

    Returns:
        The divergence in nats. A row whose teacher has no mass compares with a uniform target.

    References:
        SparDA, arXiv:2606.04511, section 4.2, equation 7.
    """
    target, guess = _vector(normalise(teacher), kept, entries), _vector(student, kept, entries)
    parts = jnp.where(kept, target.cells * jnp.log(target.cells / guess.cells), 0.0)
    parts = jnp.sum(parts, axis=-1) + target.rest * jnp.log(target.rest / guess.rest)
    return parts / target.total - jnp.log(target.total / guess.total)


def kl_slope(
    student: Float[Array, "B T K C"],
    teacher: Float[Array, "B T K C"],
    kept: Bool[Array, "B T K C"],
    entries: int,
) -> Float[Array, "B T K C"]:
    """Compute the derivative of `kl_rows` with respect to the logits of `student_probs`.

    Floors aside this is p − y on the supervised cells and p · (1 − y_rest / p_rest) on the others,
    with p the student and y the teacher. Arguments as `kl_rows`.
    """
    target, guess = _vector(normalise(teacher), kept, entries), _vector(student, kept, entries)
    wide = lambda row: row[..., None]
    cells = student / wide(guess.total) - target.cells / wide(target.total)
    rest = 1.0 / guess.total - target.rest / (target.total * guess.rest)
    rest = jnp.where(guess.rest > FLOOR, rest, 0.0)
    pull = jnp.where(kept, jnp.where(student > FLOOR, cells, 0.0), student * wide(rest))
    return pull - student * jnp.sum(pull, axis=-1, keepdims=True)


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
    student = student_probs(score_cells(forecast, pooled)[:, :, :, 0] * scale, seen)
    entries = sparse.cells_per_block * width + 1
    rows = jnp.where(counted, kl_rows(student, teacher, kept, entries), 0.0)
    if not has_gradient:
        return rows, jnp.zeros(forecast.shape, jnp.float32)
    slope = jnp.where(counted[..., None], kl_slope(student, teacher, kept, entries), 0.0)
    return rows, jnp.einsum("btkc,bckh->btkh", slope, pooled.astype(jnp.float32)) * scale
