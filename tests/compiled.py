# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Functions of the library as programs: called as they are, every op is compiled on its own."""

import jax

from sparda_jax import model

forward = jax.jit(
    model.forward,
    static_argnames=("mode", "selector", "logits", "return_choices", "attention", "parity"),
)
