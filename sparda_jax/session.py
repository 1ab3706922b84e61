# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""One batch from its prompts to its last token: what `generate` and the evaluations drive.

A `Session` checks everything before work starts, decides where K and V live, runs the prefill, and
then takes one token of each row at a time. The tokens may be sampled or given (teacher forcing).
"""

import collections
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sparda_jax.capacity import KVPlace, Prompt, check_prompts, full_kv_bytes
from sparda_jax.chunk import Plan
from sparda_jax.decode import Decoder
from sparda_jax.decode_staged import StagedDecoder
from sparda_jax.errors import CapacityError
from sparda_jax.kv.fetch import Fetch
from sparda_jax.kv.host import HostKV, record_bytes
from sparda_jax.kv.state import KVState, join_layers
from sparda_jax.kv.traffic import Traffic
from sparda_jax.model import SpardaLM
from sparda_jax.parts import cut
from sparda_jax.sampling import Draw, Drawn, Rows
from sparda_jax.selectors import Selector
from sparda_jax.setting import fill_rows, open_decoder, open_host, settle
from sparda_jax.shapes import Mode, Parity


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
        host_dtype: of K and V on the host: `int8` and `float8_e4m3fn` halve what is moved, and
            round it; `None` takes the model's dtype.
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
        host_dtype: str | None = None,
        parity: Parity = None,
        prefill_chunk: int | None = None,
        prefill_rows: int | None = None,
        prefill_selector: str | Selector | None = None,
    ) -> None:
        self.config = model.config
        self._prompts = check_prompts(prompts, max_new_tokens, model.config)
        self.batch = len(self._prompts)
        self._prompt_lengths = np.array([len(prompt) for prompt in self._prompts], np.int32)
        self._reach = self._prompt_lengths + np.int32(max_new_tokens)
        self.setting = settle(
            model,
            self.batch,
            longest=int(self._prompt_lengths.max()),
            shortest=int(self._prompt_lengths.min()),
            reach=int(self._reach.max()),
            mode=mode,
            selector=selector,
            kv=kv,
            slots=slots,
            fetch=fetch,
            host_dtype=host_dtype,
            parity=parity,
            prefill_chunk=prefill_chunk,
            prefill_rows=prefill_rows,
            prefill_selector=prefill_selector,
        )
        self._layout, self._parts = cut(model)
        self._host: HostKV | None = None
        self._decoder: Decoder | StagedDecoder | None = None
        self._counts: collections.deque[Int[Array, "L 3"]] = collections.deque()
        self._counted: list[Int[np.ndarray, "L 3"]] = []
        self._allowed = self._left = max_new_tokens

    @property
    def place(self) -> Literal["resident", "offload"]:
        """Tell where K and V live."""
        return self.setting.place

    @property
    def fetch(self) -> Fetch | None:
        """Tell how missing blocks move; `None` when resident."""
        return self.setting.fetch

    @property
    def capacity(self) -> int:
        """Tokens of room for each sequence."""
        return self.setting.capacity

    @property
    def plan(self) -> Plan:
        """The rule of decoding."""
        return self.setting.plan

    @property
    def slots(self) -> int:
        """Device slots per (sequence, KV head): all blocks when resident."""
        return self.setting.slots

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
        self._host, self.setting = open_host(self.setting)
        together = self.setting.prefill_rows
        groups, logits = [], []
        for first in range(0, self.batch, together):
            rows = slice(first, first + together)
            layers, out = fill_rows(
                self.setting,
                self._layout,
                self._parts,
                self._prompts[rows],
                self._reach[rows],
                self._host,
                first,
            )
            groups.append(layers)
            logits.append(out)
        state = KVState(
            layers=join_layers(groups),
            lengths=jnp.array(self._prompt_lengths),
            reach=jnp.array(self._reach),
            step=jnp.array(1, jnp.int32),
        )
        self._decoder = open_decoder(self.setting, self._layout, self._parts, state, self._host)
        return logits[0] if len(logits) == 1 else jnp.concatenate(logits)

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
        """Take the counts of a step that may still run; those of older ones leave the device.

        Were they kept there, each step's buffers would stand elsewhere, and XLA would record the
        commands of the whole step anew.
        """
        counts.copy_to_host_async()
        self._counts.append(counts)
        self._drain(keep=2)

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

    @property
    def _record_bytes(self) -> int:
        return record_bytes(self.config, self.setting.host_dtype)

    def _drain(self, keep: int = 0) -> None:
        """Bring counts to the host, all but the newest few."""
        while len(self._counts) > keep:
            self._counted.append(np.array(self._counts.popleft()))

    def traffic(self) -> Traffic:
        """Sum up what the cache did so far, by step and layer."""
        self._drain()
        counts = np.zeros((0, self.config.layers, 3), np.int32)
        if self._counted:
            counts = np.stack(self._counted)
        resident, fetched, evicted = np.moveaxis(counts.astype(np.int64), -1, 0)
        return Traffic(
            resident, fetched, evicted, record_bytes(self.config, self.setting.host_dtype)
        )

    def traffic_of(self, step: int) -> Traffic:
        """Sum up what one step did, counted from 0."""
        self._drain(keep=max(len(self._counted) + len(self._counts) - step - 1, 0))
        resident, fetched, evicted = np.moveaxis(self._counted[step].astype(np.int64), -1, 0)
        return Traffic(
            resident[None],
            fetched[None],
            evicted[None],
            record_bytes(self.config, self.setting.host_dtype),
        )

    def device_kv_bytes(self) -> dict[str, int]:
        """Count what the device holds between steps: slots, tables, importance, summaries.

        The scales of packed records count as tables.
        """

        def count(trees: list[object]) -> int:
            return sum(leaf.nbytes for leaf in jax.tree.leaves(trees))

        layers = self._opened().state.layers
        return {
            "slots": count([kv.slots for kv in layers]),
            "tables": count([(kv.pool, kv.scales) for kv in layers]),
            "importance": count([kv.importance for kv in layers]),
            "summaries": count([kv.summary for kv in layers]),
        }

    @property
    def host_bytes(self) -> int:
        """Bytes of the records on the host: 0 when resident, or before `prefill`."""
        return 0 if self._host is None else self._host.nbytes

    @property
    def full_kv_bytes(self) -> int:
        """Bytes of all K and V with room for `capacity` tokens a sequence."""
        return full_kv_bytes(self.config, self.batch, self.capacity)

    def close(self) -> None:
        """Free the state and the host memory."""
        try:
            if self._decoder is not None:
                self._decoder.close()
        finally:
            self._decoder = None
            if self._host is not None:
                self._host.close()
                self._host = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
