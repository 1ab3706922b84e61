# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Attention of a prefill over the blocks that each query chose."""

from pallas_kernels.sparse_attention.api import sparse_attention
from pallas_kernels.sparse_attention.config import Tiles

__all__ = ["Tiles", "sparse_attention"]
