# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What `gather_blocks` means, in plain JAX."""

import jax.numpy as jnp
from jaxtyping import Array, Int32, Num


def gather_blocks(
    records: Num[Array, "records 2 W H"],
    source: Int32[Array, " n"],
    places: Int32[Array, " n"],
    count: Int32[Array, " 1"],
    slots: Num[Array, "slots 2 W H"],
) -> Num[Array, "slots 2 W H"]:
    """Set slots[places[i]] = records[source[i]] for i < count; the other slots stay.

    Args:
        records: to read.
        source: record of each move.
        places: slot of each move, distinct among the first `count`.
        count: moves; what the lists hold behind them is not looked at.
        slots: to change.
    """
    is_move = jnp.arange(source.shape[0], dtype=jnp.int32) < count
    moved = records[jnp.where(is_move, source, 0)]
    nowhere = slots.shape[0]
    return slots.at[jnp.where(is_move, places, nowhere)].set(moved, mode="drop")
