# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Training of Forecast heads and of backbones: data, loss, step and loop."""
