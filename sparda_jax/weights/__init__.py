# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Real checkpoints in and out: Hugging Face folders and SparDA's own indexer checkpoints."""

from sparda_jax.weights.huggingface import load_pretrained as load_pretrained
from sparda_jax.weights.saving import save_pretrained as save_pretrained
from sparda_jax.weights.sparda_torch import ForecastHeads as ForecastHeads
from sparda_jax.weights.sparda_torch import apply_forecast_heads as apply_forecast_heads
from sparda_jax.weights.sparda_torch import heads_of as heads_of
from sparda_jax.weights.sparda_torch import load_forecast_heads as load_forecast_heads
from sparda_jax.weights.sparda_torch import save_forecast_heads as save_forecast_heads
