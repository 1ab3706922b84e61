# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Negative log-likelihood per token and bits per byte, in any mode, by position.

Logits are computed for a tile of positions at a time, so that neither a large vocabulary nor a long
context asks for [B T V].
"""

import math
import typing
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from sparda_jax.attention import map_tiles
from sparda_jax.model import SpardaLM, forward
from sparda_jax.selectors import Selector
from sparda_jax.shapes import Mode, Parity

_TILE_BYTES = 64 << 20
"""Bound on the logits that exist at once."""


@typing.no_type_check
@struct.dataclass
class NllTotals:
    """Sums over predicted tokens, by position bucket; they add up over batches.

    Attributes:
        nll: negative log-likelihood in nats.
        tokens: predicted tokens.
        size: bytes of the predicted tokens.
    """

    nll: Float[Array, " buckets"]
    tokens: Float[Array, " buckets"]
    size: Float[Array, " buckets"]

    def nll_per_token(self) -> float:
        """Mean over all tokens, in nats."""
        return float(_over(np.sum(self.nll), np.sum(self.tokens)))

    def perplexity(self) -> float:
        """Exponentiate the mean."""
        return math.exp(self.nll_per_token())

    def bits_per_byte(self) -> float:
        """Bits of all tokens over their bytes."""
        return float(_over(np.sum(self.nll), np.sum(self.size))) / math.log(2)

    def nll_by_bucket(self) -> Float[np.ndarray, " buckets"]:
        """Mean over the tokens of each position bucket; not a number where there are none."""
        return _over(self.nll, self.tokens)


def token_nll(
    model: SpardaLM,
    tokens: Int[Array, "B T"],
    *,
    lengths: Int[Array, " B"] | None = None,
    mode: Mode = "sparda",
    selector: str | Selector | None = None,
    parity: Parity = None,
) -> Float[Array, "B T-1"]:
    """Compute −log p(tokens[t + 1] | tokens[≤ t]) at every position t.

    Args:
        model: the decoder.
        tokens: right-padded rows.
        lengths: real tokens of each row; all of T if left out.
        mode: as in `forward`.
        selector: as in `forward`.
        parity: as in `forward`.

    Returns:
        Nats, f32; zero where the predicted token is padding.
    """
    batch, queries = tokens.shape
    if lengths is None:
        lengths = jnp.full((batch,), queries, jnp.int32)
    seen: list[Any] = []

    def observe(name: str, layer: int, value: object) -> None:
        if name == "output":
            seen.append(value)

    forward(
        model,
        tokens,
        lengths=lengths,
        mode=mode,
        selector=selector,
        logits="last",
        parity=parity,
        observe=observe,
    )

    def tile(rows: tuple[Array, Array]) -> Array:
        x, wanted = rows
        logits = model.logits(x)
        right = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - right

    size = max(8, _TILE_BYTES // (4 * batch * model.config.vocab_size))
    nll = map_tiles(tile, (seen[0][:, :-1], tokens[:, 1:]), size, (0, 0))
    at = jnp.arange(1, queries)[None, :]
    return jnp.where(at < lengths[:, None], nll, 0.0)


def nll_totals(
    model: SpardaLM,
    tokens: Int[Array, "B T"],
    *,
    lengths: Int[Array, " B"] | None = None,
    mode: Mode = "sparda",
    selector: str | Selector | None = None,
    token_bytes: Int[Array, " V"] | None = None,
    bucket_starts: tuple[int, ...] = (0,),
    parity: Parity = None,
) -> NllTotals:
    """Sum `token_nll` by the position of the predicted token; made for `jax.jit`.

    Args:
        model: the decoder.
        tokens: right-padded rows.
        lengths: real tokens of each row; all of T if left out.
        mode: as in `forward`.
        selector: as in `forward`.
        token_bytes: bytes of every token, 0 for special ones; 1 for all if left out, which is
            right for byte tokenizers.
        bucket_starts: first position of each bucket, ascending from 0; static.
        parity: as in `forward`.

    Raises:
        ValueError: the buckets do not ascend from 0.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparda_jax.testing import tiny_model
        >>> measure = jax.jit(lambda *given: nll_totals(*given, bucket_starts=(0, 16)))
        >>> measure(tiny_model(), jnp.arange(40)[None]).tokens.tolist()
        [15.0, 24.0]
    """
    starts = list(bucket_starts)
    if not starts or starts[0] != 0 or starts != sorted(set(starts)):
        raise ValueError(f"{bucket_starts=} must ascend from 0")
    batch, queries = tokens.shape
    if lengths is None:
        lengths = jnp.full((batch,), queries, jnp.int32)
    nll = token_nll(model, tokens, lengths=lengths, mode=mode, selector=selector, parity=parity)
    at = jnp.arange(1, queries)
    real = (at[None, :] < lengths[:, None]).astype(jnp.float32)
    wanted = tokens[:, 1:]
    size = real if token_bytes is None else real * token_bytes[wanted].astype(jnp.float32)
    bucket = jnp.searchsorted(jnp.asarray(starts), at, side="right") - 1
    member = jax.nn.one_hot(bucket, len(starts), dtype=jnp.float32)  # [T-1 buckets]
    # Sums over queries first: they are exact for counts, and precise for nats.
    by_bucket = partial(jnp.einsum, "bt,tq->q", precision=jax.lax.Precision.HIGHEST)
    return NllTotals(
        nll=by_bucket(nll, member), tokens=by_bucket(real, member), size=by_bucket(size, member)
    )


def evaluate_perplexity(
    model: SpardaLM,
    batches: Iterable[tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]],
    *,
    mode: Mode = "sparda",
    selector: str | Selector | None = None,
    token_bytes: Sequence[int] | None = None,
    bucket_starts: tuple[int, ...] = (0,),
) -> NllTotals:
    """Add `nll_totals` over batches, each compiled once per shape.

    Args:
        model: the decoder.
        batches: tokens and lengths.
        mode: as in `forward`.
        selector: as in `forward`.
        token_bytes: as in `nll_totals`.
        bucket_starts: as in `nll_totals`.

    Returns:
        Totals on the host, f64.

    Raises:
        ValueError: there is no batch, or the buckets do not ascend from 0.
    """
    sizes = None if token_bytes is None else jnp.asarray(token_bytes, jnp.int32)

    def run(model: SpardaLM, tokens: Array, lengths: Array, sizes: Array | None) -> NllTotals:
        return nll_totals(
            model,
            tokens,
            lengths=lengths,
            mode=mode,
            selector=selector,
            token_bytes=sizes,
            bucket_starts=bucket_starts,
        )

    compiled = jax.jit(run)
    total: NllTotals | None = None
    for tokens, lengths in batches:
        found = compiled(model, jnp.asarray(tokens), jnp.asarray(lengths), sizes)
        host = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
        total = host if total is None else jax.tree.map(np.add, total, host)
    if total is None:
        raise ValueError("0 batches to evaluate, at least 1 is needed")
    return total


def _over(part: Any, whole: Any) -> np.ndarray:
    """Divide on the host; not a number where there is nothing to divide by."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
