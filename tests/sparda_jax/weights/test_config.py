# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""config.json: the budget rules, the two model types, every refusal, and equality after a trip."""

import dataclasses
import json
import logging
import math

import hypothesis
import hypothesis.strategies as st
import pytest

from sparda_jax.config import ModelConfig, RopeConfig, SparseConfig
from sparda_jax.errors import CheckpointError
from sparda_jax.testing import tiny_config
from sparda_jax.weights.config import (
    config_to_json,
    parse_config,
    parse_eos_ids,
    parse_sparse,
    sparse_to_json,
)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
MINICPM = LLAMA | {
    "model_type": "minicpm",
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 16,
    "tie_word_embeddings": False,
}
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3, 5, 7]}


def test_minicpm_gets_its_three_scalings_and_rotates_in_f32():
    config = parse_config(MINICPM)
    assert config.embed_scale == 12.0
    assert config.residual_scale == 1.4 / math.sqrt(2)
    assert config.logit_divisor == 64 / 16
    assert config.rope.compute_dtype == "float32"
    assert config.sparse == SparseConfig()


def test_the_published_minicpm_is_the_preset():
    raw = {
        "model_type": "minicpm",
        "vocab_size": 73448,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "max_position_embeddings": 65536,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "sparse_config": {"window_size": 2048, "topk": 64, "dense_len": 8192},
    }
    assert parse_config(raw) == ModelConfig.minicpm4_1_8b()


def test_llama_has_no_scalings_and_rotates_in_the_models_dtype():
    config = parse_config(LLAMA)
    assert (config.embed_scale, config.residual_scale, config.logit_divisor) == (1.0, 1.0, 1.0)
    assert config.rope.compute_dtype == "model"
    assert config.head_dim == 8
    assert not config.token_importance


def test_tying_follows_the_file_and_the_model_types_default():
    assert not parse_config(LLAMA).tie_embeddings
    assert parse_config(LLAMA | {"tie_word_embeddings": True}).tie_embeddings
    assert not parse_config(MINICPM).tie_embeddings
    assert parse_config(MINICPM | {"tie_word_embeddings": None}).tie_embeddings


def test_head_dim_may_differ_from_width_over_heads():
    assert parse_config(LLAMA | {"head_dim": 32}).head_dim == 32
    with pytest.raises(CheckpointError, match="hidden_size=64 must be a multiple of 7 heads"):
        parse_config(LLAMA | {"num_attention_heads": 7, "num_key_value_heads": 7})


def test_missing_kv_heads_means_one_per_head():
    raw = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    assert parse_config(raw).kv_heads == 8


def test_a_plain_llama_is_dense_at_any_length_unless_told_otherwise(caplog):
    with caplog.at_level(logging.INFO):
        assert parse_config(LLAMA).sparse.dense_below == 4097
    assert "attention is dense" in caplog.text
    mine = SparseConfig(local_blocks=2, selected_blocks=6, dense_below=0)
    assert parse_config(LLAMA, sparse=mine).sparse == mine


def test_minicpm_without_a_rule_gets_the_published_one_and_says_so(caplog):
    parse_config(MINICPM)
    assert "96 selected blocks, dense below 8192 tokens" in caplog.text


@pytest.mark.parametrize(
    ("width", "layers", "selected", "query"), [(4096, 32, 96, 24), (2048, 24, 64, 16)]
)
def test_nosa_without_a_rule_gets_one_by_its_size_and_says_so(
    caplog, width, layers, selected, query
):
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    raw = LLAMA | sizes | {"vocab_size": 73448, "head_dim": 128, "num_attention_heads": 32}
    config = parse_config(raw, token_importance=True)
    assert config.token_importance
    assert config.sparse.selected_blocks == selected
    assert config.sparse.query_blocks == query
    assert config.sparse.local_blocks == 16
    assert f"{selected} selected and {query} query-aware blocks" in caplog.text


