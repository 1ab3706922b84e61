# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The rules of sparse attention as loops over scalars, in NumPy and float64.

Nothing here imports the library or is fast: each function is one definition, written down again.
Arrays belong to one sequence: q [T N H], k and v [S K H], pooled [C K H], cells [C], scores [M].
`rule` is anything with the fields of a `SparseConfig`.
"""

import math

import numpy as np


def pool_keys(k, size, stride):
    """Average each full window of `size` keys, one window every `stride` keys: [C K H]."""
    pooled, start = [], 0
    while start + size <= len(k):
        total = np.zeros(k.shape[1:], np.float64)
        for token in range(start, start + size):
            total = total + k[token]
        pooled.append(total / size)
        start += stride
    return np.array(pooled).reshape(len(pooled), *k.shape[1:])


def is_visible(cell, position, rule):
    """Tell whether the last token of window `cell` is not after the query."""
    return cell * rule.pool_stride + rule.pool_size - 1 <= position


def score_by_queries(q, pooled, position, rule):
    """Sum each group's softmax over the visible windows for one query q [N H]: [K C], −inf else."""
    heads, (windows, kv_heads, dim) = len(q), pooled.shape
    group = heads // kv_heads
    seen = [c for c in range(windows) if is_visible(c, position, rule)]
    scores = np.full((kv_heads, windows), -np.inf)
    for head in range(kv_heads):
        for c in seen:
            scores[head, c] = 0.0
        for n in range(head * group, (head + 1) * group):
            logits = {c: float(np.dot(q[n], pooled[c, head])) / math.sqrt(dim) for c in seen}
            top = max(logits.values(), default=0.0)
            total = sum(math.exp(logit - top) for logit in logits.values())
            for c in seen:
                scores[head, c] += math.exp(logits[c] - top) / total
    return scores


def score_by_forecast(forecast, pooled, position, rule):
    """Take the raw products of one forecast [K H] with the visible windows: [K C], −inf else."""
    windows, kv_heads, _ = pooled.shape
    scores = np.full((kv_heads, windows), -np.inf)
    for head in range(kv_heads):
        for c in range(windows):
            if is_visible(c, position, rule):
                scores[head, c] = float(np.dot(forecast[head], pooled[c, head]))
    return scores


def pool_scores(cells, num_blocks, ratio):
    """Take, for each block m, the best of cells ratio·m − 1 … ratio·m + ratio − 1: [M]."""
    scores = np.full(num_blocks, -np.inf)
    for block in range(num_blocks):
        for cell in range(ratio * block - 1, ratio * block + ratio):
            if 0 <= cell < len(cells) and cells[cell] > scores[block]:
                scores[block] = cells[cell]
    return scores


def pinned(position, num_blocks, rule):
    """List the sink, local and own blocks of a query."""
    own = position // rule.block_size
    return [
        m
        for m in range(num_blocks)
        if m <= own and (m < rule.sink_blocks or m >= own - rule.local_blocks)
    ]


def best(scores, candidates, count):
    """Take the `count` best candidates, one at a time; at ties the lower one."""
    left, taken = sorted(candidates), []
    while left and len(taken) < count:
        winner = left[0]
        for candidate in left:
            if scores[candidate] > scores[winner]:
                winner = candidate
        left.remove(winner)
        taken.append(winner)
    return taken


def choose(scores, position, rule):
    """Choose the blocks of one query: the pinned ones, then the best past ones, ascending."""
    own = position // rule.block_size
    chosen = pinned(position, len(scores), rule)
    rest = [m for m in range(len(scores)) if m <= own and m not in chosen]
    return sorted(chosen + best(scores, rest, min(rule.selected_blocks, len(scores)) - len(chosen)))


def choose_nosa(scores, importance, position, rule):
    """Choose in two steps: the query-aware share with the pinned blocks, then by importance."""
    own = position // rule.block_size
    share = pinned(position, len(scores), rule)
    rest = [m for m in range(len(scores)) if m <= own and m not in share]
    wanted = rule.sink_blocks + rule.local_blocks + rule.query_blocks
    share = share + best(scores, rest, wanted - len(share))
    rest = [m for m in rest if m not in share]
    budget = min(rule.selected_blocks, len(scores))
    return sorted(share + best(importance, rest, budget - len(share)))


def padded(ids, width):
    """Fill a list of block ids up with −1."""
    return list(ids) + [-1] * (width - len(ids))


