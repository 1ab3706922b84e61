# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What a batch settles before work starts, and the pieces that it is run with.

`Session` continues a fixed batch, `Batcher` keeps a batch full; both settle the same questions
(where K and V live, how much room, which rule, how blocks move), prefill rows by the same function
and decode by the same decoders.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparda_jax.capacity import (
    KVPlace,
    choose_place,
    free_device_bytes,
    full_kv_bytes,
    round_capacity,
)
from sparda_jax.chunk import Plan, make_plan
from sparda_jax.config import ModelConfig
from sparda_jax.decode import Decoder
from sparda_jax.decode_staged import StagedDecoder
from sparda_jax.errors import CapacityError
from sparda_jax.kv.fetch import Fetch, resolve_fetch
from sparda_jax.kv.host import HostKV
from sparda_jax.kv.host_pool import HostPool
from sparda_jax.kv.pack import HostDtype, check_host_dtype
from sparda_jax.kv.state import KVState, LayerKV, seed_resident, seed_slots
from sparda_jax.model import SpardaLM
from sparda_jax.parts import Layout, Parts
from sparda_jax.prefill import Prefilled, chunk_tokens, prefill
from sparda_jax.selectors import Selector, resolve
from sparda_jax.shapes import Mode, Parity

_LOG = logging.getLogger(__name__)
_seed_resident = jax.jit(seed_resident, static_argnames="block_size")
_seed_slots = jax.jit(seed_slots, static_argnames=("slots", "block_size"))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a batch has settled.

    Attributes:
        config: of the model.
        batch: B.
        prefill_rows: prompts prefilled together.
        chunk: tokens run at once in prefill.
        capacity: tokens of room for each sequence, a multiple of the chunk.
        place: where K and V live.
        plan: the rule of decoding.
        prefill_plan: the rule of prefill.
        slots: R, all blocks when resident.
        fetch: how missing blocks move; `None` when resident.
        may_fall_back: the caller left open how blocks move.
        host_dtype: of K and V on the host; `None` is the model's.
    """

    config: ModelConfig
    batch: int
    prefill_rows: int
    chunk: int
    capacity: int
    place: Literal["resident", "offload"]
    plan: Plan
    prefill_plan: Plan
    slots: int
    fetch: Fetch | None
    may_fall_back: bool
    host_dtype: HostDtype | None = None


def settle(
    model: SpardaLM,
    batch: int,
    *,
    longest: int,
    shortest: int,
    reach: int,
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
) -> Setting:
    """Settle a batch, refusing what cannot be run.

    Args:
        model: the decoder.
        batch: B.
        longest: tokens of the longest prompt.
        shortest: tokens of the shortest.
        reach: tokens that a sequence may grow to.
        mode: `dense`, `sparse` or `sparda`.
        selector: overrides what ranks the blocks.
        kv: where K and V live.
        slots: R when offloaded; `None` takes a third more than one token reads.
        fetch: how missing blocks move when offloaded; `None` chooses.
        host_dtype: of K and V on the host (`kv.pack`); `None` takes the model's.
        parity: `"reference"` repeats the original's deviations.
        prefill_chunk: tokens run at once in prefill; `None` takes about 1024.
        prefill_rows: prompts prefilled together; `None` takes all that fit.
        prefill_selector: ranks the blocks for the prompt only; it must keep the same summary.

    Raises:
        CapacityError, ValueError, NotImplementedError: before any work.
    """
    config = model.config
    sparse = config.sparse
    if prefill_chunk is None:
        prefill_chunk = max(sparse.block_size, 1024 // sparse.block_size * sparse.block_size)
    chunk = chunk_tokens(longest, prefill_chunk, sparse.block_size)
    capacity = round_capacity(reach, chunk)
    if prefill_rows is not None and prefill_rows < 1:
        raise ValueError(f"{prefill_rows=} must be at least 1")
    free = free_device_bytes()
    place = choose_place(kv, mode, config, batch, capacity, free)
    packed = check_host_dtype(host_dtype)
    if place == "resident" and fetch is not None:
        raise ValueError(f"{fetch=} has nothing to fetch: K and V are resident; kv={kv!r}")
    if place == "resident" and packed is not None:
        raise ValueError(f"{host_dtype=} has nothing to pack: K and V are resident; kv={kv!r}")
    if prefill_rows is None:
        prefill_rows = batch
        if place == "offload" and free is not None:  # half of the free memory
            prefill_rows = max(1, free // 2 // full_kv_bytes(config, 1, capacity))
    ranks = model.ranked_by(mode, selector)
    plan = make_plan(
        config,
        mode,
        max_length=capacity,
        shortest=shortest + 1,
        selector=ranks,
        parity=parity,
    )
    if place == "offload" and plan.selector is None:  # short, but still in slots
        plan = dataclasses.replace(plan, selector=resolve(mode, config, ranks, parity))
    prefill_plan = plan
    if prefill_selector is not None:
        chosen = resolve(mode, config, prefill_selector, parity)
        prefill_plan = dataclasses.replace(plan, selector=chosen)
    return Setting(
        config=config,
        batch=batch,
        prefill_rows=min(prefill_rows, batch),
        chunk=chunk,
        capacity=capacity,
        place=place,
        plan=plan,
        prefill_plan=prefill_plan,
        slots=_count_slots(slots, place, plan.width, sparse.blocks(capacity)),
        fetch=resolve_fetch(fetch, config, packed) if place == "offload" else None,
        may_fall_back=fetch is None,
        host_dtype=packed,
    )


def _count_slots(slots: int | None, place: str, width: int, num_blocks: int) -> int:
    """Settle R; all blocks when resident."""
    if place == "resident":
        if slots is not None:
            raise ValueError(f"{slots=} is for kv='offload'; every block has a slot here")
        return num_blocks
    if slots is None:
        slots = width + width // 3
    if slots < width:
        raise CapacityError(
            f"{slots=} per (sequence, KV head) cannot hold the {width} blocks that one token "
            f"reads; ask for slots={width} or more"
        )
    return min(slots, num_blocks)


def open_host(setting: Setting, pool: HostPool | None = None) -> tuple[HostKV | None, Setting]:
    """Open the host memory of a batch, none when resident.

    Where kernels cannot see it and the caller left the way open, blocks move by copies.

    Args:
        setting: of the batch.
        pool: lends the memory; without it, memory is allocated and freed again.

    Returns:
        The records, and the setting with what `fetch` has become.

    Raises:
        CapacityError: the host has too little memory.
        BackendError: `fetch="in_graph"` by name, and the memory cannot be page-locked.
    """
    if setting.place == "resident":
        return None, setting
    needs_lock = setting.fetch == "in_graph" and jax.default_backend() != "cpu"
    lock = "require" if needs_lock and not setting.may_fall_back else "auto"
    host = HostKV(
        setting.config,
        setting.batch,
        setting.capacity,
        page_lock=lock,
        pool=pool,
        host_dtype=setting.host_dtype,
    )
    if needs_lock and host.unlocked_reason is not None:
        _LOG.warning("fetch='device_put', because %s", host.unlocked_reason)
        setting = dataclasses.replace(setting, fetch="device_put")
    return host, setting


def open_decoder(
    setting: Setting, layout: Layout, parts: Parts, state: KVState, host: HostKV | None
) -> Decoder | StagedDecoder:
    """Open the decoder that a setting asks for.

    Args:
        setting: of the batch.
        layout: of the model.
        parts: its weights.
        state: after prefill; taken over.
        host: the records; `None` when resident.
    """
    if host is not None and setting.fetch == "device_put":
        return StagedDecoder(layout, parts, setting.plan, state, host)
    return Decoder(layout, parts, setting.plan, state, host)


def fill_rows(
    setting: Setting,
    layout: Layout,
    parts: Parts,
    prompts: Sequence[Int[np.ndarray, "..."]],
    reach: Int[np.ndarray, " rows"],
    host: HostKV | None,
    first_row: int,
) -> tuple[list[LayerKV], Float[Array, "rows V"]]:
    """Prefill neighbouring rows of a batch; fewer than `prefill_rows` are padded with empty ones.

    Args:
        setting: of the batch.
        layout: of the model.
        parts: its weights.
        prompts: of the rows, at most `prefill_rows`.
        reach: tokens that each may grow to.
        host: takes the records of the prompts.
        first_row: of the batch.

    Returns:
        What the device holds of these rows, and the logits after each prompt, f32.
    """
    rows, count = setting.prefill_rows, len(prompts)
    lengths, reaches = np.zeros((rows,), np.int32), np.zeros((rows,), np.int32)
    lengths[:count] = [len(prompt) for prompt in prompts]
    reaches[:count] = reach
    tokens = np.zeros((rows, -(-int(lengths.max()) // setting.chunk) * setting.chunk), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : lengths[row]] = prompt

    def store(layer: int, block: int, records: np.ndarray) -> None:
        assert host is not None  # only then is it handed on
        host.write_range(layer, first_row, block, records[:count])

    done = prefill(
        layout,
        parts,
        setting.prefill_plan,
        tokens,
        lengths,
        reaches,
        capacity=setting.capacity,
        chunk=setting.chunk,
        on_records=None if host is None else store,
        host_dtype=setting.host_dtype,
    )
    layers = _seed(setting, done, lengths, is_resident=host is None)
    if count < rows:
        layers = jax.tree.map(lambda x: x[:count], layers)
    return layers, done.logits[:count]


def _seed(
    setting: Setting, done: Prefilled, lengths: Int[np.ndarray, " rows"], *, is_resident: bool
) -> list[LayerKV]:
    """Turn caches into slots, one layer at a time, so that only one layer exists twice."""
    layers, block_size = [], setting.config.sparse.block_size
    for layer in range(setting.config.layers):
        cache = done.caches[layer]
        done.caches[layer] = None  # pyrefly: ignore[unsupported-operation]  # frees it
        if is_resident:
            layers.append(_seed_resident(cache, block_size=block_size))
        else:
            layers.append(
                _seed_slots(
                    cache,
                    done.chosen[layer],
                    jnp.asarray(lengths),
                    None if done.scales is None else done.scales[layer],
                    slots=setting.slots,
                    block_size=block_size,
                )
            )
    return layers
