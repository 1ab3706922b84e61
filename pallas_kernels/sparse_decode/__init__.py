# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Attention of one query token a sequence over its chosen blocks, through slots."""

from pallas_kernels.sparse_decode.api import sparse_decode
from pallas_kernels.sparse_decode.config import Tiles

__all__ = ["Tiles", "sparse_decode"]
