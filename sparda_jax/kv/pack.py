# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Records in fewer bits: what crosses the link is half as large, and no longer exact.

The host holds one byte a number and the device, for each record, one scale for its keys and one for
its values. A block that is fetched back is what the host holds, times its scale; a block that never
left its slot is exact.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

HostDtype = Literal["int8", "float8_e4m3fn"]
"""In what the host may hold K and V instead of the model's dtype. `int8`: 255 equal steps between
the largest numbers of a record. `float8_e4m3fn`: 3 bits of mantissa at every size."""


def check_host_dtype(name: str | None) -> HostDtype | None:
    """Take a name that is known; `None` stands for the model's own dtype.

    Args:
        name: what the caller asked for.

    Raises:
        ValueError: it is unknown; the message lists the known ones.

    Example:
        >>> check_host_dtype("int8"), check_host_dtype(None)
        ('int8', None)
    """
    for known in get_args(HostDtype):
        if name == known:
            return known
    if name is None:
        return None
    raise ValueError(f"unknown host_dtype={name!r}; known: {', '.join(get_args(HostDtype))}, None")


def _largest(dtype: jnp.dtype) -> float:
    """Give the largest number that a dtype holds."""
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    return float(jnp.iinfo(dtype).max if is_integer else jnp.finfo(dtype).max)


@jax.named_scope("pack_records")
def pack_records(
    records: Float[Array, "*lanes 2 W H"], dtype: HostDtype
) -> tuple[Num[Array, "*lanes 2 W H"], Float[Array, "*lanes 2"]]:
    """Turn records into numbers of one byte and scales.

    The scale takes the largest number of the keys, or of the values, to the largest of the dtype.

    Args:
        records: K and V of blocks.
        dtype: of the result.

    Returns:
        The numbers, and f32 scales: number · scale is nearly what was given.

    Example:
        >>> packed, scales = pack_records(jnp.array([-1.0, 0.25]).reshape(1, 2, 1, 1), "int8")
        >>> packed.ravel().tolist(), unpack_records(packed, scales, scales.dtype).ravel().tolist()
        ([-127, 127], [-1.0, 0.25])
    """
    kind = jnp.dtype(dtype)
    wide = records.astype(jnp.float32)
    top = jnp.max(jnp.abs(wide), axis=(-2, -1))
    scales = jnp.where(top > 0.0, top / _largest(kind), 1.0)
    scaled = wide / scales[..., None, None]
    if jnp.issubdtype(kind, jnp.integer):
        scaled = jnp.round(scaled)
    # A quotient may round past the end, where e4m3fn has NaN only.
    return jnp.clip(scaled, -_largest(kind), _largest(kind)).astype(kind), scales


@jax.named_scope("unpack_records")
def unpack_records(
    packed: Num[Array, "*lanes 2 W H"], scales: Float[Array, "*lanes 2"], dtype: jnp.dtype
) -> Float[Array, "*lanes 2 W H"]:
    """Turn numbers of one byte back into records.

    Args:
        packed: what `pack_records` made.
        scales: of the same records.
        dtype: of the result.
    """
    return (packed.astype(jnp.float32) * scales[..., None, None]).astype(dtype)
