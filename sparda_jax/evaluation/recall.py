# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""How much of the true attention a selector finds: recall and block overlap, by layer and KV head.

One run of the model gives the states; every selector then ranks the blocks of every layer on these
same states, so that what differs is the selector alone.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from sparda_jax.chunk import LayerCache
from sparda_jax.model import SpardaLM, forward
from sparda_jax.rope import Rope, make_rope
from sparda_jax.selectors import Probe, Selector
from sparda_jax.shapes import Mode
from sparda_jax.training.attend import map_spans, mark_blocks
from sparda_jax.training.layer import (
    LayerPlan,
    choose,
    pooled_of,
    selector_of,
)
from sparda_jax.training.teacher import (
    block_mass,
    fine_keys,
    overlap_rows,
    recall_rows,
    rows_with_a_choice,
    teacher_cells,
)

_OWN = "the own query"
"""Names the choice that overlap compares with; no selector is called that."""


@typing.no_type_check
@struct.dataclass
class RecallTotals:
    """Sums over queries that see more than J blocks; they add up over batches.

    Attributes:
        held: teacher mass on the non-pinned chosen blocks, by layer and KV head.
        best: the same for the teacher's own best choice of as many blocks.
        both: non-pinned blocks that the own-query choice has too.
        either: non-pinned blocks in either choice.
        rows: queries that were counted.
    """

    held: Float[Array, "L K"]
    best: Float[Array, "L K"]
    both: Float[Array, "L K"]
    either: Float[Array, "L K"]
    rows: Float[Array, ""]

    def recall(self) -> Float[np.ndarray, "L K"]:
        """Divide: recall by layer and KV head, 0 … 1; not a number where nothing was counted."""
        return _share(self.held, self.best)

    def overlap(self) -> Float[np.ndarray, "L K"]:
        """Divide: intersection over union with the own-query choice, pinned blocks left out."""
        return _share(self.both, self.either)

    def recall_of_layers(self) -> Float[np.ndarray, " L"]:
        """Recall by layer, over all KV heads."""
        return _share(jnp.sum(self.held, axis=1), jnp.sum(self.best, axis=1))

    def mean_recall(self) -> float:
        """Mean over layers of `recall_of_layers`."""
        return float(self.recall_of_layers().mean())


def add_totals(first: RecallTotals, second: RecallTotals) -> RecallTotals:
    """Add the totals of two batches."""
    return jax.tree.map(jnp.add, first, second)


def recall_totals(
    model: SpardaLM,
    tokens: Int[Array, "B T"],
    *,
    selectors: Sequence[str | Selector] = ("forecast",),
    lengths: Int[Array, " B"] | None = None,
    mode: Mode = "sparse",
    tile_bytes: int | None = None,
) -> dict[str, RecallTotals]:
    """Measure what selectors find of the teacher's mass on the states of one run of the model.

    Args:
        model: the decoder; its own heads are what `forecast` ranks with.
        tokens: right-padded rows. Only queries after the first `selected_blocks` blocks count.
        selectors: names or objects. A name stands for the rule of the model: with token importance
            it ranks the query-aware share of the two-step rule.
        lengths: real tokens of each row; all of T if left out.
        mode: what the layers read: `sparse` the model's own choice, `sparda` the forecast's (the
            states of deployment), `dense` everything.
        tile_bytes: bound on the largest array of a tile; by the device if left out.

    Returns:
        Totals by selector name; an object is called after its class.

    Raises:
        ValueError: two selectors have the same name, or a name is unknown.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparda_jax.testing import tiny_model
        >>> measure = jax.jit(lambda model, tokens: recall_totals(model, tokens))
        >>> measure(tiny_model(), jnp.arange(48)[None])["forecast"].recall().shape
        (3, 2)
    """
    config = model.config
    names = [s if isinstance(s, str) else type(s).__name__ for s in selectors]
    if len(set(names)) != len(names):
        raise ValueError(f"{len(names)} selectors need as many names, got {sorted(set(names))}")
    ranked = {
        name: selector_of("sparse", config, by=s) for name, s in zip(names, selectors, strict=True)
    }
    batch, queries = tokens.shape
    if lengths is None:
        lengths = jnp.full((batch,), queries, jnp.int32)
    seen: dict[tuple[str, int], Any] = {}

    def observe(name: str, layer: int, value: object) -> None:
        seen[name, layer] = value

    # The logits of one position only: nobody looks at them.
    forward(
        model,
        tokens,
        lengths=lengths,
        mode=mode,
        logits="last",
        observe=observe,
    )
    at = jnp.broadcast_to(jnp.arange(queries)[None, :], (batch, queries))
    at = jnp.where(at < lengths[:, None], at, -1)
    rope = make_rope(config.rope, config.head_dim, at, lengths)
    plan = LayerPlan(config=config)
    if tile_bytes is not None:
        plan = dataclasses.replace(plan, tile_bytes=tile_bytes)
    layers = []
    for layer in range(config.layers):
        probes = {
            name: _probe(model, selector, layer, seen, rope) for name, selector in ranked.items()
        }
        with jax.named_scope(f"recall_{layer}"):
            layers.append(
                _layer_totals(
                    plan, ranked, probes, seen["q", layer], seen["cache", layer], at, lengths
                )
            )
    rows = jnp.sum(rows_with_a_choice(at, config.sparse)).astype(jnp.float32)
    totals = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return {name: RecallTotals(*sums, rows=rows) for name, sums in totals.items()}


