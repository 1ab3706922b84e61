# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""How a fetch runs beside the matmuls of the same program.

XLA turns a program into CUDA graphs. By default each command of a graph waits for the one before;
told to be concurrent, it waits only for those that touch the same buffers. A fetch then overlaps
with what was issued after it and does not need it, so it must come first in the schedule, and the
barrier of `fetch_first` sees to that. What an order depends on must be in the data: concurrent
commands know no other. Nor does XLA know that a kernel runs beside others: what a fetch reads is
free for other results as soon as the fetch has been issued, unless `hold_lists` reads it later.

Where nothing is fetched ahead there is little to overlap, and the branches of a graph cost its
launch more than they save: such a program keeps its commands in a row.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from sparda_jax.kv.plan import FetchPlan, Places
from sparda_jax.shapes import NO_SLOT

CONCURRENT_COMMANDS = {
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    "xla_gpu_graph_min_graph_size": "2",
}
"""Compiler options of a program whose fetches are to overlap with its matmuls."""

SERIAL_COMMANDS = CONCURRENT_COMMANDS | {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
"""The same where each command waits for the one before."""

_GRAPHS = 2  # more were not faster: experiments/README.md


def compiler_options(*, is_concurrent: bool = True) -> dict[str, str] | None:
    """Give what `jax.jit` takes for a program on the default device; only a GPU needs any.

    Args:
        is_concurrent: commands wait only for those that touch the same buffers.
    """
    if jax.default_backend() != "gpu":
        return None
    return dict(CONCURRENT_COMMANDS if is_concurrent else SERIAL_COMMANDS)


def graphs_of_step() -> int:
    """Tell how many graphs a step of concurrent commands is cut into; only a GPU has any."""
    return _GRAPHS if jax.default_backend() == "gpu" else 1


def fetch_first[X, F](x: X, fetched: F) -> tuple[X, F]:
    """Order the fetch before the work on `x`, without making that work wait for it.

    Args:
        x: arrays that the layer computes on next.
        fetched: slots that a fetch changes; the layer must not read them.

    Returns:
        Both, to be used from here on.
    """
    return lax.optimization_barrier((x, fetched))


def begin_graph[X](x: X, step: Int[Array, ""]) -> tuple[X, Int[Array, ""]]:
    """Make XLA begin another graph of commands here: it records no loop into one.

    A launch takes milliseconds where a graph has hundreds of branches, and the device has only the
    first few commands until it is over. The launch of a second graph runs while the first computes.

    Args:
        x: what the rest of the program computes on.
        step: any number; the loop counts it up by one.

    Returns:
        `x`, to be used from here on, and `step` + 1, which must be used as well.
    """
    x, step = lax.optimization_barrier((x, step))
    step = lax.fori_loop(0, 2, lambda turn, count: count + turn, step)  # XLA would unroll one turn
    return lax.optimization_barrier((x, step))


def hold_lists(plan: FetchPlan) -> Places:
    """Give the places of a plan such that the lists of its fetch keep their memory until then.

    The slot of the tail is read from them, in a way that changes nothing: no entry is less than −1.
    Else partial results of the attention that runs beside the fetch would take their place, and
    wait until the fetch is over.

    Args:
        plan: whose fetch is issued; the places are first read where its blocks must be there.

    Returns:
        Equal to `plan.places`.
    """
    source, slots = plan.misses[0], plan.misses[1]  # two buffers: XLA joins them only on paper
    is_told = (source[0] >= -1) & (slots[0] >= -1) & (plan.miss_count[0] >= 0)
    tail = jnp.where(is_told, plan.places.tail, NO_SLOT)
    return dataclasses.replace(plan.places, tail=tail)
