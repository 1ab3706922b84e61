# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Scripts a person runs: each a frozen `Config` and a `main(config)` that a test can import."""
