# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What every test stands on: checked shapes, strict promotion, keys, a clean slate."""

import collections
import gc
import importlib.util
import os
import pathlib
import zlib

# Most of a test's time is LLVM's, spent on code that then runs for milliseconds. Processes that
# tests start take this over; a test whose programs run for long asks for `optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import chex
import jax
import jaxtyping
import pytest

# The hook rewrites modules while they load, so it must stand before the first import of ours.
_CHECKER = "beartype.beartype" if importlib.util.find_spec("beartype") else None
if _CHECKER:
    jaxtyping.install_import_hook(["sparda_jax", "pallas_kernels"], _CHECKER)

from pallas_kernels import _compat  # noqa: E402, must follow the hook
from tests.wide import is_wide, unmatched  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

if importlib.util.find_spec("hypothesis"):
    import hypothesis

    # The first example compiles, so no deadline; no database: a run depends on nothing else.
    hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("house")


def pytest_configure(config):
    """Run on the CPU unless the gpu tier was asked for."""
    expression = config.getoption("markexpr")
    if "gpu" not in expression.replace("not gpu", ""):
        jax.config.update("jax_platforms", "cpu")
    else:
        os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS")
        jax.config.update("jax_disable_most_optimizations", False)


def pytest_collection_finish():
    """Look for garbage in what tests make, not again and again in what was imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their marks
def pytest_collection_modifyitems(config, items):
    """Mark the wide cases, and begin with the files of the longest tests, dealt out whole."""
    tests = [tuple(item.nodeid.split("::", 1)) for item in items]
    for item, test in zip(items, tests, strict=True):
        if is_wide(*test):
            item.add_marker(pytest.mark.wide)
    if config.getoption("file_or_dir") == [] and (lost := unmatched(tests)):
        raise pytest.UsageError("tests/wide.py names no test by " + "; ".join(lost))
    slow = collections.Counter(
        item.path
        for item in items
        if item.get_closest_marker("slow") and not item.get_closest_marker("wide")
    )
    items.sort(key=lambda item: -slow[item.path])


collect_ignore_glob = ["golden/make_*.py"]  # they need torch, and are run by hand


@pytest.fixture
def key(request):
    """Give each test its own PRNG key, the same in every run."""
    return jax.random.key(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def optimized():
    """Let XLA optimise what this test compiles: it runs for longer than that takes."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def no_shape_hook():
    """Let a wrong shape reach our own error."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def golden():
    """Give the folder of golden values: `golden / "functions" / "name.npz"`."""
    return pathlib.Path(__file__).parent / "golden"


_MANY_MAPS = 20_000  # Linux allows a process 65,530 by default


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Drop compiled programs before the process runs out of memory maps: each takes several."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _clean_slate():
    """Keep trace counts and the interpreter's memory from leaking into the next test."""
    chex.clear_trace_counter()
    yield
    _compat.reset_interpreter()
