# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The state of a backbone run on the disk: masters and moments, in files that can travel.

The files stay below 16 MB each. A new state takes the place of the one before only when it is
whole.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparda_jax.errors import CheckpointError
from sparda_jax.weights.saving import swap_folder

FILE_BYTES = 15 << 20
_NEWEST, _OLDER = "state", "state.old"


def flatten(tree: Any, dtype: Any = None) -> dict[str, np.ndarray]:
    """Flatten nested dictionaries to names joined by dots; bf16 is kept as its bits, uint16."""
    flat = {}
    for path, value in jax.tree.flatten_with_path(tree)[0]:
        name = ".".join(str(getattr(key, "key", key)) for key in path)
        array = np.asarray(value if dtype is None else value.astype(dtype))
        flat[name] = array.view(np.uint16) if array.dtype == jnp.bfloat16 else array
    return flat


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Save phase, step, masters and moments in files below 16 MB.

    Whenever it is interrupted, `load_state` finds the new state or the one before.

    Args:
        folder: of the run.
        state: `phase`, `step`, `params` and `moments`.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((state["params"], state["moments"]))]
    groups: list[list[int]] = [[]]
    size = 0
    for i, leaf in enumerate(leaves):
        if groups[-1] and size + leaf.nbytes > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += leaf.nbytes
    target, temporary, older = (folder / name for name in (_NEWEST, "state.new", _OLDER))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for number, group in enumerate(groups):
        save_arrays(temporary / f"{number}.npz", {str(i): leaves[i] for i in group})
    header = {"phase": state["phase"], "step": state["step"], "leaves": len(leaves)}
    (temporary / "header.json").write_text(json.dumps(header | {"files": len(groups)}))
    if target.exists():  # else the older one, left by a run that was killed, is all there is
        shutil.rmtree(older, ignore_errors=True)
    swap_folder(temporary, target, older)
    shutil.rmtree(older, ignore_errors=True)


def load_state(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Load what `save_state` saved; a folder without state gives `state` back.

    Args:
        folder: of the run.
        state: as it begins; its masters say which shapes are wanted.

    Raises:
        CheckpointError: the state is of another model, or not whole.
    """
    whole = [folder / name for name in (_NEWEST, _OLDER) if (folder / name).is_dir()]
    if not whole:
        return state
    header = json.loads((whole[0] / "header.json").read_text())
    leaves: dict[int, np.ndarray] = {}
    for number in range(header["files"]):
        with np.load(whole[0] / f"{number}.npz") as arrays:
            leaves |= {int(name): arrays[name] for name in arrays.files}
    structure = jax.tree.structure(state["params"])
    mine = [leaf.shape for leaf in jax.tree.leaves(state["params"])]
    found = [leaves[i].shape for i in range(min(len(mine), len(leaves)))]
    if mine != found or len(leaves) != header["leaves"]:
        wrong = [pair for pair in zip(found, mine, strict=False) if pair[0] != pair[1]][:1]
        raise CheckpointError(
            f"{folder}: {len(leaves)} of {header['leaves']} arrays; first shape that differs "
            f"(saved, wanted): {wrong}; start in another folder or restore the files"
        )
    params = jax.tree.unflatten(structure, [leaves[i] for i in range(len(mine))])
    rest = [leaves[i] for i in range(len(mine), len(leaves))]
    return {
        "phase": header["phase"],
        "step": header["step"],
        "params": params,
        "moments": rest or None,
    }


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write named arrays to an `.npz` file, whatever their names are."""
    np.savez(path, **arrays)
