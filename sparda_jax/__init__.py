# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Sparse decoupled attention with a Forecast projection, in JAX."""
