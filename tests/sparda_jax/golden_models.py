# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The two tiny models of the golden data, read without `sparda_jax.weights`."""

import functools
import json
import math
import pathlib
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from sparda_jax.config import ModelConfig, RopeConfig, SparseConfig
from sparda_jax.model import SpardaLM

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
NAMES = ("minicpm", "nosa")


def read_tensors(path):
    """Read a safetensors file as float32 arrays: name → array."""
    data = pathlib.Path(path).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    dtypes = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        flat = np.frombuffer(data[start:end], dtypes[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"]).astype(np.float32)
    return tensors


def golden_config(name, **changes):
    """Make the configuration of a golden model, always sparse; `changes` replace sparse fields."""
    raw = json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))
    rule = raw["sparse_config"]
    local = rule["window_size"] // rule["block_size"]
    fields = {
        "local_blocks": local,
        "selected_blocks": rule["topk"] + local,
        "query_blocks": rule.get("select_blocks"),
        "dense_below": 0,
    }
    own = {}
    if name == "nosa":
        rope = RopeConfig(compute_dtype="model", max_positions=4096, original_max_positions=4096)
    else:
        scaling = raw["rope_scaling"]
        original = scaling["original_max_position_embeddings"]
        rope = RopeConfig(
            kind="longrope",
            max_positions=raw["max_position_embeddings"],
            original_max_positions=original,
            short_factor=tuple(scaling["short_factor"]),
            long_factor=tuple(scaling["long_factor"]),
        )
        own = {
            "embed_scale": float(raw["scale_emb"]),
            "residual_scale": raw["scale_depth"] / math.sqrt(raw["num_hidden_layers"]),
            "logit_divisor": raw["hidden_size"] / raw["dim_model_base"],
        }
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        width=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw["hidden_size"] // raw["num_attention_heads"],
        mlp_width=raw["intermediate_size"],
        rms_norm_eps=raw["rms_norm_eps"],
        token_importance=name == "nosa",
        rope=rope,
        sparse=SparseConfig(**(fields | changes)),
        max_context=4096,
        dtype="float32",
        **own,
    )


def _put(param, value):
    assert param[...].shape == value.shape, (param[...].shape, value.shape)
    param[...] = jnp.asarray(value)


@functools.cache
def golden_model(name, **changes):
    """Load a golden model in float32; `changes` replace fields of its `SparseConfig`."""
    config = golden_config(name, **changes)
    weights = read_tensors(GOLDEN / name / "model.safetensors")
    weights |= read_tensors(GOLDEN / name / "indexer.safetensors")
    model = SpardaLM(config, rngs=nnx.Rngs(0))
    width, dim = config.width, config.head_dim
    _put(model.embed, weights["model.embed_tokens.weight"])
    _put(model.final_norm.scale, weights["model.norm.weight"])
    _put(model.lm_head, weights["lm_head.weight"].T)
    for number, layer in enumerate(model.layers):
        prefix = f"model.layers.{number}."
        attention, heads = layer.attention, prefix + "self_attn."

        def projection(name, count):
            return weights[name + ".weight"].T.reshape(width, count, dim)

        _put(layer.input_norm.scale, weights[prefix + "input_layernorm.weight"])
        _put(layer.mlp_norm.scale, weights[prefix + "post_attention_layernorm.weight"])
        _put(attention.q_proj, projection(heads + "q_proj", config.heads))
        _put(attention.k_proj, projection(heads + "k_proj", config.kv_heads))
        _put(attention.v_proj, projection(heads + "v_proj", config.kv_heads))
        _put(attention.o_proj, weights[heads + "o_proj.weight"].T.reshape(config.heads, dim, width))
        for part in ("gate", "up", "down"):
            weight = weights[prefix + f"mlp.{part}_proj.weight"]
            _put(getattr(layer.mlp, f"{part}_proj"), weight.T)
        if number < config.layers - 1:
            _put(attention.forecast_proj, projection(heads + "q_future_proj", config.kv_heads))
        if number == 0:
            _put(attention.entry_forecast_proj, projection(heads + "q_curr_proj", config.kv_heads))
        if config.token_importance:
            _put(attention.importance_scale, weights[heads + "A"])
            delta = weights[heads + "delta.weight"].T
            _put(attention.importance_proj, delta.reshape(config.kv_heads, dim, config.kv_heads))
    return model
