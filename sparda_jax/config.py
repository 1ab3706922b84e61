# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What a model is: frozen, checked, hashable configurations and three presets.

`SparseConfig` holds the rule that chooses blocks, `RopeConfig` the rotary positions, `ModelConfig`
the decoder. One decoder serves both published backbones; what differs between them is a number or
a flag here, never a subclass.
"""

import dataclasses
import math
from typing import Literal

from sparda_jax.shapes import blocks_in, pooled_in


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SparseConfig:
    """Which blocks a query reads, and on which grid its keys are pooled.

    Attributes:
        block_size: tokens in one KV block (W).
        pool_size: tokens averaged into one pooled key.
        pool_stride: tokens between the starts of neighbouring pooled keys.
        sink_blocks: leading blocks that are always chosen.
        local_blocks: blocks before the query's own that are always chosen; the own block is pinned
            too, so `pinned_blocks` = sink + local + 1.
        selected_blocks: all blocks that a query reads per KV head, pinned included (J).
        query_blocks: NOSA's query-aware share beyond sink and local; the own block takes one of
            them. `None` for models without token importance.
        dense_below: a context shorter than this many tokens attends densely; 0 means never.
        teacher_pool_size: tokens averaged into one key of the teacher's fine grid.
        teacher_pool_stride: its stride.
        teacher_alignment: how fine mass is brought to the pooled grid.

    References:
        SparDA, arXiv:2606.04511, section 4; InfLLM-V2, arXiv:2509.24663; NOSA, arXiv:2510.13602.

    Example:
        >>> SparseConfig(selected_blocks=3, local_blocks=2, sink_blocks=1)
        Traceback (most recent call last):
        ValueError: self.selected_blocks=3 must be at least sink_blocks + local_blocks + 1 = 4
    """

    block_size: int = 64
    pool_size: int = 32
    pool_stride: int = 16
    sink_blocks: int = 1
    local_blocks: int = 32
    selected_blocks: int = 96
    query_blocks: int | None = None
    dense_below: int = 8192
    teacher_pool_size: int = 2
    teacher_pool_stride: int = 1
    teacher_alignment: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        """Refuse what no layer could run."""
        for name in ("block_size", "pool_size", "pool_stride", "teacher_pool_size"):
            _check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("sink_blocks", "local_blocks", "dense_below"):
            _check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be at least 0")
        _check(
            self.block_size % self.pool_stride == 0,
            f"{self.block_size=} must be a multiple of {self.pool_stride=}",
        )
        _check(
            self.pool_size % self.pool_stride == 0,
            f"{self.pool_size=} must be a multiple of {self.pool_stride=}",
        )
        _check(
            self.selected_blocks >= self.pinned_blocks,
            f"{self.selected_blocks=} must be at least sink_blocks + local_blocks + 1 = "
            f"{self.pinned_blocks}",
        )
        if self.query_blocks is not None:
            shortlist = self.sink_blocks + self.local_blocks + self.query_blocks
            _check(self.query_blocks >= 1, f"{self.query_blocks=} must be at least 1")
            _check(
                shortlist <= self.selected_blocks,
                f"sink_blocks + local_blocks + query_blocks = {shortlist} must not exceed "
                f"{self.selected_blocks=}",
            )
        _check(
            self.teacher_pool_stride >= 1 and self.pool_stride % self.teacher_pool_stride == 0,
            f"{self.pool_stride=} must be a multiple of {self.teacher_pool_stride=}",
        )
        _check(
            self.teacher_alignment in ("max", "mean"),
            f"{self.teacher_alignment=} must be 'max' or 'mean'",
        )

    @property
    def pinned_blocks(self) -> int:
        """Blocks that are always chosen: sink, local and the query's own."""
        return self.sink_blocks + self.local_blocks + 1

    @property
    def cells_per_block(self) -> int:
        """Pooled keys that start in one block."""
        return self.block_size // self.pool_stride

    def blocks(self, tokens: int) -> int:
        """Count the blocks of `tokens` tokens (M)."""
        return blocks_in(tokens, self.block_size)

    def pooled(self, tokens: int) -> int:
        """Count the full pooling windows of `tokens` tokens (C)."""
        return pooled_in(tokens, self.pool_size, self.pool_stride)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary positions: base frequencies and how they are stretched.

    Attributes:
        theta: base of the geometric frequencies.
        kind: `default`; `linear` (positions divided by `factor`); `llama3` (slow frequencies
            divided by `factor`); `yarn` (the same along another ramp); `longrope` (per-frequency
            factors).
        original_max_positions: length that the unstretched frequencies were trained for. LongRoPE
            uses `long_factor` for sequences longer than this.
        max_positions: length that the model claims; sets LongRoPE's attention factor.
        short_factor: LongRoPE factors, H/2 of them, for short sequences.
        long_factor: the same for long ones.
        factor: the stretch of `linear`, `llama3` and `yarn`.
        slow_turns: `llama3` divides frequencies that turn less often than this over
            `original_max_positions`.
        fast_turns: and keeps those that turn more often than this.
        compute_dtype: `float32` rotates in f32 (MiniCPM); `model` rotates in the activations' dtype
            with tables rounded to it (Llama, NOSA).

    References:
        LongRoPE, arXiv:2402.13753; YaRN, arXiv:2309.00071.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "longrope", "yarn"] = "default"
    original_max_positions: int = 65536
    max_positions: int = 65536
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    factor: float = 1.0
    slow_turns: float = 1.0
    fast_turns: float = 4.0
    compute_dtype: Literal["float32", "model"] = "float32"

    def __post_init__(self) -> None:
        """Refuse factors that do not belong to the kind."""
        _check(self.theta > 0, f"{self.theta=} must be positive")
        _check(
            self.kind in ("default", "linear", "llama3", "longrope", "yarn"),
            f"{self.kind=} must be 'default', 'linear', 'llama3', 'longrope' or 'yarn'",
        )
        has = bool(self.short_factor) or bool(self.long_factor)
        _check(
            has == (self.kind == "longrope") and len(self.short_factor) == len(self.long_factor),
            f"kind={self.kind!r} with {len(self.short_factor)} short and {len(self.long_factor)} "
            "long factors: longrope needs two lists of head_dim / 2 factors, other kinds none",
        )
        _check(self.factor >= 1.0, f"{self.factor=} must be at least 1")
        _check(
            0.0 < self.slow_turns < self.fast_turns,
            f"{self.slow_turns=} must be positive and below {self.fast_turns=}",
        )

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by."""
        if self.kind == "longrope":
            ratio = self.max_positions / self.original_max_positions
            if ratio <= 1.0:
                return 1.0
            return math.sqrt(1.0 + math.log(ratio) / math.log(self.original_max_positions))
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        return 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder: sizes, scalings, positions and the sparse rule.

    Attributes:
        vocab_size: V. width: D. layers: L. heads: N. kv_heads: K. head_dim: H. mlp_width: F.
        rms_norm_eps: added to the variance in RMSNorm.
        embed_scale: multiplies the embeddings (muP).
        residual_scale: multiplies what a sub-layer adds to the residual stream (muP).
        logit_divisor: divides the final hidden state before the LM head (muP).
        tie_embeddings: the LM head is the embedding.
        token_importance: NOSA: per-token importance A·softplus(Δ v) is a logit bias in attention
            and ranks blocks beyond the query-aware share.
        rope: rotary positions.
        sparse: the rule that chooses blocks.
        max_context: longest sequence, in tokens, that the model is meant for.
        dtype: of parameters, activations and KV; scores, softmax, norms, logits and sampling are
            f32 always.

    References:
        SparDA, arXiv:2606.04511; the muP scalings are MiniCPM's, arXiv:2404.06395.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rms_norm_eps: float = 1e-6
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    tie_embeddings: bool = False
    token_importance: bool = False
    rope: RopeConfig = RopeConfig()
    sparse: SparseConfig = SparseConfig()
    max_context: int = 65536
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width"):
            _check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        _check(
            self.heads % self.kv_heads == 0,
            f"{self.heads=} must be a multiple of {self.kv_heads=}",
        )
        _check(self.head_dim % 2 == 0, f"{self.head_dim=} must be even")
        factors = len(self.rope.long_factor)
        _check(
            factors in (0, self.head_dim // 2),
            f"rope has {factors} factors, but head_dim / 2 = {self.head_dim // 2}",
        )
        _check(
            self.token_importance == (self.sparse.query_blocks is not None),
            f"{self.token_importance=} goes with sparse.query_blocks, which is "
            f"{self.sparse.query_blocks}",
        )
        _check(
            self.dtype in ("float32", "bfloat16"),
            f"{self.dtype=} must be 'float32' or 'bfloat16'",
        )

    @property
    def group(self) -> int:
        """Query heads per KV head (G)."""
        return self.heads // self.kv_heads

    @classmethod
    def minicpm4_1_8b(cls) -> "ModelConfig":
        """MiniCPM4.1-8B at its native 64K, without LongRoPE factors (the checkpoint has them)."""
        return cls(
            vocab_size=73448,
            width=4096,
            layers=32,
            heads=32,
            kv_heads=2,
            head_dim=128,
            mlp_width=16384,
            embed_scale=12.0,
            residual_scale=1.4 / math.sqrt(32),
            logit_divisor=16.0,
        )

    @classmethod
    def nosa_8b(cls) -> "ModelConfig":
        """NOSA-8B at its native 32K, in the sizes that its kernels imply."""
        return cls(
            vocab_size=73448,
            width=4096,
            layers=32,
            heads=32,
            kv_heads=2,
            head_dim=128,
            mlp_width=16384,
            rms_norm_eps=1e-5,
            token_importance=True,
            rope=RopeConfig(
                max_positions=32768, original_max_positions=32768, compute_dtype="model"
            ),
            sparse=SparseConfig(local_blocks=16, query_blocks=24),
            max_context=32768,
        )

    @classmethod
    def shipped(cls) -> "ModelConfig":
        """The small byte-level model in `sparda_jax/shipped`: 8,192-byte documents and answers."""
        return cls(
            vocab_size=259,
            width=256,
            layers=8,
            heads=8,
            kv_heads=2,
            head_dim=32,
            mlp_width=512,
            rope=RopeConfig(theta=100000.0, max_positions=8704, original_max_positions=8704),
            sparse=SparseConfig(
                block_size=16,
                pool_size=8,
                pool_stride=4,
                local_blocks=8,
                selected_blocks=32,
                dense_below=0,
            ),
            max_context=8704,
        )
