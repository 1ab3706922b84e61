# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""GPU kernels of sparse attention with lookahead, each beside its reference in plain JAX."""
