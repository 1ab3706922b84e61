# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""One batch from its prompts to its last token: what `generate` and the evaluations drive.

A `Session` checks everything before work starts, decides where K and V live, runs the prefill, and
then takes one token of each row at a time. The tokens may be sampled or given (teacher forcing).
"""

import dataclasses
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparda_jax.capacity import (
    KVPlace,
    Prompt,
    check_prompts,
    choose_place,
    free_device_bytes,
    full_kv_bytes,
    round_capacity,
)
from sparda_jax.chunk import Plan, make_plan
from sparda_jax.decode import Decoder
from sparda_jax.decode_staged import StagedDecoder
from sparda_jax.errors import CapacityError
from sparda_jax.kv.fetch import resolve_fetch
from sparda_jax.kv.host import HostKV, record_bytes
from sparda_jax.kv.state import KVState, LayerKV, join_layers, seed_resident, seed_slots
from sparda_jax.kv.traffic import Traffic
from sparda_jax.model import SpardaLM
from sparda_jax.parts import cut
from sparda_jax.prefill import Prefilled, chunk_tokens, prefill
from sparda_jax.sampling import Draw, Drawn, Rows
from sparda_jax.selectors import Selector, resolve
from sparda_jax.shapes import Mode, Parity

_LOG = logging.getLogger(__name__)
_seed_resident = jax.jit(seed_resident, static_argnames="block_size")
_seed_slots = jax.jit(seed_slots, static_argnames=("slots", "block_size"))


class Session:
    """A batch of prompts being continued; a context manager.

    Prompts of one length or many share a program: lengths are data. LongRoPE takes the factors of
    prompt + `max_new_tokens`, the length that a row may reach, in prefill and decode alike: keys
    that were rotated by one set of factors never meet queries of the other.

    Args:
        model: the decoder.
        prompts: token ids of each prompt.
        max_new_tokens: tokens that may be fed after each prompt.
        mode: `dense`, `sparse` or `sparda`.
        selector: overrides what ranks the blocks.
        kv: where K and V live.
        slots: R, device slots per (sequence, KV head) when offloaded; `None` takes a third more
            than one token reads.
        fetch: how missing blocks move when offloaded.
        parity: `"reference"` repeats the original's deviations, for comparison.
        prefill_chunk: tokens run at once in prefill, a multiple of the block size; `None` takes
            about 1024.
        prefill_rows: prompts prefilled together; `None` takes all. Fewer hold less K and V on the
            device at a time.
        prefill_selector: ranks the blocks for the prompt only; it must keep the same summary.

    Raises:
        DataError, CapacityError, ValueError, NotImplementedError: before any work.

    Example:
        >>> from sparda_jax.testing import tiny_model
        >>> with Session(tiny_model(layers=2), [[1, 2, 3], [4]], max_new_tokens=2) as session:
        ...     logits = session.prefill()
        ...     logits = session.step(np.array([5, 6]))
        ...     session.lengths.tolist()
        [4, 2]
    """

    def __init__(
        self,
        model: SpardaLM,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        mode: Mode = "sparda",
        selector: str | Selector | None = None,
        kv: KVPlace = "auto",
        slots: int | None = None,
        fetch: str | None = None,
        parity: Parity = None,
        prefill_chunk: int | None = None,
        prefill_rows: int | None = None,
        prefill_selector: str | Selector | None = None,
    ) -> None:
        config = model.config
        sparse = config.sparse
        self.config = config
        self._prompts = check_prompts(prompts, max_new_tokens, config)
        self.batch = len(self._prompts)
        self._prompt_lengths = np.array([len(prompt) for prompt in self._prompts], np.int32)
        self._reach = self._prompt_lengths + np.int32(max_new_tokens)
        longest = int(self._prompt_lengths.max())
        if prefill_chunk is None:
            prefill_chunk = max(sparse.block_size, 1024 // sparse.block_size * sparse.block_size)
        self.chunk = chunk_tokens(longest, prefill_chunk, sparse.block_size)
        self.capacity = round_capacity(int(self._reach.max()), self.chunk)
        if prefill_rows is not None and prefill_rows < 1:
            raise ValueError(f"{prefill_rows=} must be at least 1")
        free = free_device_bytes()
        self.place = choose_place(kv, mode, config, self.batch, self.capacity, free)
        self._rows = self._count_rows(prefill_rows, free)
        self.plan = self._make_plan(mode, model.ranked_by(mode, selector), parity)
        self._prefill_plan = self.plan
        if prefill_selector is not None:
            chosen = resolve(mode, config, prefill_selector, parity)
            self._prefill_plan = dataclasses.replace(self.plan, selector=chosen)
        self.slots = self._count_slots(slots)
        if self.place == "offload":
            self.fetch = resolve_fetch(fetch, config)
            self._may_fall_back = fetch is None
        elif fetch is not None:
            raise ValueError(f"{fetch=} has nothing to fetch: K and V are resident; kv={kv!r}")
        else:
            self.fetch = None
        self._layout, self._parts = cut(model)
        self._host: HostKV | None = None
        self._decoder: Decoder | StagedDecoder | None = None
        self._counts: list[Int[Array, "L 3"]] = []
        self._counted: list[Int[np.ndarray, "L 3"]] = []
        self._allowed = self._left = max_new_tokens

    def _count_rows(self, rows: int | None, free: int | None) -> int:
        """Settle how many prompts are prefilled together: offloaded, half of the free memory."""
        if rows is None:
            rows = self.batch
            if self.place == "offload" and free is not None:
                rows = max(1, free // 2 // full_kv_bytes(self.config, 1, self.capacity))
        return min(rows, self.batch)

    def _make_plan(self, mode: Mode, selector: str | Selector | None, parity: Parity) -> Plan:
        plan = make_plan(
            self.config,
            mode,
            max_length=self.capacity,
            shortest=int(self._prompt_lengths.min()) + 1,
            selector=selector,
            parity=parity,
        )
        if self.place == "offload" and plan.selector is None:  # short, but still in slots
            plan = dataclasses.replace(plan, selector=resolve(mode, self.config, selector, parity))
        return plan

    def _count_slots(self, slots: int | None) -> int:
        """Settle R; all blocks when resident."""
        num_blocks = self.config.sparse.blocks(self.capacity)
        if self.place == "resident":
            if slots is not None:
                raise ValueError(f"{slots=} is for kv='offload'; every block has a slot here")
            return num_blocks
        width = self.plan.width
        if slots is None:
            slots = width + width // 3
        if slots < width:
            raise CapacityError(
                f"{slots=} per (sequence, KV head) cannot hold the {width} blocks that one token "
                f"reads; ask for slots={width} or more"
            )
        return min(slots, num_blocks)

    def prefill(self) -> Float[Array, "B V"]:
        """Run the prompts.

        Returns:
            Logits after the last token of each prompt, f32.

        Raises:
            ValueError: it has run already.
            CapacityError: the host has too little memory.
        """
        if self._decoder is not None or self._host is not None:
            raise ValueError("prefill runs once; open another session for other prompts")
        if self.place == "offload":
            self._host = self._open_host()
        groups, logits = [], []
        for first in range(0, self.batch, self._rows):
            rows = list(range(first, min(first + self._rows, self.batch)))
            layers, out = self._prefill_rows(rows)
            groups.append(layers)
            logits.append(out)
        state = KVState(
            layers=join_layers(groups),
            lengths=jnp.array(self._prompt_lengths),
            reach=jnp.array(self._reach),
            step=jnp.array(1, jnp.int32),
        )
        common = (self._layout, self._parts, self.plan, state)
        if self._host is not None and self.fetch == "device_put":
            self._decoder = StagedDecoder(*common, self._host)
        else:
            self._decoder = Decoder(*common, self._host)
        return logits[0] if len(logits) == 1 else jnp.concatenate(logits)

    def _open_host(self) -> HostKV:
        """Open the host memory; where kernels cannot see it, an open choice moves by copies."""
        needs_lock = self.fetch == "in_graph" and jax.default_backend() != "cpu"
        lock = "require" if needs_lock and not self._may_fall_back else "auto"
        host = HostKV(self.config, self.batch, self.capacity, page_lock=lock)
        if needs_lock and host.unlocked_reason is not None:
            _LOG.warning("fetch='device_put', because %s", host.unlocked_reason)
            self.fetch = "device_put"
        return host

    def _prefill_rows(self, rows: list[int]) -> tuple[list[LayerKV], Float[Array, "B V"]]:
        """Prefill some of the prompts; a short last group is padded with empty rows."""
        lengths = np.zeros((self._rows,), np.int32)
        reach = np.zeros((self._rows,), np.int32)
        lengths[: len(rows)] = self._prompt_lengths[rows]
        reach[: len(rows)] = self._reach[rows]
        padded = -(-int(lengths.max()) // self.chunk) * self.chunk
        tokens = np.zeros((self._rows, padded), np.int32)
        for place, row in enumerate(rows):
            tokens[place, : lengths[place]] = self._prompts[row]

        def store(layer: int, block: int, records: np.ndarray) -> None:
            assert self._host is not None  # only then is it handed on
            self._host.write_range(layer, rows[0], block, records[: len(rows)])

        done = prefill(
            self._layout,
            self._parts,
            self._prefill_plan,
            tokens,
            lengths,
            reach,
            capacity=self.capacity,
            chunk=self.chunk,
            on_records=None if self._host is None else store,
        )
        layers = self._seed(done, lengths)
        if len(rows) < self._rows:
            layers = jax.tree.map(lambda x: x[: len(rows)], layers)
        return layers, done.logits[: len(rows)]

    def _seed(self, done: Prefilled, lengths: Int[np.ndarray, " B"]) -> list[LayerKV]:
        """Turn caches into slots, one layer at a time, so that only one layer exists twice."""
        layers, block_size = [], self.config.sparse.block_size
        for layer in range(self.config.layers):
            cache = done.caches[layer]
            done.caches[layer] = None  # pyrefly: ignore[unsupported-operation]  # frees it
            if self._host is None:
                layers.append(_seed_resident(cache, block_size=block_size))
            else:
                layers.append(
                    _seed_slots(
                        cache, done.chosen[layer], lengths, slots=self.slots, block_size=block_size
                    )
                )
        return layers

    def _opened(self) -> Decoder | StagedDecoder:
        if self._decoder is None:
            raise ValueError("this needs a prefilled, open session: call prefill first")
        return self._decoder

    def step(
        self, tokens: Int[Array, " B"] | np.ndarray, active: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B V"]:
        """Feed one token of each row.

        Args:
            tokens: the next token of each sequence.
            active: rows that take part; all of them if left out. Others read and write nothing,
                and their logits mean nothing.

        Returns:
            Logits for the token after, f32.

        Raises:
            CapacityError: more tokens than `max_new_tokens` were fed.
            ValueError: before `prefill`, or after `close`.
        """
        decoder = self._take_turn()
        tokens = jnp.asarray(tokens).astype(jnp.int32)
        if active is None:
            active = jnp.ones((self.batch,), bool)
        logits, counts = decoder.step(tokens, jnp.asarray(active))
        self._note(counts)
        return logits

    def advance(self, rows: Rows, key: PRNGKeyArray | None, draw: Draw) -> tuple[Rows, Drawn]:
        """Feed the newest token of each active row and draw the next, all on the device.

        Args:
            rows: the batch: what prefill's logits gave, or the call before; donated.
            key: of the whole call; `None` when greedy.
            draw: how tokens are drawn.

        Returns:
            The rows after, and what was drawn.

        Raises:
            CapacityError: more tokens than `max_new_tokens` were fed.
            ValueError: before `prefill`, or after `close`.
        """
        rows, drawn, counts = self._take_turn().advance(rows, key, draw)
        self._note(counts)
        return rows, drawn

    def _take_turn(self) -> Decoder | StagedDecoder:
        decoder = self._opened()
        if self._left == 0:
            raise CapacityError(
                f"all {self._allowed} of max_new_tokens have been fed; open the session with more"
            )
        self._left -= 1
        return decoder

    def _note(self, counts: Int[Array, "L 3"]) -> None:
        self._counts.append(counts)
        if len(self._counts) == 64:
            self._drain()

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Tokens held of each sequence."""
        if self._decoder is None:
            return self._prompt_lengths
        return np.asarray(self._decoder.state.lengths)

    @property
    def choices(self) -> tuple[Int[Array, "B K J"], ...]:
        """Block ids that the last step read, by layer; empty in dense mode."""
        return self._opened().choices

    def _drain(self) -> None:
        self._counted += jax.device_get(self._counts)
        self._counts.clear()

    def traffic(self) -> Traffic:
        """Sum up what the cache did so far, by step and layer."""
        self._drain()
        counts = np.zeros((0, self.config.layers, 3), np.int32)
        if self._counted:
            counts = np.stack(self._counted)
        resident, fetched, evicted = np.moveaxis(counts.astype(np.int64), -1, 0)
        return Traffic(resident, fetched, evicted, record_bytes(self.config))

    def traffic_of(self, step: int) -> Traffic:
        """Sum up what one step did, counted from 0."""
        if step >= len(self._counted):
            self._drain()
        resident, fetched, evicted = np.moveaxis(self._counted[step].astype(np.int64), -1, 0)
        return Traffic(resident[None], fetched[None], evicted[None], record_bytes(self.config))

    def device_kv_bytes(self) -> dict[str, int]:
        """Count what the device holds between steps: slots, tables, importance, summaries."""

        def count(trees: list[object]) -> int:
            return sum(leaf.nbytes for leaf in jax.tree.leaves(trees))

        layers = self._opened().state.layers
        return {
            "slots": count([kv.slots for kv in layers]),
            "tables": count([kv.pool for kv in layers]),
            "importance": count([kv.importance for kv in layers]),
            "summaries": count([kv.summary for kv in layers]),
        }

    @property
    def full_kv_bytes(self) -> int:
        """Bytes of all K and V with room for `capacity` tokens a sequence."""
        return full_kv_bytes(self.config, self.batch, self.capacity)

    def close(self) -> None:
        """Free the state and the host memory."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None
        if self._host is not None:
            self._host.close()
            self._host = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
