# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The original's small checkpoints through the doors that users take: loaded, prefilled, decoded.

Whole prompts and training are compared in `test_golden_prefill.py` and `test_golden_training.py`,
which load the same way.
"""

import json

import numpy as np
import pytest
from flax import nnx

from sparda_jax.model import SpardaLM
from sparda_jax.session import Session
from sparda_jax.testing import assert_same_choices, original_tolerance
from sparda_jax.weights.config import parse_config
from tests.sparda_jax.golden_models import GOLDEN, NAMES, golden_config, golden_model

pytestmark = pytest.mark.parity

each_name = pytest.mark.parametrize("name", NAMES)
STEPS = 50  # past a block, three windows, and the 16 steps after which the fast engine stops


@each_name
def test_both_forms_of_the_indexer_give_identical_models(name):
    folder = GOLDEN / name
    torch, safe = (
        SpardaLM.from_pretrained(folder, heads=folder / f"indexer.{suffix}", progress=None)
        for suffix in ("pt", "safetensors")
    )
    assert torch.config == safe.config
    flat = zip(*(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (torch, safe)), strict=True)
    compared = 0
    for (path, one), (other_path, other) in flat:
        assert path == other_path
        assert one.get_value().dtype == other.get_value().dtype
        assert one.get_value().tobytes() == other.get_value().tobytes(), path
        compared += 1
    assert compared >= 4 * 9 + 3 + 4


@each_name
def test_the_configuration_is_read_from_the_folder(name):
    raw = json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))
    config = golden_config(name)
    assert config == parse_config(raw, dtype="float32")
    assert (config.layers, config.heads, config.kv_heads, config.head_dim) == (4, 8, 2, 32)
    assert config.sparse.selected_blocks == (6 if name == "minicpm" else 8)
    assert config.sparse.query_blocks == (None if name == "minicpm" else 3)
    assert config.rope.kind == ("longrope" if name == "minicpm" else "default")


@each_name
@pytest.mark.parametrize("mode", [pytest.param("sparse", marks=pytest.mark.slow), "sparda"])
def test_decode_steps_are_the_originals(name, mode):
    with np.load(GOLDEN / name / "decode_L20_T140_short.npz") as arrays:
        held = dict(arrays)
    forced = held["forced_tokens"].astype(np.int32)
    ids, logits = [], {}
    with Session(
        golden_model(name),
        list(held["prompt"].astype(np.int32)),
        max_new_tokens=STEPS,
        mode=mode,
        kv="resident",
        parity="reference",
    ) as session:
        first = np.asarray(session.prefill())
        for step in range(STEPS):
            logits[step] = np.asarray(session.step(forced[:, step]))
            ids.append([np.asarray(choice) for choice in session.choices])
    bound = original_tolerance("logits", 703)
    np.testing.assert_allclose(first, held[f"{mode}.prefill_last_logits"], rtol=0, atol=bound)
    at = [int(step) for step in held["logit_steps"] if step < STEPS]
    assert len(at) >= 9
    got = np.stack([logits[step] for step in at], axis=1)
    np.testing.assert_allclose(got, held[f"{mode}.logits"][:, : len(at)], rtol=0, atol=bound)
    got = np.stack(ids)
    want = held[f"{mode}.block_ids"][:STEPS]
    assert (got[..., want.shape[-1] :] == -1).all()
    width = min(got.shape[-1], want.shape[-1])
    assert_same_choices(got[..., :width], want[..., :width])
    assert (want[..., width:] == -1).all()
