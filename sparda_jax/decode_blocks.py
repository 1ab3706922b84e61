# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Where the blocks of a decode step stand while it is traced, and what brings them there.

`run_step` walks the layers and asks here: which slots hold what a layer reads, and what must be
fetched first. Resident blocks stand where they are; offloaded ones become plans and fetches.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparda_jax.chunk import Plan
from sparda_jax.decode_layer import Now, choices_made_at, resident_places
from sparda_jax.kv.fetch_in_graph import completed_rows, fetch_records, store_completed
from sparda_jax.kv.overlap import hold_lists
from sparda_jax.kv.pack import HostDtype
from sparda_jax.kv.plan import FetchPlan, Places, plan_fetch
from sparda_jax.kv.state import KVState, LayerKV, SlotPool, pack_tail, take_tail


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """The static side of a step.

    Attributes:
        plan: which rule chooses, how wide.
        is_offloaded: records in host memory, slots on the device.
        has_lookahead: fetch for the next layer while this one computes; else each layer waits for
            its own fetch, for comparison.
        writes_host: a kernel writes completed blocks to the host; else the step returns them.
        host_dtype: of the numbers on the host; `None` takes the model's.
        graphs: that a GPU runs a step of concurrent commands as, each of its share of the layers;
            see `begin_graph`.
    """

    plan: Plan
    is_offloaded: bool = False
    has_lookahead: bool = True
    writes_host: bool = False
    host_dtype: HostDtype | None = None
    graphs: int = 1

    @property
    def is_concurrent(self) -> bool:
        """Whether a layer chooses for a later one, which is done beside the layer's own work."""
        layers = range(self.plan.config.layers)
        return any(max(choices_made_at(self.plan, layer), default=0) > layer for layer in layers)

    @property
    def cuts(self) -> frozenset[int]:
        """The layers that begin another graph."""
        layers, graphs = self.plan.config.layers, self.graphs if self.is_concurrent else 1
        return frozenset(layers * part // graphs for part in range(1, graphs)) - {0}


class Blocks:
    """While a step is traced: who stands where, and what is on its way. Everything is resident.

    Attributes:
        way: the static side of the step.
        now: what its layers share.
        choices: block ids that layers read, as far as they were chosen.
        slots: of each layer whose records move; empty when none do.
        receipts: of the kernels that wrote completed blocks to the host.
        tails: of each layer the record of the block being filled, where no kernel writes it.
        num_blocks: M.

    Args:
        way: the static side of the step.
        state: before it.
        now: what its layers share.
    """

    def __init__(self, way: Way, state: KVState, now: Now) -> None:
        self.way, self.now = way, now
        self.choices: dict[int, Array] = {}
        self.slots: dict[int, Array] = {}
        self.receipts: list[Array] = []
        self.tails: list[Array] = []
        self.num_blocks = self._count_blocks(state.layers[0])

    def _count_blocks(self, kv: LayerKV) -> int:
        return kv.slots.shape[2]

    def choose(self, layer: int, chosen: Mapping[int, Array]) -> list[int]:
        """Take the choices made while `layer` begins; list the layers whose slots move now."""
        self.choices |= chosen
        return []

    def bring(self, layer: int, kv: LayerKV, after: Array) -> tuple[LayerKV, Places]:
        """Give the state of a layer and the places of its blocks once they are there."""
        return kv, resident_places(
            self.way.plan, self.choices.get(layer), self.now, self.num_blocks
        )

    def leave(self, layer: int, kv: LayerKV, places: Places) -> LayerKV:
        """Take the layer's state after its second half."""
        return kv

    def count(self, layer: int, places: Places) -> Int[Array, " 3"]:
        """Count blocks resident, fetched and evicted."""
        read = jnp.sum(places.ids >= 0, dtype=jnp.int32)
        return jnp.stack([read, jnp.int32(0), jnp.int32(0)])


class OffloadedBlocks(Blocks):
    """The same with records in host memory: choices become plans, plans become fetches.

    Args:
        way: the static side of the step.
        state: before it.
        now: what its layers share.
        active: rows that take part.
        records: of each layer, in host memory.
    """

    def __init__(
        self, way: Way, state: KVState, now: Now, active: Array, records: Sequence[Array]
    ) -> None:
        super().__init__(way, state, now)
        self._records = records
        self.slots = {layer: kv.slots for layer, kv in enumerate(state.layers)}
        self._scales = [kv.scales for kv in state.layers]
        self._receipt = state.receipt
        self._pools: dict[int, SlotPool] = {
            layer: kv.pool for layer, kv in enumerate(state.layers) if kv.pool is not None
        }
        self._plans: dict[int, FetchPlan] = {}
        self._is_fetched: set[int] = set()
        self._completed = completed_rows(now.positions, active, way.plan.config.sparse.block_size)

    def _count_blocks(self, kv: LayerKV) -> int:
        assert kv.pool is not None  # a resident layer has none
        return kv.pool.table.shape[2]

    def _fetch(self, layer: int, after: Array | None) -> None:
        self.slots[layer] = fetch_records(
            self.slots[layer],
            self._records[layer],
            self._plans[layer],
            self._receipt,
            scales=self._scales[layer],
            after=after,
        )
        self._is_fetched.add(layer)

    def choose(self, layer: int, chosen: Mapping[int, Array]) -> list[int]:
        """Plan the fetches of choices; issue those of later layers, and list these."""
        self.choices |= chosen
        ahead = []
        for target, ids in chosen.items():
            with jax.named_scope("plan_fetch"):
                self._plans[target], self._pools[target] = plan_fetch(
                    ids, self._pools[target], self.now.own, self.now.step
                )
            if target > layer and self.way.has_lookahead:
                self._fetch(target, None)
                ahead.append(target)
        return ahead

    def bring(self, layer: int, kv: LayerKV, after: Array) -> tuple[LayerKV, Places]:
        """Fetch what is not on its way yet; without lookahead, once `after` is computed."""
        if layer not in self._is_fetched:
            self._fetch(layer, None if self.way.has_lookahead else after)
        kv = dataclasses.replace(kv, slots=self.slots[layer], pool=self._pools[layer])
        return kv, hold_lists(self._plans[layer])

    def leave(self, layer: int, kv: LayerKV, places: Places) -> LayerKV:
        """Send the blocks that this step completed to the host, packed if it wants them so."""
        records, done, source, tail = self._records[layer], self._completed, kv.slots, places.tail
        dtype = self.way.host_dtype
        if dtype is not None:
            assert kv.scales is not None  # the host's records have them
            packed, scales = pack_tail(
                kv.slots, kv.scales, tail, done.rows, done.blocks, host_dtype=dtype
            )
            kv = dataclasses.replace(kv, scales=scales)
            source, tail = packed[:, :, None], jnp.zeros_like(tail)
        if self.way.writes_host:
            self.receipts.append(store_completed(source, records, tail, done))
        else:
            self.tails.append(take_tail(source, tail))
        return kv

    def count(self, layer: int, places: Places) -> Int[Array, " 3"]:
        """Give the counts of the layer's plan."""
        return self._plans[layer].counts
