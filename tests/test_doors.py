# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The doors of the project: what imports what, what an import costs, what the text may say."""

import ast
import graphlib
import importlib
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import pytest

from sparda_jax import shapes

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARIES = [name for name in ("sparda_jax", "pallas_kernels") if (ROOT / name).is_dir()]

# Lower layers never import higher ones; a part that is not named here is held by the other rules.
LAYERS = (
    {"config", "shapes", "errors"},
    {"attention", "layers", "pooling", "rope", "selection"},
    {"selectors"},
    {"chunk"},
    {"kv", "model"},
    {"prefill", "decode_layer"},
    {"decode", "decode_staged"},
    {"setting"},
    {"session"},
    {"generate"},
    {"batcher"},
)
RANKS = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}


def modules(package):
    """Find the modules of a package: dotted name → path."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(name, path, tree=None):
    """Name what a module imports, `from a import b` as both `a` and `a.b`."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree or parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def part_of(name):
    """Name the first part below `sparda_jax`: `sparda_jax.kv.host` is of `kv`."""
    return name.split(".")[1] if name.startswith("sparda_jax.") else ""


def is_within(name, package):
    return name == package or name.startswith(f"{package}.")


def everything(*packages):
    return [
        pytest.param(name, path, id=name)
        for package in packages
        for name, path in modules(package).items()
    ]


def committed():
    """List the text files that git holds or would hold; binary files are left out."""
    try:
        run = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout, to tell committed files from others")
    paths = [ROOT / name for name in run.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]


@pytest.mark.parametrize(("name", "path"), everything(*LIBRARIES))
def test_the_library_never_imports_what_stands_on_it(name, path):
    above = ("experiments", "notebooks", "tests", "conftest")
    assert not [other for other in imports(name, path) if other.split(".")[0] in above]


@pytest.mark.parametrize(("name", "path"), everything("sparda_jax"))
def test_imports_point_down_the_layers(name, path):
    used = {part_of(other) for other in imports(name, path)}
    own = RANKS.get(part_of(name), len(LAYERS))
    assert not [part for part in used if RANKS.get(part, own) > own]


@pytest.mark.parametrize(("name", "path"), everything("sparda_jax"))
def test_nothing_imports_training_or_evaluation_but_themselves(name, path):
    above = ("sparda_jax.training", "sparda_jax.evaluation")  # recall is defined by the teacher
    used = [other for other in imports(name, path) if any(is_within(other, p) for p in above)]
    assert any(is_within(name, package) for package in above) or not used


@pytest.mark.parametrize(("name", "path"), everything(*LIBRARIES))
def test_only_the_testing_module_asserts_with_chex(name, path):
    uses = any(is_within(other, "chex") for other in imports(name, path))
    assert not uses or name == "sparda_jax.testing"


@pytest.mark.parametrize(("name", "path"), everything(*LIBRARIES))
def test_kernels_know_nothing_of_the_library_and_keep_their_privates(name, path):
    used = imports(name, path)
    if is_within(name, "pallas_kernels"):
        assert not [other for other in used if is_within(other, "sparda_jax")]
        return
    private = [
        other
        for other in used
        if is_within(other, "pallas_kernels") and re.search(r"\._(?!compat\b)", other)
    ]
    assert not private


@pytest.mark.parametrize("package", LIBRARIES)
def test_no_module_imports_itself_by_a_detour(package):
    found = modules(package)
    graph = {}
    for name, path in found.items():
        tree = parse(path)
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        # `from package import module` needs the module, not what the package's `__init__` gathers.
        used = imports(name, path, tree) & set(found)
        graph[name] = {o for o in used if not any(u.startswith(f"{o}.") for u in used)} - {name}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(found)


