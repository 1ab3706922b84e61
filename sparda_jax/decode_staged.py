# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The decode step with offloaded KV, layer by layer: blocks for layer l + 1 move while l computes.

For each layer two programs are dispatched. The first half makes the layer's heads and, from its
forecast, the fetch plan of the next layer; the second half attends and runs the MLP. While the
device is busy with the second half, the plan comes to the host, the missing records are gathered
there and copied to the device. A layer that chooses for itself (layer 0, and every layer of a
selector without lookahead) has nothing to hide its fetch behind: it waits for it.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

from sparda_jax.chunk import Plan, targets_of
from sparda_jax.decode_layer import (
    Begun,
    Now,
    begin_layer,
    choices_made_at,
    finish_layer,
    open_step,
)
from sparda_jax.kv.fetch_device_put import DevicePut, Fetched
from sparda_jax.kv.host import HostKV
from sparda_jax.kv.plan import FetchPlan, Places, plan_fetch
from sparda_jax.kv.state import (
    KVState,
    LayerKV,
    SlotPool,
    insert_packed,
    insert_records,
    pack_tail,
    take_tail,
)
from sparda_jax.parts import EXACT, HEAD, Layout, Parts, commit, pick, without_heads
from sparda_jax.sampling import Draw, Drawn, Rows, draw_tokens
from sparda_jax.selectors import KeySummary, Probe


@functools.lru_cache(maxsize=32)
def open_program(layout: Layout) -> Callable:
    """Compile the start of a step: embedding, rotations, longer lengths."""

    def run(
        parts: Parts, tokens: Array, active: Array, lengths: Array, reach: Array, step: Array
    ) -> tuple[Array, Now, Array, Array]:
        model = layout.merge(parts)
        x, now = open_step(model, tokens, active, lengths, reach, step)
        return x, now, jnp.where(active, lengths + 1, lengths), step + 1

    return jax.jit(run, compiler_options=EXACT)


@functools.lru_cache(maxsize=256)
def begin_program(layout: Layout, plan: Plan, layer: int, num_blocks: int) -> Callable:
    """Compile the first half of one layer, and the fetch plans of the choices it makes."""

    def run(
        summary: KeySummary,
        pools: dict[int, SlotPool],
        parts: Parts,
        x: Array,
        now: Now,
        others: dict[int, KeySummary],
        probe: Probe | None,
    ) -> tuple[
        Begun, KeySummary, dict[int, FetchPlan], dict[int, SlotPool], dict[int, Probe], list[Array]
    ]:
        model = layout.merge(parts)
        summaries = others | {layer: summary}
        begun, summary, choices, probes = begin_layer(
            model, plan, layer, x, now, num_blocks, summaries, probe
        )
        plans, after = {}, {}
        for target, ids in choices.items():
            with jax.named_scope("plan_fetch"):
                plans[target], after[target] = plan_fetch(ids, pools[target], now.own, now.step)
        misses = [plans[target].misses for target in sorted(plans)]
        return begun, summary, plans, after, probes, misses

    return jax.jit(run, donate_argnums=(0, 1), compiler_options=EXACT)


@functools.lru_cache(maxsize=256)
def finish_program(graph: nnx.GraphDef, tree: jax.tree_util.PyTreeDef, plan: Plan) -> Callable:
    """Compile the second half of a layer; equal layers share the program."""

    def run(
        stored: tuple[Array, Array | None],
        leaves: list[Array],
        x: Array,
        begun: Begun,
        places: Places,
        now: Now,
    ) -> tuple[Array, tuple[Array, Array | None]]:
        block = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        slots, importance = stored
        kv = LayerKV(slots=slots, pool=None, importance=importance, summary=None)
        x, kv = finish_layer(block, plan, x, begun, kv, places, now)
        return x, (kv.slots, kv.importance)

    return jax.jit(run, donate_argnums=0, compiler_options=EXACT)


