# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""From a choice of blocks to the slots they take and the records that have to move."""

from pallas_kernels.plan_fetch.api import plan_fetch
from pallas_kernels.plan_fetch.config import Tiles
from pallas_kernels.plan_fetch.reference import Plan

__all__ = ["Plan", "Tiles", "plan_fetch"]
