# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The user's door: prompts in, tokens out.

Prompts may differ in length, and a sequence that met an end token stops reading and fetching while
the others go on. What a request gets does not depend on which others share its batch.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from sparda_jax.capacity import KVPlace, Prompt
from sparda_jax.kv.traffic import Traffic
from sparda_jax.model import SpardaLM
from sparda_jax.sampling import GREEDY, Draw, Drawn, Rows, Sampling, draw_tokens
from sparda_jax.selectors import Selector
from sparda_jax.session import Session
from sparda_jax.shapes import Mode, Parity

FinishReason = Literal["eos", "length"]
"""Why a request ended: an end token, or `max_new_tokens`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """What one step gave.

    Attributes:
        step: number of the token, from 0 (the one that prefill gave).
        tokens: the new token of each request; `None` for one that has ended.
        tokens_per_s: over all requests since the first token.
        hit_rate: share of the chosen blocks that were resident, in the step that fed the token
            before; 1 for step 0.
        bytes_fetched: in that step.
    """

    step: int
    tokens: tuple[int | None, ...]
    tokens_per_s: float
    hit_rate: float
    bytes_fetched: int


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """What `generate` gives back.

    Attributes:
        tokens: new tokens of each request; an end token is the last of them.
        finish_reasons: why each ended.
        traffic: what the cache did, by step and layer.
        place: where K and V were.
        device_kv_bytes: what the device held: slots, tables, importance, summaries.
        full_kv_bytes: K and V of every block, wherever they were.
        prefill_seconds: from the start to the first token.
        decode_seconds: from the first token to the last.
    """

    tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    traffic: Traffic
    place: Literal["resident", "offload"]
    device_kv_bytes: dict[str, int]
    full_kv_bytes: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens decoded per second, prefill and first tokens left out."""
        decoded = sum(len(tokens) - 1 for tokens in self.tokens)
        return decoded / self.decode_seconds if self.decode_seconds > 0.0 else 0.0


class _Record:
    """Collects what the rows give, as their tokens reach the host."""

    def __init__(
        self,
        session: Session,
        on_step: Callable[[Progress], None] | None,
        ends: tuple[int, ...],
    ) -> None:
        self._ends = ends
        self.tokens: list[list[int]] = [[] for _ in range(session.batch)]
        self.reasons: list[FinishReason] = ["length"] * session.batch
        self._session, self._on_step = session, on_step
        self._begin, self._count = 0.0, 0

    def take(
        self,
        tokens: Int[np.ndarray, " B"],
        active: Bool[np.ndarray, " B"],
        goes_on: Bool[np.ndarray, " B"],
    ) -> None:
        """Add one token of each active row."""
        step, now = self._count, time.perf_counter()
        self._begin = now if step == 0 else self._begin
        self._count += 1
        for row in np.flatnonzero(active):
            self.tokens[row].append(int(tokens[row]))
            if not goes_on[row] and int(tokens[row]) in self._ends:
                self.reasons[row] = "eos"
        if self._on_step is None:
            return
        seconds = now - self._begin
        decoded = sum(len(row) - 1 for row in self.tokens)
        traffic = self._session.traffic_of(step - 1) if step > 0 else None
        self._on_step(
            Progress(
                step=step,
                tokens=tuple(int(t) if on else None for t, on in zip(tokens, active, strict=True)),
                tokens_per_s=decoded / seconds if seconds > 0.0 else 0.0,
                hit_rate=1.0 if traffic is None else traffic.hit_rate,
                bytes_fetched=0 if traffic is None else int(traffic.fetched_bytes.sum()),
            )
        )


def _announce(drawn: Drawn) -> tuple[Array, Array, Array]:
    """Send what a draw gave to the host, without waiting: tokens, who drew, who goes on."""
    told = (drawn.tokens, drawn.is_new, drawn.goes_on)
    for array in told:
        array.copy_to_host_async()
    return told


