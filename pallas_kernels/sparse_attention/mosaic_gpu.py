# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""`sparse_attention` for Hopper through Pallas-Mosaic GPU.

**Why.** The tensor cores of Hopper are fed from shared memory, so a kernel at the speed of dense
attention needs copies that run ahead of the arithmetic. One memory warpgroup walks the union of a
tile's blocks (see `union.py`) and copies each block of K and V by one transfer each into a ring of
buffers. Each computing warpgroup owns 64 rows, 64 / G queries, and takes from the ring the blocks
that one of its own queries chose; the others it only hands back. So memory traffic falls with the
overlap of all queries of a tile, and arithmetic is spent on the unions of few queries only.

**Numerics.** Scores, softmax and the accumulator are f32; probabilities are rounded to the dtype of
`v` before the second product, as in the reference. The softmax runs in base 2 with the scale folded
in. A row that did not choose a block takes no part: its maximum ignores the block, and its
exponents are shifted out of range, which gives exact zeros at the cost of two numbers a row, not
one a score. Blocks that end after some query come first in the list, and only these are compared
with positions key by key.

**Backend.** Mosaic GPU on compute capability 9.0: `wgmma` with 64 rows, copies by TMA, whose
coordinates are counted by axis, so no offset passes 2³¹. It refuses f32, whose products `wgmma`
would round to TF32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import _backend, _compat
from pallas_kernels.sparse_attention.config import WARPGROUP_ROWS, Tiles, padded_group, shared_bytes
from pallas_kernels.sparse_attention.reference import LOWEST
from pallas_kernels.sparse_attention.union import Union

_DTYPES = ("bfloat16", "float16")
_SHARED_BYTES = 226 * 1024
"""What a block of threads may ask for, less a little for barriers."""

_REGISTERS = {2: (232, 40), 3: (160, 32)}
"""Registers of a thread that computes, and of one that copies, by computing warpgroups."""

_ROWS = plgpu.Layout.WGMMA.reduce(1)  # a vector with one number for each row of a tile
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def unsupported_reason(
    *, group: int, head_dim: int, block_size: int, dtype: jax.typing.DTypeLike, tiles: Tiles
) -> str | None:
    """Say why the kernel cannot run here on such arguments; `None` if it can.

    Args:
        group: G, query heads per KV head.
        head_dim: H.
        block_size: W.
        dtype: of q, k and v.
        tiles: of the kernel.
    """
    return _backend.hopper_reason() or argument_reason(
        group=group, head_dim=head_dim, block_size=block_size, dtype=dtype, tiles=tiles
    )


