# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Every op folder keeps the contract of `pallas_kernels/README.md`, however many there are."""

import ast
import collections
import importlib
import io
import pathlib
import re
import tokenize
import types
import typing

import jax
import jax.numpy as jnp
import pytest

from experiments.bench_kernels import known_ops
from experiments.kernel_timing import Effort, measure
from pallas_kernels import _backend, _compat

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "pallas_kernels"
BACKENDS = ("mosaic_gpu", "triton")
OURS = ("sparda_jax", "pallas_kernels", "experiments", "tests")
REFERENCE_LINES = 40
ONCE = Effort(min_operand_bytes=1, max_sets=2, repeats=1, seconds=0.0)


def op_folders(folder):
    """Find the ops: folders that are packages."""
    return [path.parent for path in sorted(folder.glob("[a-z]*/__init__.py"))]


def backends(folder):
    return [name for name in BACKENDS if (folder / f"{name}.py").exists()]


OPS = [pytest.param(folder, id=folder.name) for folder in op_folders(FOLDER)]
KERNELS = [
    pytest.param(folder / f"{name}.py", id=f"{folder.name}-{name}")
    for folder in op_folders(FOLDER)
    for name in backends(folder)
]


def code_lines(source, first, last):
    """Count the lines of a span that hold code: no docstring, no comment, none that is empty."""
    held = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped and token.string:
            held |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            held -= set(range(node.lineno, node.end_lineno + 1))
    return len(held & set(range(first, last + 1)))


def longest_body(source):
    """Count the code lines of the longest function, its signature left out."""
    functions = [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.FunctionDef)]
    return max(code_lines(source, f.body[0].lineno, f.end_lineno) for f in functions)


