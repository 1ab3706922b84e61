# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""However a program ends, what it forgot is unlocked once and nothing crashes.

Each test runs a program of its own, with a driver that prints what it is asked to do.
"""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]

BEGIN = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
import jax, jax.numpy as jnp
from sparda_jax.kv import page_lock
from sparda_jax.kv.host import HostKV
from sparda_jax.testing import tiny_config

class Printer:
    def lock(self, address, size): print("lock", flush=True)
    def device_address(self, address): return address
    def synchronize(self): print("synchronize", flush=True)
    def unlock(self, address):
        print("unlock", all(array.is_deleted() for array in operands), flush=True)

page_lock.find_driver = Printer
operands = []
def open_host():
    host = HostKV(tiny_config(), batch=1, capacity=16)
    operands.extend(host.operand(layer) for layer in range(3))
    jax.block_until_ready(jax.jit(lambda x: x[0, 0, 0] * 2)(operands[0]))
    return host
"""

ENDED = ["lock", "synchronize", "unlock True"]


def start(code):
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + code],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        pytest.param("host = open_host()", 0, "", id="it ends"),
        pytest.param(
            "host = open_host()\nsys.exit(3)", 3, "", id="it asks for an exit with a status"
        ),
        pytest.param(
            "with open_host() as host:\n    raise RuntimeError('lost')", 1, "lost", id="it fails"
        ),
        pytest.param(
            "host = open_host()\nx = jnp.ones((256, 256))\n"
            "slow = jax.jit(lambda r, x: jax.lax.fori_loop(0, 40, lambda i, y: "
            "jnp.tanh(y @ x) + r[0, 0, 0, 0, 0, 0], x))\nslow(operands[1], x)",
            0,
            "",
            id="it ends while a program still reads",
        ),
        pytest.param(
            "host = open_host()\nif os.fork() == 0:\n    sys.exit(0)\nos.wait()",
            0,
            "",
            id="a child of a fork ends first",
        ),
    ],
)
def test_what_is_left_open_is_unlocked_once(code, status, error):
    process = start(code)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    assert out.split("\n")[:-1] == ENDED
    assert error in err
    assert "Fatal" not in err


@pytest.mark.parametrize("frame", ["with open_host() as host:", "host = open_host()\nif True:"])
def test_an_interrupt_unlocks(frame):
    process = start(frame + "\n    print('ready', flush=True)\n    time.sleep(60)")
    assert process.stdout.readline() == "lock\n"
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out.split("\n")[:-1] == ENDED[1:]
    assert "KeyboardInterrupt" in err
    assert process.returncode in (1, 130, -signal.SIGINT)
