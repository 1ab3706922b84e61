# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Missing records from the host into slots, in place."""

from pallas_kernels.gather_blocks.api import gather_blocks
from pallas_kernels.gather_blocks.config import Tiles

__all__ = ["Tiles", "gather_blocks"]