def imported(source):
    """Name the first part of every module that is imported; `.` is this package."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else (node.module or "").partition(".")[0])
    return found


def paragraphs(docstring):
    """Name the paragraphs that open with a word and a stop or colon, bold or not."""
    return re.findall(r"^(?:\*\*)?(\w+)[.:](?:\*\*)?", docstring or "", flags=re.MULTILINE)


# --- what a folder holds ------------------------------------------------------------------------


@pytest.mark.parametrize("folder", OPS)
def test_a_folder_holds_its_files_and_a_kernel(folder):
    for name in ("__init__.py", "api.py", "config.py", "reference.py", "README.md"):
        assert (folder / name).is_file(), f"{folder.name} lacks {name}"
    assert backends(folder), f"{folder.name} has none of {BACKENDS}"


@pytest.mark.parametrize("path", KERNELS)
def test_a_kernel_opens_with_why_numerics_and_backend(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    found = [name for name in paragraphs(docstring) if name in ("Why", "Numerics", "Backend")]
    assert found == ["Why", "Numerics", "Backend"]


@pytest.mark.parametrize("folder", OPS)
def test_a_reference_fits_on_a_screen_and_stands_alone(folder):
    source = (folder / "reference.py").read_text(encoding="utf-8")
    assert longest_body(source) <= REFERENCE_LINES
    assert not imported(source) & {*OURS, "."}


@pytest.mark.parametrize("folder", OPS)
def test_the_implementations_are_the_files(folder):
    api = importlib.import_module(f"pallas_kernels.{folder.name}.api")
    found = typing.get_args(api.Implementation)
    assert sorted(found) == sorted([*backends(folder), "reference"])
    assert found[-1] == "reference"


@pytest.mark.parametrize("path", KERNELS)
def test_a_kernel_can_say_why_it_refuses(path):
    module = importlib.import_module(f"pallas_kernels.{path.parent.name}.{path.stem}")
    assert callable(module.unsupported_reason)


@pytest.mark.parametrize("folder", OPS)
def test_a_package_gives_its_op_and_its_tiles(folder):
    package = importlib.import_module(f"pallas_kernels.{folder.name}")
    given = [name for name in vars(package) if not name.startswith("_")]
    public = [name for name in given if not isinstance(vars(package)[name], types.ModuleType)]
    assert folder.name in public
    assert "Tiles" in public


@pytest.mark.parametrize("folder", OPS)
def test_tiles_are_frozen_and_have_no_places(folder):
    tiles = importlib.import_module(f"pallas_kernels.{folder.name}.config").Tiles
    parameters = tiles.__dataclass_params__
    assert parameters.frozen
    assert parameters.kw_only
    assert parameters.slots


@pytest.mark.parametrize("folder", OPS)
def test_an_op_counts_its_work(folder):
    config = importlib.import_module(f"pallas_kernels.{folder.name}.config")
    found = [f for f in vars(config).values() if isinstance(f, types.FunctionType)]
    assert any(typing.get_type_hints(f).get("return").__name__ == "Work" for f in found)


# --- its cases ----------------------------------------------------------------------------------


def cases(folder, *, tiny):
    return importlib.import_module(f"experiments.kernel_cases.{folder.name}").cases(tiny=tiny)


def test_only_ops_have_cases():
    known = set(known_ops("experiments.kernel_cases"))
    assert known - {"selection"} <= {f.name for f in op_folders(FOLDER)}  # ops in a row


@pytest.mark.parametrize("folder", OPS)
def test_the_tiny_cases_run_and_are_right(folder):
    made = cases(folder, tiny=True)
    assert made
    for case in made:
        assert case.op == folder.name
        found = measure(case, ONCE, None)
        if found.check_error is not None:
            raise found.check_error


@pytest.mark.parametrize("folder", OPS)
def test_the_real_cases_name_each_backend_and_the_reference_once_a_shape(folder):
    made = cases(folder, tiny=False)
    names = collections.Counter((case.shape, case.implementation) for case in made)
    assert max(names.values()) == 1
    assert {case.op for case in made} == {folder.name}
    plain = {case.implementation.partition("[")[0] for case in made}
    assert plain >= set(backends(folder))
    assert all(case.work.bytes > 0 for case in made)


@pytest.mark.parametrize("path", KERNELS)
def test_the_real_cases_are_lowered_for_cuda(path, monkeypatch):
    """Find wrong shapes and what a backend refuses before a GPU does."""
    for reason in ("hopper_reason", "triton_reason"):
        monkeypatch.setattr(_backend, reason, lambda: None)
    made = cases(path.parent, tiny=False)
    made = [case for case in made if case.implementation.partition("[")[0] == path.stem]
    assert made
    for case in made:
        shapes = jax.eval_shape(lambda case=case: case.operands(0))
        assert "custom_call" in _compat.lowered(case.call, *shapes).as_text(), case.shape


@pytest.mark.parametrize("path", KERNELS)
def test_calls_of_a_program_share_one_lowered_kernel(path, monkeypatch):
    """A model calls an op once a layer: one function of the program, not one for each."""
    for reason in ("hopper_reason", "triton_reason"):
        monkeypatch.setattr(_backend, reason, lambda: None)
    made = [case for case in cases(path.parent, tiny=False) if case.implementation == path.stem]
    call, operands = made[0].call, made[0].operands
    shapes = jax.eval_shape(lambda: operands(0))

    def kernels(layers):
        def model(*operands):
            return [call(*operands) for _ in range(layers)]

        return _compat.lowered(model, *shapes).as_text().count("custom_call @")

    assert kernels(3) == kernels(1) > 0


def test_the_example_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    names = {"scores": jnp.zeros((1, 2, 1, 200)), "positions": jnp.array([[70, 12_799]])}
    exec(code, names)
    assert names["choice"].count.tolist() == [[[2], [96]]]


# --- the tools of this file ---------------------------------------------------------------------


def test_folders_are_found_whether_or_not_there_are_any(tmp_path):
    assert op_folders(tmp_path) == []
    for name in ("score", "_private", "empty", "tuned"):
        (tmp_path / name).mkdir()
    for name in ("score", "_private"):
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "__init__.py").touch()
    (tmp_path / "score" / "triton.py").touch()
    (folder,) = op_folders(tmp_path)
    assert folder.name == "score"
    assert backends(folder) == ["triton"]


def test_lines_of_code_leave_out_what_only_reads():
    source = '''"""Module."""
import jax


def f(
    x,
):
    """Doc.

    More.
    """
    # a comment
    y = (
        x
    )

    return y  # two


def g():
    return 1
'''
    assert longest_body(source) == 4
    assert code_lines(source, 1, 99) == 10


def test_imports_are_found_in_every_form():
    source = "import jax.numpy as jnp\nfrom a.b import c\ndef f():\n    from . import d\n"
    assert imported(source) == {"jax", "a", "."}


def test_paragraphs_are_found_bold_and_plain():
    text = "Title.\n\n**Why.** It is. So.\n\nNumerics: None.\nBackends. No.\n"
    assert paragraphs(text) == ["Title", "Why", "Numerics", "Backends"]
    assert paragraphs(None) == []
