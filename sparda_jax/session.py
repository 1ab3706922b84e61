# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""One batch from its prompts to its last token: what `generate` and the evaluations drive.

A `Session` checks everything before work starts, decides where K and V live, runs the prefill, and
then takes one token of each row at a time. The tokens may be sampled or given (teacher forcing).
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparda_jax.config import ModelConfig
from sparda_jax.decode import ResidentDecoder
from sparda_jax.decode_staged import StagedDecoder
from sparda_jax.errors import CapacityError, DataError
from sparda_jax.kv.fetch import resolve_fetch
from sparda_jax.kv.host import HostKV, record_bytes
from sparda_jax.kv.state import KVState, LayerKV, join_layers, seed_resident, seed_slots
from sparda_jax.model import Plan, SpardaLM, make_plan
from sparda_jax.parts import cut
from sparda_jax.prefill import Prefilled, chunk_tokens, prefill
from sparda_jax.selectors import Selector, resolve
from sparda_jax.shapes import Mode, Parity

KVPlace = Literal["auto", "resident", "offload"]
"""Where K and V live: on the device, on the host, or on the device if they fit there."""

Prompt = Sequence[int] | Int[np.ndarray, " S"]
"""Token ids of one prompt, at least one."""

_seed_resident = jax.jit(seed_resident, static_argnames="block_size")
_seed_slots = jax.jit(seed_slots, static_argnames=("slots", "block_size"))

_LOG = logging.getLogger(__name__)
_SHARE = 0.9  # of the free device memory that KV may take; the rest is for activations


@dataclasses.dataclass(frozen=True, slots=True)
class Traffic:
    """What the cache did, by step and layer.

    Attributes:
        resident: chosen blocks that stood in a slot, the tail among them.
        fetched: chosen blocks that had to move.
        evicted: blocks that lost their slot.
        record_bytes: of one block and KV head.
    """

    resident: Int[np.ndarray, "steps L"]
    fetched: Int[np.ndarray, "steps L"]
    evicted: Int[np.ndarray, "steps L"]
    record_bytes: int

    @property
    def fetched_bytes(self) -> Int[np.ndarray, "steps L"]:
        """Bytes of the fetched records."""
        return self.fetched * self.record_bytes

    @property
    def hit_rate(self) -> float:
        """Share of the chosen blocks that were resident; 1 if nothing was chosen."""
        chosen = int(self.resident.sum()) + int(self.fetched.sum())
        return 1.0 if chosen == 0 else int(self.resident.sum()) / chosen


