# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The axis letters of every shape in this library, and the values that mean "none".

A letter means one thing in einsum strings, jaxtyping strings, comments and documents:

| letter | axis | letter | axis |
|---|---|---|---|
| B | batch (sequences) | M | KV blocks of a sequence |
| T | query positions of this call (1 in decode) | C | pooled keys (windows) |
| S | key/value positions held | J | blocks chosen per (token, KV head) |
| D | model width | R | device slots per (sequence, KV head) |
| N | query heads | W | tokens in one block |
| K | KV heads | F | MLP width |
| G | query heads per KV head, N = K·G | V | vocabulary |
| H | head dim | L | layers |
"""

from typing import Literal, get_args

NO_BLOCK = -1
"""Fills the end of a list of block ids: no block here."""

NO_SLOT = -1
"""Fills a block table: this block is in no slot."""

Mode = Literal["dense", "sparse", "sparda"]
"""`dense`: every block. `sparse`: the model's own rule. `sparda`: the Forecast chooses."""

Parity = Literal["reference", "reference_bf16_scores", "reference_fast_engine"] | None
"""`None` is the correct behaviour; `"reference"` repeats the deviations of the original's model,
`"reference_bf16_scores"` also its rounding of scores to bf16, `"reference_fast_engine"` instead the
scale that its fast engine gives NOSA's bias in decode. PARITY.md lists them all."""

MODES: tuple[str, ...] = get_args(Mode)

PARITIES: tuple[str, ...] = tuple(name for part in get_args(Parity) for name in get_args(part))


def blocks_in(tokens: int, block_size: int) -> int:
    """Count the blocks that hold `tokens` tokens: M = ⌈tokens / block_size⌉.

    Example:
        >>> blocks_in(65, 64)
        2
    """
    return -(-tokens // block_size)


def pooled_in(tokens: int, pool_size: int, pool_stride: int) -> int:
    """Count the full pooling windows in `tokens` tokens: C = ⌊(tokens − size) / stride⌋ + 1.

    Example:
        >>> [pooled_in(s, 32, 16) for s in (31, 32, 47, 48, 65536)]
        [0, 1, 1, 2, 4095]
    """
    return 0 if tokens < pool_size else (tokens - pool_size) // pool_stride + 1