def test_nosa_is_known_by_its_tensors_or_by_its_rule(caplog):
    rule = {"window_size": 1024, "topk": 80, "select_blocks": 24}
    assert parse_config(LLAMA | {"sparse_config": rule}).token_importance
    del rule["select_blocks"]
    assert not parse_config(LLAMA | {"sparse_config": rule}).token_importance
    config = parse_config(LLAMA | {"sparse_config": rule}, token_importance=True)
    assert config.sparse.query_blocks == 16
    assert "lacks select_blocks: 16 query-aware blocks" in caplog.text


def test_a_rule_of_the_caller_wins_and_must_fit_token_importance():
    with pytest.raises(CheckpointError, match="query_blocks"):
        parse_config(LLAMA, sparse=SparseConfig(), token_importance=True)


def test_topk_comes_on_top_of_the_local_window():
    sparse = parse_sparse({"block_size": 64, "window_size": 2048, "topk": 64})
    assert (sparse.local_blocks, sparse.selected_blocks, sparse.query_blocks) == (32, 96, None)
    sparse = parse_sparse({"block_size": 64, "window_size": 100, "topk": 5})
    assert (sparse.local_blocks, sparse.selected_blocks) == (1, 6)


@pytest.mark.parametrize(("given", "want"), [(-1, 0), (0, 0), (640, 640)])
def test_a_dense_len_of_zero_or_less_means_never_dense(given, want):
    assert parse_sparse({"dense_len": given}).dense_below == want


def test_the_teachers_grid_is_read():
    sparse = parse_sparse(
        {
            "training_kernel_size": 32,
            "training_kernel_stride": 16,
            "kl_target_align_pooling": "mean",
        }
    )
    assert (sparse.teacher_pool_size, sparse.teacher_pool_stride) == (32, 16)
    assert sparse.teacher_alignment == "mean"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"use_nope": True}, "use_nope=True is not supported"),
        ({"topk": 1, "window_size": 64}, r"selected_blocks=2 must be at least .* = 3"),
        ({"block_size": 0}, "no valid rule"),
        ({"topk": "many"}, "no valid rule"),
        ({"kl_target_align_pooling": "sum"}, "'sum' must be 'max' or 'mean'"),
    ],
)
@pytest.mark.usefixtures("no_shape_hook")
def test_an_impossible_rule_is_refused(entry, message):
    with pytest.raises(CheckpointError, match=message):
        parse_sparse(entry)


def test_an_unknown_model_type_lists_the_known_ones():
    with pytest.raises(CheckpointError, match=r"'mamba' is not one of \['llama', 'minicpm'\]"):
        parse_config(LLAMA | {"model_type": "mamba"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_what_the_decoder_lacks_is_refused(name, value):
    with pytest.raises(CheckpointError, match=f"{name}=.* is not supported"):
        parse_config(LLAMA | {name: value})


def test_a_missing_size_is_named():
    raw = {name: value for name, value in LLAMA.items() if name != "intermediate_size"}
    with pytest.raises(CheckpointError, match=r"config\.json lacks 'intermediate_size'"):
        parse_config(raw)


def test_sizes_that_do_not_fit_show_both_numbers():
    with pytest.raises(CheckpointError, match=r"heads=8 must be a multiple of self\.kv_heads=3"):
        parse_config(LLAMA | {"num_key_value_heads": 3})


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"torch_dtype": "float32"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"torch_dtype": "float16"}, "bfloat16"),
        ({}, "bfloat16"),
    ],
)
def test_the_dtype_is_the_checkpoints(given, want):
    assert parse_config(LLAMA | given).dtype == want
    assert parse_config(LLAMA | given, dtype="float32").dtype == "float32"


def test_an_unknown_dtype_is_refused():
    with pytest.raises(CheckpointError, match="torch_dtype='int8' is not one of"):
        parse_config(LLAMA | {"torch_dtype": "int8"})


