# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""New blocks per step on real text: the shipped model's choices, replayed through slot pools.

    python -m experiments.decode_trace --out runs/trace.npz
    python -m experiments.bench_decode --cells "B16 128K" --trace runs/trace.npz

The shipped model reads documents that it never saw, token by token after a long beginning. What it
chooses is recorded once, and pools of several sizes then fetch what they lack. A block is new if it
is in no slot; the pools begin empty, and the steps that fill them are left out. Beside what such
pools miss stands what pools of the size miss that know the future (`fewest_misses`): over the whole
run, its beginning included, no order of eviction misses less.

An 8B model with random weights follows such a trace by its counts: in each step, layer, row and
head as many of its blocks are new as were in the trace. They come in bursts and differ by layer, as
those of a real model do. Their number is that of a small model of bytes, whose pool holds 42 slots
for a choice of 32; it is not scaled to the 96 blocks of an 8B model.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sparda_jax.kv.host import record_bytes
from sparda_jax.kv.plan import plan_fetch
from sparda_jax.kv.state import SlotPool, empty_pool
from sparda_jax.model import SpardaLM
from sparda_jax.session import Session
from sparda_jax.shapes import Mode
from sparda_jax.shipped import heldout_texts, load_shipped
from sparda_jax.tokenizer import ByteTokenizer

__all__ = ["Config", "main"]  # for `from experiments.decode_trace import *`

SLOTS = (32, 40, 48, 64)
"""Pools that are replayed: 1 to 2 times the 32 blocks of a choice."""


def record_choices(
    model: SpardaLM, documents: Sequence[np.ndarray], *, beginning: int, steps: int, mode: Mode
) -> Int[np.ndarray, "steps L B K J"]:
    """Read documents token by token and record the blocks that every layer chooses.

    Args:
        model: the decoder.
        documents: token ids, at least `beginning + steps` each.
        beginning: tokens that are read at once first.
        steps: tokens read one by one.
        mode: who chooses.
    """
    prompts = [document[:beginning] for document in documents]
    found = []
    with Session(model, prompts, max_new_tokens=steps, mode=mode, kv="resident") as session:
        session.prefill()
        for step in range(steps):
            session.step(np.array([document[beginning + step] for document in documents]))
            found.append(jnp.stack(session.choices))
    return np.asarray(jnp.stack(found))


