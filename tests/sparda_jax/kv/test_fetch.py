# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The door to moving blocks."""

import pytest

from sparda_jax.kv.fetch import resolve_fetch, unsupported_reason


def test_an_open_choice_and_a_name_give_device_put():
    assert resolve_fetch(None) == resolve_fetch("device_put") == "device_put"


def test_in_graph_is_refused_with_the_reason_and_the_way_out():
    with pytest.raises(NotImplementedError, match=r"in_graph.*kernel.*use fetch='device_put'"):
        resolve_fetch("in_graph")
    assert unsupported_reason("in_graph") is not None


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown fetch='dma'; known: in_graph, device_put"):
        resolve_fetch("dma")