@pytest.mark.parametrize("kind", ["llama", "minicpm"])
def test_longrope_is_read(kind):
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 1024, **FACTORS}
    rope = parse_config((MINICPM if kind == "minicpm" else LLAMA) | {"rope_scaling": scaling}).rope
    assert rope.kind == "longrope"
    assert rope.short_factor == (1.0, 1.5, 2.0, 2.5)
    assert rope.long_factor == (1.0, 3.0, 5.0, 7.0)
    assert (rope.original_max_positions, rope.max_positions) == (1024, 4096)


def test_longrope_lists_of_a_wrong_length_show_both_numbers():
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}
    with pytest.raises(CheckpointError, match="rope has 3 factors, but head_dim / 2 = 4"):
        parse_config(LLAMA | {"rope_scaling": scaling})


def test_yarn_stretches_the_positions():
    scaling = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1}
    rope = parse_config(LLAMA | {"rope_scaling": scaling}).rope
    assert (rope.kind, rope.factor) == ("yarn", 4.0)
    assert (rope.original_max_positions, rope.max_positions) == (4096, 16384)
    scaling["original_max_position_embeddings"] = 1024
    rope = parse_config(LLAMA | {"rope_scaling": scaling}).rope
    assert (rope.original_max_positions, rope.max_positions) == (1024, 4096)
    assert parse_config(LLAMA | {"rope_scaling": scaling}).max_context == 4096


def test_llama3_is_read_as_llama_3_1_states_it():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    rope = parse_config(LLAMA | {"rope_scaling": scaling, "rope_theta": 5e5}).rope
    assert (rope.kind, rope.factor, rope.theta) == ("llama3", 8.0, 5e5)
    assert (rope.slow_turns, rope.fast_turns) == (1.0, 4.0)
    assert (rope.original_max_positions, rope.max_positions) == (1024, 4096)


def test_linear_stretches_positions_but_not_the_stated_length():
    config = parse_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (config.rope.kind, config.rope.factor) == ("linear", 2.0)
    assert config.max_context == 4096


def test_newer_files_keep_theta_among_the_rope_parameters():
    raw = LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert parse_config(raw).rope.theta == 5e5
    assert parse_config(LLAMA | {"rope_theta": 4e4, "rope_scaling": None}).rope.theta == 4e4


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "'dynamic' is not one of .*change as a text grows.*run within 4096 positions",
        ),
        (
            {"rope_type": "su", "factor": 2.0},
            r"'su' is not one of .*'yarn'\]; remove rope_scaling",
        ),
        ({"rope_type": "llama3", "factor": 8.0}, "lacks 'low_freq_factor'"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4},
            "lacks 'original_max_position_embeddings'",
        ),
        ({"type": "linear"}, "lacks 'factor'"),
        ({"type": "linear", "factor": 0.5}, r"self\.factor=0\.5 must be at least 1"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}, "another beta_fast than 32"),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}, "'mscale': 0.7"),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}, "factor=1.0 .* 1.138"),
        ({"rope_type": "yarn"}, "config.json lacks 'factor'"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "config.json lacks 'long_factor'"),
    ],
)
def test_rope_settings_that_are_not_computed_are_refused(scaling, message):
    with pytest.raises(CheckpointError, match=message):
        parse_config(LLAMA | {"rope_scaling": scaling})


def test_eos_may_be_one_a_list_or_none():
    assert parse_eos_ids({"eos_token_id": 2}) == (2,)
    assert parse_eos_ids({"eos_token_id": [2, 73440]}) == (2, 73440)
    assert parse_eos_ids({"eos_token_id": None}) == parse_eos_ids({}) == ()


def test_an_unknown_override_is_refused():
    with pytest.raises(CheckpointError, match="colour"):
        parse_config(LLAMA | {"sparda_jax": {"colour": "red"}})


