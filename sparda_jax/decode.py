# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""One decode step as one program: all layers, choices, fetches, attention, MLP and the draw.

With everything resident a layer reads its blocks where they stand. Offloaded, each layer's choice
for the next one becomes a fetch plan, and a kernel moves the missing records from host memory into
slots while this layer computes (`overlap` says how XLA is told). The state is donated; nothing
comes to the host but what the caller reads of the results.

`decode_blocks.py` says where blocks stand meanwhile. `decode_staged.py` runs the same halves of a
layer one after the other, for `fetch="device_put"`.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

from sparda_jax.chunk import Plan
from sparda_jax.decode_blocks import Blocks, OffloadedBlocks, Way
from sparda_jax.decode_layer import Begun, Now, begin_layer, finish_layer, open_step
from sparda_jax.kv.host import HostKV
from sparda_jax.kv.overlap import begin_graph, compiler_options, fetch_first, graphs_of_step
from sparda_jax.kv.plan import Places
from sparda_jax.kv.state import KVState, LayerKV
from sparda_jax.model import DecoderLayer, SpardaLM
from sparda_jax.parts import EXACT, Layout, Parts, commit, without_heads
from sparda_jax.sampling import Draw, Drawn, Rows, draw_tokens
from sparda_jax.selectors import Probe


@typing.no_type_check
@struct.dataclass
class Stepped:
    """What a step gives beside the new state.

    Attributes:
        logits: for the token after, f32.
        choices: block ids that each layer read, in order; empty when nothing was chosen.
        counts: of each layer the blocks resident, fetched and evicted.
        tails: of each layer the record of the block being filled, as the host stores it, where no
            kernel does.
    """

    logits: Float[Array, "B V"]
    choices: tuple[Int[Array, "B K J"], ...]
    counts: Int[Array, "L 3"]
    tails: tuple[Num[Array, "B K 2 W H"], ...]


@functools.partial(jax.jit, static_argnames=("graph", "tree", "plan"))
def _finish_traced_once(
    leaves: list[Array],
    x: Array,
    begun: Begun,
    kv: LayerKV,
    places: Places,
    now: Now,
    *,
    graph: nnx.GraphDef,
    tree: jax.tree_util.PyTreeDef,
    plan: Plan,
) -> tuple[Array, LayerKV]:
    block = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
    return finish_layer(block, plan, x, begun, kv, places, now)


def _finish(block: DecoderLayer, plan: Plan, *rest: typing.Any) -> tuple[Array, LayerKV]:
    """Run the second half of a layer; equal layers of a step are traced and lowered once."""
    graph, weights = nnx.split(without_heads(block))
    leaves, tree = jax.tree.flatten(weights)
    return _finish_traced_once(leaves, *rest, graph=graph, tree=tree, plan=plan)


