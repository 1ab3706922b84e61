# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What one layer spends on its choice, several ops in a row: scores, the best blocks, the plan.

No op of its own: in decode `block_scores`, `select_blocks` and `plan_fetch`, one after the other;
in prefill the first two, for the queries of a whole prompt in tiles as a model takes them, so that
no score of a (query, pooled key) pair is in memory, and block scores are for one tile only.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from experiments.kernel_cases import block_scores as scores_case
from experiments.kernel_cases.base import Case
from pallas_kernels import block_scores, plan_fetch, select_blocks
from pallas_kernels._roofline import Work
from pallas_kernels.block_scores.config import work as scores_work
from pallas_kernels.plan_fetch import Plan
from pallas_kernels.plan_fetch.config import work as plan_work
from pallas_kernels.select_blocks import Selection
from pallas_kernels.select_blocks.config import work as select_work
from sparda_jax.attention import map_tiles

_CHECKED = 64
"""First and last queries of a prompt whose choices are compared with the reference."""

_SAME_ROWS = 0.99
"""Least share of rows with the reference's very blocks: its sums have another order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape(scores_case.Shape):
    """One call: the last T queries of sequences of `tokens` tokens, and what is resident."""

    sink_blocks: int = 1
    local_blocks: int = 32
    selected_blocks: int = 96
    slots: int = 128
    missing: int = 4

    @property
    def choice(self) -> dict[str, Any]:
        """Collect the sizes that the choice takes."""
        names = ("block_size", "sink_blocks", "local_blocks", "selected_blocks")
        return {name: getattr(self, name) for name in names}

    @property
    def blocks(self) -> int:
        """Count the blocks of a sequence."""
        return self.tokens // self.block_size

    def choose(
        self,
        forecast: Array,
        pooled: Array,
        positions: Int[Array, "B T"],
        counts: Int[Array, " B"],
        *,
        implementation: Any = None,
    ) -> Selection:
        """Score blocks and select the best."""
        kernel: dict[str, Any] = {"implementation": implementation}
        scores = block_scores(forecast, pooled, positions, counts, **self.rule, **kernel)
        return select_blocks(scores, positions, **self.choice, **kernel)

    def work(self) -> Work:
        """Add up what the ops have to do."""
        rows = self.batch * self.queries * self.kv_heads
        scores = scores_work(
            batch=self.batch,
            queries=self.queries,
            cells=self.cells,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            num_blocks=self.blocks,
            itemsize=jnp.dtype(self.dtype).itemsize,
            pairs=self.pairs(),
        )
        visible = float(np.mean(self.positions() // self.block_size + 1))
        parts = [scores, select_work(rows, self.blocks, self.selected_blocks, visible=visible)]
        if self.queries == 1:
            parts.append(plan_work(rows, self.selected_blocks, self.slots, self.missing))
        return Work(
            bytes=sum(part.bytes for part in parts),
            flops=sum(part.flops for part in parts),
            ceiling=scores.ceiling,
        )


@functools.partial(jax.jit, static_argnames="shape")
def _decode_operands(seed: int | Int[Array, ""], *, shape: _Shape) -> tuple[Array, ...]:
    """Operands of the scores, and a full pool that lacks `missing` of the blocks chosen by them."""
    probe = scores_case.operands(seed, shape=shape)
    ids = shape.choose(*probe).ids[:, 0]  # [B K J]
    own = shape.blocks - 1
    heads = ids.shape[:2]
    batch = jnp.arange(heads[0])[:, None, None]
    head = jnp.arange(heads[1])[None, :, None]
    keys = jax.random.split(jax.random.key(seed), 2)
    draw = jax.random.uniform(keys[0], (*heads, shape.blocks))
    kept = draw[batch, head, ids] + jnp.where(ids == own, 4.0, 2.0)
    absent = jnp.argsort(kept, axis=-1)[..., : shape.missing]
    kept = kept.at[batch, head, absent].set(-1.0)
    rank = draw.at[batch, head, ids].set(kept)
    slot_blocks = jax.lax.top_k(rank, shape.slots)[1].astype(jnp.int32)  # [B K R]
    slot = jnp.broadcast_to(jnp.arange(shape.slots, dtype=jnp.int32)[None, None], slot_blocks.shape)
    table = jnp.full((*heads, shape.blocks), -1, jnp.int32)
    table = table.at[batch, head, slot_blocks].set(slot)
    ages = jax.random.randint(keys[1], slot_blocks.shape, 0, 64)
    return *probe, table, slot_blocks, ages, jnp.full(heads[:1], own), jnp.int32(64)


def _decode(*operands: Array, shape: _Shape, implementation: Any) -> Plan:
    choice = shape.choose(*operands[:4], implementation=implementation)
    return plan_fetch(choice.ids[:, 0], *operands[4:], implementation=implementation)


def _check_plan(plan: Plan, operands: tuple[Array, ...], *, shape: _Shape) -> None:
    """Hold the plan to its definition, for the ids that the ops choose without it."""

    @jax.jit
    def plain(*operands: Array) -> Plan:
        ids = shape.choose(*operands[:4]).ids[:, 0]
        return plan_fetch(ids, *operands[4:], implementation="reference")

    want = plain(*operands)
    for field in dataclasses.fields(Plan):
        got = np.asarray(getattr(plan, field.name))
        np.testing.assert_array_equal(got, getattr(want, field.name), err_msg=field.name)


def _prefill(
    forecast: Array,
    pooled: Array,
    positions: Int32[Array, "B T"],
    counts: Int32[Array, " B"],
    *,
    shape: _Shape,
    implementation: Any,
    tile: int,
) -> Selection:
    def choose(rows: tuple[Array, Array]) -> Selection:
        forecast, positions = rows
        return shape.choose(forecast, pooled, positions, counts, implementation=implementation)

    return map_tiles(choose, (forecast, positions), tile, (0, -1))


def _check_choice(choice: Selection, operands: tuple[Array, ...], *, shape: _Shape) -> None:
    """Compare the blocks of the first and of the last queries with the reference's in f32."""
    forecast, pooled, positions, counts = operands
    oracle = jax.jit(functools.partial(shape.choose, implementation="reference"))
    for part in scores_case.checked_parts(shape.queries, _CHECKED):
        exact = forecast[:, part].astype(jnp.float32), pooled.astype(jnp.float32)
        want = oracle(*exact, positions[:, part], counts)
        same = np.all(np.asarray(choice.ids[:, part]) == np.asarray(want.ids), axis=-1)
        share = float(np.mean(same))
        assert share >= _SAME_ROWS, f"{share=} of the rows are alike, less than {_SAME_ROWS}"


