# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What a cell of `bench_decode` is, and everything that it needs before the first step.

Weights are drawn on the device, K, V and pooled keys are random numbers of the right size, and the
host's records are copies of one random piece: a context of 128K tokens is there in seconds.
"""

import dataclasses
import functools
import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from experiments.decode_drift import DriftSelector
from sparda_jax.chunk import Plan, make_plan
from sparda_jax.config import ModelConfig, RopeConfig, SparseConfig
from sparda_jax.kv.host import HostKV, record_bytes
from sparda_jax.kv.pack import HostDtype
from sparda_jax.kv.state import KVState, LayerKV, SlotPool
from sparda_jax.model import SpardaLM
from sparda_jax.parts import Layout, Parts, cut
from sparda_jax.selectors import Selector, resolve
from sparda_jax.shapes import Mode

MODELS = ("minicpm4_1_8b", "nosa_8b")
"""Presets of `ModelConfig` that have cells."""

_BANK = 61  # distinct random records, repeated over the slots
_PIECE = 8 << 20  # bytes of the random piece that the host's records repeat
_STEPS = 32  # what a packed number is multiplied by


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to decode.

    Attributes:
        name: as in the rows.
        mode: who chooses the blocks.
        is_offloaded: K and V on the host, slots on the device.
        has_lookahead: fetches begin a layer early.
    """

    name: str
    mode: Mode
    is_offloaded: bool = False
    has_lookahead: bool = True


METHODS = {
    method.name: method
    for method in (
        Method(name="sparda_offload", mode="sparda", is_offloaded=True),
        Method(name="sparse_offload", mode="sparse", is_offloaded=True),
        Method(
            name="sparda_offload_no_prefetch",
            mode="sparda",
            is_offloaded=True,
            has_lookahead=False,
        ),
        Method(name="sparse_resident", mode="sparse"),
        Method(name="sparda_resident", mode="sparda"),
        Method(name="dense_resident", mode="dense"),
    )
}
"""By name, in the order in which a cell runs them: what needs more memory comes later."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one process measures.

    Attributes:
        model: one of `MODELS`.
        context: tokens of each row when decoding begins.
        batch: B; `None` takes the largest that runs.
        methods: names of `METHODS`.
        device_gib: memory that the device may use; `None` takes nearly all.
    """

    model: str
    context: int
    batch: int | None
    methods: tuple[str, ...]
    device_gib: float | None = None

    @property
    def name(self) -> str:
        """Spell the cell as `parse_cell` reads it, methods left out."""
        short = self.context // 1024
        tokens = f"{short}K" if short and self.context % 1024 == 0 else str(self.context)
        words = [f"B{self.batch or 'max'}", tokens]
        if self.model != MODELS[0]:
            words.insert(0, self.model)
        if self.device_gib is not None:
            words.append(f"{self.device_gib:g}GiB")
        return " ".join(words)


def parse_cell(text: str, methods: tuple[str, ...] = ()) -> Cell:
    """Read a cell: `[model] B<batch> <tokens>[K] [<memory>GiB]`.

    Args:
        text: for example `nosa_8b B16 128K`; `Bmax` is the largest batch that runs.
        methods: of the cell; empty takes all at {32K, 128K} × {4, 16} of the first model, the two
            that fill small memory best in a capped cell, and the two offloaded ones elsewhere.

    Raises:
        ValueError: the text is no cell, or a method is unknown.

    Example:
        >>> parse_cell("B8 64K").methods
        ('sparda_offload', 'sparse_offload')
        >>> parse_cell("nosa_8b B16 128K").context
        131072
    """
    found = re.fullmatch(r"(?:(\w+) )?B(\d+|max) (\d+)(K?)(?: ([\d.]+)GiB)?", text)
    if found is None or (found[1] or MODELS[0]) not in MODELS:
        raise ValueError(
            f"{text!r} is no cell; write '[model] B<batch> <tokens>K [<memory>GiB]' with a model "
            f"of {', '.join(MODELS)}, such as 'B16 128K'"
        )
    model, context = found[1] or MODELS[0], int(found[3]) * (1024 if found[4] else 1)
    batch = None if found[2] == "max" else int(found[2])
    if not methods:
        methods = ("sparda_offload", "sparse_offload")
        if found[5] is not None:
            methods = ("sparda_offload", "sparse_resident")
        elif model == MODELS[0] and context // 1024 in (32, 128) and batch in (4, 16):
            methods = tuple(METHODS)
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"methods={unknown} are unknown; known: {', '.join(METHODS)}")
    return Cell(
        model=model,
        context=context,
        batch=batch,
        methods=tuple(name for name in METHODS if name in methods),
        device_gib=float(found[5]) if found[5] else None,
    )