def run_step(
    model: SpardaLM,
    way: Way,
    state: KVState,
    records: Sequence[Num[Array, "B K M 2 W H"]],
    tokens: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> tuple[KVState, Stepped]:
    """Feed one token of each active row through all layers, unrolled.

    Args:
        model: the decoder.
        way: how blocks are chosen and where they are.
        state: before the step.
        records: of each layer, in host memory; none when everything is resident.
        tokens: the next token of each sequence.
        active: rows that take part.
    """
    x, now = open_step(model, tokens, active, state.lengths, state.reach, state.step)
    cuts = way.cuts
    blocks = Blocks(way, state, now)
    if way.is_offloaded:
        blocks = OffloadedBlocks(way, state, now, active, records)
    summaries = {layer: kv.summary for layer, kv in enumerate(state.layers)}
    probes: dict[int, Probe] = {}
    layers, counts = [], []
    mark = state.step
    for layer, block in enumerate(model.layers):
        if layer in cuts:
            x, mark = begin_graph(x, mark)
        with jax.named_scope(f"layer_{layer}"):
            begun, summary, chosen, waiting = begin_layer(
                model,
                way.plan,
                layer,
                x,
                now,
                blocks.num_blocks,
                summaries,
                probes.pop(layer, None),
            )
            probes |= waiting
            ahead = blocks.choose(layer, chosen)
            if ahead:
                moving = {target: blocks.slots[target] for target in ahead}
                (x, begun), moving = fetch_first((x, begun), moving)
                blocks.slots |= moving
            kv = dataclasses.replace(state.layers[layer], summary=summary)
            kv, places = blocks.bring(layer, kv, begun.q[0, 0, 0, 0].astype(jnp.float32))
            x, kv = _finish(block, way.plan, x, begun, kv, places, now)
            layers.append(blocks.leave(layer, kv, places))
            counts.append(blocks.count(layer, places))
    after = KVState(
        layers=layers,
        lengths=jnp.where(active, state.lengths + 1, state.lengths),
        reach=state.reach,
        step=mark + 1 - len(cuts),
        receipt=jnp.sum(jnp.stack(blocks.receipts), axis=0) if blocks.receipts else None,
    )
    return after, Stepped(
        logits=model.logits(x)[:, 0],
        choices=tuple(blocks.choices[layer] for layer in sorted(blocks.choices)),
        counts=jnp.stack(counts),
        tails=tuple(blocks.tails),
    )


def _options(way: Way) -> dict[str, typing.Any]:
    """Give the compiler options of a step: bf16 rounds as written, fetches run beside matmuls."""
    return EXACT | (compiler_options(is_concurrent=way.is_concurrent) or {})


@functools.lru_cache(maxsize=32)
def step_program(layout: Layout, way: Way) -> Callable:
    """Compile the step that is given its tokens: (state, parts, records, tokens, active)."""

    def run(
        state: KVState, parts: Parts, records: list[Array], tokens: Array, active: Array
    ) -> tuple[KVState, Stepped]:
        return run_step(layout.merge(parts), way, state, records, tokens, active)

    return jax.jit(run, donate_argnums=0, compiler_options=_options(way))


@functools.lru_cache(maxsize=32)
def draw_program(layout: Layout, way: Way, draw: Draw) -> Callable:
    """Compile the step that draws its tokens: (state, rows, parts, records, key)."""

    def run(
        state: KVState, rows: Rows, parts: Parts, records: list[Array], key: PRNGKeyArray | None
    ) -> tuple[KVState, Rows, Drawn, Array, tuple[Array, ...]]:
        model = layout.merge(parts)
        state, done = run_step(model, way, state, records, rows.tokens, rows.active)
        with jax.named_scope("draw"):
            rows, drawn = draw_tokens(done.logits, rows, state.lengths, key, draw=draw)
        return state, rows, drawn, done.counts, done.tails

    # What is donated keeps its address: a recorded graph of commands has less to update.
    return jax.jit(run, donate_argnums=(0, 1), compiler_options=_options(way))


class Decoder:
    """Decodes by one program a step, K and V resident or in host memory.

    Args:
        layout: of the model.
        parts: its weights.
        plan: the rule.
        state: after prefill; taken over.
        host: the records of the prompts; `None` when everything is resident.
        has_lookahead: see `Way`.
    """

    def __init__(
        self,
        layout: Layout,
        parts: Parts,
        plan: Plan,
        state: KVState,
        host: HostKV | None = None,
        *,
        has_lookahead: bool = True,
    ) -> None:
        self.choices: tuple[Int[Array, "B K J"], ...] = ()
        writes_host = host is not None and jax.default_backend() != "cpu"
        if writes_host:
            state = dataclasses.replace(state, receipt=jnp.zeros((1,), jnp.int32))
        self._layout, self._parts, self._host = layout, parts, host
        self._way = Way(
            plan=plan,
            is_offloaded=host is not None,
            has_lookahead=has_lookahead,
            writes_host=writes_host,
            host_dtype=None if host is None else host.host_dtype,
            graphs=graphs_of_step(),
        )
        layers = range(plan.config.layers)
        self._records = [] if host is None else [host.operand(layer) for layer in layers]
        self.state = commit(state, (state, parts, self._records))

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
        program = step_program(self._layout, self._way)
        held = self._held_before(active)
        self.state, done = program(self.state, self._parts, self._records, tokens, active)
        self.choices = done.choices
        self._store(done.tails, held)
        return done.logits, done.counts

    def advance(
        self, rows: Rows, key: PRNGKeyArray | None, draw: Draw
    ) -> tuple[Rows, Drawn, Int[Array, "L 3"]]:
        """Feed the newest token of each active row and draw the next, on the device.

        Args:
            rows: of the batch; donated.
            key: of the whole call; `None` when greedy.
            draw: how tokens are drawn.

        Returns:
            The rows after, what was drawn, and the counts as in `step`.
        """
        program = draw_program(self._layout, self._way, draw)
        held = self._held_before(rows.active)
        if not rows.tokens.committed:
            rows = commit(rows, self.state.lengths)
        self.state, rows, drawn, counts, tails = program(
            self.state, rows, self._parts, self._records, key
        )
        self._store(tails, held)
        return rows, drawn, counts

    def replace_row(self, state: KVState, row: int, length: int) -> None:
        """Go on with a state in which another request has taken a row.

        Args:
            state: the new one; the old was donated.
            row: of the request.
            length: of its prompt.
        """
        del row, length  # lengths live on the device here
        self.state = state

    def _held_before(self, active: Bool[Array, " B"]) -> Int[np.ndarray, " B"] | None:
        """Tell where each row writes, −1 if nowhere; `None` where the device stores blocks."""
        if self._host is None or self._way.writes_host:
            return None
        return np.where(np.asarray(active), np.asarray(self.state.lengths), -1)

    def _store(self, tails: Sequence[Array], held: Int[np.ndarray, " B"] | None) -> None:
        """Write the blocks that a step completed to their records, once it has read them."""
        if held is None or self._host is None:
            return
        block_size = self._way.plan.config.sparse.block_size
        rows = np.flatnonzero((held >= 0) & ((held + 1) % block_size == 0))
        jax.block_until_ready(tails)  # a program that runs may still read the records
        if rows.size:
            for layer, records in enumerate(tails):
                blocks = held[rows] // block_size
                self._host.write(layer, rows, blocks, np.asarray(records)[rows])

    def close(self) -> None:
        """Wait for the step under way, forget the state and the records."""
        if hasattr(self, "state"):
            # A step that was interrupted may have taken the state with it.
            held = [leaf for leaf in jax.tree.leaves(self.state) if not leaf.is_deleted()]
            jax.block_until_ready(held)
            del self.state
            self._records = []
