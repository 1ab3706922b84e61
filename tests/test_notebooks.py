# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs from top to bottom at tiny size, and is committed clean."""

import pathlib
import re

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebooks`")
nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebooks`")

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def notebooks(*marks):
    return [pytest.param(path, id=path.stem, marks=marks) for path in NOTEBOOKS]


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


@pytest.mark.parametrize("path", notebooks(pytest.mark.notebook, pytest.mark.slow))
@pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq")
def test_a_notebook_runs_at_tiny_size(path):
    notebook = read(path)
    place = next(
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("tiny = True"))
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    assert all(cell.execution_count for cell in code_of(notebook))


@pytest.mark.parametrize("path", notebooks())
def test_a_notebook_is_committed_without_counts_or_machine(path):
    notebook = read(path)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert set(notebook.metadata.get("language_info", {})) <= {"name"}
    for cell in code_of(notebook):
        assert cell.execution_count is None
        assert set(cell.metadata) <= {"tags"}
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.get("text")
    assert path.stat().st_size < 120_000


@pytest.mark.parametrize("path", notebooks())
def test_a_notebook_asks_one_question_and_says_what_comes_next(path):
    cells = read(path).cells
    number = path.stem.split("_")[0]
    assert cells[0].source.startswith(f"# {number}. ")
    assert re.search(r"\*\*.+\?\*\*", cells[0].source)
    assert "**Next:**" in cells[-1].source
    for name in re.findall(r"\(([^)]+\.ipynb)\)", "".join(cell.source for cell in cells)):
        assert (path.parent / name).is_file(), name