LONG = RopeConfig(
    kind="longrope",
    short_factor=(1.0, 1.1, 1.2, 1.3),
    long_factor=(1.0, 2.0, 3.0, 4.0),
    original_max_positions=512,
    max_positions=2048,
)
NOSA = dataclasses.replace(tiny_config().sparse, query_blocks=1)
TRIPS = {
    "minicpm": ModelConfig.minicpm4_1_8b(),
    "nosa": ModelConfig.nosa_8b(),
    "shipped": ModelConfig.shipped(),
    "tiny": tiny_config(),
    "longrope": tiny_config(rope=LONG, max_context=2048),
    "yarn": tiny_config(
        rope=RopeConfig(kind="yarn", factor=4.0, original_max_positions=256, max_positions=1024)
    ),
    "llama3": tiny_config(
        rope=RopeConfig(
            kind="llama3",
            factor=8.0,
            slow_turns=2.0,
            fast_turns=8.0,
            original_max_positions=128,
            max_positions=1024,
            compute_dtype="model",
        )
    ),
    "linear": tiny_config(
        rope=RopeConfig(kind="linear", factor=2.0, original_max_positions=512, max_positions=1024)
    ),
    "other lengths": tiny_config(rope=RopeConfig(original_max_positions=100), max_context=77),
    "importance, rotated in f32": tiny_config(token_importance=True, sparse=NOSA),
    "scaled llama": tiny_config(
        embed_scale=3.0, residual_scale=0.1, rope=RopeConfig(compute_dtype="model")
    ),
    "tied": tiny_config(tie_embeddings=True),
}


@pytest.mark.parametrize("config", TRIPS.values(), ids=TRIPS)
def test_a_configuration_comes_back_equal(config):
    raw = json.loads(json.dumps(config_to_json(config)))
    assert parse_config(raw) == config


@pytest.mark.parametrize("name", ["minicpm", "nosa", "shipped"])
def test_a_published_model_needs_no_words_of_our_own(name):
    raw = config_to_json(TRIPS[name])
    assert set(raw.get("sparda_jax", {})) == set()
    assert raw["model_type"] == ("llama" if name == "nosa" else "minicpm")


def test_the_published_numbers_are_written_as_published():
    raw = config_to_json(ModelConfig.minicpm4_1_8b())
    assert (raw["scale_emb"], raw["scale_depth"], raw["dim_model_base"]) == (12.0, 1.4, 256.0)
    assert raw["sparse_config"]["topk"] == 64
    assert raw["sparse_config"]["window_size"] == 2048
    assert config_to_json(ModelConfig.nosa_8b())["sparse_config"]["select_blocks"] == 24


@hypothesis.given(
    scale=st.floats(1e-3, 1e3),
    depth=st.floats(1e-3, 10.0),
    divisor=st.floats(1e-2, 1e3),
    layers=st.integers(1, 70),
)
def test_any_scalings_come_back_bit_for_bit(scale, depth, divisor, layers):
    config = tiny_config(
        embed_scale=scale, residual_scale=depth, logit_divisor=divisor, layers=layers
    )
    assert parse_config(json.loads(json.dumps(config_to_json(config)))) == config


@hypothesis.given(data=st.data())
def test_any_rule_comes_back_equal(data):
    draw = data.draw
    stride = draw(st.sampled_from([1, 2, 4]))
    local, sink, free = (draw(st.integers(0, 9)) for _ in range(3))
    query = draw(st.none() | st.integers(1, free + 1))
    sparse = SparseConfig(
        block_size=stride * draw(st.integers(1, 8)),
        pool_stride=stride,
        pool_size=stride * draw(st.integers(1, 4)),
        local_blocks=local,
        sink_blocks=sink,
        selected_blocks=sink + local + 1 + free,
        query_blocks=query,
        dense_below=draw(st.integers(0, 100)),
        teacher_alignment=draw(st.sampled_from(["max", "mean"])),
    )
    assert parse_sparse(json.loads(json.dumps(sparse_to_json(sparse)))) == sparse
