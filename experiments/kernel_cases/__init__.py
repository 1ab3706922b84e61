# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What `experiments.bench_kernels` measures, one module an op."""
