# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""From block scores to the blocks that each query reads, as ids and as a bitmask."""

from pallas_kernels.select_blocks.api import select_blocks
from pallas_kernels.select_blocks.config import Tiles
from pallas_kernels.select_blocks.reference import Selection

__all__ = ["Selection", "Tiles", "select_blocks"]
