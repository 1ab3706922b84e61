# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The door of `sparse_decode`: checks its arguments once and settles who computes."""

import typing
from collections.abc import Sequence
from typing import Literal

import jax
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import _backend
from pallas_kernels.sparse_decode import triton
from pallas_kernels.sparse_decode.config import Tiles
from pallas_kernels.sparse_decode.reference import reference

Implementation = Literal["triton", "reference"]

_PREFERRED = ("triton",)


@typing.overload
def sparse_decode(
    q: Float[Array, "B N H"],
    slots: Float[Array, "B K R 2 W H"],
    slot_ids: Int[Array, "B K J"],
    block_ids: Int[Array, "B K J"],
    positions: Int[Array, " B"],
    *,
    scale: float | None = None,
    bias: Float32[Array, "B K X W"] | None = None,
    bias_order: Literal["slot", "block"] = "slot",
    return_lse: Literal[False] = False,
    implementation: Implementation | Sequence[Implementation] | None = None,
    tiles: Tiles | None = None,
) -> Float[Array, "B N H"]: ...


@typing.overload
def sparse_decode(
    q: Float[Array, "B N H"],
    slots: Float[Array, "B K R 2 W H"],
    slot_ids: Int[Array, "B K J"],
    block_ids: Int[Array, "B K J"],
    positions: Int[Array, " B"],
    *,
    scale: float | None = None,
    bias: Float32[Array, "B K X W"] | None = None,
    bias_order: Literal["slot", "block"] = "slot",
    return_lse: Literal[True],
    implementation: Implementation | Sequence[Implementation] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]: ...


def sparse_decode(
    q: Float[Array, "B N H"],
    slots: Float[Array, "B K R 2 W H"],
    slot_ids: Int[Array, "B K J"],
    block_ids: Int[Array, "B K J"],
    positions: Int[Array, " B"],
    *,
    scale: float | None = None,
    bias: Float32[Array, "B K X W"] | None = None,
    bias_order: Literal["slot", "block"] = "slot",
    return_lse: bool = False,
    implementation: Implementation | Sequence[Implementation] | None = None,
    tiles: Tiles | None = None,
) -> Float[Array, "B N H"] | tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
    """Attend to the tokens s ≤ t of the chosen blocks: softmax(scale · q · k + bias) v.

    One query token a sequence; each group of N / K query heads reads the blocks of its KV head.

    Args:
        q: rotated queries.
        slots: records of K and V, in any order.
        slot_ids: where each chosen block stands, below R; negative where there is none.
        block_ids: which block that is, distinct; negative where there is none. It is quickest if
            the real ones stand in front.
        positions: of the queries; −1 sees nothing.
        scale: multiplies q · k; `None` for 1 / √H.
        bias: added to the logits, f32, for each token of X slots or blocks.
        bias_order: whether `bias` follows the slots (X = R) or the blocks of the sequence.
        return_lse: whether the logarithm of the mass, log Σ exp(logits), is returned too; −1e30
            for a row that sees nothing.
        implementation: which one computes; `None` takes the fastest that can.
        tiles: the cut; `None` for the default.

    Returns:
        The attended values in the dtype of `q`, zeros for a row that sees nothing; with
        `return_lse` also the logarithms, f32.

    Raises:
        ValueError: shapes disagree.
        NotImplementedError: the named implementation cannot take these arguments here.

    References:
        SparDA, arXiv:2606.04511; splitting over keys: Flash-Decoding (Dao et al., 2023).

    Example:
        Block 0 stands in slot 1; token 0 of it is all that a query at position 0 sees.

        >>> import jax.numpy as jnp
        >>> slots = jnp.stack([jnp.zeros((2, 16, 16)), jnp.ones((2, 16, 16))])[None, None]
        >>> ids = jnp.array([[[1, -1]]]), jnp.array([[[0, -1]]])
        >>> out, lse = sparse_decode(
        ...     jnp.ones((1, 1, 16)), slots, *ids, jnp.array([0]), return_lse=True)
        >>> float(out[0, 0, 0]), float(lse[0, 0])
        (1.0, 4.0)
    """
    _check(q, slots, slot_ids, block_ids, positions, bias, bias_order)
    settled = {
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "bias_order": bias_order,
    }
    if tiles is None:
        tiles = Tiles.default(slots.shape[4], slots.shape[5], slots.dtype.itemsize)
    cut = tiles
    chosen = _backend.resolve(
        "sparse_decode",
        implementation,
        _PREFERRED,
        lambda name: triton.unsupported_reason(q, slots, cut),
    )
    operands = (q, slots, slot_ids, block_ids, positions, bias)
    with jax.named_scope("sparse_decode"):
        if chosen == "triton":
            out, lse = triton.sparse_decode_triton(*operands, tiles=cut, **settled)
        else:
            out, lse = reference(*operands, **settled)
    return (out, lse) if return_lse else out


def _check(
    q: Array,
    slots: Array,
    slot_ids: Array,
    block_ids: Array,
    positions: Array,
    bias: Array | None,
    bias_order: str,
) -> None:
    """Refuse arguments that disagree."""
    if q.ndim != 3 or slots.ndim != 6:
        raise ValueError(f"{q.shape=} must be [B N H] and {slots.shape=} [B K R 2 W H]")
    batch, kv_heads, room, two, block_size, dim = slots.shape
    if two != 2 or q.shape[0] != batch or q.shape[2] != dim:
        raise ValueError(f"{q.shape=} must be [B N H] of {slots.shape=}, [B K R 2 W H]")
    if q.shape[1] % kv_heads:
        raise ValueError(f"the heads of {q.shape=} must be a multiple of {kv_heads=} of the slots")
    if slot_ids.shape != block_ids.shape or slot_ids.shape[:-1] != (batch, kv_heads):
        raise ValueError(
            f"{slot_ids.shape=} and {block_ids.shape=} must be [B K J], with B K of {slots.shape=}"
        )
    if positions.shape != (batch,):
        raise ValueError(f"{positions.shape=} must be [B] of {slots.shape=}")
    if bias_order not in ("slot", "block"):
        raise ValueError(f"{bias_order=} must be 'slot' or 'block'")
    if bias is None:
        return
    if bias.ndim != 4 or (*bias.shape[:2], bias.shape[3]) != (batch, kv_heads, block_size):
        raise ValueError(f"{bias.shape=} must be [B K X W], with B K W of {slots.shape=}")
    if bias_order == "slot" and bias.shape[2] != room:
        raise ValueError(f"{bias.shape=} in slot order must have as many slots as {slots.shape=}")
