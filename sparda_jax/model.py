# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The decoder: layers that read all blocks, their own choice, or the choice of a forecast.

`forward` is the whole model as a function of tokens, for evaluation under `jax.jit`, for tests and
for training. It is one chunk of prefill from an empty cache: chunked prefill (`prefill.py`) and
generation run the same `chunk.run_chunk`.
"""

import pathlib
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparda_jax.attention import Attention
from sparda_jax.chunk import AttentionPath, Observer, init_cache, make_plan, run_chunk
from sparda_jax.config import ModelConfig, SparseConfig
from sparda_jax.layers import MLP, RMSNorm, init_weight
from sparda_jax.rope import make_rope
from sparda_jax.selectors import Selector, resolve
from sparda_jax.shapes import NO_BLOCK, Mode, Parity


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP; what they add is scaled by `residual_scale`."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.input_norm = RMSNorm(config.width, config.rms_norm_eps, config.dtype)
        self.attention = Attention(config, layer, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.rms_norm_eps, config.dtype)
        self.mlp = MLP(config, rngs=rngs)

    def finish(self, x: Float[Array, "B T D"], y: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Add the output projection of the attended heads, then the MLP."""
        scale = jnp.asarray(self.config.residual_scale, x.dtype)
        x = x + scale * self.attention.output(y)
        return x + scale * self.mlp(self.mlp_norm(x))


class SpardaLM(nnx.Module):
    """A decoder-only language model with Forecast heads.

    Args:
        config: sizes, scalings, positions and the sparse rule.
        rngs: where initial weights come from.

    Attributes:
        selector: name of what ranks the blocks in the sparda mode where a call names none; `None`
            is the Forecast.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.selector: str | None = None
        self.embed = init_weight(
            rngs.params(), (config.vocab_size, config.width), "VD", config.width, config.dtype
        )
        self.layers = nnx.List(
            [DecoderLayer(config, layer, rngs=rngs) for layer in range(config.layers)]
        )
        self.final_norm = RMSNorm(config.width, config.rms_norm_eps, config.dtype)
        shape = (config.width, config.vocab_size)
        self.lm_head = (
            None
            if config.tie_embeddings
            else init_weight(rngs.params(), shape, "DV", config.width, config.dtype)
        )

    @jax.named_scope("embed")
    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look tokens up and scale them."""
        x = self.embed[...][tokens]
        return x * jnp.asarray(self.config.embed_scale, x.dtype)

    @jax.named_scope("lm_head")
    def logits(self, x: Float[Array, "B P D"]) -> Float[Array, "B P V"]:
        """Turn final hidden states into logits, f32."""
        x = self.final_norm(x)
        x = x / jnp.asarray(self.config.logit_divisor, x.dtype)
        if self.lm_head is None:
            weight, formula = self.embed[...], "bpd,vd->bpv"
        else:
            weight, formula = self.lm_head[...], "bpd,dv->bpv"
        return jnp.einsum(formula, x, weight, preferred_element_type=jnp.float32)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | pathlib.Path,
        *,
        selector: str | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        mesh: jax.sharding.Mesh | None = None,
        sparse: SparseConfig | None = None,
        heads: str | pathlib.Path | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | Literal["bar"] | None = "bar",
    ) -> "SpardaLM":
        """Load a model from a Hugging Face folder or hub id: `sparda_jax.weights.load_pretrained`.

        Args:
            path_or_id: a folder with config.json and safetensors, or a hub id `owner/name`.
            selector: what ranks the blocks in the sparda mode of this model, by name, where a call
                names none; `None` is the Forecast.
            dtype: of the parameters; `None` takes the checkpoint's.
            mesh: devices with an axis `model` to spread the parameters over; `None` puts all of
                them on the default device.
            sparse: the rule that chooses blocks; `None` reads `sparse_config` of config.json.
            heads: Forecast heads, `.pt` of the original's trainer or safetensors; `None` takes
                those of the folder, or draws them at random and says so.
            seed: of heads drawn at random.
            progress: told the bytes done and in all; `bar` draws a bar on a terminal.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or another model's.
            ValueError: a mesh without an axis `model`, or an unknown selector.
        """
        from sparda_jax.weights import load_pretrained

        model = load_pretrained(
            path_or_id,
            dtype=dtype,
            mesh=mesh,
            sparse=sparse,
            heads=heads,
            seed=seed,
            progress=progress,
        )
        resolve("sparda", model.config, selector)
        model.selector = selector
        return model

    def ranked_by(self, mode: Mode, selector: str | Selector | None) -> str | Selector | None:
        """Settle who ranks the blocks: the call's selector, else the model's in the sparda mode."""
        return self.selector if selector is None and mode == "sparda" else selector

    def save_pretrained(
        self,
        folder: str | pathlib.Path,
        *,
        tokenizer_files: str | pathlib.Path | Iterable[str | pathlib.Path] = (),
        eos_ids: Sequence[int] = (),
        step: int | None = None,
        name: str | None = None,
        max_shard_bytes: int = 4_000_000_000,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | Literal["bar"] | None = "bar",
    ) -> None:
        """Save the model as a Hugging Face folder: `sparda_jax.weights.save_pretrained`.

        Args:
            folder: to be made; config.json holds the sparse rule, heads.safetensors the heads.
            tokenizer_files: files to copy beside the model, or a folder whose tokenizer to copy.
            eos_ids: ids that end a text, for config.json.
            step: optimiser steps that the heads have seen, for their metadata.
            name: of the backbone, for the same.
            max_shard_bytes: a larger backbone is split into files of at most this size.
            overwrite: replace a folder that exists.
            progress: as in `from_pretrained`.

        Raises:
            ValueError: the folder exists and `overwrite` is false, a tokenizer file is missing, or
                `max_shard_bytes` < 1.
        """
        from sparda_jax.weights import save_pretrained

        save_pretrained(
            self,
            folder,
            tokenizer_files=tokenizer_files,
            eos_ids=eos_ids,
            step=step,
            name=name,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            progress=progress,
        )