def model_config(model: str, *, is_tiny: bool = False) -> ModelConfig:
    """Give the configuration of a model, its context raised to what is measured.

    Args:
        model: one of `MODELS`.
        is_tiny: two layers and blocks of 8 tokens instead, by the same rule.
    """
    config: ModelConfig = getattr(ModelConfig, model)()
    if is_tiny:
        sparse = SparseConfig(
            block_size=8,
            pool_size=4,
            pool_stride=2,
            local_blocks=3,
            selected_blocks=24,
            query_blocks=6 if config.token_importance else None,
            dense_below=0,
        )
        config = dataclasses.replace(
            config,
            vocab_size=64,
            width=32,
            layers=2,
            heads=4,
            head_dim=16,
            mlp_width=48,
            sparse=sparse,
            dtype="float32",
            rope=RopeConfig(max_positions=1024, original_max_positions=1024),
        )
    return dataclasses.replace(config, max_context=1 << 18)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The sizes of a cell.

    Attributes:
        config: of the model.
        batch: B.
        context: tokens of each row when decoding begins.
        capacity: tokens of room for each row.
        slots: R of an offloaded layer.
        host_dtype: of K and V on the host; `None` is the model's.
    """

    config: ModelConfig
    batch: int
    context: int
    capacity: int
    slots: int
    host_dtype: HostDtype | None = None

    @property
    def num_blocks(self) -> int:
        """Count the blocks of a row (M)."""
        return self.config.sparse.blocks(self.capacity)

    def plan(self, mode: Mode) -> Plan:
        """Make the rule of a mode, with choices that drift."""
        inner = resolve(mode, self.config, None)
        drifting = None
        if inner is not None:
            drifting = DriftSelector(self.config, inner, self.context)
        return make_plan(self.config, mode, max_length=self.capacity, selector=drifting)


def make_setting(
    config: ModelConfig,
    *,
    context: int,
    batch: int,
    steps: int,
    slots: int | None = None,
    host_dtype: HostDtype | None = None,
) -> Setting:
    """Settle the sizes of a cell.

    Args:
        config: of the model.
        context: tokens of each row when decoding begins.
        batch: B.
        steps: tokens that may follow.
        slots: R; `None` takes a third more than a choice, as `Session` does.
        host_dtype: of K and V on the host; `None` takes the model's.
    """
    block_size = config.sparse.block_size
    selected = config.sparse.selected_blocks
    return Setting(
        config=config,
        batch=batch,
        context=context,
        capacity=-(-(context + steps) // block_size) * block_size,
        slots=selected + selected // 3 if slots is None else slots,
        host_dtype=host_dtype,
    )


def make_weights(config: ModelConfig) -> tuple[Layout, Parts]:
    """Draw the weights of a model on the device, and cut it."""
    layout, parts = cut(SpardaLM(config, rngs=nnx.Rngs(0)))
    return layout, jax.block_until_ready(parts)


def weight_bytes(config: ModelConfig) -> int:
    """Count the bytes of all weights."""
    abstract = nnx.eval_shape(lambda: SpardaLM(config, rngs=nnx.Rngs(0)))
    return _nbytes(nnx.state(abstract))


def _nbytes(tree: PyTree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _fill(key: PRNGKeyArray, leaf: jax.ShapeDtypeStruct) -> Float[Array, "B ..."]:
    """Fill [B n ...] by repeating a few random entries."""
    rows = leaf.shape[0] * leaf.shape[1]
    bank = jax.random.normal(key, (1021, *leaf.shape[2:]), leaf.dtype)
    return bank[jnp.arange(rows) % 1021].reshape(leaf.shape)


def _layer_state(
    layer: Array, setting: Setting, selector: Selector | None, is_offloaded: bool
) -> LayerKV:
    """Make what the device holds of one layer after a prompt that nobody ran."""
    config, batch, num_blocks = setting.config, setting.batch, setting.num_blocks
    kv_heads, block_size = config.kv_heads, config.sparse.block_size
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), layer), 4)
    slots = setting.slots if is_offloaded else num_blocks
    bank = jax.random.normal(keys[0], (_BANK, 2, block_size, config.head_dim), config.dtype)
    records = bank[jnp.arange(batch * kv_heads * slots) % _BANK]
    pool = summary = importance = None
    if isinstance(selector, DriftSelector):
        shapes = jax.eval_shape(
            lambda: selector.inner.init_summary(batch, setting.capacity, config.dtype)
        )
        leaves, tree = jax.tree.flatten(shapes)
        filled = [_fill(jax.random.fold_in(keys[1], i), leaf) for i, leaf in enumerate(leaves)]
        inner = jax.tree.unflatten(tree, filled)
        summary = selector.stand_still(inner, layer, batch, setting.capacity)
        if is_offloaded:
            pool = SlotPool(*selector.seed(layer, batch, num_blocks, slots))
    if config.token_importance:
        shape = (batch, kv_heads, num_blocks, block_size)
        importance = jnp.abs(_fill(keys[2], jax.ShapeDtypeStruct(shape, jnp.float32)))
    is_packed = is_offloaded and setting.host_dtype is not None
    return LayerKV(
        slots=records.reshape(batch, kv_heads, slots, *records.shape[1:]),
        pool=pool,
        importance=importance,
        summary=summary,
        scales=jnp.full((batch, kv_heads, num_blocks, 2), 1 / _STEPS) if is_packed else None,
    )


_make_layer = jax.jit(_layer_state, static_argnums=(1, 2, 3))


def make_state(setting: Setting, method: Method) -> KVState:
    """Make the state of a batch as if its prompts had been run.

    Args:
        setting: the sizes.
        method: who chooses, and where K and V live.
    """
    selector = setting.plan(method.mode).selector
    layers: list[LayerKV] = [
        _make_layer(jnp.int32(layer), setting, selector, method.is_offloaded)
        for layer in range(setting.config.layers)
    ]
    rows = functools.partial(jnp.full, (setting.batch,), dtype=jnp.int32)
    return KVState(
        layers=layers,
        lengths=rows(setting.context),
        reach=rows(setting.capacity),
        step=jnp.array(1, jnp.int32),
    )


def state_bytes(setting: Setting, method: Method) -> int:
    """Count the bytes that the device holds between steps, weights left out."""
    return _nbytes(jax.eval_shape(lambda: make_state(setting, method)))


def host_bytes(setting: Setting) -> int:
    """Count the bytes of the host's records."""
    config = setting.config
    records = config.layers * setting.batch * config.kv_heads * setting.num_blocks
    return records * record_bytes(config, setting.host_dtype)


