# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's config.json ↔ `ModelConfig`.

`minicpm` (MiniCPM4.1) has muP scalings and rotates in f32; `llama` (Llama, NOSA) has none and
rotates in the activations' dtype. What a config.json cannot say about one of our models goes into
its entry `sparda_jax`, so that saving and loading give an equal configuration.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

from sparda_jax.config import ModelConfig, RopeConfig, SparseConfig
from sparda_jax.errors import CheckpointError

Dtype = Literal["float32", "bfloat16"]

MODEL_TYPES = ("llama", "minicpm")
"""The values of `model_type` that this library can run."""

_LOG = logging.getLogger(__name__)
_OVERRIDES = "sparda_jax"
_NOSA_8B_PARAMETERS = 5_000_000_000
_REFUSED = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "hidden_act": (None, "silu"),
    "quantization_config": (None,),
}


def parse_config(
    raw: Mapping[str, Any],
    *,
    sparse: SparseConfig | None = None,
    dtype: Dtype | None = None,
    token_importance: bool = False,
) -> ModelConfig:
    """Turn a config.json into a `ModelConfig`.

    Args:
        raw: the parsed JSON.
        sparse: the rule that chooses blocks; `None` reads `sparse_config`. Without either, MiniCPM
            and NOSA get their published rules and a plain Llama attends densely at any length it is
            meant for; each default is logged.
        dtype: of parameters and activations; `None` takes the checkpoint's.
        token_importance: the checkpoint has NOSA's tensors. A `sparse_config` with `select_blocks`
            says so too.

    Returns:
        the configuration.

    Raises:
        CheckpointError: an unknown `model_type` or rope type, a missing size, or a setting that
            the decoder does not have, such as biases.
    """
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(f"model_type={kind!r} is not one of {list(MODEL_TYPES)}")
    for name, allowed in _REFUSED.items():
        if raw.get(name) not in allowed:
            raise CheckpointError(f"{name}={raw[name]!r} is not supported; known: {allowed[-1]!r}")
    entry = raw.get("sparse_config")
    importance = token_importance or "select_blocks" in (entry or {})
    try:
        sizes = _parse_sizes(raw, kind)
        sizes["rope"] = _parse_rope(raw, kind)
        sizes["max_context"] = sizes["rope"].max_positions
        sizes["dtype"] = dtype or _parse_dtype(raw)
        if sparse is None and entry is not None:
            sparse = parse_sparse(entry)
            if importance and sparse.query_blocks is None:
                blocks = _nosa_sparse(sizes).query_blocks
                _LOG.warning("sparse_config lacks select_blocks: %d query-aware blocks", blocks)
                sparse = dataclasses.replace(sparse, query_blocks=blocks)
        elif sparse is None:
            sparse = _default_sparse(kind, importance, sizes)
        config = ModelConfig(**sizes, sparse=sparse, token_importance=importance)
        return _with_overrides(config, raw.get(_OVERRIDES) or {})
    except KeyError as error:
        raise CheckpointError(f"config.json lacks {error.args[0]!r}") from error
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json gives no valid model: {error}") from error


