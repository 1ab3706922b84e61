# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What `gather_blocks` means, in plain JAX."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Num


def gather_blocks(
    records: Num[Array, "records 2 W H"],
    source: Int32[Array, " n"],
    places: Int32[Array, " n"],
    count: Int32[Array, " 1"],
    slots: Num[Array, "slots 2 W H"],
    scales: Float32[Array, "records 2"] | None = None,
) -> Num[Array, "slots 2 W H"]:
    """Set slots[places[i]] = records[source[i]] for i < count; the other slots stay.

    With scales, what is set is records[source[i]] · scales[source[i]], in f32 until it is rounded.

    Args:
        records: to read.
        source: record of each move.
        places: slot of each move, distinct among the first `count`.
        count: moves; what the lists hold behind them is not looked at.
        slots: to change.
        scales: of the keys and of the values of each record; `None` moves bits as they are.
    """
    is_move = jnp.arange(source.shape[0], dtype=jnp.int32) < count
    chosen = jnp.where(is_move, source, 0)
    moved = records[chosen]
    if scales is not None:
        wide = moved.astype(jnp.float32) * scales[chosen][:, :, None, None]
        moved = wide.astype(slots.dtype)
    nowhere = slots.shape[0]
    return slots.at[jnp.where(is_move, places, nowhere)].set(moved, mode="drop")
