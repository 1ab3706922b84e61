# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""New blocks per step on real text: the shipped model's choices, replayed through slot pools.

The shipped model reads documents that it never saw, token by token after a long beginning. What it
chooses is recorded once, and pools of several sizes then fetch what they lack. A block is new if it
is in no slot; the pools begin empty, and the steps that fill them are left out.
"""

import functools
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
) -> Int[Array, "steps 3"]:
    """Send choices through pools that begin empty, and count what they do.

    Args:
        choices: block ids, of as many pools as there are lanes.
        own: the block being filled, which is never fetched.
        slots: R.
        num_blocks: M.

    Returns:
        Blocks resident, fetched and evicted in each step.
    """
    lanes, kv_heads = choices.shape[1:3]
    empty = empty_pool(lanes, kv_heads, num_blocks, slots)

    def advance(pool: SlotPool, now: tuple[Array, Array, Array]) -> tuple[SlotPool, Array]:
        plan, after = plan_fetch(now[0], pool, now[1], now[2])
        return after, plan.counts

    number = jnp.arange(1, choices.shape[0] + 1, dtype=jnp.int32)
    return jax.lax.scan(advance, empty, (choices, own, number))[1]


def trace_rows(*, is_tiny: bool = False) -> Iterator[dict[str, Any]]:
    """Record both rules on the held-out documents, and give a row for each size of pool.

    Args:
        is_tiny: one short document instead of eight.
    """
    model = load_shipped()
    sparse = model.config.sparse
    beginning, steps, count = (640, 48, 1) if is_tiny else (7168, 512, 8)
    skipped = steps // 4
    encode = ByteTokenizer().encode
    texts = [text.data[: beginning + steps].decode("ascii") for text in heldout_texts()[:count]]
    documents = [np.asarray(encode(text)) for text in texts]
    at = (beginning + np.arange(steps)) // sparse.block_size
    for mode in ("sparda", "sparse"):
        choices = record_choices(model, documents, beginning=beginning, steps=steps, mode=mode)
        lanes = choices.shape[1] * choices.shape[2]
        flat = jnp.asarray(choices.reshape(steps, lanes, *choices.shape[3:]))
        own = jnp.broadcast_to(jnp.asarray(at, jnp.int32)[:, None], (steps, lanes))
        for slots in SLOTS:
            num_blocks = sparse.blocks(beginning + steps)
            counts = replay(flat, own, slots=slots, num_blocks=num_blocks)
            new = np.asarray(counts)[skipped:, 1] / (lanes * model.config.kv_heads)
            yield {
                "model": "shipped",
                "method": f"{mode}_offload",
                "context": beginning,
                "batch": count,
                "slots": slots,
                "new_blocks_per_step": None,
                "selections": "trace",
                "device_gib": None,
                "kv_dtype": model.config.dtype,
                "misses": float(new.mean()),
                "p99_misses": float(np.percentile(new, 99)),
                "fetched_bytes": float(new.mean())
                * lanes
                * model.config.kv_heads
                * record_bytes(model.config),
                "steps": steps - skipped,
                "status": "ok",
            }