def _case(shape: _Shape, implementation: str, tile: int | None = None) -> Case:
    common: dict[str, Any] = {
        "op": "selection",
        "implementation": implementation,
        "work": shape.work(),
    }
    static = {"shape": shape, "implementation": implementation}
    if tile is None:
        return Case(
            shape=f"{shape.name} R{shape.slots} J{shape.selected_blocks} missing {shape.missing}",
            operands=functools.partial(_decode_operands, shape=shape),
            call=functools.partial(_decode, **static),
            check=functools.partial(_check_plan, shape=shape)
            if implementation == "triton"
            else None,
            in_place=(4, 5, 6),
            least_sets=48 if implementation == "triton" else 1,
            **common,
        )
    return Case(
        shape=f"{shape.name} J{shape.selected_blocks} tiles of {tile}",
        operands=functools.partial(scores_case.operands, shape=shape),
        call=functools.partial(_prefill, **static, tile=tile),
        check=functools.partial(_check_choice, shape=shape),
        **common,
    )


def cases(*, tiny: bool = False) -> list[Case]:
    """List the cases.

    Args:
        tiny: shapes that run on a CPU in seconds, by the reference.
    """
    if tiny:
        small: dict[str, Any] = {
            "tokens": 2048,
            "head_dim": 16,
            "dtype": "float32",
            "local_blocks": 2,
        }
        small |= {"selected_blocks": 9, "slots": 12, "missing": 2}
        decode = _Shape(batch=2, queries=1, **small)
        return [
            _case(decode, "reference"),
            _case(_Shape(batch=2, queries=40, **small), "reference", 16),
        ]
    decode = [_Shape(batch=batch, queries=1) for batch in (4, 16)]
    prompt = _Shape(batch=1, queries=131072)
    return [
        _case(decode[0], "triton"),
        _case(prompt, "triton", 8192),
        _case(decode[1], "triton"),
        _case(decode[0], "reference"),
        _case(prompt, "reference", 1024),
    ]
