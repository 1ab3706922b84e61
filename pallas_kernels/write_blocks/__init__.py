# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Finished blocks from slots into host records, in place."""

from pallas_kernels.write_blocks.api import write_blocks
from pallas_kernels.write_blocks.config import Tiles, Written

__all__ = ["Tiles", "Written", "write_blocks"]
