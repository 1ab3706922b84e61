# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Decoding with a cache against the PyTorch original, on the golden data's weights."""

import dataclasses
import functools

import numpy as np
import pytest

from sparda_jax.session import Session
from sparda_jax.testing import original_tolerance
from tests.sparda_jax.golden_models import GOLDEN, NAMES, golden_model

pytestmark = pytest.mark.parity

SKIPPED = -2  # the file's mark of a step that attended densely


@dataclasses.dataclass(frozen=True)
class Case:
    """One file of the golden data in one mode.

    Attributes:
        file: its name without "decode_" and ".npz".
        mode: of the library.
        arrays: prefix in the file; the mode if empty.
        prefill: selector of the prompt, if another one.
        dense_below: of the configuration.
        kv: where K and V live.
    """

    file: str
    mode: str
    arrays: str = ""
    prefill: str | None = None
    dense_below: int = 0
    kv: str = "resident"


PLAIN = [Case("L660_T140", mode) for mode in ("dense", "sparse", "sparda")]
OTHERS = [
    Case("L600_T140_greedy", "sparse"),
    Case("L600_T140_greedy", "sparda", kv="offload"),
    Case("L20_T140_short", "sparda"),
    Case("L560_T70_forecast_decode_only", "sparda", prefill="query"),
    Case("L600_T70_denselen640", "sparse", dense_below=640),
    Case("L600_T70_denselen640", "sparda", dense_below=640, kv="offload"),
]
TWO_ROWS = {
    "minicpm": [Case("L592_T70_B2", "sparse"), Case("L592_T70_B2", "sparda")],
    # The original selects sequence 1 by the importance of sequence 0; these arrays do not.
    "nosa": [
        Case("L592_T40_B2", mode, arrays=f"{mode}_corrected") for mode in ("sparse", "sparda")
    ],
}


def named(name, case, *marks):
    return pytest.param(name, case, id=f"{name} {case.file} {case.mode} {case.kv}", marks=marks)


CASES = [
    *(named(name, case) for name in NAMES for case in PLAIN),
    *(named(name, case, pytest.mark.slow) for name in NAMES for case in OTHERS),
    *(named(name, case, pytest.mark.slow) for name in NAMES for case in TWO_ROWS[name]),
]


@functools.cache
def replayed(name, case):
    """Feed the file's tokens: the file, prefill logits [B V], logits [B T V], ids [T L B K J]."""
    with np.load(GOLDEN / name / f"decode_{case.file}.npz") as arrays:
        stored = dict(arrays)
    prefix = case.arrays or case.mode
    tokens = stored.get("forced_tokens", stored.get(f"{prefix}.generated"))
    logits, ids = [], []
    with Session(
        golden_model(name, dense_below=case.dense_below),
        list(stored["prompt"].astype(np.int32)),
        max_new_tokens=tokens.shape[1],
        mode=case.mode,
        kv=case.kv,
        parity="reference",
        prefill_selector=case.prefill,
    ) as session:
        first = np.asarray(session.prefill())
        for step in range(tokens.shape[1]):
            logits.append(np.asarray(session.step(tokens[:, step].astype(np.int32))))
            ids.append([np.asarray(layer) for layer in session.choices])
    return stored, prefix, first, np.stack(logits, axis=1), np.array(ids)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_agree_with_the_original(name, case):
    stored, prefix, first, logits, _ = replayed(name, case)
    bound = original_tolerance("logits", stored["prompt"].shape[1])
    if f"{prefix}.prefill_last_logits" in stored:
        np.testing.assert_allclose(first, stored[f"{prefix}.prefill_last_logits"], atol=bound)
    steps = stored["logit_steps"][:: 3 if case.mode == "dense" else 1]
    np.testing.assert_allclose(logits[:, steps], stored[f"{prefix}.logits"], atol=bound)
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), stored[f"{prefix}.argmax"])


@pytest.mark.parametrize(("name", "case"), [c for c in CASES if c.values[1].mode != "dense"])
def test_every_chosen_block_agrees_with_the_original(name, case):
    stored, prefix, _, _, ids = replayed(name, case)
    want = stored[f"{prefix}.block_ids"].astype(np.int32)
    width = max(ids.shape[-1], want.shape[-1])

    def widen(x):
        return np.pad(x, [(0, 0)] * 4 + [(0, width - x.shape[-1])], constant_values=-1)

    ids, dense = widen(ids), np.any(want == SKIPPED, axis=(1, 2, 3, 4))
    np.testing.assert_array_equal(ids[~dense], widen(want)[~dense])
    assert np.any(dense) == (case.dense_below > 0)
    for step in np.flatnonzero(dense):  # a dense step reads every block up to its own
        own = (stored["prompt"].shape[1] + step) // 64
        every = np.where(np.arange(width) <= own, np.arange(width), -1)
        np.testing.assert_array_equal(ids[step], np.broadcast_to(every, ids[step].shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_the_originals(name):
    stored, prefix, first, logits, _ = replayed(
        name, Case("L600_T140_greedy", "sparda", kv="offload")
    )
    ours = np.concatenate([first[:, None], logits[:, :-1]], axis=1).argmax(axis=-1)
    np.testing.assert_array_equal(ours, stored[f"{prefix}.generated"])