def fill_host(host: HostKV, config: ModelConfig) -> None:
    """Fill the host's records with normal numbers, repeating one piece, from many threads.

    Args:
        host: its memory.
        config: of the model.
    """
    dtype = host.view(0).dtype
    normal = np.random.default_rng(0).standard_normal(_PIECE // dtype.itemsize, np.float32)
    if host.host_dtype is not None:
        normal = np.clip(normal * _STEPS, -127, 127)
    piece = normal.astype(dtype).view(np.uint8)
    views = [host.view(layer).reshape(-1).view(np.uint8) for layer in range(config.layers)]

    def write(job: tuple[np.ndarray, int]) -> None:
        view, first = job
        part = view[first : first + _PIECE]
        part[...] = piece[: part.size]

    jobs = [(view, first) for view in views for first in range(0, view.size, _PIECE)]
    with ThreadPoolExecutor() as threads:
        list(threads.map(write, jobs))


def largest_batch(
    config: ModelConfig, method: Method, room: int, host_room: int, **sizes: Any
) -> int:
    """Compute the largest batch whose state fits, by the bytes of one row.

    Args:
        config: of the model.
        method: who chooses, and where K and V live.
        room: bytes of the device for states.
        host_room: bytes of the host for records.
        **sizes: of `make_setting`, without the batch.
    """
    one = make_setting(config, batch=1, **sizes)
    fitting = room // state_bytes(one, method)
    if method.is_offloaded:
        fitting = min(fitting, host_room // host_bytes(one))
    return int(fitting)