def test_importing_the_library_loads_only_what_it_always_needs():
    heavy = "chex matplotlib orbax rich safetensors tokenizers torch transformers".split()
    heavy += "huggingface_hub lm_eval optax tensorboard tokamax trackio tyro wandb".split()
    code = f"""
import sys
import flax.nnx, flax.struct, jax, jaxtyping, numpy
before = set(sys.modules)
import sparda_jax
print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}} & set({heavy})))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []


@pytest.mark.parametrize("package", LIBRARIES)
def test_every_public_name_is_declared_once_and_exists(package):
    library = importlib.import_module(package)
    declared = list(getattr(library, "__all__", []))
    tree = parse(ROOT / package / "__init__.py")
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    gathered = {alias.asname or alias.name for node in nodes for alias in node.names}
    assert len(set(declared)) == len(declared)
    assert not [name for name in declared if not hasattr(library, name)]
    assert {name for name in gathered if not name.startswith("_")} <= set(declared)


@pytest.mark.parametrize(("name", "path"), everything(*LIBRARIES))
def test_every_public_function_class_and_module_says_what_it_is(name, path):
    def missing(node, prefix):
        for child in node.body:
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            marks = [ast.unparse(mark) for mark in child.decorator_list]
            skipped = {f"{child.name}.setter", "typing.overload"} & set(marks)
            if child.name.startswith("_") or skipped:
                continue
            if not ast.get_docstring(child):
                yield f"{prefix}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from missing(child, f"{prefix}.{child.name}")

    tree = parse(path)
    assert ast.get_docstring(tree)
    assert not list(missing(tree, name))


def test_every_python_file_carries_its_licence():
    for path in committed():
        if path.suffix == ".py":
            head = path.read_text(encoding="utf-8").splitlines()[:3]
            assert "# SPDX-License-Identifier: Apache-2.0" in head, path.relative_to(ROOT)


def test_no_file_is_a_drawer_for_everything():
    assert not [path for path in committed() if path.stem in ("utils", "common")]


def absolute(line):
    """Tell whether a line holds a path that only one machine has; a shebang and a URL are none."""
    return bool(PLACES.search(line)) and not line.startswith("#!")


TOPS = "data etc home media mnt opt private root srv tmp usr var work Users Volumes".split()
PLACES = re.compile(
    rf"(?<![\w.:/<~}}\])*-])/(?:{'|'.join(TOPS)})/\w"  # a path from the root
    r"|\b[A-Z]:\\\w"  # a path from a drive
    r"|\.\./" + "shared"  # a path out of the project
)


def test_no_committed_text_holds_an_absolute_path():
    found = []
    for path in committed():
        name = path.relative_to(ROOT)
        if name.is_relative_to("sparda_jax/shipped"):
            continue  # held-out documents are other people's text
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if absolute(line):
                found.append(f"{name}:{number}: {line.strip()[:80]}")
    assert not found


@pytest.mark.parametrize("top", TOPS)
def test_an_absolute_path_is_told_from_a_url_and_a_relative_path(top):
    assert absolute(f"open('/{top}/x')")
    assert absolute(f"see /{top}/x")
    assert not absolute(f"https://example.org/{top}/x")
    assert not absolute(f"runs/{top}/x and ./{top}/x")
    assert not absolute(f"#!/{top}/bin/env bash")


def test_the_shape_hook_checks_the_library_unless_a_test_turns_it_off(request):
    pytest.importorskip("beartype", reason="beartype is not installed: extra `dev`")
    with pytest.raises(jaxtyping.TypeCheckError, match="blocks_in"):
        shapes.blocks_in("many", 64)
    request.getfixturevalue("no_shape_hook")
    with pytest.raises(TypeError, match="unary"):
        shapes.blocks_in("many", 64)


def test_tests_run_under_strict_promotion_of_dtypes_and_ranks():
    with pytest.raises(ValueError, match="jax_numpy_dtype_promotion=strict"):
        jnp.ones(2, jnp.int32) + jnp.ones(2, jnp.float32)
    with pytest.raises(ValueError, match=r"jax_numpy_rank_promotion=.raise"):
        jnp.ones(2) + jnp.ones((2, 2))


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is missing")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme.read_text(encoding="utf-8"), re.M | re.S)
    assert blocks, "README.md must hold a ```python block"
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {"__name__": "readme"})
