# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The registry, and what a mode means for a model."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax import selectors
from sparda_jax.config import SparseConfig
from sparda_jax.model import forward
from sparda_jax.selectors import (
    ForecastSelector,
    NosaSelector,
    PreviousQuerySelector,
    QuerySelector,
    RandomSelector,
    base,
)
from sparda_jax.selectors.base import round_scores, score_cells
from sparda_jax.testing import assert_close_float32, tiny_config, tiny_model

CONFIG = tiny_config()
NOSA = tiny_config(token_importance=True, sparse=SparseConfig(query_blocks=24))


def test_selectors_are_found_by_name():
    assert set(selectors.names()) >= {"forecast", "nosa", "previous_query", "query", "random"}
    assert selectors.names() == tuple(sorted(selectors.names()))
    assert selectors.get("forecast", CONFIG) == ForecastSelector(CONFIG)
    assert selectors.get("random", CONFIG, seed=3) == RandomSelector(CONFIG, seed=3)


def test_an_unknown_name_lists_the_known_ones():
    message = f"unknown selector 'best'; known: {', '.join(selectors.names())}"
    with pytest.raises(ValueError, match=re.escape(message)):
        selectors.get("best", CONFIG)


@pytest.mark.parametrize(
    ("config", "mode", "name", "want"),
    [
        (CONFIG, "dense", None, None),
        (CONFIG, "sparse", None, QuerySelector(CONFIG)),
        (CONFIG, "sparda", None, ForecastSelector(CONFIG)),
        (CONFIG, "sparda", "random", RandomSelector(CONFIG)),
        (CONFIG, "sparse", "previous_query", PreviousQuerySelector(CONFIG)),
        (NOSA, "dense", None, None),
        (NOSA, "sparse", None, NosaSelector(NOSA, inner=QuerySelector(NOSA))),
        (NOSA, "sparda", None, NosaSelector(NOSA, inner=ForecastSelector(NOSA))),
        (NOSA, "sparda", "nosa", NosaSelector(NOSA, inner=QuerySelector(NOSA))),
        (NOSA, "sparse", "random", NosaSelector(NOSA, inner=RandomSelector(NOSA))),
    ],
)
def test_a_mode_means_the_rule_of_the_model(config, mode, name, want):
    assert selectors.resolve(mode, config, name) == want


def test_a_selector_given_as_an_object_is_taken_as_it_is():
    selector = RandomSelector(CONFIG, seed=5)
    assert selectors.resolve("sparda", CONFIG, selector, "reference") is selector


def test_parity_is_passed_on_to_selectors_made_here():
    got = selectors.resolve("sparda", NOSA, None, "reference")
    assert got.parity == got.inner.parity == "reference"


@pytest.mark.usefixtures("no_shape_hook")
def test_an_unknown_mode_lists_the_known_ones():
    message = "mode='fast' must be 'dense', 'sparse' or 'sparda'"
    with pytest.raises(ValueError, match=re.escape(message)):
        selectors.resolve("fast", CONFIG, None)


def test_dense_mode_refuses_a_selector_that_it_would_never_ask():
    message = "mode='dense' reads every block, so selector='query' would never be asked"
    with pytest.raises(ValueError, match=re.escape(message)):
        selectors.resolve("dense", CONFIG, "query")


def test_each_head_is_multiplied_with_the_keys_of_its_group(key):
    probe = jax.random.normal(key, (1, 2, 6, 4))
    pooled = jax.random.normal(jax.random.fold_in(key, 1), (1, 3, 2, 4))
    got = score_cells(probe, pooled)
    assert got.shape == (1, 2, 2, 3, 3)
    want = np.zeros(got.shape)
    for t, n, c in np.ndindex(2, 6, 3):
        want[0, t, n // 3, n % 3, c] = float(jnp.dot(probe[0, t, n], pooled[0, c, n // 3]))
    assert_close_float32(got, want)


def test_products_of_bfloat16_are_summed_in_float32():
    probe = jnp.ones((1, 1, 1, 512), jnp.bfloat16)
    pooled = jnp.full((1, 1, 1, 512), 1 + 2**-7, jnp.bfloat16)
    assert float(score_cells(probe, pooled).ravel()[0]) == 516.0
    assert score_cells(probe, pooled).dtype == jnp.float32


def test_scores_are_rounded_only_where_the_original_does():
    x = jnp.array([1.00390625, 100.3, -7.77])
    np.testing.assert_array_equal(round_scores(x, None), x)
    np.testing.assert_array_equal(round_scores(x, "reference"), x)
    want = x.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(
        jax.jit(lambda a: round_scores(a, "reference_bf16_scores"))(x), want
    )
    assert (want != x).any()


def test_the_selector_of_the_readme_ranks_blocks(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    readme = pathlib.Path(base.__file__).with_name("README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert "largest_key" in selectors.names()
    sparse = dataclasses.replace(CONFIG.sparse, selected_blocks=4)
    model = tiny_model(layers=1, sparse=sparse)
    # Token 1 has ten times the key of token 0, so block 3, full of it, has the largest keys.
    attention = model.layers[0].attention
    model.embed[...] = jnp.zeros((64, 32)).at[0, 0].set(1.0).at[1, 1].set(1.0)
    attention.k_proj[...] = jnp.zeros((32, 2, 8)).at[0].set(1.0).at[1].set(10.0)
    tokens = jnp.zeros((1, 64), jnp.int32).at[0, 24:32].set(1)
    run = functools.partial(forward, mode="sparse", selector="largest_key", return_choices=True)
    _, ids = jax.jit(run)(model, tokens)
    # Sink 0, local 6 and own 7 are pinned.
    assert np.asarray(ids)[0, 0, 63].tolist() == [[0, 3, 6, 7]] * 2


def test_the_readme_lists_every_selector():
    readme = pathlib.Path(base.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", readme, flags=re.MULTILINE)) == list(
        selectors.names()
    )


def test_an_unknown_parity_is_refused_by_name(no_shape_hook):
    with pytest.raises(ValueError, match="parity='exact' must be None or one of reference, "):
        selectors.resolve("sparse", tiny_config(), None, "exact")
