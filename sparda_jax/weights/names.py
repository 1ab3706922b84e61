# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The table from Hugging Face tensor names to parameters, and what a checkpoint must hold.

A row says how a torch tensor's dimensions split into axis letters and in which order our parameter
has them: `q_proj` is stored as [NH D] and held as [D N H]. Reading reshapes and transposes, saving
undoes both, so a round trip gives the same bits.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from sparda_jax.config import ModelConfig
from sparda_jax.errors import CheckpointError
from sparda_jax.weights.tensor_file import FLOATS, TensorEntry

type AnyArray = Float[Array, "..."] | Float[np.ndarray, "..."]
"""A parameter on the device or on the host."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One kind of tensor.

    Attributes:
        torch: its name, `{l}` standing for the layer.
        path: our parameter's path, likewise.
        dims: its dimensions as stored, each a word of axis letters.
        order: for each axis of ours, its place among the letters of `dims`.
        only: `all` checkpoints have it; `importance`: those with token importance; `untied`: those
            whose LM head is not the embedding.
    """

    torch: str
    path: str
    dims: str
    order: tuple[int, ...]
    only: str = "all"


TABLE = (
    Row("model.embed_tokens.weight", "embed", "V D", (0, 1)),
    Row("model.norm.weight", "final_norm.scale", "D", (0,)),
    Row("lm_head.weight", "lm_head", "V D", (1, 0), "untied"),
    Row("model.layers.{l}.input_layernorm.weight", "layers.{l}.input_norm.scale", "D", (0,)),
    Row("model.layers.{l}.post_attention_layernorm.weight", "layers.{l}.mlp_norm.scale", "D", (0,)),
    Row(
        "model.layers.{l}.self_attn.q_proj.weight",
        "layers.{l}.attention.q_proj",
        "NH D",
        (2, 0, 1),
    ),
    Row(
        "model.layers.{l}.self_attn.k_proj.weight",
        "layers.{l}.attention.k_proj",
        "KH D",
        (2, 0, 1),
    ),
    Row(
        "model.layers.{l}.self_attn.v_proj.weight",
        "layers.{l}.attention.v_proj",
        "KH D",
        (2, 0, 1),
    ),
    Row(
        "model.layers.{l}.self_attn.o_proj.weight",
        "layers.{l}.attention.o_proj",
        "D NH",
        (1, 2, 0),
    ),
    Row(
        "model.layers.{l}.self_attn.A",
        "layers.{l}.attention.importance_scale",
        "K",
        (0,),
        "importance",
    ),
    Row(
        "model.layers.{l}.self_attn.delta.weight",
        "layers.{l}.attention.importance_proj",
        "K KH",
        (1, 2, 0),
        "importance",
    ),
    Row("model.layers.{l}.mlp.gate_proj.weight", "layers.{l}.mlp.gate_proj", "F D", (1, 0)),
    Row("model.layers.{l}.mlp.up_proj.weight", "layers.{l}.mlp.up_proj", "F D", (1, 0)),
    Row("model.layers.{l}.mlp.down_proj.weight", "layers.{l}.mlp.down_proj", "D F", (1, 0)),
)

IGNORED = (re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),)
"""Buffers that old checkpoints carry and every model computes."""

_IMPORTANCE = re.compile(r"model\.layers\.\d+\.self_attn\.(A|delta\.weight)")


def has_importance(names: Iterable[str]) -> bool:
    """Tell whether a checkpoint has NOSA's token importance, from its tensor names."""
    return any(_IMPORTANCE.fullmatch(name) for name in names)


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """One tensor of one model, with its sizes filled in.

    Attributes:
        torch: name in the checkpoint.
        path: of our parameter, `layers.3.mlp.up_proj` for instance.
        split: sizes of the axis letters, in stored order.
        order: as in `Row`.
        letters: our axes.
        torch_shape: as stored.
    """

    torch: str
    path: str
    split: tuple[int, ...]
    order: tuple[int, ...]
    letters: str
    torch_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the shape of our parameter."""
        return tuple(self.split[place] for place in self.order)

    def from_torch(self, stored: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Turn a stored tensor into our parameter: split the dimensions, then transpose."""
        return stored.reshape(self.split).transpose(self.order)

    def to_torch(self, ours: AnyArray) -> AnyArray:
        """Turn our parameter into the stored tensor: the inverse of `from_torch`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return ours.transpose(inverse).reshape(self.torch_shape)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Give the size of each axis letter of the parameters."""
    return {
        "V": config.vocab_size,
        "D": config.width,
        "N": config.heads,
        "K": config.kv_heads,
        "H": config.head_dim,
        "F": config.mlp_width,
    }


