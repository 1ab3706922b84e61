# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`plan_fetch` of one layer in decode: full slots, of which a choice keeps most."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.kernel_cases.base import Case
from pallas_kernels.plan_fetch import Plan, plan_fetch
from pallas_kernels.plan_fetch.api import Implementation
from pallas_kernels.plan_fetch.config import work


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
    """The pool of one layer, and how many blocks of a choice are not in it."""

    batch: int
    missing: int = 4
    width: int = 96
    slots: int = 128
    blocks: int = 2048
    kv_heads: int = 2

    @property
    def name(self) -> str:
        return f"B{self.batch} M{self.blocks} R{self.slots} J{self.width} missing {self.missing}"

    def case(self, implementation: Implementation) -> Case:
        rows = self.batch * self.kv_heads
        return Case(
            op="plan_fetch",
            shape=self.name,
            implementation=implementation,
            operands=functools.partial(_operands, shape=self),
            call=functools.partial(plan_fetch, implementation=implementation),
            work=work(rows, self.width, self.slots, self.missing),
            check=_check,
            in_place=(1, 2, 3),
            least_sets=64 if implementation == "triton" else 1,
        )


def _operands(seed: int, *, shape: _Shape) -> tuple[Int[Array, "..."], ...]:
    """A pool of random blocks of random ages, and a choice that holds the newest block."""
    rng = np.random.default_rng(seed)
    rows = shape.batch * shape.kv_heads
    table = np.full((rows, shape.blocks), -1, np.int32)
    slot_blocks = np.zeros((rows, shape.slots), np.int32)
    ids = np.zeros((rows, shape.width), np.int32)
    for row in range(rows):
        blocks = rng.permutation(shape.blocks - 1)
        resident = np.append(blocks[: shape.slots - 1], shape.blocks - 1)
        slot_blocks[row] = rng.permutation(resident)
        table[row, slot_blocks[row]] = np.arange(shape.slots)
        kept = resident[len(resident) - (shape.width - shape.missing) :]
        ids[row] = np.sort(np.append(kept, blocks[shape.slots : shape.slots + shape.missing]))
    ages = rng.integers(0, 64, slot_blocks.shape).astype(np.int32)
    heads = (shape.batch, shape.kv_heads, -1)
    return (
        *(jnp.asarray(x.reshape(heads)) for x in (ids, table, slot_blocks, ages)),
        jnp.full((shape.batch,), shape.blocks - 1, jnp.int32),
        jnp.int32(64),
    )


def _check(output: Plan, operands: tuple[Int[Array, "..."], ...]) -> None:
    """Hold every field of the plan to the reference."""
    want = jax.jit(functools.partial(plan_fetch, implementation="reference"))(*operands)
    for field in dataclasses.fields(Plan):
        got = np.asarray(getattr(output, field.name))
        np.testing.assert_array_equal(got, getattr(want, field.name), err_msg=field.name)


def cases(*, tiny: bool = False) -> list[Case]:
    """List the cases.

    Args:
        tiny: shapes that run on a CPU in seconds, by the reference.
    """
    if tiny:
        small = _Shape(batch=2, missing=2, width=5, slots=8, blocks=20)
        return [small.case("reference")]
    shapes = [
        _Shape(batch=4),
        _Shape(batch=4, missing=60),
        _Shape(batch=16),
        _Shape(batch=64),
        _Shape(batch=128, width=128, slots=256, blocks=16384),
    ]
    return [shape.case("triton") for shape in shapes] + [shapes[0].case("reference")]
