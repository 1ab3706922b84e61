# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""One measurement of one implementation of one op at one shape."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from pallas_kernels._roofline import Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What to call, on what, and what it has to move.

    Attributes:
        op: name of the op's folder.
        shape: the case in words: `B16 S128K J96`.
        implementation: a backend of the op, `reference`, or the name of a peer.
        operands: makes the operands of one call on the device from a seed. The harness makes as
            many sets as exceed the caches and rotates over them. They are part of the run's time:
            one jitted function makes them in the time that they take.
        call: the op, jittable, of the operands.
        work: what one call has to do.
        check: compares an output with an oracle, for a set of operands; raises if they differ.
            Called once, before timing.
        in_place: operands that the call changes in place, by number: the harness donates them.
        least_sets: operand sets at least, for an op so short that few calls in one program drown in
            the spread of its start.
    """

    op: str
    shape: str
    implementation: str
    operands: Callable[[int], tuple[PyTree, ...]]
    call: Callable[..., Any]
    work: Work
    check: Callable[[Any, tuple[PyTree, ...]], None] | None = None
    in_place: tuple[int, ...] = ()
    least_sets: int = 1