def attend(q, k, v, ids, positions, block_size, bias=None):
    """Attend to tokens s ≤ t of the blocks ids[t][head]: [T N H], zeros where nothing is seen."""
    (queries, heads, dim), (length, kv_heads, _) = q.shape, k.shape
    group = heads // kv_heads
    out = np.zeros((queries, heads, dim), np.float64)
    for t in range(queries):
        for n in range(heads):
            head = n // group
            chosen = {int(m) for m in ids[t][head] if m >= 0}
            seen = [s for s in range(length) if s <= positions[t] and s // block_size in chosen]
            logits = []
            for s in seen:
                logit = float(np.dot(q[t, n], k[s, head])) / math.sqrt(dim)
                logits.append(logit + (0.0 if bias is None else float(bias[s, head])))
            top = max(logits, default=0.0)
            weights = [math.exp(logit - top) for logit in logits]
            for s, weight in zip(seen, weights, strict=True):
                out[t, n] += weight / sum(weights) * v[s, head]
    return out


def rotate(x, positions, theta):
    """Rotate x [T N H] by pairs (i, i + H/2) through the angle p · θ^(−2i/H)."""
    half = x.shape[-1] // 2
    out = np.zeros(x.shape, np.float64)
    for t, position in enumerate(positions):
        for i in range(half):
            angle = position * theta ** (-i / half)
            cos, sin = math.cos(angle), math.sin(angle)
            first, second = x[t, :, i], x[t, :, i + half]
            out[t, :, i] = first * cos - second * sin
            out[t, :, i + half] = second * cos + first * sin
    return out


def rms_norm(x, scale, epsilon):
    """Divide each row by its root mean square, then scale."""
    rows = [row / math.sqrt(float(np.mean(row**2)) + epsilon) * scale for row in x]
    return np.array(rows)


def silu(x):
    """x / (1 + e^(−x))."""
    return x / (1.0 + np.exp(-x))


def softplus(x):
    """log(1 + e^x)."""
    return np.logaddexp(0.0, x)


def _choose_layer(config, mode, probe, pooled, importance, position):
    """Choose the blocks of one query in one layer for every KV head."""
    rule, blocks = config.sparse, config.sparse.blocks(position + 1)
    ratio = rule.block_size // rule.pool_stride
    score = score_by_queries if mode == "sparse" else score_by_forecast
    cells = score(probe, pooled, position, rule)
    chosen = []
    for head in range(config.kv_heads):
        scores = pool_scores(cells[head], blocks, ratio)
        if importance is None:
            chosen.append(choose(scores, position, rule))
        else:
            rank = pool_scores(importance[:, head], blocks, ratio)
            chosen.append(choose_nosa(scores, rank, position, rule))
    return chosen


def decoder(weights, config, tokens, mode):
    """Run a whole decoder over one sequence: logits [T V] and ids[layer][t][head].

    Args:
        weights: by path, such as `layers.0.attention.q_proj`, float64.
        config: a ModelConfig with plain rotary positions.
        tokens: list of token ids.
        mode: `dense`, `sparse` (own queries) or `sparda` (forecasts).
    """
    rule, theta = config.sparse, config.rope.theta
    positions = list(range(len(tokens)))
    x = np.array([weights["embed"][token] for token in tokens]) * config.embed_scale
    all_ids, forecast = [], None
    for layer in range(config.layers):
        w = {
            name.removeprefix(f"layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"layers.{layer}.")
        }

        def heads(name, a, w=w):
            return np.tensordot(a, w[f"attention.{name}"], axes=1)

        a = rms_norm(x, w["input_norm.scale"], config.rms_norm_eps)
        q = rotate(heads("q_proj", a), positions, theta)
        k = rotate(heads("k_proj", a), positions, theta)
        v = heads("v_proj", a)
        if layer == 0:
            forecast = rotate(heads("entry_forecast_proj", a), positions, theta)
        probe = q if mode == "sparse" else forecast
        bias = pooled_bias = None
        if config.token_importance:
            raw = np.tensordot(v, w["attention.importance_proj"], axes=2)
            bias = w["attention.importance_scale"] * softplus(raw)
            pooled_bias = pool_keys(bias, rule.pool_size, rule.pool_stride)
        pooled = pool_keys(k, rule.pool_size, rule.pool_stride)
        ids = []
        for t in positions:
            if mode == "dense":
                everything = list(range(t // rule.block_size + 1))
                ids.append([everything] * config.kv_heads)
            else:
                ids.append(_choose_layer(config, mode, probe[t], pooled, pooled_bias, t))
        all_ids.append(ids)
        y = attend(q, k, v, ids, positions, rule.block_size, bias)
        if layer < config.layers - 1:
            forecast = rotate(heads("forecast_proj", a), positions, theta)
        x = x + config.residual_scale * np.tensordot(y, w["attention.o_proj"], axes=2)
        h = rms_norm(x, w["mlp_norm.scale"], config.rms_norm_eps)
        wide = silu(h @ w["mlp.gate_proj"]) * (h @ w["mlp.up_proj"])
        x = x + config.residual_scale * (wide @ w["mlp.down_proj"])
    x = rms_norm(x, weights["final_norm.scale"], config.rms_norm_eps) / config.logit_divisor
    head = weights["embed"].T if config.tie_embeddings else weights["lm_head"]
    return x @ head, all_ids
