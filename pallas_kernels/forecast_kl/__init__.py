# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The training loss of a layer: teacher mass on the pooled grid, KL of the forecast, gradient."""

from pallas_kernels.forecast_kl.api import forecast_kl as forecast_kl
from pallas_kernels.forecast_kl.api import forecast_kl_and_gradient as forecast_kl_and_gradient
from pallas_kernels.forecast_kl.api import teacher_mass as teacher_mass
from pallas_kernels.forecast_kl.config import Tiles as Tiles
