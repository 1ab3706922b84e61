# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""GPU kernels of sparse attention with lookahead, each beside its reference in plain JAX."""

from pallas_kernels.append_kv import append_kv
from pallas_kernels.block_scores import block_scores
from pallas_kernels.forecast_kl import forecast_kl, forecast_kl_and_gradient, teacher_mass
from pallas_kernels.gather_blocks import gather_blocks
from pallas_kernels.plan_fetch import plan_fetch
from pallas_kernels.query_scores import query_scores
from pallas_kernels.select_blocks import select_blocks
from pallas_kernels.sparse_attention import sparse_attention
from pallas_kernels.sparse_decode import sparse_decode
from pallas_kernels.write_blocks import write_blocks

__all__ = [
    "append_kv",
    "block_scores",
    "forecast_kl",
    "forecast_kl_and_gradient",
    "gather_blocks",
    "plan_fetch",
    "query_scores",
    "select_blocks",
    "sparse_attention",
    "sparse_decode",
    "teacher_mass",
    "write_blocks",
]