@functools.lru_cache(maxsize=32)
def close_program(layout: Layout) -> Callable:
    """Compile the end of a step: logits."""
    return jax.jit(lambda parts, x: layout.merge(parts).logits(x)[:, 0], compiler_options=EXACT)


_insert_records = jax.jit(insert_records, donate_argnums=0)
_insert_packed = jax.jit(insert_packed, donate_argnums=0)
_take_tail = jax.jit(take_tail)
_pack_tail = jax.jit(pack_tail, donate_argnums=1, static_argnames="host_dtype")


class StagedDecoder:
    """Decodes with K and V on the host: slots on the device, fetched one layer ahead.

    Args:
        layout: of the model.
        parts: its weights.
        plan: the rule; it has a selector.
        state: after prefill; taken over.
        host: the records of the prompts.
    """

    def __init__(
        self,
        layout: Layout,
        parts: Parts,
        plan: Plan,
        state: KVState,
        host: HostKV,
    ) -> None:
        self.state = commit(state, (state, parts))
        self.choices: tuple[Int[Array, "B K J"], ...] = ()
        self._plan, self._host = plan, host
        self._lengths = np.array(state.lengths)
        slots = state.layers[0].slots.shape[2]
        pool = state.layers[0].pool
        assert pool is not None  # a resident layer has none
        num_blocks = pool.table.shape[2]
        self._mover = DevicePut(host, slots, plan.width)
        layers = range(plan.config.layers)
        self._made = {layer: choices_made_at(plan, layer) for layer in layers}
        self._head = pick(parts, (HEAD,))
        self._open, self._close = open_program(layout), close_program(layout)
        self._begin = {layer: begin_program(layout, plan, layer, num_blocks) for layer in layers}
        self._begin_parts = {
            layer: pick(parts, (layer, *targets_of(plan, layer))) for layer in layers
        }
        model = layout.merge(parts)
        self._finish, self._finish_parts = {}, {}
        for layer in layers:
            graph, weights = nnx.split(without_heads(model.layers[layer]))
            leaves, tree = jax.tree.flatten(weights)
            self._finish[layer] = finish_program(graph, tree, plan)
            self._finish_parts[layer] = leaves

    def step(
        self, tokens: Int[Array, " B"], active: Bool[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Int[Array, "L 3"]]:
        """Feed one token of each active row.

        Args:
            tokens: the next token of each sequence.
            active: rows that take part.

        Returns:
            Logits, f32, and for each layer the blocks resident, fetched and evicted. The chosen
            block ids are kept in `choices`.
        """
        state = self.state
        x, now, lengths, step = self._open(
            self._head, tokens, active, state.lengths, state.reach, state.step
        )
        completes = np.asarray(active) & (
            (self._lengths + 1) % self._plan.config.sparse.block_size == 0
        )
        plans: dict[int, FetchPlan] = {}
        probes: dict[int, Probe] = {}
        arriving: dict[int, Fetched | None] = {}
        tails: dict[int, Array] = {}
        for layer in range(len(state.layers)):
            begun, misses = self._begin_layer(layer, x, now, plans, probes)
            if layer in misses:
                arriving[layer] = self._mover.fetch(layer, np.asarray(misses.pop(layer)))
            x = self._finish_layer(layer, x, begun, plans[layer].places, arriving.pop(layer), now)
            if completes.any():
                tails[layer] = self._take_tail(layer, plans[layer].places.tail, completes)
                tails[layer].copy_to_host_async()
            for target, missing in misses.items():  # while the device computes this layer
                arriving[target] = self._mover.fetch(target, np.asarray(missing))
        logits = self._close(self._head, x)
        self._store(tails, completes)
        self._lengths += np.asarray(active)
        self.state = KVState(layers=state.layers, lengths=lengths, reach=state.reach, step=step)
        self.choices = tuple(plans[layer].places.ids for layer in sorted(plans))
        return logits, jnp.stack([plans[layer].counts for layer in sorted(plans)])

    def advance(
        self, rows: Rows, key: PRNGKeyArray | None, draw: Draw
    ) -> tuple[Rows, Drawn, Int[Array, "L 3"]]:
        """Feed the newest token of each active row and draw the next.

        Args:
            rows: of the batch.
            key: of the whole call; `None` when greedy.
            draw: how tokens are drawn.

        Returns:
            The rows after, what was drawn, and the counts as in `step`.
        """
        logits, counts = self.step(rows.tokens, rows.active)
        rows, drawn = draw_tokens(logits, rows, self.state.lengths, key, draw=draw)
        return rows, drawn, counts

    def replace_row(self, state: KVState, row: int, length: int) -> None:
        """Go on with a state in which another request has taken a row.

        Args:
            state: the new one; the old was donated.
            row: of the request.
            length: of its prompt.
        """
        self.state = state
        self._lengths[row] = length

    def _begin_layer(
        self,
        layer: int,
        x: Float[Array, "B 1 D"],
        now: Now,
        plans: dict[int, FetchPlan],
        probes: dict[int, Probe],
    ) -> tuple[Begun, dict[int, Int[Array, "2 misses"]]]:
        """Run the first half; keep its plans and probes; return what must move, by layer."""
        layers, made = self.state.layers, self._made[layer]
        begun, summary, new, pools, waiting, misses = self._begin[layer](
            layers[layer].summary,
            {target: layers[target].pool for target in made},
            self._begin_parts[layer],
            x,
            now,
            {target: layers[target].summary for target in made if target != layer},
            probes.pop(layer, None),
        )
        layers[layer] = dataclasses.replace(layers[layer], summary=summary)
        for target, pool in pools.items():
            layers[target] = dataclasses.replace(layers[target], pool=pool)
        plans |= new
        probes |= waiting
        for missing in misses:
            missing.copy_to_host_async()
        return begun, dict(zip(sorted(new), misses, strict=True))

    def _finish_layer(
        self,
        layer: int,
        x: Float[Array, "B 1 D"],
        begun: Begun,
        places: Places,
        fetched: Fetched | None,
        now: Now,
    ) -> Float[Array, "B 1 D"]:
        """Put what was fetched into its slots and run the second half."""
        kv = self.state.layers[layer]
        slots = kv.slots
        if fetched is not None:
            moved = (fetched.records, fetched.places)
            if kv.scales is None:
                slots = _insert_records(slots, *moved)
            else:
                slots = _insert_packed(slots, *moved, kv.scales, fetched.sources)
        stored = (slots, kv.importance)
        x, (slots, importance) = self._finish[layer](
            stored, self._finish_parts[layer], x, begun, places, now
        )
        self.state.layers[layer] = dataclasses.replace(kv, slots=slots, importance=importance)
        return x

    def _take_tail(
        self, layer: int, tail: Int[Array, "B K"], completes: Bool[np.ndarray, " B"]
    ) -> Num[Array, "B K 2 W H"]:
        """Copy the blocks being filled out of their slots, as the host stores them."""
        kv, dtype = self.state.layers[layer], self._host.host_dtype
        if dtype is None:
            return _take_tail(kv.slots, tail)
        rows = np.where(completes, np.arange(completes.size), completes.size)
        blocks = self._lengths // self._plan.config.sparse.block_size
        where = (rows.astype(np.int32), blocks.astype(np.int32))
        packed, scales = _pack_tail(kv.slots, kv.scales, tail, *where, host_dtype=dtype)
        self.state.layers[layer] = dataclasses.replace(kv, scales=scales)
        return packed

    def _store(self, tails: dict[int, Array], completes: Bool[np.ndarray, " B"]) -> None:
        """Write the blocks that this step completed to their host records."""
        rows = np.flatnonzero(completes)
        blocks = self._lengths[rows] // self._plan.config.sparse.block_size
        for layer, records in tails.items():
            self._host.write(layer, rows, blocks, np.asarray(records)[rows])

    def close(self) -> None:
        """Wait for copies under way, free the staging memory, forget the state."""
        if hasattr(self, "state"):
            self._mover.close()
            del self.state
