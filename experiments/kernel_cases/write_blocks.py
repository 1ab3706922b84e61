# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`write_blocks` of one layer: finished blocks of the 8B model into host memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from experiments.kernel_cases.base import Case
from experiments.kernel_cases.gather_blocks import Shape, host_records
from pallas_kernels.write_blocks import Tiles, Written, write_blocks
from pallas_kernels.write_blocks.config import work


def _receipt(*arrays: Array, tiles: Tiles | None) -> Int32[Array, " 1"]:
    """Write in place and give the receipt; the records are not to be returned."""
    return write_blocks(*arrays, implementation="mosaic_gpu", tiles=tiles).receipt


def _case(shape: Shape, implementation: str, tiles: Tiles | None = None) -> Case:
    variant = "" if tiles is None else f"[ctas={tiles.ctas} in_flight={tiles.in_flight}"
    variant += "" if tiles is None else f" parts={tiles.parts}]"
    is_reference = implementation == "reference"
    call: Any = functools.partial(_receipt, tiles=tiles)
    if is_reference:
        call = functools.partial(write_blocks, implementation="reference")
    itemsize = jnp.dtype(shape.dtype).itemsize
    return Case(
        op="write_blocks",
        shape=shape.name,
        implementation=implementation + variant,
        operands=functools.partial(_operands, shape=shape),
        call=call,
        work=work(shape.moved, shape.block_size, shape.head_dim, itemsize),
        check=_check_records if is_reference else _check_memory,
        in_place=(1,) if is_reference else (),
    )


def _operands(seed: int, *, shape: Shape) -> tuple[Array, ...]:
    rng = np.random.default_rng(seed)
    if jax.default_backend() == "gpu":
        records = host_records(shape.records, shape.record, shape.dtype)
    else:  # nothing crosses a link here; zeros make no work where only shapes are asked for
        records = jnp.zeros((shape.records, *shape.record), shape.dtype)
    source = rng.choice(shape.slots, shape.moved, replace=False).astype(np.int32)
    places = rng.choice(shape.records, shape.moved, replace=False).astype(np.int32)
    # A slot holds its number, the rest of it by 128 in K, so that a wrong place is noticed.
    numbers = np.stack(np.divmod(np.arange(shape.slots) + seed, 128), axis=1)
    numbers = jnp.asarray(numbers.reshape(-1, 2, 1, 1), shape.dtype)
    return (
        jnp.zeros((shape.slots, *shape.record), shape.dtype) + numbers,
        records,
        jnp.asarray(source),
        jnp.asarray(places),
        jnp.array([shape.moved], jnp.int32),
    )


def _check_memory(output: Array, operands: tuple[Array, ...]) -> None:
    """Read the written records back, unless a later call wrote there too."""
    slots, records, source, places, count = operands
    assert output.tolist() == count.tolist(), (output, count)
    write = jax.jit(functools.partial(_receipt, tiles=None))
    jax.block_until_ready(write(*operands))
    found = jax.jit(lambda x, i: jnp.take(x, i, axis=0))(records, places)
    assert bool(jnp.array_equal(found, slots[source])), "records differ from their slots"


def _check_records(output: Written, operands: tuple[Array, ...]) -> None:
    """Hold the records to a loop."""
    slots, records, source, places, count = (np.asarray(x) for x in operands)
    want = np.array(records)
    for i in range(int(count[0])):
        want[places[i]] = slots[source[i]]
    np.testing.assert_array_equal(np.asarray(output.records), want)


def cases(*, tiny: bool = False) -> list[Case]:
    """List the cases.

    Args:
        tiny: shapes that run on a CPU in seconds, by the reference.
    """
    if tiny:
        small = Shape(moved=5, records=20, block_size=8, head_dim=16, dtype="float32")
        return [_case(small, "reference")]
    found = [_case(Shape(moved=moved), "mosaic_gpu") for moved in (128, 512)]
    spreads = [Tiles(ctas=1), Tiles(ctas=2), Tiles(ctas=8), Tiles(ctas=16)]
    return found + [_case(Shape(moved=128), "mosaic_gpu", tiles) for tiles in spreads]
