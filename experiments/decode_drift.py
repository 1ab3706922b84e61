# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Choices that drift: exactly so many new blocks in each step, whatever the weights are.

Random weights rank blocks at random, and then every step would choose other ones. Here the blocks
that a run never pins stand on a cycle, scattered and turned anew for each layer, row and head; the
hot ones are a window on it that moves by as many places in a step as blocks are to be new: by n, or
by what was counted elsewhere (`decode_trace`). The true scores are computed all the
same, and the hot blocks are lifted above them by a constant that the compiler does not see through.
The block after the window was hot one whole turn ago, so it is in no slot.
"""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.config import ModelConfig
from sparda_jax.rope import Rope
from sparda_jax.selectors import Decoder, KeySummary, Probe, Selector, Source
from sparda_jax.shapes import NO_SLOT

LIFT = 4e30
"""What a hot block's score is raised by: more than any score, NOSA's shortlist included."""


@typing.no_type_check
@struct.dataclass
class DriftSummary:
    """The inner selector's summary of a layer, and how its choices drift.

    Attributes:
        inner: of the inner selector.
        begin: the layer, and the position where this drift begins.
        window: the place of the window at that position and at each one after it.
    """

    inner: KeySummary
    begin: Int[Array, " 2"]
    window: Int[Array, "steps B K"]


@dataclasses.dataclass(frozen=True, slots=True)
class DriftSelector:
    """Ranks as another selector does, then lifts the blocks of a moving window.

    Attributes:
        config: of the model.
        inner: whose probes, summaries and scores are computed.
        context: tokens of each row when the run begins; a multiple of the block size.

    Raises:
        ValueError: the context is no multiple of the block size, or has too few blocks that a run
            never pins to choose from.
    """

    config: ModelConfig
    inner: Selector
    context: int

    def __post_init__(self) -> None:
        """Refuse a context that cannot drift."""
        block_size = self.config.sparse.block_size
        if self.context % block_size:
            raise ValueError(f"{self.context=} must be a multiple of {block_size=}")
        if self.turn <= self.hot:
            raise ValueError(
                f"{self.context=} leaves {self.turn} blocks to choose {self.hot} from; take a "
                "longer context"
            )

    @property
    def turn(self) -> int:
        """Count the blocks on the cycle: those that are pinned neither now nor later."""
        sparse = self.config.sparse
        return self.context // sparse.block_size - sparse.local_blocks - sparse.sink_blocks

    @property
    def hot(self) -> int:
        """Count the blocks that are chosen and not pinned."""
        sparse = self.config.sparse
        return sparse.selected_blocks - sparse.pinned_blocks

    @property
    def stride(self) -> int:
        """Places between neighbouring blocks: coprime with the turn, near its golden section."""
        wanted = max(int(0.618 * self.turn), 1)
        return next(s for s in range(wanted, 0, -1) if math.gcd(s, self.turn) == 1)

    def most_slots(self) -> int:
        """Count the slots up to which a new block is in none: those of one turn."""
        return self.turn + self.config.sparse.pinned_blocks

    def place(
        self, layer: Int[Array, ""], batch: int, num_blocks: int
    ) -> tuple[Int[Array, "B K M"], Bool[Array, " M"]]:
        """Place every block on the cycle of its layer, row and head; and tell which are on it.

        Args:
            layer: whose blocks.
            batch: B.
            num_blocks: M.
        """
        kv_heads, first = self.config.kv_heads, self.config.sparse.sink_blocks
        row = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
        head = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
        block = jnp.arange(num_blocks, dtype=jnp.int32)
        shift = ((layer * batch + row) * kv_heads + head) * 7919 % self.turn
        place = (self.stride * (block[None, None, :] - first) + shift) % self.turn
        return place, (block >= first) & (block < first + self.turn)

    def seed(
        self, layer: Int[Array, ""], batch: int, num_blocks: int, slots: int
    ) -> tuple[Int[Array, "B K M"], Int[Array, "B K R"], Int[Array, "B K R"]]:
        """Fill a pool as if the window had always drifted: chosen blocks, then the latest ones.

        Args:
            layer: whose pool.
            batch: B.
            num_blocks: M.
            slots: R.

        Returns:
            Block → slot, slot → block, and the step of each slot's last use, 0 or before.

        Raises:
            ValueError: fewer slots than chosen blocks, or more than a turn fills.
        """
        sparse = self.config.sparse
        if not sparse.selected_blocks <= slots <= self.most_slots():
            raise ValueError(
                f"{slots=} must be {sparse.selected_blocks} to {self.most_slots()}: room for a "
                "choice, and no more than the blocks to choose from"
            )
        place, is_on = self.place(layer, batch, num_blocks)
        block = jnp.arange(num_blocks, dtype=jnp.int32)
        own = self.context // sparse.block_size
        pinned = (block < sparse.sink_blocks) | (block >= own - sparse.local_blocks)
        pinned = pinned & (block <= own)
        age = jnp.where(place < self.hot, 0, place - self.turn)  # of blocks on the cycle
        oldest = sparse.selected_blocks - slots
        held = pinned[None, None, :] | (is_on[None, None, :] & (age >= oldest))
        ids = jnp.sort(jnp.where(held, block[None, None, :], num_blocks), axis=-1)[..., :slots]
        slot = jnp.cumsum(held, axis=-1, dtype=jnp.int32) - 1
        take = jax.vmap(jax.vmap(lambda row, index: row[index]))
        age = jnp.where(pinned[None, None, :], 0, age)
        return jnp.where(held, slot, NO_SLOT), ids, take(age, ids)

    def source(self, layer: int) -> Source:
        """Whatever the inner selector asks."""
        return self.inner.source(layer)

    def init_summary(self, batch: int, capacity: int, dtype: str) -> DriftSummary:
        """Make the inner summary, of layer 0 and without drift."""
        inner = self.inner.init_summary(batch, capacity, dtype)
        return self.stand_still(inner, jnp.int32(0), batch, capacity)

    def stand_still(
        self, inner: KeySummary, layer: Int[Array, ""], batch: int, capacity: int
    ) -> DriftSummary:
        """Make the summary of a layer whose window does not move.

        Args:
            inner: of the inner selector.
            layer: whose summary.
            batch: B.
            capacity: tokens of room for each row; beyond it the window has no place.
        """
        steps = max(capacity - self.context, 1)
        return DriftSummary(
            inner=inner,
            begin=jnp.stack([layer, jnp.int32(self.context)]),
            window=jnp.zeros((steps, batch, self.config.kv_heads), jnp.int32),
        )

    def extend_summary(
        self,
        summary: DriftSummary,
        k: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
        importance: Float[Array, "B T K"] | None = None,
    ) -> DriftSummary:
        """Add new keys to the inner summary."""
        inner = self.inner.extend_summary(summary.inner, k, positions, importance)
        return dataclasses.replace(summary, inner=inner)

    def probe(
        self,
        model: Decoder,
        layer: int,
        target: int,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        rope: Rope,
    ) -> Probe:
        """Whatever the inner selector offers."""
        return self.inner.probe(model, layer, target, x, q, rope)

    def score_blocks(
        self,
        probe: Probe,
        summary: DriftSummary,
        positions: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        num_blocks: int,
    ) -> Float[Array, "B T K M"]:
        """Score by the inner selector, and lift what the window holds at these positions."""
        scores = self.inner.score_blocks(probe, summary.inner, positions, lengths, num_blocks)
        layer, start = summary.begin
        place, is_on = self.place(layer, positions.shape[0], num_blocks)
        step = jnp.clip(positions - start, 0, summary.window.shape[0] - 1)
        window = summary.window[step, jnp.arange(step.shape[0])[:, None]]  # [B T K]
        rank = (place[:, None] - window[..., None]) % self.turn
        hot = is_on[None, None, None, :] & (rank < self.hot)
        return scores + jnp.where(hot, jnp.float32(LIFT), jnp.float32(0.0))
