# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""A model cut into its head and its layers, so that a program takes only the weights it reads.

A decode step is called thousands of times: flattening a module each time would cost more than the
call. `cut` flattens once; `Layout` is the static rest, and compiled programs are kept by it.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from sparda_jax.model import DecoderLayer, SpardaLM

EXACT = {"xla_allow_excess_precision": False}
"""Compiler options of every program of generation: bf16 rounds where the code says so.

By default XLA keeps the f32 of fused bf16 operations, so two programs that cut a step at different
places round differently. With this, one program and layer by layer give the same bits."""

HEAD = -1
"""The part that holds embedding, final norm and LM head."""

Parts = dict[int, list[Float[Array, "..."]]]
"""Weights by part: `HEAD` or the number of a layer."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """The static side of a cut model: hashable, equal for models of one configuration.

    Attributes:
        graph: structure of the module.
        tree: structure of its state.
        parts: the part of each leaf.
        shapes: shape and dtype of each leaf.
    """

    graph: nnx.GraphDef
    tree: jax.tree_util.PyTreeDef
    parts: tuple[int, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Hash once: of 32 layers it takes milliseconds, and every step looks its program up."""
        found = hash((self.graph, self.tree, self.parts, self.shapes))
        object.__setattr__(self, "_hash", found)

    def __hash__(self) -> int:
        """Give the hash, equal for equal layouts."""
        return self._hash

    def merge(self, parts: Mapping[int, list[Float[Array, "..."]]]) -> SpardaLM:
        """Put a model together again; parts that are left out stay abstract and must not be read.

        Args:
            parts: weights of the parts that will be read.
        """
        given = {part: iter(leaves) for part, leaves in parts.items()}
        leaves = [
            next(given[part]) if part in given else shape
            for part, shape in zip(self.parts, self.shapes, strict=True)
        ]
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))


def _part_of(path: tuple[object, ...]) -> int:
    """Name the part of a leaf by its path in the state."""
    keys = [getattr(step, "key", None) for step in path[:2]]
    return int(str(keys[1])) if keys[0] == "layers" else HEAD


def cut(model: SpardaLM) -> tuple[Layout, Parts]:
    """Cut a model into its head and its layers.

    Args:
        model: the decoder; its arrays are shared, not copied.

    Returns:
        The layout, and the weights by part.

    Example:
        >>> from sparda_jax.testing import tiny_model
        >>> layout, parts = cut(tiny_model())
        >>> sorted(parts)
        [-1, 0, 1, 2]
        >>> layout == cut(tiny_model(1))[0]
        True
    """
    graph, state = nnx.split(model)
    flat, tree = jax.tree_util.tree_flatten_with_path(state)
    owners = tuple(_part_of(path) for path, _ in flat)
    parts: Parts = {part: [] for part in (HEAD, *range(model.config.layers))}
    for part, (_, leaf) in zip(owners, flat, strict=True):
        parts[part].append(leaf)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for _, leaf in flat)
    return _intern(Layout(graph=graph, tree=tree, parts=owners, shapes=shapes)), parts


@functools.lru_cache(maxsize=32)
def _intern(layout: Layout) -> Layout:
    """Give the first layout that was equal: to be found equal again takes as long as to hash."""
    return layout


def pick(parts: Parts, wanted: Iterable[int]) -> Parts:
    """Take the parts that a program reads."""
    return {part: parts[part] for part in sorted(set(wanted))}


def without_heads(block: DecoderLayer) -> DecoderLayer:
    """Copy a layer without its Forecast: what is left of all layers but their weights is equal.

    Args:
        block: the layer; its arrays are shared.
    """
    copy: DecoderLayer = nnx.merge(*nnx.split(block))
    for name in ("forecast_proj", "entry_forecast_proj"):
        setattr(copy.attention, name, nnx.data(None))
    return copy


def _is_committed(leaf: object) -> bool:
    """Tell whether an array has a place; one that is traced has none."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed


def commit[T](tree: T, beside: object) -> T:
    """Commit arrays to the device that others are committed to; nothing is copied there.

    What a program returns is committed if any of its arguments is. A state that goes round would
    be free in the first call and committed in the second, and the program compiled once for each.

    Args:
        tree: arrays, free or committed.
        beside: arrays that a program takes with them; if all are free, `tree` stays as it is.
    """
    pinned = [leaf.sharding for leaf in jax.tree.leaves(beside) if _is_committed(leaf)]
    if not pinned:
        return tree
    place = pinned[0]
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec())
    return jax.tree.map(lambda x: x if _is_committed(x) else jax.device_put(x, place), tree)
