# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The door to moving blocks."""

import pytest

from pallas_kernels import _backend
from sparda_jax.kv import fetch as door
from sparda_jax.kv.fetch import resolve_fetch, unsupported_reason
from sparda_jax.testing import tiny_config

CONFIG = tiny_config()


def test_an_open_choice_takes_copies_on_a_cpu_and_a_name_gets_that_one():
    assert resolve_fetch(None, CONFIG) == "device_put"
    assert resolve_fetch("device_put", CONFIG) == "device_put"
    assert resolve_fetch("in_graph", CONFIG) == "in_graph"


def test_an_open_choice_takes_the_program_on_a_gpu_that_can(monkeypatch):
    monkeypatch.setattr(door.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_backend, "hopper_reason", lambda: None)
    wide = tiny_config(head_dim=64)
    assert resolve_fetch(None, wide) == "in_graph"
    assert unsupported_reason("in_graph", wide) is None
    assert unsupported_reason("in_graph", wide, "int8") is None


def test_a_refusal_says_why_and_the_way_out(monkeypatch):
    monkeypatch.setattr(door.jax, "default_backend", lambda: "gpu")
    other = "needs compute capability 9.0"
    monkeypatch.setattr(_backend, "hopper_reason", lambda: other)
    assert resolve_fetch(None, CONFIG) == "device_put"
    with pytest.raises(NotImplementedError, match=r"needs compute capability 9.0; use fetch='dev"):
        resolve_fetch("in_graph", CONFIG)
    monkeypatch.setattr(_backend, "hopper_reason", lambda: None)
    odd = tiny_config(head_dim=2)  # rows of 8 bytes
    with pytest.raises(NotImplementedError, match=r"multiple of 16 bytes, but H=2 makes 8; use"):
        resolve_fetch("in_graph", odd)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown fetch='dma'; known: in_graph, device_put"):
        resolve_fetch("dma", CONFIG)