# Both overloads stand for all other options at once, which the checker takes for too many.
@typing.overload
def forward(  # pyrefly: ignore[inconsistent-overload]
    model: SpardaLM,
    tokens: Int[Array, "B T"],
    *,
    return_choices: Literal[False] = False,
    **options: Any,
) -> Float[Array, "B P V"]: ...


@typing.overload
def forward(  # pyrefly: ignore[inconsistent-overload]
    model: SpardaLM, tokens: Int[Array, "B T"], *, return_choices: Literal[True], **options: Any
) -> tuple[Float[Array, "B P V"], Int[Array, "L B T K J"]]: ...


def forward(
    model: SpardaLM,
    tokens: Int[Array, "B T"],
    *,
    lengths: Int[Array, " B"] | None = None,
    mode: Mode = "sparda",
    selector: str | Selector | None = None,
    logits: Literal["all", "last"] | Int[Array, "B P"] = "all",
    return_choices: bool = False,
    attention: AttentionPath = "gather",
    remat: bool = False,
    parity: Parity = None,
    observe: Observer | None = None,
) -> Float[Array, "B P V"] | tuple[Float[Array, "B P V"], Int[Array, "L B T K J"]]:
    """Run the model over whole sequences.

    Args:
        model: the decoder.
        tokens: right-padded rows.
        lengths: real tokens of each row; all of T if left out.
        mode: `dense` reads every block, `sparse` the model's own choice, `sparda` the forecast's.
        selector: overrides what ranks the blocks in the sparse modes, by name or as an object.
        logits: for `all` positions, for the `last` real one of each row, or for given positions.
        return_choices: return the chosen block ids of every layer as well.
        attention: `gather` reads chosen blocks only; `mask` computes all scores and is
            differentiable; `cudnn` the same by a fused kernel, in bf16 on an NVIDIA GPU.
        remat: recompute each layer in the backward pass.
        parity: `"reference"` repeats the original's deviations, for comparison.
        observe: told about inputs, queries, probes and caches while tracing.

    Returns:
        Logits, f32: [B T V], [B 1 V] for `last`, [B P V] for positions. With `return_choices` also
        the block ids, [L B T K J], `NO_BLOCK` at the end of a row; a dense run returns J = 0.

    Raises:
        ValueError: rows and lengths disagree, a mode or selector is unknown.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from sparda_jax.testing import tiny_config
        >>> model = SpardaLM(tiny_config(), rngs=nnx.Rngs(0))
        >>> tokens = jnp.zeros((2, 40), jnp.int32)
        >>> forward(model, tokens, lengths=jnp.array([40, 7]), logits="last").shape
        (2, 1, 64)
    """
    batch, queries = tokens.shape
    config = model.config
    if lengths is None:
        lengths = jnp.full((batch,), queries, jnp.int32)
    if lengths.shape != (batch,):
        raise ValueError(f"{lengths.shape=} must be ({batch},), one per row of {tokens.shape=}")
    plan = make_plan(
        config,
        mode,
        max_length=queries,
        shortest=0 if config.sparse.dense_below > 0 else None,
        selector=model.ranked_by(mode, selector),
        attention=attention,
        parity=parity,
        remat=remat,
    )
    at = jnp.broadcast_to(jnp.arange(queries)[None, :], (batch, queries))
    at = jnp.where(at < lengths[:, None], at, -1)
    rope = make_rope(config.rope, config.head_dim, at, lengths)
    x = model.embed_tokens(tokens)
    caches = [init_cache(plan, batch, queries) for _ in range(config.layers)]
    attend_all = lengths < config.sparse.dense_below
    x, _, choices = run_chunk(model, plan, x, caches, rope, jnp.int32(0), attend_all, observe)
    if observe is not None:
        observe("output", config.layers, x)
    if isinstance(logits, str):
        if logits == "last":
            x = _take_positions(x, jnp.maximum(lengths - 1, 0)[:, None])
        elif logits != "all":
            raise ValueError(f"{logits=} must be 'all', 'last' or positions [B P]")
    else:
        x = _take_positions(x, logits)
    out = model.logits(x)
    if not return_choices:
        return out
    if plan.selector is None:
        empty = jnp.full((config.layers, batch, queries, config.kv_heads, 0), NO_BLOCK, jnp.int32)
        return out, empty
    return out, jnp.stack([choice.ids for choice in choices if choice is not None])


def _take_positions(x: Float[Array, "B T D"], at: Int[Array, "B P"]) -> Float[Array, "B P D"]:
    """Pick rows of x by position."""
    return jax.vmap(lambda row, index: row[index])(x, at)