def _probe(
    model: SpardaLM, selector: Selector, layer: int, seen: dict[tuple[str, int], Any], rope: Rope
) -> Probe:
    """Make the probe of a layer's blocks from what its source layer saw."""
    source = selector.source(layer).probe_layer
    return selector.probe(model, source, layer, seen["input", source], seen["q", source], rope)


def _layer_totals(
    plan: LayerPlan,
    selectors: Mapping[str, Selector],
    probes: Mapping[str, Probe],
    q: Float[Array, "B T N H"],
    cache: LayerCache,
    at: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> dict[str, tuple[Array, Array, Array, Array]]:
    """Sum the rows of one layer: held, best, both and either, by KV head."""
    config, sparse = plan.config, plan.config.sparse
    batch, queries = at.shape
    num_blocks = sparse.blocks(queries)
    fine = fine_keys(cache.k, sparse)
    everyone = {**selectors, _OWN: selector_of("sparse", config)}
    summaries = {
        name: selector.extend_summary(
            selector.init_summary(batch, queries, config.dtype), cache.k, at, cache.importance
        )
        for name, selector in everyone.items()
    }
    pooled = pooled_of(summaries[_OWN]).pooled

    def tile(rows: tuple[Array, dict[str, Probe], Array], end: int) -> dict[str, Any]:
        q, probes, at = rows
        held = fine[:, : -(-end // sparse.teacher_pool_stride)]
        cells = teacher_cells(q, held, pooled, at, lengths, config)
        mass = block_mass(cells, num_blocks, sparse)
        marks = {}
        for name, probe in {**probes, _OWN: q}.items():
            choice = choose(plan, everyone[name], probe, summaries[name], at, lengths, num_blocks)
            marks[name] = mark_blocks(choice.ids, num_blocks)
        return {
            name: (
                *recall_rows(mass, marks[name], at, sparse),
                *overlap_rows(marks[name], marks[_OWN], at, sparse),
            )
            for name in selectors
        }

    arrays = (q, dict(probes), at)
    padding = (0, jax.tree.map(lambda _: 0, dict(probes)), -1)
    found = map_spans(tile, arrays, plan.label_tile(*at.shape), padding)
    return jax.tree.map(lambda rows: jnp.sum(rows, axis=(0, 1)), found)


def _share(part: Array, whole: Array) -> np.ndarray:
    """Divide on the host; not a number where there is nothing to divide by."""
    top, bottom = np.asarray(part), np.asarray(whole)
    empty = np.full(bottom.shape, np.nan, bottom.dtype)
    return np.divide(top, bottom, out=empty, where=bottom > 0)
