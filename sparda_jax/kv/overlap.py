# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""How a fetch runs beside the matmuls of the same program.

XLA turns a program into CUDA graphs. By default each command of a graph waits for the one before;
told to be concurrent, it waits only for those that touch the same buffers. A fetch then overlaps
with what was issued after it and does not need it, so it must come first in the schedule, and the
barrier of `fetch_first` sees to that. What an order depends on must be in the data: concurrent
commands know no other.
"""

import jax
from jax import lax

CONCURRENT_COMMANDS = {
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    "xla_gpu_graph_min_graph_size": "2",
}
"""Compiler options of a program whose fetches are to overlap with its matmuls."""


def compiler_options() -> dict[str, str] | None:
    """Give what `jax.jit` takes for such a program on the default device; only a GPU needs any."""
    return dict(CONCURRENT_COMMANDS) if jax.default_backend() == "gpu" else None


def fetch_first[X, F](x: X, fetched: F) -> tuple[X, F]:
    """Order the fetch before the work on `x`, without making that work wait for it.

    Args:
        x: arrays that the layer computes on next.
        fetched: slots that a fetch changes; the layer must not read them.

    Returns:
        Both, to be used from here on.
    """
    return lax.optimization_barrier((x, fetched))
