# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The same few CTAs for records of one byte a number: what arrives is scaled, then stored.

**Why.** Half the bytes cross the link. Unpacked in XLA, the records that were fetched would need an
array with room for every record that could be missing, filled with zeros and read again to its end
at every step, whatever is missing. Here a number is unpacked between the two transfers that it
takes anyhow.

**Numerics.** number · scale in f32, rounded once to the dtype of the slots: the bits of the
reference. Going through bf16 (int8) or f16 (fp8) on the way to f32 is exact.

**Backend.** Mosaic GPU on Hopper, as `mosaic_gpu`. A piece is part of the keys of a record or of
its values, never of both, so it has one scale. The ring holds packed pieces; two more buffers hold
what was unpacked until its transfer has read it. At 53 GB/s over four CTAs a piece of 8 KiB has
about a thousand cycles, for 64 numbers a thread.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32, Num

from pallas_kernels import _backend, _compat
from pallas_kernels.gather_blocks.config import Tiles
from pallas_kernels.gather_blocks.mosaic_gpu import cut, deal_pieces

EXACT_STEP = {"int8": jnp.bfloat16, "float8_e4m3fn": jnp.float16}
"""What the kernel unpacks, and the dtype that holds every such number and has a fast conversion."""

SLOT_DTYPES = ("bfloat16", "float16", "float32")
"""Into what."""

_THREADS = 128


def shape_reason(size: Sequence[int], dtype: np.dtype, slot: np.dtype, tiles: Tiles) -> str | None:
    """Say why no device could unpack such records so; `None` if Hopper can.

    Args:
        size: [2 W H] of a record.
        dtype: of its numbers on the host.
        slot: dtype of the slots.
        tiles: how they are moved.
    """
    if dtype.name not in EXACT_STEP or slot.name not in SLOT_DTYPES:
        return (
            f"unpacks {', '.join(EXACT_STEP)} into {', '.join(SLOT_DTYPES)}, but this is "
            f"{dtype.name} into {slot.name}"
        )
    _, block_size, head_dim = size
    if tiles.parts % 2:
        return f"takes pieces of keys or of values, but {tiles.parts=} leaves both in one"
    numbers = 2 * block_size // tiles.parts * head_dim
    if numbers % _THREADS:
        return f"gives {_THREADS} threads equal work, but {tiles.parts=} makes {numbers} numbers"
    return tiles.unsupported_reason(block_size, head_dim, dtype.itemsize, slot.itemsize)


def unsupported_reason(
    size: Sequence[int], dtype: np.dtype, slot: np.dtype, tiles: Tiles
) -> str | None:
    """Say why the kernel cannot unpack such records here; `None` if it can.

    Args:
        size: [2 W H] of a record.
        dtype: of its numbers on the host.
        slot: dtype of the slots.
        tiles: how they are moved.
    """
    return _backend.hopper_reason() or shape_reason(size, dtype, slot, tiles)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def gather_blocks(
    records: Num[Array, "records 2 W H"],
    scales: Float32[Array, "records 2"],
    source: Int32[Array, " n"],
    places: Int32[Array, " n"],
    count: Int32[Array, " 1"],
    slots: Float[Array, "slots 2 W H"],
    receipt: Int32[Array, " 1"] | None,
    *,
    tiles: Tiles,
    interpret: bool = False,
) -> Float[Array, "slots 2 W H"]:
    """Run the kernel; see the reference for what it means.

    Args:
        records: to read, on the device or in page-locked host memory.
        scales: of their keys and of their values, on the device.
        source: record of each move, within bounds.
        places: slot of each move, within bounds, distinct.
        count: moves.
        slots: changed in place.
        receipt: of the last write into `records`, if there was one.
        tiles: how they are moved.
        interpret: whether to run in the interpreter.
    """
    most, ring, parts = source.shape[0], tiles.in_flight, tiles.parts
    exact = EXACT_STEP[records.dtype.name]
    origin, slots_ref = cut(records, parts), jax.new_ref(cut(slots, parts))

    def body(origin_ref, target_ref, scales_ref, source_ref, places_ref, count_ref, *rest: Any):
        packed, unpacked, arrived = rest[-3:]
        cta = lax.axis_index("cta")
        mine, entry_and_part = deal_pieces(cta, jnp.clip(count_ref[0], 0, most), tiles)

        def record_of(nth):
            return source_ref[entry_and_part(jnp.minimum(nth, mine - 1))[0]]

        def scale_of(nth, record):
            part = entry_and_part(jnp.minimum(nth, mine - 1))[1]
            return scales_ref[record, lax.div(part, parts // 2)]

        def load(nth, record):
            slot, part = lax.rem(nth, ring), entry_and_part(nth)[1]
            plgpu.copy_gmem_to_smem(origin_ref.at[record, part], packed.at[slot], arrived.at[slot])

        def fill(nth, carry):
            load(nth, record_of(nth))
            return carry

        def step(nth, scale):
            slot, place_in_pair = lax.rem(nth, ring), lax.rem(nth, 2)
            entry, part = entry_and_part(nth)
            # What later pieces need is read before the wait, so that its latency hides in it.
            place, following, ahead = places_ref[entry], record_of(nth + 1), record_of(nth + ring)
            plgpu.barrier_wait(arrived.at[slot])
            numbers = packed[slot].astype(exact).astype(jnp.float32) * scale
            next_scale = scale_of(nth + 1, following)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            unpacked[place_in_pair] = numbers.astype(slots.dtype)
            plgpu.commit_smem()  # also: every thread has read its packed numbers
            plgpu.copy_smem_to_gmem(unpacked.at[place_in_pair], target_ref.at[place, part])

            @pl.when(nth + ring < mine)
            def _():
                load(nth + ring, ahead)

            return next_scale

        @pl.when(mine > 0)
        def _():
            lax.fori_loop(0, jnp.minimum(mine, ring), fill, None)
            lax.fori_loop(0, mine, step, scale_of(0, record_of(0)))
            plgpu.wait_smem_to_gmem(0)

    plgpu.kernel(
        body,
        out_type=(),
        scratch_types=(
            plgpu.SMEM((ring, *origin.shape[2:]), records.dtype),
            plgpu.SMEM((2, *origin.shape[2:]), slots.dtype),
            plgpu.Barrier(num_barriers=ring),
        ),
        grid=(tiles.ctas,),
        grid_names=("cta",),
        kernel_name="gather_blocks_unpack",
        **_compat.mosaic_interpret(interpret),
    )(
        *(origin, slots_ref, scales, source, places, count),
        *(() if receipt is None else (receipt,)),
    )
    return jax.freeze(slots_ref).reshape(slots.shape)