@functools.partial(jax.jit, static_argnames=("slots", "num_blocks"))
def replay(
    choices: Int[Array, "steps lanes K J"],
    own: Int[Array, "steps lanes"],
    *,
    slots: int,
    num_blocks: int,
) -> tuple[Int[Array, "steps 3"], Int[Array, "steps lanes K"]]:
    """Send choices through pools that begin empty, and count what they do.

    Args:
        choices: block ids, of as many pools as there are lanes.
        own: the block being filled, which is never fetched.
        slots: R.
        num_blocks: M.

    Returns:
        Blocks resident, fetched and evicted in each step, and the fetched ones of each pool.
    """
    lanes, kv_heads = choices.shape[1:3]
    empty = empty_pool(lanes, kv_heads, num_blocks, slots)

    def advance(
        pool: SlotPool, now: tuple[Array, Array, Array]
    ) -> tuple[SlotPool, tuple[Array, Array]]:
        plan, after = plan_fetch(now[0], pool, now[1], now[2])
        filled = plan.misses[1]
        mine = jnp.where(filled >= 0, filled // slots, lanes * kv_heads)
        each = jnp.zeros((lanes * kv_heads,), jnp.int32).at[mine].add(1, mode="drop")
        return after, (plan.counts, each.reshape(lanes, kv_heads))

    number = jnp.arange(1, choices.shape[0] + 1, dtype=jnp.int32)
    return jax.lax.scan(advance, empty, (choices, own, number))[1]


def fewest_fetches(
    choices: Int[np.ndarray, "steps pools J"],
    own: Int[np.ndarray, " steps"],
    *,
    slots: int,
    num_blocks: int,
) -> Int[np.ndarray, "steps pools"]:
    """Count what pools fetch that know the future: a slot is taken from whoever is read last again.

    No order of eviction fetches less in all (Belady's rule). Pools begin empty.

    Args:
        choices: block ids; negative where there is none.
        own: the block being filled, which is never fetched.
        slots: R, at least J.
        num_blocks: M.
    """
    steps, pools, _ = choices.shape
    pool = np.arange(pools)[:, None]
    place = np.where(choices >= 0, choices, num_blocks)
    next_read = np.full((steps + 1, pools, num_blocks + 1), steps, np.int16)
    for step in range(steps - 1, -1, -1):  # `next_read[t]`: the first read at t or later
        next_read[step] = next_read[step + 1]
        next_read[step, pool, place[step]] = step
    held = np.zeros((pools, num_blocks + 1), bool)
    fetched = np.zeros((steps, pools), np.int64)
    for step in range(steps):
        is_read = np.zeros_like(held)
        is_read[pool, place[step]] = True
        is_read[:, num_blocks] = False
        missing = is_read & ~held
        fetched[step] = missing.sum(axis=1) - missing[:, own[step]]
        held |= is_read
        may_go = np.where(held & ~is_read, next_read[step + 1], -1)
        last = np.argsort(-may_go, axis=1, kind="stable")
        rank = np.empty_like(last)
        np.put_along_axis(rank, last, np.arange(num_blocks + 1)[None, :], axis=1)
        held &= (rank >= (held.sum(axis=1) - slots)[:, None]) | (may_go < 0)
    return fetched


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What the shipped model chose on documents that it never saw.

    Attributes:
        model: that model.
        beginning: tokens read before.
        choices: block ids, by mode.
        own: the block being filled at each step.
    """

    model: SpardaLM
    beginning: int
    choices: dict[Mode, Int[np.ndarray, "steps L B K J"]]
    own: Int[np.ndarray, " steps"]

    def fetched(
        self, mode: Mode, slots: int
    ) -> tuple[Int[np.ndarray, " steps"], Int[np.ndarray, "steps L B K"]]:
        """Count the blocks that pools fetch once they are warm: all of a step, and of each pool.

        Args:
            mode: who chose.
            slots: R.
        """
        choices = self.choices[mode]
        steps, layers, batch, kv_heads, width = choices.shape
        lanes = layers * batch
        own = jnp.broadcast_to(jnp.asarray(self.own, jnp.int32)[:, None], (steps, lanes))
        counts, each = replay(
            jnp.asarray(choices.reshape(steps, lanes, kv_heads, width)),
            own,
            slots=slots,
            num_blocks=self.model.config.sparse.blocks(self.beginning + steps),
        )
        warm = steps // 4
        of_pools = np.asarray(each)[warm:].reshape(-1, layers, batch, kv_heads)
        return np.asarray(counts)[warm:, 1], of_pools

    def fewest(self, mode: Mode, slots: int) -> float:
        """Give the mean new blocks of warm pools that know the future.

        Args:
            mode: who chose.
            slots: R.
        """
        choices = self.choices[mode]
        steps = choices.shape[0]
        found = fewest_fetches(
            choices.reshape(steps, -1, choices.shape[-1]),
            self.own,
            slots=slots,
            num_blocks=self.model.config.sparse.blocks(self.beginning + steps),
        )
        return float(found[steps // 4 :].mean())


def record_shipped(*, is_tiny: bool = False) -> Recorded:
    """Record both rules on the held-out documents.

    Args:
        is_tiny: one short document instead of eight.
    """
    model = load_shipped()
    beginning, steps, count = (640, 48, 1) if is_tiny else (7168, 512, 8)
    encode = ByteTokenizer().encode
    texts = [text.data[: beginning + steps].decode("ascii") for text in heldout_texts()[:count]]
    documents = [np.asarray(encode(text)) for text in texts]
    modes: tuple[Mode, ...] = ("sparda", "sparse")
    return Recorded(
        model=model,
        beginning=beginning,
        choices={
            mode: record_choices(model, documents, beginning=beginning, steps=steps, mode=mode)
            for mode in modes
        },
        own=(beginning + np.arange(steps)) // model.config.sparse.block_size,
    )


def trace_rows(*, is_tiny: bool = False) -> Iterator[dict[str, Any]]:
    """Record both rules, and give a row for each size of pool.

    Args:
        is_tiny: one short document instead of eight.
    """
    recorded = record_shipped(is_tiny=is_tiny)
    config = recorded.model.config
    for mode in recorded.choices:
        for slots in SLOTS:
            fetched, of_pools = recorded.fetched(mode, slots)
            pools = of_pools[0].size
            new = fetched / pools
            yield {
                "model": "shipped",
                "method": f"{mode}_offload",
                "context": recorded.beginning,
                "batch": of_pools.shape[2],
                "slots": slots,
                "new_blocks_per_step": None,
                "selections": "trace",
                "device_gib": None,
                "kv_dtype": config.dtype,
                "misses": float(new.mean()),
                "p99_misses": float(np.percentile(new, 99)),
                "fewest_misses": recorded.fewest(mode, slots),
                "fetched_bytes": float(new.mean()) * pools * record_bytes(config),
                "steps": len(new),
                "status": "ok",
            }


def spread(
    fetched: Int[np.ndarray, "recorded l b k"],
    *,
    layers: int,
    batch: int,
    kv_heads: int,
    steps: int,
) -> Int[np.ndarray, "steps L B K"]:
    """Deal a trace to a larger model: a layer follows one at the same share of the depth.

    Layers that follow the same one, and rows, do so in stretches that begin at random places of
    random documents; heads stay together.

    Args:
        fetched: new blocks of each pool.
        layers: L.
        batch: B.
        kv_heads: K.
        steps: of a stretch.

    Raises:
        ValueError: the trace is shorter than a stretch.
    """
    recorded, depth, documents, heads = fetched.shape
    if recorded < steps:
        raise ValueError(f"a trace of {recorded} steps is too short for {steps}; time fewer steps")
    rng = np.random.default_rng(0)
    first = rng.integers(recorded - steps + 1, size=(layers, batch))
    document = rng.integers(documents, size=(layers, batch))
    source = np.arange(layers)[:, None] * depth // layers
    step = np.arange(steps)[:, None, None] + first
    dealt = fetched[step, source, document]  # [steps L B k]
    return dealt[..., np.arange(kv_heads) % heads].astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Where the trace goes.

    Attributes:
        out: the file, `.npz`: new blocks in each step, layer, document and head, by mode.
        tiny: one short document instead of eight.
    """

    out: pathlib.Path = pathlib.Path("runs/trace.npz")
    tiny: bool = False


def main(config: Config) -> None:
    """Record a trace, with as many slots for a choice as a `Session` has.

    Args:
        config: where it goes.
    """
    recorded = record_shipped(is_tiny=config.tiny)
    chosen = recorded.model.config.sparse.selected_blocks
    traces: dict[str, Any] = {}
    for mode in recorded.choices:
        _, traces[mode] = recorded.fetched(mode, chosen + chosen // 3)
        mean, top = traces[mode].mean(), np.percentile(traces[mode], 99)
        print(f"{mode}: {mean:.2f} new blocks of {chosen} a step, layer and head; p99 {top:.0f}")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(config.out, **traces)


def load_trace(path: pathlib.Path, mode: Mode) -> Int[np.ndarray, "steps L B K"]:
    """Read what `main` wrote for a mode.

    Args:
        path: the file.
        mode: who chose.

    Raises:
        FileNotFoundError: there is none; the message says how to make it.
        ValueError: it has no trace of this mode.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; make it: python -m experiments.decode_trace --out {path}"
        )
    with np.load(path) as file:
        if mode not in file:
            raise ValueError(f"{path} has traces of {sorted(file)}, none of {mode!r}")
        return file[mode]


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
