# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`gather_blocks` of one layer: scattered records of the 8B model out of host memory."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from experiments.kernel_cases.base import Case
from pallas_kernels.gather_blocks import Tiles, gather_blocks
from pallas_kernels.gather_blocks.config import record_bytes, work
from sparda_jax.kv.page_lock import HostBuffer

_BUFFERS: list[HostBuffer] = []  # they must outlive their views


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Records in host memory, slots on the device, and how many records move.

    Attributes:
        moved: records that one call moves, into four times as many slots.
        records: in host memory.
        block_size: W.
        head_dim: H.
        dtype: of K and V.
        host_dtype: of the numbers in host memory, which have scales then; `None` is `dtype`.
    """

    moved: int
    records: int = 32768
    block_size: int = 64
    head_dim: int = 128
    dtype: str = "bfloat16"
    host_dtype: str | None = None

    @property
    def itemsize(self) -> int:
        """Count the bytes of one number in host memory."""
        return jnp.dtype(self.host_dtype or self.dtype).itemsize

    @property
    def name(self) -> str:
        """Say it in words."""
        size = record_bytes(self.block_size, self.head_dim, self.itemsize)
        packed = "" if self.host_dtype is None else f" of {self.host_dtype}"
        moved = f"{self.moved * size / 2**20:g} MiB"
        return f"{self.moved} records of {size // 1024} KiB{packed} ({moved})"

    @property
    def slots(self) -> int:
        """Count the slots on the device."""
        return 4 * self.moved

    @property
    def record(self) -> tuple[int, int, int]:
        """Give [2 W H]."""
        return (2, self.block_size, self.head_dim)

    def case(self, implementation: str, tiles: Tiles | None = None) -> Case:
        """Make the case of one implementation; tiles that are named become part of its name."""
        kind: Any = implementation
        variant = "" if tiles is None else f"[ctas={tiles.ctas} in_flight={tiles.in_flight}"
        variant += "" if tiles is None else f" parts={tiles.parts}]"
        return Case(
            op="gather_blocks",
            shape=self.name,
            implementation=implementation + variant,
            operands=functools.partial(_operands, shape=self),
            call=functools.partial(_call, implementation=kind, tiles=tiles),
            work=work(self.moved, self.block_size, self.head_dim, self.itemsize),
            check=_check,
            in_place=(4,),
        )


@functools.cache
def host_records(count: int, record: tuple[int, ...], dtype: str) -> Num[Array, "records 2 W H"]:
    """Make records in page-locked host memory, and give them as kernels see them.

    Each record holds its own number: modulo 128 in K, the rest in V.

    Args:
        count: of records.
        record: [2 W H].
        dtype: of K and V.
    """
    kind = jnp.dtype(dtype)
    shape = (count, *record)
    buffer = HostBuffer(int(np.prod(shape)) * kind.itemsize, page_lock="require")
    _BUFFERS.append(buffer)
    numbers = np.stack(np.divmod(np.arange(count), 128)[::-1], axis=1)  # exact in bf16 to 2^15
    buffer.array(shape, kind)[...] = numbers.astype(kind).reshape(count, 2, 1, 1)
    return buffer.device_view(shape, kind).array


def _call(
    records: Array,
    source: Array,
    places: Array,
    count: Array,
    slots: Array,
    scales: Array | None = None,
    **named: Any,
) -> Array:
    return gather_blocks(records, source, places, count, slots, scales=scales, **named)


def _operands(seed: int, *, shape: Shape) -> tuple[Array, ...]:
    rng = np.random.default_rng(seed)
    dtype = shape.host_dtype or shape.dtype
    if jax.default_backend() == "gpu":
        records = host_records(shape.records, shape.record, dtype)
    else:  # nothing crosses a link here; zeros make no work where only shapes are asked for
        records = jnp.zeros((shape.records, *shape.record), dtype)
    source = rng.choice(shape.records, shape.moved, replace=False).astype(np.int32)
    places = rng.choice(shape.slots, shape.moved, replace=False).astype(np.int32)
    return (
        records,
        jnp.asarray(source),
        jnp.asarray(places),
        jnp.array([shape.moved], jnp.int32),
        jnp.ones((shape.slots, *shape.record), shape.dtype),
        *(() if shape.host_dtype is None else (jnp.asarray(_scales(rng, shape.records)),)),
    )


def _scales(rng: np.random.Generator, records: int) -> np.ndarray:
    return rng.uniform(0.01, 0.1, (records, 2)).astype(np.float32)


def _check(output: Array, operands: tuple[Array, ...]) -> None:
    """Hold the slots to the reference, bit by bit."""
    want = jax.jit(functools.partial(_call, implementation="reference"))(*operands)
    assert bool(jnp.array_equal(output, want)), "slots differ from those of the reference"


def cases(*, tiny: bool = False) -> list[Case]:
    """List the cases.

    Args:
        tiny: shapes that run on a CPU in seconds, by the reference.
    """
    if tiny:
        small = Shape(moved=5, records=20, block_size=8, head_dim=16, dtype="float32")
        packed = dataclasses.replace(small, host_dtype="int8")
        return [small.case("reference"), packed.case("reference")]
    found = []
    for moved in (128, 512, 32):
        shape = Shape(moved=moved)
        found.append(shape.case("mosaic_gpu"))
        if moved == 128:
            found.append(shape.case("reference"))
            spreads = [(1, 12, 2), (2, 12, 2), (8, 12, 2), (4, 4, 2), (4, 6, 1), (4, 12, 4)]
            found += [
                shape.case("mosaic_gpu", Tiles(ctas=ctas, in_flight=ring, parts=parts))
                for ctas, ring, parts in spreads
            ]
    for moved in (128, 512):
        packed = Shape(moved=moved, host_dtype="int8")
        found.append(packed.case("mosaic_gpu"))
        if moved == 512:
            spreads = [(2, 12, 2), (8, 12, 2), (4, 12, 4), (4, 16, 2)]
            found += [
                packed.case("mosaic_gpu", Tiles(ctas=ctas, in_flight=ring, parts=parts))
                for ctas, ring, parts in spreads
            ]
    found.append(Shape(moved=512, host_dtype="float8_e4m3fn").case("mosaic_gpu"))
    return found