def generate(
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
    sampling: Sampling = GREEDY,
    eos_ids: Collection[int] = (),
    key: PRNGKeyArray | None = None,
    on_step: Callable[[Progress], None] | None = None,
    prefill_chunk: int | None = None,
    prefill_rows: int | None = None,
    parity: Parity = None,
) -> Generation:
    """Continue prompts until an end token or `max_new_tokens`.

    Args:
        model: the decoder.
        prompts: token ids of each prompt; lengths may differ.
        max_new_tokens: the most tokens to add to each.
        mode: `dense` reads every block, `sparse` the model's own choice, `sparda` the forecast's.
        selector: overrides what ranks the blocks in the sparse modes.
        kv: `resident` keeps K and V on the device, `offload` on the host with slots on the device;
            `auto` takes the device if they fit there, and logs the arithmetic.
        slots: device slots per (sequence, KV head) when offloaded, at least the blocks that one
            token reads; `None` takes a third more.
        fetch: how missing blocks move when offloaded; `None` chooses.
        host_dtype: of K and V on the host: `int8` and `float8_e4m3fn` halve what is moved, and
            round it, so tokens may differ from those of resident K and V; `None` takes the model's.
        sampling: how tokens are drawn.
        eos_ids: tokens that end a sequence; they are part of its result.
        key: needed unless greedy; request r draws its token at position p with
            fold_in(fold_in(key, r), p).
        on_step: told about each token of the batch, in order.
        prefill_chunk: tokens run at once in prefill, a multiple of the block size.
        prefill_rows: prompts prefilled together.
        parity: `"reference"` repeats the original's deviations, for comparison.

    Returns:
        Tokens, finish reasons, and what it took.

    Raises:
        DataError: prompts that cannot be used.
        CapacityError: they are too long or too many; nothing has run.
        ValueError: arguments that contradict each other.
        NotImplementedError: `fetch` names a way that cannot be used; the message says why.

    Example:
        >>> from sparda_jax.testing import tiny_model
        >>> result = generate(tiny_model(layers=2), [[1, 2, 3], [4]], max_new_tokens=4)
        >>> [len(tokens) for tokens in result.tokens], result.finish_reasons
        ([4, 4], ['length', 'length'])
    """
    if key is None and not sampling.is_greedy:
        raise ValueError(f"{sampling=} draws at random, so it needs a key; got key=None")
    draw = Draw(sampling=sampling, eos_ids=tuple(sorted({int(end) for end in eos_ids})))
    started = time.perf_counter()
    with Session(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        mode=mode,
        selector=selector,
        kv=kv,
        slots=slots,
        fetch=fetch,
        host_dtype=host_dtype,
        parity=parity,
        prefill_chunk=prefill_chunk,
        prefill_rows=prefill_rows,
    ) as session:
        record = _Record(session, on_step, draw.eos_ids)
        rows = Rows(
            tokens=jnp.zeros((session.batch,), jnp.int32),
            active=jnp.ones((session.batch,), bool),
            left=jnp.full((session.batch,), max_new_tokens, jnp.int32),
            requests=jnp.arange(session.batch, dtype=jnp.int32),
        )
        logits = session.prefill()
        rows, drawn = draw_tokens(logits, rows, jnp.array(session.lengths), key, draw=draw)
        # The device runs ahead by one step where nothing of a step needs the host.
        ahead = 0 if session.fetch == "device_put" else 1
        waiting = [_announce(drawn)]
        first = None
        for _ in range(max_new_tokens - 1):
            if len(waiting) > ahead:
                entry = jax.device_get(waiting.pop(0))
                record.take(*entry)
                first = first or time.perf_counter()
                if not entry[2].any():
                    break
            rows, drawn = session.advance(rows, key, draw)
            waiting.append(_announce(drawn))
        for entry in jax.device_get(waiting):
            if entry[1].any():
                record.take(*entry)
            first = first or time.perf_counter()
        ended = time.perf_counter()
        first = ended if first is None else first
        return Generation(
            tokens=record.tokens,
            finish_reasons=record.reasons,
            traffic=session.traffic(),
            place=session.place,
            device_kv_bytes=session.device_kv_bytes(),
            full_kv_bytes=session.full_kv_bytes,
            prefill_seconds=first - started,
            decode_seconds=ended - first,
        )
