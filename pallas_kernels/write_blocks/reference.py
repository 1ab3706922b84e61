# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What `write_blocks` means, in plain JAX."""

import jax.numpy as jnp
from jaxtyping import Array, Int32, Num


def write_blocks(
    slots: Num[Array, "slots 2 W H"],
    records: Num[Array, "records 2 W H"],
    source: Int32[Array, " n"],
    places: Int32[Array, " n"],
    count: Int32[Array, " 1"],
) -> tuple[Int32[Array, " 1"], Num[Array, "records 2 W H"]]:
    """Set records[places[i]] = slots[source[i]] for i < count; the other records stay.

    Args:
        slots: to read.
        records: to change.
        source: slot of each move.
        places: record of each move, distinct among the first `count`.
        count: moves; what the lists hold behind them is not looked at.

    Returns:
        The number of records written, and the records after it.
    """
    is_move = jnp.arange(source.shape[0], dtype=jnp.int32) < count
    moved = slots[jnp.where(is_move, source, 0)]
    nowhere = records.shape[0]
    after = records.at[jnp.where(is_move, places, nowhere)].set(moved, mode="drop")
    return jnp.clip(count, 0, source.shape[0]), after
