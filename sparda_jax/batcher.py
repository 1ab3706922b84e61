# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""More requests than rows: each takes a free row, leaves it when it ends, and the batch stays full.

The decode step is one program for the whole life of a batcher: capacity is fixed, and who is active
is data. A request that joins is prefilled alone, in a program of one row, and its state is written
into its row of the donated state; the others do not notice. What a request gets is what `generate`
gives it alone.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from sparda_jax.capacity import KVPlace, Prompt, check_prompts
from sparda_jax.errors import CapacityError
from sparda_jax.generate import FinishReason
from sparda_jax.kv.host_pool import HostPool
from sparda_jax.kv.state import KVState, LayerKV, empty_pool
from sparda_jax.model import SpardaLM
from sparda_jax.parts import cut
from sparda_jax.sampling import GREEDY, Draw, Drawn, Rows, Sampling, draw_tokens
from sparda_jax.selectors import Selector
from sparda_jax.setting import Setting, fill_rows, open_decoder, open_host, settle
from sparda_jax.shapes import Mode


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """A request that has ended.

    Attributes:
        request: its number, as `submit` gave it.
        tokens: new tokens; an end token is the last of them.
        reason: why it ended.
    """

    request: int
    tokens: list[int]
    reason: FinishReason


@dataclasses.dataclass(frozen=True, slots=True)
class _Request:
    number: int
    prompt: Int[np.ndarray, "..."]
    max_new_tokens: int


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _join(
    state: KVState,
    rows: Rows,
    row: Int[Array, ""],
    layers: list[LayerKV],
    length: Int[Array, ""],
    reach: Int[Array, ""],
    new: Rows,
) -> tuple[KVState, Rows]:
    """Write a prefilled request into its row of everything that has rows."""
    put = lambda every, one: every.at[row].set(one[0])
    state = dataclasses.replace(
        state,
        layers=jax.tree.map(put, state.layers, layers),
        lengths=state.lengths.at[row].set(length),
        reach=state.reach.at[row].set(reach),
    )
    return state, jax.tree.map(put, rows, new)


def empty_layer(setting: Setting) -> LayerKV:
    """Make a layer of a batch that holds nothing yet.

    Args:
        setting: of the batch.
    """
    config, batch = setting.config, setting.batch
    num_blocks = config.sparse.blocks(setting.capacity)
    lanes, block_size = (batch, config.kv_heads), config.sparse.block_size
    is_offloaded, selector = setting.place == "offload", setting.plan.selector
    bias = jnp.zeros((*lanes, num_blocks, block_size), jnp.float32)
    is_packed = setting.host_dtype is not None
    return LayerKV(
        slots=jnp.zeros((*lanes, setting.slots, 2, block_size, config.head_dim), config.dtype),
        pool=empty_pool(*lanes, num_blocks, setting.slots) if is_offloaded else None,
        importance=bias if config.token_importance else None,
        summary=selector and selector.init_summary(batch, setting.capacity, config.dtype),
        scales=jnp.ones((*lanes, num_blocks, 2), jnp.float32) if is_packed else None,
    )


