# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Forecasts and pooled keys to block scores, without a score per pooled key in memory."""

from pallas_kernels.block_scores.api import block_scores as block_scores
from pallas_kernels.block_scores.config import Tiles as Tiles
