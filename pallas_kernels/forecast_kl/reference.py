# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The definition of the teacher and of the loss, in plain JAX, f32 inside."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

LOWEST = -1e30
"""The logit of what is not visible."""

FLOOR = 1e-8
"""No entry of a distribution is smaller; also added to the sum that divides a teacher row."""


def teacher_mass(
    q: Float[Array, "B T N H"],
    fine: Float[Array, "B fine K H"],
    seen: Int[Array, "B T"],
    *,
    num_cells: int,
    ratio: int,
    alignment: str,
    scale: float,
) -> Float32[Array, "B T K C"]:
    """Sum each group's softmax over the first `seen` fine keys, then max or mean over windows."""
    batch, queries, heads, dim = q.shape
    count, kv_heads = fine.shape[1], fine.shape[2]
    if 0 in (queries, count, num_cells):
        return jnp.zeros((batch, queries, kv_heads, num_cells), jnp.float32)
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("btkgh,bukh->bktgu", grouped, fine, preferred_element_type=jnp.float32)
    visible = (jnp.arange(count)[None, None] < seen[:, :, None])[:, None, :, None, :]
    logits = jnp.where(visible, logits * scale, LOWEST)
    mass = jnp.where(visible, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0.0)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    mass = jnp.sum(mass * (1.0 / jnp.where(total > 0.0, total, 1.0)), axis=3)[
        ..., : num_cells * ratio
    ]

    mass = jnp.pad(mass, ((0, 0),) * 3 + ((1, num_cells * ratio - mass.shape[-1]),))
    inside = mass[..., 1:].reshape(*mass.shape[:3], num_cells, ratio)
    before = mass[..., : num_cells * ratio : ratio]  # fine key u stands at u + 1
    if ratio == 1:
        aligned = inside[..., 0]
    elif alignment == "max":
        aligned = jnp.maximum(jnp.max(inside, axis=-1), before)
    else:
        aligned = (jnp.sum(inside, axis=-1) + before) / (ratio + 1)
    return jnp.swapaxes(aligned, 1, 2)


def forecast_kl(
    forecast: Float[Array, "B T K H"],
    pooled: Float[Array, "B C K H"],
    teacher: Float[Array, "B T K C"],
    kept: Bool[Array, "B T K C"],
    counted: Bool[Array, "B T K"],
    seen: Int[Array, "B T"],
    *,
    entries: int,
    scale: float,
    has_gradient: bool,
) -> tuple[Float32[Array, "B T K"], Float32[Array, "B T K H"]]:
    """Compute KL(teacher ‖ student) over `kept` cells and a rest, and its gradient."""
    visible = (jnp.arange(pooled.shape[1])[None, None] < seen[:, :, None])[:, :, None, :]
    logits = jnp.einsum("btkh,bckh->btkc", forecast, pooled, preferred_element_type=jnp.float32)
    logits = jnp.where(visible, logits * scale, LOWEST)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=LOWEST)
    p = jnp.where(visible, jnp.exp(logits - top), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    p = p / jnp.where(total > 0.0, total, 1.0)
    y = teacher / (jnp.sum(teacher, axis=-1, keepdims=True) + FLOOR)

    over = lambda where, x: jnp.sum(jnp.where(where, x, 0.0), axis=-1, keepdims=True)
    spare = (entries - 1 - jnp.sum(kept, axis=-1, keepdims=True)).astype(jnp.float32) * FLOOR
    y_cells, p_cells = jnp.maximum(y, FLOOR), jnp.maximum(p, FLOOR)
    y_rest, p_rest = (jnp.maximum(over(~kept, x), FLOOR) for x in (y, p))
    y_total, p_total = over(kept, y_cells) + y_rest + spare, over(kept, p_cells) + p_rest + spare
    parts = over(kept, y_cells * jnp.log(y_cells / p_cells)) + y_rest * jnp.log(y_rest / p_rest)
    kl = jnp.where(counted, (parts / y_total - jnp.log(y_total / p_total))[..., 0], 0.0)
    if not has_gradient:
        return kl, jnp.zeros(forecast.shape, jnp.float32)

    cell = jnp.where(p > FLOOR, p / p_total - y_cells / y_total, 0.0)
    rest = jnp.where(p_rest > FLOOR, 1.0 / p_total - y_rest / (y_total * p_rest), 0.0)
    pull = jnp.where(kept, cell, p * rest)
    slope = pull - p * jnp.sum(pull, axis=-1, keepdims=True)
    slope = jnp.where(counted[..., None], slope, 0.0)
    return kl, jnp.einsum("btkc,bckh->btkh", slope, pooled.astype(jnp.float32)) * scale