def target_of(row: Row, config: ModelConfig, layer: int) -> Target:
    """Fill a row with the sizes of a model and the number of a layer."""
    sizes = axis_sizes(config)
    words = row.dims.split()
    letters = "".join(words)
    return Target(
        torch=row.torch.format(l=layer),
        path=row.path.format(l=layer),
        split=tuple(sizes[letter] for letter in letters),
        order=row.order,
        letters="".join(letters[place] for place in row.order),
        torch_shape=tuple(math.prod(sizes[letter] for letter in word) for word in words),
    )


def expected_tensors(config: ModelConfig) -> dict[str, Target]:
    """List every backbone tensor of a model by its name in the checkpoint.

    Args:
        config: sizes, and which of the optional tensors exist.

    Returns:
        targets by torch name, layer by layer. Forecast heads are not among them.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=8, width=4, layers=1, heads=2, kv_heads=1, head_dim=2, mlp_width=6
        ... )
        >>> q = expected_tensors(config)["model.layers.0.self_attn.q_proj.weight"]
        >>> q.torch_shape, q.shape, q.letters
        ((4, 4), (4, 2, 2), 'DNH')
    """
    wanted = {"all": True, "importance": config.token_importance}
    wanted["untied"] = not config.tie_embeddings
    rows = [row for row in TABLE if wanted[row.only]]
    targets = [target_of(row, config, 0) for row in rows if "{l}" not in row.torch]
    for layer in range(config.layers):
        targets += [target_of(row, config, layer) for row in rows if "{l}" in row.torch]
    return {target.torch: target for target in targets}


def check_tensors(
    found: Mapping[str, TensorEntry], targets: Mapping[str, Target], *, where: str
) -> None:
    """Refuse a checkpoint that is not the model's: all its faults in one message.

    Args:
        found: what the checkpoint holds, by torch name.
        targets: what it must hold.
        where: the checkpoint, for the message.

    Raises:
        CheckpointError: a tensor is missing, unexpected, misshapen or not of a float dtype; with
            the expected and the found shape of each.
    """
    lines: list[tuple[str, str]] = []
    for name, target in targets.items():
        want = list(target.torch_shape)
        if name not in found:
            lines.append(("missing", f"{name}, expected {want}"))
        elif list(found[name].shape) != want:
            lines.append(("misshapen", f"{name}, found {list(found[name].shape)}, expected {want}"))
        elif found[name].dtype not in FLOATS:
            note = f"{name}, found {found[name].dtype}, expected one of {sorted(FLOATS)}"
            lines.append(("of the wrong dtype", note))
    for name in found.keys() - targets.keys():
        if not any(pattern.fullmatch(name) for pattern in IGNORED):
            lines.append(("unexpected", f"{name}, found {list(found[name].shape)}"))
    if lines:
        raise CheckpointError(
            f"{where} does not fit its config.json: {len(lines)} faults in "
            f"{len(found)} tensors, {len(targets)} expected\n" + "\n".join(_grouped(lines))
        )


def _grouped(lines: Sequence[tuple[str, str]]) -> list[str]:
    """Merge lines that differ in the layer only, and say for which layers they hold."""
    groups: dict[tuple[str, str], list[int]] = {}
    for kind, text in lines:
        match = re.search(r"layers\.(\d+)\.", text)
        key = (kind, re.sub(r"layers\.\d+\.", "layers.{l}.", text, count=1))
        groups.setdefault(key, []).extend([int(match[1])] if match else [])
    result = []
    for (kind, text), layers in groups.items():
        if len(layers) == 1:
            text = text.replace("{l}", str(layers[0]), 1)
        suffix = f" (l = {', '.join(map(str, sorted(layers)))})" if len(layers) > 1 else ""
        result.append(f"  {kind}: {text}{suffix}")
    return result


def specification(
    target: Target, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> jax.sharding.PartitionSpec:
    """Shard one axis of a parameter over the mesh axis `model`: heads, MLP width or vocabulary.

    Args:
        target: the parameter.
        mesh: devices with an axis `model`.

    Returns:
        a spec with at most one sharded axis: the first of N, K, F, V that the size of the mesh
        axis divides; an empty spec means that every device holds a copy.
    """
    shards = mesh.shape["model"]
    spec: list[str | None] = [None] * len(target.shape)
    for place, (letter, size) in enumerate(zip(target.letters, target.shape, strict=True)):
        if letter in "NKFV" and size % shards == 0:
            spec[place] = "model"
            break
    return jax.sharding.PartitionSpec(*spec)