def _parse_sizes(raw: Mapping[str, Any], kind: str) -> dict[str, Any]:
    width, layers, heads = (
        int(raw[name]) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    head_dim = raw.get("head_dim")
    if head_dim is None:
        if width % heads:
            raise ValueError(f"hidden_size={width} must be a multiple of {heads} heads")
        head_dim = width // heads
    tied = raw.get("tie_word_embeddings")
    sizes: dict[str, Any] = {
        "vocab_size": int(raw["vocab_size"]),
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": int(raw.get("num_key_value_heads") or heads),
        "head_dim": int(head_dim),
        "mlp_width": int(raw["intermediate_size"]),
        "rms_norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": kind == "minicpm" if tied is None else bool(tied),
    }
    if kind == "minicpm":
        sizes["embed_scale"] = float(raw.get("scale_emb", 1))
        sizes["residual_scale"] = float(raw.get("scale_depth", 1)) / math.sqrt(layers)
        sizes["logit_divisor"] = width / float(raw.get("dim_model_base", 1))
    return sizes


def _parse_dtype(raw: Mapping[str, Any]) -> Dtype:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name in ("float32", "bfloat16"):
        return name
    if name == "float16":
        _LOG.warning("the checkpoint is float16: loading as bfloat16 (choose with dtype=)")
        return "bfloat16"
    raise ValueError(f"torch_dtype={name!r} is not one of ['bfloat16', 'float16', 'float32']")


def _parse_rope(raw: Mapping[str, Any], kind: str) -> RopeConfig:
    """Read `rope_theta` and `rope_scaling`, or `rope_parameters`, which newer files have."""
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(scaling.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
    name = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    maximum = int(raw.get("max_position_embeddings") or 2048)
    original = scaling.pop("original_max_position_embeddings", None)
    if original is None:
        original = raw.get("original_max_position_embeddings")
    settings: dict[str, Any] = {
        "theta": theta,
        "compute_dtype": "float32" if kind == "minicpm" else "model",
        "original_max_positions": int(original or maximum),
        "max_positions": maximum,
    }
    if name == "longrope":
        for factor in ("short_factor", "long_factor"):
            settings[factor] = tuple(float(number) for number in scaling.pop(factor))
        scaling.pop("factor", None)  # the ratio of the two lengths, which are both known
    elif name == "yarn":
        settings["factor"] = float(scaling.pop("factor"))
        if original is None:
            settings["max_positions"] = round(maximum * settings["factor"])
        for beta, usual in (("beta_fast", 32), ("beta_slow", 1)):
            if (scaling.pop(beta, None) or usual) != usual:
                raise ValueError(f"yarn with another {beta} than {usual} is not supported")
    elif name == "llama3":
        settings["factor"] = float(scaling.pop("factor"))
        settings["slow_turns"] = float(scaling.pop("low_freq_factor"))
        settings["fast_turns"] = float(scaling.pop("high_freq_factor"))
        if original is None:
            raise KeyError("original_max_position_embeddings")
    elif name == "linear":
        settings["factor"] = float(scaling.pop("factor"))
    elif name == "default":
        scaling.pop("factor", None)
    else:
        known = ["default", "linear", "llama3", "longrope", "yarn"]
        why = ": its frequencies change as a text grows, and cached keys would no longer fit"
        raise ValueError(
            f"rope_type={name!r} is not one of {known}{why if name == 'dynamic' else ''}; remove "
            f"rope_scaling from config.json to run within {maximum} positions"
        )
    rope = RopeConfig(kind=name, **settings)
    factor = scaling.pop("attention_factor", None)
    if factor is not None and not math.isclose(factor, rope.attention_factor, rel_tol=1e-6):
        raise ValueError(
            f"attention_factor={factor} is not supported: {name} computes {rope.attention_factor}"
        )
    if unknown := {key: value for key, value in scaling.items() if value is not None}:
        raise ValueError(f"rope settings {unknown} are not supported for rope_type={name!r}")
    return rope


def parse_sparse(entry: Mapping[str, Any]) -> SparseConfig:
    """Turn a `sparse_config` of the original into a `SparseConfig`.

    Its `topk` counts what comes on top of the local window, ours all blocks: selected_blocks =
    topk + window_size // block_size. A `dense_len` of zero or less means never dense.

    Args:
        entry: the dictionary, in a config.json or an indexer checkpoint.

    Returns:
        the rule; keys that are absent take the defaults of `SparseConfig`.

    Raises:
        CheckpointError: `use_nope`, which selects with keys that were not rotated, or numbers that
            no layer could run.

    Example:
        >>> sparse = parse_sparse({"topk": 80, "window_size": 1024, "select_blocks": 24})
        >>> sparse.selected_blocks, sparse.local_blocks, sparse.query_blocks
        (96, 16, 24)
    """
    if entry.get("use_nope"):
        raise CheckpointError("use_nope=True is not supported: keys are pooled after rotation")
    default = SparseConfig()
    block_size = int(entry.get("block_size", default.block_size))
    try:
        local = int(entry.get("window_size", default.local_blocks * block_size)) // block_size
        query = entry.get("select_blocks")
        return SparseConfig(
            block_size=block_size,
            pool_size=int(entry.get("kernel_size", default.pool_size)),
            pool_stride=int(entry.get("kernel_stride", default.pool_stride)),
            sink_blocks=int(entry.get("init_blocks", default.sink_blocks)),
            local_blocks=local,
            selected_blocks=int(entry.get("topk", 64)) + local,
            query_blocks=None if query is None else int(query),
            dense_below=max(0, int(entry.get("dense_len", default.dense_below))),
            teacher_pool_size=int(entry.get("training_kernel_size", default.teacher_pool_size)),
            teacher_pool_stride=int(
                entry.get("training_kernel_stride", default.teacher_pool_stride)
            ),
            teacher_alignment=entry.get("kl_target_align_pooling", default.teacher_alignment),
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"sparse_config gives no valid rule: {error}") from error


def _default_sparse(kind: str, importance: bool, sizes: Mapping[str, Any]) -> SparseConfig:
    if importance:
        sparse = _nosa_sparse(sizes)
        _LOG.warning(
            "NOSA checkpoint without sparse_config: %d selected and %d query-aware blocks "
            "(pass sparse= to choose)",
            sparse.selected_blocks,
            sparse.query_blocks,
        )
        return sparse
    if kind == "minicpm":
        sparse = SparseConfig()
        _LOG.warning(
            "MiniCPM checkpoint without sparse_config: %d selected blocks, dense below %d tokens "
            "(pass sparse= to choose)",
            sparse.selected_blocks,
            sparse.dense_below,
        )
        return sparse
    _LOG.info("no sparse_config: attention is dense (pass sparse= to make it sparse)")
    return SparseConfig(dense_below=sizes["max_context"] + 1)


def _nosa_sparse(sizes: Mapping[str, Any]) -> SparseConfig:
    """Give the published rule: 96 blocks, 24 query-aware for 8B; 64 and 16 for smaller models."""
    width, heads = sizes["width"], sizes["heads"] + sizes["kv_heads"]
    layer = 2 * width * heads * sizes["head_dim"] + 3 * width * sizes["mlp_width"]
    parameters = sizes["layers"] * layer + 2 * sizes["vocab_size"] * width
    large = parameters >= _NOSA_8B_PARAMETERS
    return SparseConfig(
        local_blocks=16,
        selected_blocks=96 if large else 64,
        query_blocks=24 if large else 16,
    )


def parse_eos_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Read the ids that end a text: config.json has one, a list, or none.

    Example:
        >>> parse_eos_ids({"eos_token_id": [2, 73440]})
        (2, 73440)
    """
    ids = raw.get("eos_token_id")
    if ids is None:
        return ()
    return tuple(int(token) for token in ids) if isinstance(ids, list) else (int(ids),)


def sparse_to_json(sparse: SparseConfig) -> dict[str, Any]:
    """Turn a `SparseConfig` into the original's `sparse_config`: the inverse of `parse_sparse`."""
    entry: dict[str, Any] = {
        "kernel_size": sparse.pool_size,
        "kernel_stride": sparse.pool_stride,
        "init_blocks": sparse.sink_blocks,
        "block_size": sparse.block_size,
        "window_size": sparse.local_blocks * sparse.block_size,
        "topk": sparse.selected_blocks - sparse.local_blocks,
        "use_nope": False,
        "dense_len": sparse.dense_below or -1,
        "training_kernel_size": sparse.teacher_pool_size,
        "training_kernel_stride": sparse.teacher_pool_stride,
        "kl_target_align_pooling": sparse.teacher_alignment,
        "create_indexer": True,
        "use_q_future_for_topk": True,
        "use_q_future_decode_only": False,
    }
    if sparse.query_blocks is not None:
        entry["select_blocks"] = sparse.query_blocks
    return entry


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Turn a `ModelConfig` into a config.json: the inverse of `parse_config`.

    Args:
        config: any model. Rotation in f32 makes it a `minicpm`, otherwise it is a `llama`.

    Returns:
        the dictionary. Fields that the chosen `model_type` cannot say exactly stand in an entry
        `sparda_jax`, which other programs ignore.
    """
    minicpm = config.rope.compute_dtype == "float32"
    prefix = "MiniCPM" if minicpm else "SparseLlama" if config.token_importance else "Llama"
    raw: dict[str, Any] = {
        "model_type": "minicpm" if minicpm else "llama",
        "architectures": [f"{prefix}ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": config.rope.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_to_json(config.rope),
        "sparse_config": sparse_to_json(config.sparse),
        "torch_dtype": config.dtype,
    }
    if minicpm:
        raw["scale_emb"] = config.embed_scale
        root = math.sqrt(config.layers)
        depth = config.residual_scale * root
        short = round(depth, 12)
        raw["scale_depth"] = short if short / root == config.residual_scale else depth
        raw["dim_model_base"] = config.width / config.logit_divisor
    said = parse_config(raw)
    overrides = _differences(config, said) | {
        f"rope.{name}": value for name, value in _differences(config.rope, said.rope).items()
    }
    if overrides:
        raw[_OVERRIDES] = overrides
    return raw


def _rope_to_json(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind == "longrope":
        scaling |= {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    else:
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.slow_turns, "high_freq_factor": rope.fast_turns}
    if rope.kind != "linear":
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    return scaling


def _differences(config: Any, said: Any) -> dict[str, Any]:
    """List the fields in which two flat configurations differ, with the values of the first."""
    pairs = {
        field.name: (getattr(config, field.name), getattr(said, field.name))
        for field in dataclasses.fields(config)
        if field.name not in ("rope", "sparse")
    }
    return {name: ours for name, (ours, theirs) in pairs.items() if ours != theirs}


def _with_overrides(config: ModelConfig, overrides: Mapping[str, Any]) -> ModelConfig:
    rope = {key.removeprefix("rope."): overrides[key] for key in overrides if "." in key}
    flat = {key: overrides[key] for key in overrides if "." not in key}
    return dataclasses.replace(config, rope=dataclasses.replace(config.rope, **rope), **flat)
