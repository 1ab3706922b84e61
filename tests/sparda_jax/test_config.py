# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Configurations: what they refuse, what follows from them, and the three presets."""

import dataclasses
import math
import re

import pytest

from sparda_jax.config import ModelConfig, RopeConfig, SparseConfig
from sparda_jax.shapes import blocks_in, pooled_in
from sparda_jax.testing import tiny_config

SIXTEEN = tuple(1.0 + i / 16 for i in range(16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"pool_size": -3}, "pool_size=-3 must be at least 1"),
        ({"pool_stride": 0}, "pool_stride=0 must be at least 1"),
        ({"teacher_pool_size": 0}, "teacher_pool_size=0 must be at least 1"),
        ({"sink_blocks": -1}, "sink_blocks=-1 must be at least 0"),
        ({"local_blocks": -2}, "local_blocks=-2 must be at least 0"),
        ({"dense_below": -1}, "dense_below=-1 must be at least 0"),
        (
            {"block_size": 40},
            "self.block_size=40 must be a multiple of self.pool_stride=16",
        ),
        (
            {"pool_size": 40},
            "self.pool_size=40 must be a multiple of self.pool_stride=16",
        ),
        (
            {"selected_blocks": 33},
            "self.selected_blocks=33 must be at least sink_blocks + local_blocks + 1 = 34",
        ),
        ({"query_blocks": 0}, "self.query_blocks=0 must be at least 1"),
        (
            {"query_blocks": 64},
            "sink_blocks + local_blocks + query_blocks = 97 must not exceed "
            "self.selected_blocks=96",
        ),
        (
            {"teacher_pool_stride": 3},
            "self.pool_stride=16 must be a multiple of self.teacher_pool_stride=3",
        ),
        (
            {"teacher_pool_stride": 0},
            "self.pool_stride=16 must be a multiple of self.teacher_pool_stride=0",
        ),
        ({"teacher_alignment": "sum"}, "self.teacher_alignment='sum' must be 'max' or 'mean'"),
    ],
)
@pytest.mark.usefixtures("no_shape_hook")
def test_a_sparse_rule_that_no_layer_could_run_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"theta": 0.0}, "self.theta=0.0 must be positive"),
        (
            {"kind": "ntk"},
            "self.kind='ntk' must be 'default', 'linear', 'llama3', 'longrope' or 'yarn'",
        ),
        ({"kind": "longrope"}, "kind='longrope' with 0 short and 0 long factors"),
        (
            {"kind": "longrope", "short_factor": (1.0,), "long_factor": (1.0, 2.0)},
            "kind='longrope' with 1 short and 2 long factors",
        ),
        (
            {"short_factor": SIXTEEN, "long_factor": SIXTEEN},
            "kind='default' with 16 short and 16 long factors",
        ),
        ({"kind": "yarn", "factor": 0.5}, "self.factor=0.5 must be at least 1"),
        (
            {"kind": "llama3", "slow_turns": 4.0, "fast_turns": 2.0},
            "self.slow_turns=4.0 must be positive and below self.fast_turns=2.0",
        ),
    ],
)
@pytest.mark.usefixtures("no_shape_hook")
def test_rotary_factors_of_another_kind_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RopeConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"heads": 5}, "self.heads=5 must be a multiple of self.kv_heads=2"),
        ({"head_dim": 7}, "self.head_dim=7 must be even"),
        (
            {"rope": RopeConfig(kind="longrope", short_factor=SIXTEEN, long_factor=SIXTEEN)},
            "rope has 16 factors, but head_dim / 2 = 4",
        ),
        (
            {"token_importance": True},
            "self.token_importance=True goes with sparse.query_blocks, which is None",
        ),
        (
            {"sparse": SparseConfig(query_blocks=24)},
            "self.token_importance=False goes with sparse.query_blocks, which is 24",
        ),
        ({"dtype": "float16"}, "self.dtype='float16' must be 'float32' or 'bfloat16'"),
    ],
)
@pytest.mark.usefixtures("no_shape_hook")
def test_sizes_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config(**fields)


def test_a_configuration_is_hashable_and_cannot_be_changed():
    assert tiny_config() == tiny_config()
    assert hash(tiny_config()) == hash(tiny_config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().width = 64  # pyrefly: ignore[read-only]  # the point of the test


def test_minicpm_has_the_published_numbers():
    config = ModelConfig.minicpm4_1_8b()
    assert (config.group, config.sparse.pinned_blocks, config.sparse.selected_blocks) == (
        16,
        34,
        96,
    )
    assert config.sparse.cells_per_block == 4
    assert config.residual_scale == pytest.approx(0.2474874, abs=1e-7)
    assert (config.embed_scale, config.logit_divisor) == (12.0, 16.0)
    assert config.rope.attention_factor == 1.0


def test_nosa_has_the_published_numbers():
    config = ModelConfig.nosa_8b()
    sparse = config.sparse
    assert (sparse.pinned_blocks, sparse.selected_blocks, sparse.query_blocks) == (18, 96, 24)
    assert sparse.sink_blocks + sparse.local_blocks + sparse.query_blocks == 41
    assert (config.embed_scale, config.residual_scale, config.logit_divisor) == (1.0, 1.0, 1.0)
    assert config.rope.compute_dtype == "model"


def test_the_shipped_model_chooses_fewer_blocks_than_it_can_hold():
    config = ModelConfig.shipped()
    assert config.sparse.blocks(config.max_context) > config.sparse.selected_blocks
    assert config.sparse.cells_per_block == 4


@pytest.mark.parametrize(
    ("tokens", "count"),
    [(31, 0), (32, 1), (47, 1), (48, 2), (64, 3), (65536, 4095), (131072, 8191)],
)
def test_pooled_keys_are_counted_by_full_windows(tokens, count):
    assert SparseConfig().pooled(tokens) == pooled_in(tokens, 32, 16) == count


@pytest.mark.parametrize(
    ("tokens", "pooled", "blocks"),
    [(32768, 2047, 513), (65536, 4095, 1025), (98304, 6143, 1537), (131072, 8191, 2049)],
)
def test_the_first_step_after_a_long_prompt_has_the_published_sizes(tokens, pooled, blocks):
    assert SparseConfig().pooled(tokens) == pooled
    assert SparseConfig().blocks(tokens + 1) == blocks


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 1), (64, 1), (65, 2), (65536, 1024)])
def test_the_last_block_may_be_partial(tokens, count):
    assert SparseConfig().blocks(tokens) == blocks_in(tokens, 64) == count


def test_longrope_scales_only_beyond_its_original_length():
    def factor(maximum):
        return RopeConfig(
            kind="longrope",
            short_factor=SIXTEEN,
            long_factor=SIXTEEN,
            original_max_positions=1024,
            max_positions=maximum,
        ).attention_factor

    assert factor(1024) == factor(512) == 1.0
    assert factor(4096) == pytest.approx(math.sqrt(1 + math.log(4) / math.log(1024)))


def test_yarn_scales_by_the_logarithm_of_its_stretch():
    assert RopeConfig(kind="yarn", factor=4.0).attention_factor == pytest.approx(1.1386294)
    assert RopeConfig(kind="yarn", factor=1.0).attention_factor == 1.0
