# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""One new token a sequence: rotated, written into its tail slot, pooled."""

from pallas_kernels.append_kv.api import append_kv
from pallas_kernels.append_kv.config import Tiles
from pallas_kernels.append_kv.reference import Appended

__all__ = ["Appended", "Tiles", "append_kv"]
