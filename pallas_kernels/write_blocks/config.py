# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What a write gives; how records are moved is as in `gather_blocks`, the other way."""

import typing

from jaxtyping import Array, Int32, Num

from pallas_kernels.gather_blocks.config import Tiles, work

__all__ = ["Tiles", "Written", "work"]


@typing.no_type_check  # vmap and eval_shape rebuild it from leaves that are not arrays
class Written(typing.NamedTuple):
    """The two things that a later read takes.

    Attributes:
        receipt: number of records written. Whatever reads the records later takes it as an operand,
            and the program returns it: a write that nobody waits for may be removed or moved.
        records: what to read from then on. A kernel changed the memory that it was given and gives
            back the same array; the reference gives a new one.
    """

    receipt: Int32[Array, " 1"]
    records: Num[Array, "records 2 W H"]
