# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The alignment loss of the backbone: choosing blocks has no gradient, this gives its keys one."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.backbone_data import WeightedBatch
from sparda_jax.config import SparseConfig
from sparda_jax.pooling import LOWEST, pool_scores
from sparda_jax.selection import block_mask, pinned_blocks, select_blocks
from sparda_jax.selectors.query import score_by_queries, visible_cells


def choose_queries(
    batch: WeightedBatch, queries: int, seed: int, step: int
) -> Int[np.ndarray, "B Q"]:
    """Pick queries for `alignment_loss`: half of them predict an answer, where there are any."""
    rng = np.random.default_rng([seed, step, 77])
    length = batch.tokens.shape[1]
    rows = []
    for weights in batch.loss_weights:
        asking = np.flatnonzero(weights[1:] > 1.0)
        count = queries // 2 if len(asking) else 0
        chosen = rng.choice(asking, count) if count else np.empty(0, np.int64)
        others = rng.integers(length, size=queries - count)
        rows.append(np.concatenate([chosen, others]))
    return np.stack(rows).astype(np.int32)


def alignment_loss(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    pooled: Float[Array, "B C K H"],
    queries: Int[Array, "B Q"],
    sparse: SparseConfig,
    sharpness: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Teach pooled keys to find what attention wants: KL(attention ‖ pooled scores) over blocks.

    For some queries, the attention mass that full attention puts on each block that is not pinned
    (no gradient), against the mass of the own-query rule on the cells of the block. Both are
    normalised over those blocks; a row counts by the attention mass that it puts there, so rows
    that look nowhere far weigh nothing. Choosing blocks has no gradient; this gives the keys one.

    Args:
        q: rotated queries of a layer.
        k: rotated keys.
        pooled: pooled keys.
        queries: positions looked at.
        sparse: the rule.
        sharpness: multiplies the pooled logits.

    Returns:
        The mean divergence over rows and KV heads, and the share of the mass on free blocks that
        the blocks chosen by the rule hold.
    """
    length, kv_heads = k.shape[1], k.shape[2]
    blocks, cells = sparse.blocks(length), sparse.cells_per_block
    asked = jax.vmap(lambda row, index: row[index])(q, queries)
    grouped = asked.reshape(*asked.shape[:2], kv_heads, -1, asked.shape[-1])
    logits = jnp.einsum(
        "bqkgh,bskh->bqkgs",
        jax.lax.stop_gradient(grouped),
        jax.lax.stop_gradient(k),
        preferred_element_type=jnp.float32,
    ) * (q.shape[-1] ** -0.5)
    past = jnp.arange(length)[None, None, :] <= queries[:, :, None]
    mass = jax.nn.softmax(jnp.where(past[:, :, None, None, :], logits, LOWEST), axis=-1)
    mass = jnp.mean(mass, axis=3)  # [B Q K S]
    mass = jnp.pad(mass, ((0, 0),) * 3 + ((0, blocks * sparse.block_size - length),))
    wanted = mass.reshape(*mass.shape[:3], blocks, sparse.block_size).sum(axis=-1)

    visible = visible_cells(queries, pooled.shape[1], sparse)
    ranks = jax.lax.stop_gradient(score_by_queries(asked, pooled, visible))
    ranks = jnp.where(visible[:, :, None, :], ranks, LOWEST)
    chosen = select_blocks(pool_scores(ranks, blocks, cells), queries, sparse).ids
    found = score_by_queries(asked * jnp.asarray(sharpness, asked.dtype), pooled, visible)
    found = found / grouped.shape[3]
    found = jnp.pad(found, ((0, 0),) * 3 + ((0, blocks * cells - found.shape[-1]),))
    found = found.reshape(*found.shape[:3], blocks, cells).sum(axis=-1)  # [B Q K M]

    own = (queries // sparse.block_size)[:, :, None]
    free = (jnp.arange(blocks)[None, None, :] <= own) & ~pinned_blocks(queries, blocks, sparse)
    free = free[:, :, None, :]
    wanted, found = jnp.where(free, wanted, 0.0), jnp.where(free, found, 0.0)
    weight = jnp.sum(wanted, axis=-1)
    wanted = wanted / jnp.maximum(weight, 1e-6)[..., None]
    found = found / jnp.maximum(jnp.sum(found, axis=-1), 1e-6)[..., None]
    divergence = jnp.sum(
        wanted * (jnp.log(jnp.maximum(wanted, 1e-9)) - jnp.log(jnp.maximum(found, 1e-9))), axis=-1
    )
    held = jnp.sum(jnp.where(block_mask(chosen, blocks), wanted, 0.0), axis=-1) * weight
    return jnp.mean(weight * divergence), jnp.sum(held) / jnp.maximum(jnp.sum(weight), 1e-6)
