# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token: greedy, temperature, top-k, top-p.

Pure functions of logits and key. Each request draws from its own stream,
fold_in(fold_in(key, request), position), so a token does not depend on which other requests share
the batch.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt32

Keys = Key[Array, " B"] | UInt32[Array, "B words"]
"""One key a row, typed or as words."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: keep this many tokens; `None` keeps all.
        top_p: then keep the fewest tokens that hold this share of the mass; `None` keeps all.

    Example:
        >>> Sampling(temperature=-1.0)
        Traceback (most recent call last):
        ValueError: self.temperature=-1.0 must be at least 0; 0 is greedy
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that leave no token to draw."""
        if not self.temperature >= 0.0:
            raise ValueError(f"{self.temperature=} must be at least 0; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"{self.top_k=} must be at least 1; None keeps every token")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"{self.top_p=} must be in (0, 1]; None keeps every token")

    @property
    def is_greedy(self) -> bool:
        """Tell whether no key is needed."""
        return self.temperature == 0.0


GREEDY = Sampling()
"""The most probable token; at ties the lower id."""


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Keep the k greatest logits, at ties the lower ids; the others become −inf.

    Example:
        >>> keep_top_k(jnp.array([[1.0, 3.0, 3.0, 2.0]]), 1).tolist()
        [[-inf, 3.0, -inf, -inf]]
    """
    _, ids = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    keep = jax.vmap(lambda row, index: row.at[index].set(True))(logits < -jnp.inf, ids)
    return jnp.where(keep, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keep the fewest most probable tokens whose mass is at least p; the others become −inf.

    A token stays if the mass of those before it, in order of probability, is below p; the first
    always stays.

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.2, 0.3]]))
        >>> jnp.isfinite(keep_top_p(logits, 0.6)).tolist()
        [[True, False, True]]
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    take = jax.vmap(lambda row, index: row[index])
    probs = take(jax.nn.softmax(logits, axis=-1), order)
    before = jnp.cumsum(probs, axis=-1) - probs
    keep = (before < p).at[:, 0].set(True)
    keep = jax.vmap(lambda index, value: jnp.zeros_like(value).at[index].set(value))(order, keep)
    return jnp.where(keep, logits, -jnp.inf)


def request_keys(
    key: PRNGKeyArray, requests: Int[Array, " B"], positions: Int[Array, " B"]
) -> Keys:
    """Make the key of each token: fold_in(fold_in(key, request), position).

    Args:
        key: of the whole call.
        requests: number of each request.
        positions: of the tokens to draw.
    """
    return jax.vmap(lambda r, p: jax.random.fold_in(jax.random.fold_in(key, r), p))(
        requests, positions
    )


def sample_tokens(
    logits: Float[Array, "B V"], sampling: Sampling, keys: Keys | None
) -> Int[Array, " B"]:
    """Draw the next token of each row: temperature, then top-k, then top-p.

    Args:
        logits: f32.
        sampling: how to draw.
        keys: one a row; not looked at when greedy.

    Raises:
        ValueError: a drawn token without keys.

    Example:
        >>> sample_tokens(jnp.array([[0.0, 2.0, 2.0]]), GREEDY, None).tolist()
        [1]
    """
    if sampling.is_greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if keys is None:
        raise ValueError(f"{sampling=} draws at random, so it needs a key; got None")
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What all rows of a batch share when their next tokens are drawn.

    Attributes:
        sampling: how.
        eos_ids: tokens that end a row.
    """

    sampling: Sampling = GREEDY
    eos_ids: tuple[int, ...] = ()


@typing.no_type_check
@struct.dataclass
class Rows:
    """What the device knows of the requests that a batch continues.

    Attributes:
        tokens: the newest token of each, not yet fed.
        active: rows that go on: their newest token will be fed.
        left: tokens that each may still draw.
        requests: number of each request, for its keys.
    """

    tokens: Int[Array, " B"]
    active: Bool[Array, " B"]
    left: Int[Array, " B"]
    requests: Int[Array, " B"]


@typing.no_type_check
@struct.dataclass
class Drawn:
    """What one draw gave, for the host to read.

    Attributes:
        tokens: one of each row; 0 where a row had ended before.
        is_new: rows that drew.
        goes_on: rows that go on after it.
    """

    tokens: Int[Array, " B"]
    is_new: Bool[Array, " B"]
    goes_on: Bool[Array, " B"]


@functools.partial(jax.jit, static_argnames="draw")
def draw_tokens(
    logits: Float[Array, "B V"],
    rows: Rows,
    positions: Int[Array, " B"],
    key: PRNGKeyArray | None,
    *,
    draw: Draw,
) -> tuple[Rows, Drawn]:
    """Draw the next token of each active row, and mark the rows that go on.

    Args:
        logits: f32.
        rows: before.
        positions: of the tokens to draw.
        key: of the whole call; `None` when greedy.
        draw: how, and what ends a row.

    Returns:
        The rows after, and what was drawn: token 0 where a row had ended; a row ends with one of
        `eos_ids` or with the last token that it may draw.

    Example:
        >>> on = jnp.array([True, True, False])
        >>> two, number = jnp.array([2, 1, 2]), jnp.arange(3)
        >>> rows = Rows(tokens=jnp.zeros(3, jnp.int32), active=on, left=two, requests=number)
        >>> _, drawn = draw_tokens(jnp.eye(3), rows, jnp.zeros(3, jnp.int32), None, draw=Draw())
        >>> drawn.tokens.tolist(), drawn.goes_on.tolist()
        ([0, 1, 0], [True, False, False])
    """
    keys = None
    if not draw.sampling.is_greedy and key is not None:
        keys = request_keys(key, rows.requests, positions)
    tokens = jnp.where(rows.active, sample_tokens(logits, draw.sampling, keys), 0)
    left = rows.left - rows.active.astype(rows.left.dtype)
    goes_on = rows.active & (left > 0)
    for end in draw.eos_ids:
        goes_on = goes_on & (tokens != end)
    drawn = Drawn(tokens=tokens, is_new=rows.active, goes_on=goes_on)
    return Rows(tokens=tokens, active=goes_on, left=left, requests=rows.requests), drawn
