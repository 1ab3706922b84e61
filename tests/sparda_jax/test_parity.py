# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The fast engine's scale of NOSA's bias, and the table of all deviations."""

import functools
import pathlib
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparda_jax
from sparda_jax.chunk import make_plan
from sparda_jax.config import SparseConfig
from sparda_jax.decode_layer import Begun, Now, finish_layer
from sparda_jax.kv.plan import Places
from sparda_jax.kv.state import LayerKV
from sparda_jax.rope import make_rope
from sparda_jax.session import Session
from sparda_jax.shapes import Parity
from sparda_jax.testing import assert_close_float32, tiny_config, tiny_model
from tests import oracles

ROOT = pathlib.Path(sparda_jax.__file__).parent.parent
RULE = SparseConfig(
    block_size=8,
    pool_size=4,
    pool_stride=2,
    local_blocks=1,
    selected_blocks=5,
    query_blocks=2,
    dense_below=0,
)
NOSA = {"token_importance": True, "sparse": RULE}
VALUES = typing.get_args(typing.get_args(Parity)[0])


@functools.cache
def plain_layer(config):
    """Make a layer whose output is what was attended, heads side by side."""
    layer = tiny_model(**NOSA).layers[0]
    side_by_side = jnp.eye(32).reshape(config.heads, config.head_dim, config.width)
    layer.attention.o_proj[...] = side_by_side
    layer.mlp.down_proj[...] = jnp.zeros((config.mlp_width, config.width))
    return layer


def attended(key, parity, lengths=(27, 38), all_blocks=(False, False)):
    """Attend with one new token of two rows: ours, and by the loop with a given bias scale."""
    config = tiny_config(**NOSA)
    plan = make_plan(config, "sparse", max_length=40, parity=parity)
    q, k, v = (
        jax.random.normal(k, (2, 1, n, 8))
        for k, n in zip(jax.random.split(key, 3), (4, 2, 2), strict=True)
    )
    slots = jax.random.normal(jax.random.fold_in(key, 1), (2, 2, 5, 2, 8, 8))
    importance = 2.0 * jax.random.normal(jax.random.fold_in(key, 2), (2, 2, 5, 8))
    new = jnp.array([[[1.5, -2.0]], [[-0.5, 3.0]]])
    at = jnp.array(lengths)
    ids = np.full((2, 2, 5), -1, np.int32)
    for row, length in enumerate(lengths):
        held = [0, *range(2, length // 8 + 1)]
        ids[row, :, : len(held)] = held
    tail = jnp.broadcast_to(at[:, None] // 8, (2, 2))
    now = Now(
        rope=make_rope(config.rope, 8, at[:, None], at + 1),
        lengths=at,
        own=at // 8,
        attend_all=jnp.array(all_blocks),
        step=jnp.int32(1),
    )
    layer = plain_layer(config)
    step = jax.jit(lambda *given: finish_layer(layer, plan, jnp.zeros((2, 1, 32)), *given))
    y, kv = step(
        Begun(q=q, k=k, v=v, importance=new),
        LayerKV(slots=slots, pool=None, importance=importance, summary=None),
        Places(ids=jnp.asarray(ids), slots=jnp.asarray(ids), tail=tail),
        now,
    )

    def by_loop(scale):
        rows = []
        for row in range(2):
            keys, values = (
                np.asarray(kv.slots)[row, :, :, part].reshape(2, 40, 8).transpose(1, 0, 2)
                for part in (0, 1)
            )
            bias = scale * np.asarray(kv.importance)[row].reshape(2, 40).T
            chosen, where = ids[row][None], [lengths[row]]
            rows.append(oracles.attend(np.asarray(q)[row], keys, values, chosen, where, 8, bias))
        return np.stack(rows)

    return y.reshape(2, 1, 4, 8), by_loop


@pytest.mark.parametrize(
    ("parity", "scale"),
    [
        (None, 1.0),
        ("reference", 1.0),
        ("reference_bf16_scores", 1.0),
        ("reference_fast_engine", 8**-0.5),
    ],
)
def test_only_the_fast_engine_divides_the_bias_of_a_step_by_the_root_of_the_head_dim(
    key, parity, scale
):
    y, by_loop = attended(key, parity)
    assert_close_float32(y, by_loop(scale))
    other = by_loop(8**-0.5 if scale == 1.0 else 1.0)
    assert np.abs(np.asarray(y) - other).max() > 0.05


def test_a_row_that_reads_everything_has_no_bias_in_any_parity_mode(key):
    for parity in VALUES:
        y, by_loop = attended(key, parity, all_blocks=(True, True))
        assert_close_float32(y, by_loop(0.0))


def heard(model, parity, kv):
    with Session(
        model, [[5, 1, 7] * 11], max_new_tokens=3, mode="sparse", kv=kv, parity=parity
    ) as session:
        return [np.asarray(session.prefill())] + [
            np.asarray(session.step(np.array([token]))) for token in (3, 9)
        ]


def test_the_fast_engines_prefill_is_the_model_codes_and_its_decode_is_not():
    model = tiny_model(layers=2, **NOSA)
    for layer in model.layers:
        layer.attention.importance_scale[...] = jnp.array([2.0, -1.5])
    usual = heard(model, "reference", "resident")
    engine = heard(model, "reference_fast_engine", "resident")
    np.testing.assert_array_equal(engine[0], usual[0])
    for step in (1, 2):
        assert np.abs(engine[step] - usual[step]).max() > 1e-3
    for got, want in zip(heard(model, "reference_fast_engine", "offload"), engine, strict=True):
        assert_close_float32(got, want)


def test_the_table_of_deviations_names_tests_that_exist_and_every_parity_value():
    text = (ROOT / "sparda_jax" / "PARITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 10
    for path, test in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {test}\(", source, re.M), (path, test)
    for value in VALUES:
        assert f'`"{value}"`' in text
