# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Queries and pooled keys to block scores: InfLLM-V2's rule in two exact passes."""

from pallas_kernels.query_scores.api import query_scores as query_scores
from pallas_kernels.query_scores.config import Tiles as Tiles
