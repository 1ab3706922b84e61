# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Measures of a model: perplexity, recall, and answers found far back in the text."""
