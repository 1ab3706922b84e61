# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The key-value cache of generation: slots on the device, records on the host, and what moves."""