class Batcher:
    """Continues requests in a batch of fixed size, each joining as soon as a row is free.

    A context manager: it holds the device state and the host memory of all rows.

    Args:
        model: the decoder.
        rows: B, requests continued at once.
        prompt_tokens: the longest prompt that will be submitted.
        max_new_tokens: the most that a request may ask for.
        mode: `dense`, `sparse` or `sparda`.
        selector: overrides what ranks the blocks.
        kv: where K and V live.
        slots: device slots per (sequence, KV head) when offloaded.
        fetch: how missing blocks move when offloaded.
        host_dtype: of K and V on the host, as in `generate`.
        sampling: how tokens are drawn.
        eos_ids: tokens that end a request.
        key: needed unless greedy; a request draws by its number, as in `generate`.
        prefill_chunk: tokens run at once in prefill.
        pool: lends the host memory.
        on_token: told (request, token) of each new token, in the order of the steps.

    Raises:
        CapacityError, ValueError, NotImplementedError: before any work.

    Example:
        >>> from sparda_jax.testing import tiny_model
        >>> with Batcher(tiny_model(layers=2), 2, prompt_tokens=8, max_new_tokens=4) as batcher:
        ...     numbers = [batcher.submit([1, 2, n], 2 + n) for n in range(3)]
        ...     sorted((done.request, len(done.tokens)) for done in batcher.run())
        [(0, 2), (1, 3), (2, 4)]
    """

    def __init__(
        self,
        model: SpardaLM,
        rows: int,
        *,
        prompt_tokens: int,
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
        prefill_chunk: int | None = None,
        pool: HostPool | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> None:
        for name, value in (("rows", rows), ("prompt_tokens", prompt_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if key is None and not sampling.is_greedy:
            raise ValueError(f"{sampling=} draws at random, so it needs a key; got key=None")
        check_prompts([[0] * prompt_tokens], max_new_tokens, model.config)
        setting = settle(
            model,
            rows,
            longest=prompt_tokens,
            shortest=1,
            reach=prompt_tokens + max_new_tokens,
            mode=mode,
            selector=selector,
            kv=kv,
            slots=slots,
            fetch=fetch,
            host_dtype=host_dtype,
            prefill_chunk=prefill_chunk,
            prefill_rows=1,
        )
        self._limits = (prompt_tokens, max_new_tokens)
        self._draw = Draw(sampling=sampling, eos_ids=tuple(sorted({int(e) for e in eos_ids})))
        self._key, self._on_token = key, on_token
        self._layout, self._parts = cut(model)
        self._host, self.setting = open_host(setting, pool)
        state = KVState(
            layers=[empty_layer(self.setting) for _ in range(model.config.layers)],
            lengths=jnp.zeros((rows,), jnp.int32),
            reach=jnp.zeros((rows,), jnp.int32),
            step=jnp.array(1, jnp.int32),
        )
        self._decoder = open_decoder(self.setting, self._layout, self._parts, state, self._host)
        zeros = lambda: jnp.zeros((rows,), jnp.int32)
        self._rows = Rows(
            tokens=zeros(), active=jnp.zeros((rows,), bool), left=zeros(), requests=zeros()
        )
        self._waiting: collections.deque[_Request] = collections.deque()
        self._owners: list[_Request | None] = [None] * rows
        self._tokens: dict[int, list[int]] = {}
        self._submitted = 0

    def submit(self, prompt: Prompt, max_new_tokens: int | None = None) -> int:
        """Queue a request; `run` continues it.

        Args:
            prompt: token ids.
            max_new_tokens: the most tokens to add; `None` takes the batcher's.

        Returns:
            The number of the request, from 0.

        Raises:
            DataError: the prompt cannot be used.
            CapacityError: it is longer than the batcher has room for.
            ValueError: `max_new_tokens` < 1.
        """
        longest, most = self._limits
        wanted = most if max_new_tokens is None else max_new_tokens
        tokens = check_prompts([prompt], wanted, self.setting.config)[0]
        if tokens.size > longest or wanted > most:
            raise CapacityError(
                f"a prompt of {tokens.size} tokens and max_new_tokens={wanted} do not fit a "
                f"batcher with prompt_tokens={longest} and max_new_tokens={most}; open a larger one"
            )
        number, self._submitted = self._submitted, self._submitted + 1
        self._waiting.append(_Request(number, tokens, wanted))
        return number

    def submit_all(self, prompts: Sequence[Prompt], max_new_tokens: int | None = None) -> list[int]:
        """Queue several requests; see `submit`."""
        return [self.submit(prompt, max_new_tokens) for prompt in prompts]

    def run(self) -> Iterator[Finished]:
        """Continue everything that is queued, and what is queued meanwhile; give what has ended.

        The device is one step ahead of the host, which reads each step's tokens while the next one
        runs.
        """
        told: collections.deque[tuple[Drawn, list[_Request | None]]] = collections.deque()
        while self._waiting or told or any(owner is not None for owner in self._owners):
            yield from self._fill_free_rows()
            if any(owner is not None for owner in self._owners):
                self._rows, drawn, _ = self._decoder.advance(self._rows, self._key, self._draw)
                for array in jax.tree.leaves(drawn):
                    array.copy_to_host_async()
                told.append((drawn, list(self._owners)))
            while told and (len(told) > 1 or not self._may_go_on(told[0])):
                yield from self._read(*told.popleft())

    def _may_go_on(self, entry: tuple[Drawn, list[_Request | None]]) -> bool:
        """Tell whether some owner of a step that is not read yet may draw another token."""
        _, owners = entry
        return any(
            owner is not None
            and owner is self._owners[row]
            and len(self._tokens[owner.number]) + 1 < owner.max_new_tokens
            for row, owner in enumerate(owners)
        )

    def _fill_free_rows(self) -> Iterator[Finished]:
        for row, owner in enumerate(self._owners):
            while owner is None and self._waiting:
                request = self._waiting.popleft()
                finished = self._start(row, request)
                if finished is None:
                    break
                yield finished

    def _start(self, row: int, request: _Request) -> Finished | None:
        """Prefill a request into a free row and draw its first token; it may end there."""
        reach = request.prompt.size + request.max_new_tokens
        layers, logits = fill_rows(
            self.setting,
            self._layout,
            self._parts,
            [request.prompt],
            np.array([reach], np.int32),
            self._host,
            row,
        )
        one = lambda value: jnp.full((1,), value, jnp.int32)
        new = Rows(
            tokens=one(0),
            active=jnp.ones((1,), bool),
            left=one(request.max_new_tokens),
            requests=one(request.number),
        )
        new, drawn = draw_tokens(logits, new, one(request.prompt.size), self._key, draw=self._draw)
        self._owners[row] = request
        self._tokens[request.number] = []
        ended = list(self._read(drawn, [request], first_row=row))
        if ended:
            return ended[0]
        length = jnp.int32(request.prompt.size)
        place = (jnp.int32(row), layers, length, jnp.int32(reach), new)
        state, self._rows = _join(self._decoder.state, self._rows, *place)
        self._decoder.replace_row(state, row, request.prompt.size)
        return None

    def _read(
        self, drawn: Drawn, owners: Sequence[_Request | None], first_row: int = 0
    ) -> Iterator[Finished]:
        """Take the tokens of one step to their requests; free the rows of those that ended."""
        drawn = jax.device_get(drawn)
        for row, owner in enumerate(owners):
            if owner is None or not drawn.is_new[row]:
                continue
            token = int(drawn.tokens[row])
            tokens = self._tokens[owner.number]
            tokens.append(token)
            if self._on_token is not None:
                self._on_token(owner.number, token)
            if not drawn.goes_on[row]:
                self._owners[first_row + row] = None
                reason: FinishReason = "eos" if token in self._draw.eos_ids else "length"
                yield Finished(owner.number, self._tokens.pop(owner.number), reason)

    def close(self) -> None:
        """Free the device state and the host memory."""
        try:
            self._decoder.close()
        finally:
            if self._host is not None:
                self._host.close()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