def round_capacity(tokens: int, chunk: int) -> int:
    """Round a length up, so that near lengths share a program: at most an eighth is wasted.

    Args:
        tokens: the longest sequence.
        chunk: the result is a multiple of it.

    Example:
        >>> round_capacity(8300, 64), round_capacity(100, 64)
        (9216, 128)
    """
    step = max(chunk, 1 << max(tokens.bit_length() - 4, 0))
    step = -(-step // chunk) * chunk
    return -(-tokens // step) * step


def full_kv_bytes(config: ModelConfig, batch: int, capacity: int) -> int:
    """Count the bytes of K and V of all layers with room for `capacity` tokens a sequence."""
    blocks = batch * config.kv_heads * config.sparse.blocks(capacity)
    return config.layers * blocks * record_bytes(config)


def free_device_bytes() -> int | None:
    """Ask the default device for its free memory; `None` where it does not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


def choose_place(
    kv: KVPlace, mode: Mode, config: ModelConfig, batch: int, capacity: int, free: int | None
) -> Literal["resident", "offload"]:
    """Decide where K and V live, and log the arithmetic.

    Args:
        kv: what the caller asked for.
        mode: `dense` reads every block and cannot be offloaded.
        config: of the model.
        batch: B.
        capacity: tokens of room for each sequence.
        free: free device memory in bytes; `None` if unknown, then everything fits.

    Raises:
        ValueError: an unknown name, or dense mode with `kv="offload"`.
        CapacityError: what must be resident does not fit.
    """
    if kv not in ("auto", "resident", "offload"):
        raise ValueError(f"{kv=} must be 'auto', 'resident' or 'offload'")
    if kv == "offload":
        if mode == "dense":
            raise ValueError("mode='dense' reads every block, so kv='offload' would move them all")
        return "offload"
    # While the last layer's cache is turned into slots, both exist.
    layers = config.layers
    needed = full_kv_bytes(config, batch, capacity) * (layers + 1) // layers
    room = None if free is None else int(free * _SHARE)
    fits = room is None or needed <= room
    _LOG.info(
        "KV of %d x %d tokens x %d layers: %.1f MiB; free for it on the device: %s; %s",
        batch,
        capacity,
        layers,
        needed / 2**20,
        "unknown" if room is None else f"{room / 2**20:.1f} MiB",
        "resident" if fits or kv == "resident" else "offload",
    )
    if fits:
        return "resident"
    if kv == "auto" and mode != "dense":
        return "offload"
    raise CapacityError(
        f"KV needs {needed} bytes on the device, of which {room} can be used; take fewer or "
        "shorter prompts, or kv='offload' with mode='sparda' or 'sparse'"
    )


def check_prompts(
    prompts: Sequence[Prompt], max_new_tokens: int, config: ModelConfig
) -> list[Int[np.ndarray, " S"]]:
    """Turn prompts into arrays, refusing what no model could run.

    Args:
        prompts: token ids of each prompt, at least one each.
        max_new_tokens: tokens that may follow.
        config: of the model.

    Raises:
        DataError: no prompts, an empty one, or a token id outside the vocabulary.
        ValueError: `max_new_tokens` < 1.
        CapacityError: a prompt and what may follow exceed `max_context`.
    """
    if len(prompts) == 0:
        raise DataError("got 0 prompts; generation needs at least 1")
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} must be at least 1")
    arrays = []
    for number, prompt in enumerate(prompts):
        tokens = np.asarray(prompt, dtype=np.int64)
        if tokens.ndim != 1 or tokens.size == 0:
            raise DataError(f"prompt {number} has shape {tokens.shape}: it needs at least 1 token")
        wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
        if wrong.size:
            raise DataError(
                f"prompt {number} holds token {wrong[0]}, but the vocabulary ends at "
                f"{config.vocab_size - 1}: was it encoded with this model's tokenizer?"
            )
        total = tokens.size + max_new_tokens
        if total > config.max_context:
            raise CapacityError(
                f"prompt {number} has {tokens.size} tokens and {max_new_tokens=} may follow: "
                f"{total} in all, but {config.max_context=}; shorten one of them"
            )
        arrays.append(tokens.astype(np.int32))
    return arrays


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
        >>> with Session(tiny_model(), [[1, 2, 3], [4]], max_new_tokens=2) as session:
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
        self.plan = self._make_plan(mode, selector, parity)
        self._prefill_plan = self.plan
        if prefill_selector is not None:
            chosen = resolve(mode, config, prefill_selector, parity)
            self._prefill_plan = dataclasses.replace(self.plan, selector=chosen)
        self.slots = self._count_slots(slots)
        if self.place == "offload":
            self.fetch = resolve_fetch(fetch)
        elif fetch is not None:
            raise ValueError(f"{fetch=} has nothing to fetch: K and V are resident; kv={kv!r}")
        else:
            self.fetch = None
        self._layout, self._parts = cut(model)
        self._host: HostKV | None = None
        self._decoder: ResidentDecoder | StagedDecoder | None = None
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
            self._host = HostKV(self.config, self.batch, self.capacity)
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
        if self._host is None:
            self._decoder = ResidentDecoder(self._layout, self._parts, self.plan, state)
        else:
            self._decoder = StagedDecoder(
                self._layout, self._parts, self.plan, state, self._host, fetch=self.fetch
            )
        return logits[0] if len(logits) == 1 else jnp.concatenate(logits)

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
            cache, done.caches[layer] = done.caches[layer], None
            if self._host is None:
                layers.append(_seed_resident(cache, block_size=block_size))
            else:
                layers.append(
                    _seed_slots(
                        cache, done.chosen[layer], lengths, slots=self.slots, block_size=block_size
                    )
                )
        return layers

    def _opened(self) -> ResidentDecoder | StagedDecoder:
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
        decoder = self._opened()
        if self._left == 0:
            raise CapacityError(
                f"all {self._allowed} of max_new_tokens have been fed; open the session with more"
            )
        self._left -= 1
        tokens = jnp.asarray(tokens).astype(jnp.int32)
        if active is None:
            active = jnp.ones((self.batch,), bool)
        logits, counts = decoder.step(tokens, jnp.asarray(active))
        self._counts.append(counts)
        if len(self._counts) == 64:
            self._drain()
        return logits

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