def argument_reason(
    *, group: int, head_dim: int, block_size: int, dtype: jax.typing.DTypeLike, tiles: Tiles
) -> str | None:
    """Say why the kernel cannot take such arguments on any Hopper GPU; `None` if it can."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in _DTYPES:
        return f"takes {' or '.join(_DTYPES)}, not {dtype.name}"
    for name, size, least in (("head_dim", head_dim, 32), ("block_size", block_size, 16)):
        if size & (size - 1) or not least <= size <= 128:
            return f"takes a {name} that is a power of two from {least} to 128, not {size}"
    if padded_group(group) > WARPGROUP_ROWS:
        return f"takes groups of up to {WARPGROUP_ROWS} query heads, not {group}"
    if tiles.rows % WARPGROUP_ROWS or tiles.rows > 3 * WARPGROUP_ROWS:
        return f"takes 1 to 3 times {WARPGROUP_ROWS} rows, not {tiles.rows=}"
    if tiles.stages < 2:
        return f"needs at least 2 stages, not {tiles.stages=}"
    if tiles.queries_in == "shared" and block_size < min(64, head_dim):
        return f"multiplies queries from registers if {block_size=} < 64, not {tiles.queries_in=}"
    shared = shared_bytes(tiles, head_dim=head_dim, block_size=block_size)
    if shared > _SHARED_BYTES:
        return f"may use {_SHARED_BYTES} bytes of shared memory, but {tiles} takes {shared}"
    return None


def parts(tiles: Tiles) -> int:
    """Count the parts of a tile that skip blocks on their own: one for each warpgroup."""
    return tiles.rows // WARPGROUP_ROWS


def _accumulate(out, a, b_ref, while_running, spare_ref):
    """Give out + a @ b, f32; `while_running` is called once the product is under way.

    The interpreter multiplies no registers and starts no accumulator from a value: for it,
    `spare_ref` holds `a`, and the product is added to `out`.
    """
    if spare_ref is not None:
        spare_ref[...] = a
        plgpu.commit_smem()

        def product(acc_ref):
            plgpu.wgmma(acc_ref, spare_ref, b_ref)
            while_running()
            return acc_ref[...]

        return out + pl.run_scoped(product, plgpu.ACC(out.shape, jnp.float32))

    def accumulate(acc_ref):
        plgpu.wgmma(acc_ref, a, b_ref)
        while_running()

    return pl.run_state(accumulate)(plgpu.ACC.init(out))


def _compute(
    at, own_of, counts, smem, loaded, taken, positions_ref, bias_ref, query, spare_ref, *, scale
):
    """Attend with one warpgroup to the entries of the list that are its own: out, total mass."""
    batch, kv_head, row = at
    q, k_smem, v_smem, id_of = smem
    stages, block_size, dim = k_smem.shape
    cut, count = counts
    position = plgpu.load(
        positions_ref.at[batch, pl.ds(row, WARPGROUP_ROWS)], layout=_ROWS, optimized=False
    )
    column = plgpu.broadcasted_iota(
        jnp.int32, (WARPGROUP_ROWS, block_size), 1, layout=plgpu.Layout.WGMMA
    )

    def along_rows(x, width=block_size):
        return lax.broadcast_in_dim(x, (WARPGROUP_ROWS, width), [0])

    def wait_for(entry):
        pl.when(entry < count)(
            lambda: plgpu.barrier_wait(loaded.at[lax.rem(entry, jnp.int32(stages))])
        )

    def hand_back(entry):
        plgpu.barrier_arrive(taken.at[lax.rem(entry, jnp.int32(stages))])

    def skip(entry, own):
        """Hand back entries of other warpgroups, from one that has arrived on."""

        def is_other(state):
            entry, own = state
            return (entry < count) & (functools.reduce(jnp.bitwise_or, own) == 0)

        def pass_on(state):
            entry, _ = state
            hand_back(entry)
            wait_for(entry + 1)
            return entry + 1, own_of(entry + 1)

        return lax.while_loop(is_other, pass_on, (entry, own))

    def step(state, *, is_cut):
        (entry, own), top, total, out = state
        slot = lax.rem(entry, jnp.int32(stages))
        next_own = own_of(entry + 1)
        marked = lax.broadcast_in_dim(own[0], (WARPGROUP_ROWS,), ())
        if len(own) == 2:
            marked = jnp.where(query < 32, marked, lax.broadcast_in_dim(own[1], query.shape, ()))
        marked = (lax.shift_right_logical(marked, query & 31) & 1) != 0  # [rows]

        def product(acc_ref):
            plgpu.wgmma(acc_ref, q, k_smem.at[slot].transpose((1, 0)))
            return acc_ref[...]

        logits = pl.run_scoped(product, plgpu.ACC((WARPGROUP_ROWS, block_size), jnp.float32))
        if bias_ref is None and not is_cut:
            best = jnp.max(logits, axis=1) * scale
            logits = logits * scale
        else:
            block = id_of(entry)
            logits = logits * scale
            if bias_ref is not None:
                place = pl.ds(block * block_size, block_size)
                bias = plgpu.load(
                    bias_ref.at[batch, kv_head, place], layout=_COLUMNS, optimized=False
                )
                logits = logits + lax.broadcast_in_dim(bias, logits.shape, [1])
            if is_cut:
                seen = column <= along_rows(position - block * block_size)
                logits = jnp.where(seen, logits, LOWEST)
            best = jnp.max(logits, axis=1)
        new_top = jnp.maximum(top, jnp.where(marked, best, LOWEST))
        shift = jnp.where(marked, new_top, -LOWEST)  # −LOWEST: no mass from this row
        mass = jnp.exp2(logits - along_rows(shift))
        fade = jnp.exp2(top - new_top)
        total = total * fade + jnp.sum(mass, axis=1)
        out = _accumulate(
            out * along_rows(fade, dim),
            mass.astype(v_smem.dtype),
            v_smem.at[slot],
            lambda: wait_for(entry + 1),
            spare_ref,
        )
        hand_back(entry)
        return skip(entry + 1, next_own), new_top, total, out

    wait_for(jnp.int32(0))
    state = (
        skip(jnp.int32(0), own_of(jnp.int32(0))),
        plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), LOWEST, jnp.float32), _ROWS),
        plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), _ROWS),
        plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, dim), jnp.float32), plgpu.Layout.WGMMA),
    )
    state = lax.while_loop(lambda s: s[0][0] < cut, functools.partial(step, is_cut=True), state)
    state = lax.while_loop(lambda s: s[0][0] < count, functools.partial(step, is_cut=False), state)
    _, _, total, out = state
    return out * along_rows(1.0 / jnp.where(total > 0.0, total, 1.0), dim)


def _kernel(
    ids_ref, bits_ref, counts_ref, positions_ref, q_ref, k_ref, v_ref, *rest: Any,
    group, rows_of, has_bias, in_registers, scale,
):  # fmt: skip
    bias_ref, rest = (rest[0], rest[1:]) if has_bias else (None, rest)
    out_ref, q_smem, k_smem, v_smem, q_loaded, loaded, taken, *spare = rest
    batch, kv_head = lax.axis_index("batch"), lax.axis_index("kv_head")
    tile, thread = lax.axis_index("tile"), lax.axis_index("thread")
    threads, stages, block_size = q_smem.shape[0], k_smem.shape[0], k_smem.shape[1]
    queries = WARPGROUP_ROWS // group  # of a warpgroup
    entries = ids_ref.shape[3]
    count = counts_ref[batch, kv_head, tile, 1]

    def id_of(entry):
        return ids_ref[batch, kv_head, tile, entry]

    @pl.when(thread < threads)
    def _compute_warpgroup():
        if threads in _REGISTERS:
            plgpu.set_max_registers(_REGISTERS[threads][0], action="increase")
        first = (tile * threads + thread) * queries
        own_q = q_smem.at[thread]
        for here, there in rows_of(batch, kv_head, first):
            plgpu.copy_gmem_to_smem(q_ref.at[there], own_q.at[here], q_loaded.at[thread])
        row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=_ROWS)
        query = lax.shift_right_logical(row, jnp.full_like(row, group.bit_length() - 1))

        def own_of(entry):
            entry = jnp.minimum(entry, entries - 1)
            if queries == 64:
                words = [2 * thread, 2 * thread + 1]
                return tuple(bits_ref[batch, kv_head, tile, word, entry] for word in words)
            start = thread * queries
            bits = bits_ref[batch, kv_head, tile, lax.shift_right_logical(start, 5), entry]
            if queries == 32:
                return (bits,)
            return (lax.shift_right_logical(bits, start & 31) & ((1 << queries) - 1),)

        plgpu.barrier_wait(q_loaded.at[thread])
        q = plgpu.load(own_q, layout=plgpu.Layout.WGMMA) if in_registers else own_q
        out = _compute(
            (batch, kv_head, first * group),
            own_of,
            (counts_ref[batch, kv_head, tile, 0], count),
            (q, k_smem, v_smem, id_of),
            loaded,
            taken,
            positions_ref,
            bias_ref,
            query,
            spare[0].at[thread] if spare else None,
            scale=scale,
        )
        own_q[...] = out.astype(q_smem.dtype)
        plgpu.commit_smem()
        for here, there in rows_of(batch, kv_head, first):
            plgpu.copy_smem_to_gmem(own_q.at[here], out_ref.at[there])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(thread == threads)
    def _memory_warpgroup():
        if threads in _REGISTERS:
            plgpu.set_max_registers(_REGISTERS[threads][1], action="decrease")

        @pl.loop(0, count + stages)  # the last rounds see every block taken, and copy none
        def _copy_block(entry):
            slot = lax.rem(entry, jnp.int32(stages))
            block = id_of(jnp.minimum(entry, entries - 1))  # read while the slot is in use
            pl.when(entry >= stages)(lambda: plgpu.barrier_wait(taken.at[slot]))

            @pl.when(entry < count)
            def _copy():
                place = (batch, pl.ds(block * block_size, block_size), kv_head)
                plgpu.copy_gmem_to_smem(k_ref.at[place], k_smem.at[slot], loaded.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[place], v_smem.at[slot], loaded.at[slot])


def attend(
    union: Union,
    positions: Int32[Array, "B T"],
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    bias: Float32[Array, "B K S"] | None,
    *,
    scale: float,
    tiles: Tiles,
    interpret: bool = False,
) -> Float[Array, "B T K G H"]:
    """Attend to the union of each tile, rows masked by who chose what.

    Args:
        union: the lists of blocks, of tiles of `tiles.rows / G` queries in `parts(tiles)` parts.
        positions: of the queries; −1 gives zeros.
        q: queries; T is a multiple of the tile, G a power of two.
        k: keys; S is M · W.
        v: values.
        bias: added to the logits, times log2(e).
        scale: of the logits, times log2(e); positive.
        tiles: of the kernel.
        interpret: run it in the interpreter.
    """
    batch, queries, kv_heads, group, dim = q.shape
    block_size = k.shape[1] // union.ids.shape[3]
    threads = parts(tiles)
    per_thread = WARPGROUP_ROWS // group
    # Where 8 heads or more are the rows of a query, they are copied as they stand; fewer would
    # not fill the 8 rows that a transfer moves together, so queries become neighbours first.
    in_place = group % 8 == 0
    if in_place:
        shape = (batch, queries, kv_heads * group, dim)
        operand = q.reshape(shape)
    else:
        shape = (batch, kv_heads, queries * group, dim)
        operand = q.transpose(0, 2, 1, 3, 4).reshape(shape)

    def rows_of(b, h, first):
        if not in_place:
            return [(pl.ds(0, WARPGROUP_ROWS), (b, h, pl.ds(first * group, WARPGROUP_ROWS)))]
        return [
            (pl.ds(i * group, group), (b, first + i, pl.ds(h * group, group)))
            for i in range(per_thread)
        ]

    def swizzled(shape, minor):
        minor = min(64, minor)
        transforms = (plgpu.TilingTransform((8, minor)), plgpu.SwizzleTransform(2 * minor))
        return plgpu.SMEM(shape, k.dtype, transforms=transforms)

    ring = swizzled((tiles.stages, block_size, dim), min(block_size, dim))
    spare = swizzled((threads, WARPGROUP_ROWS, block_size), min(block_size, dim))
    operands = [
        union.ids, union.bits, union.counts, jnp.repeat(positions, group, axis=1), operand, k, v,
    ]  # fmt: skip
    operands += [] if bias is None else [bias]
    out = plgpu.kernel(
        functools.partial(
            _kernel,
            group=group,
            rows_of=rows_of,
            has_bias=bias is not None,
            in_registers=tiles.queries_in == "registers" and not interpret,
            scale=scale,
        ),
        out_type=jax.ShapeDtypeStruct(shape, q.dtype),
        scratch_types=[
            swizzled((threads, WARPGROUP_ROWS, dim), dim),
            ring,
            ring,
            plgpu.Barrier(num_arrivals=per_thread if in_place else 1, num_barriers=threads),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
            plgpu.Barrier(num_arrivals=threads, num_barriers=tiles.stages),
            *([spare] if interpret else []),
        ],
        grid=(batch, kv_heads, queries // (threads * per_thread)),
        grid_names=("batch", "kv_head", "tile"),
        num_threads=threads + 1,
        thread_name="thread",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="sparse_attention_mosaic",
        **_compat.mosaic_interpret(interpret),
    )(*operands)
    if in_place:
        return out.reshape(q.shape)
    return out.reshape(batch, kv_heads, queries, group, dim).transpose(0, 2, 1, 3, 4)
