# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Progress: a function is called as it is, a bar is drawn on terminals only."""

import io
import sys

import pytest

from sparda_jax.weights.progress import reporting


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_function_is_given_back():
    def report(done, total):
        pass

    with reporting(report, "loading") as given:
        assert given is report


def test_nothing_is_drawn_without_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with reporting("bar", "loading") as report:
        assert report is None
    with reporting(None, "loading") as report:
        assert report is None


def test_a_terminal_gets_a_bar(monkeypatch):
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with reporting("bar", "loading") as report:
        assert report is not None
        report(1_000_000, 4_000_000)
        report(4_000_000, 4_000_000)
    assert "loading" in terminal.getvalue()
    assert "4.0/4.0 MB" in terminal.getvalue()
