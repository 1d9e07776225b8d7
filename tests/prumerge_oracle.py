"""PruMerge written out with loops over patches and tokens, float64, and inputs for it."""

import numpy as np

from prumerge_jax.prumerge import PruMergeConfig


def reduce_one(
    hidden: np.ndarray, keys: np.ndarray, attention: np.ndarray, config: PruMergeConfig
) -> tuple[np.ndarray, list[int]]:
    """One image: hidden and keys [N, D], attention [N]. Returns tokens [n, D], patch indices."""
    hidden, keys = hidden.astype(np.float64), keys.astype(np.float64)
    num = len(attention)
    by_attention = sorted(range(num), key=lambda i: (-attention[i], i))
    if config.count_rule == "all":
        number = num
    elif config.count_rule == "top":
        number = int(num * config.ratio)
    else:
        q1, q3 = np.percentile(attention, [25, 75])
        number = sum(bool(a > q3 + config.iqr_factor * (q3 - q1)) for a in attention)
    if config.count_rule != "all":
        number = max(number, config.min_tokens)
        number = min(number, num if config.max_tokens is None else config.max_tokens)
    selected = by_attention[:number]
    added = _added(selected, number, num, config)
    entries = selected + added if config.order == "attention" else sorted(selected + added)

    pruned = [i for i in range(num) if i not in entries]
    doubled = len(entries) - len(set(entries))
    pruned = pruned[doubled:]
    tokens = []
    for entry, patch in enumerate(entries):
        pool = list(pruned)
        if config.pool == "all":
            pool += entries[:entry] + entries[entry + 1 :]
        similarity = {j: _similarity(keys[patch], keys[j], config.similarity) for j in set(pool)}
        nearest = sorted(pool, key=lambda j: (-similarity[j], j))[: config.neighbours]
        token = hidden[patch].copy()
        if config.merge == "sum":
            token += sum((attention[j] * hidden[j] for j in nearest), np.zeros(hidden.shape[1]))
        if config.merge == "mean":
            members = [patch, *nearest]
            weights = np.array([attention[j] for j in members], np.float64)
            if weights.sum() > 0:
                token = weights @ hidden[members] / weights.sum()
        tokens.append(token)
    if config.extra_token:
        tokens.append(sum((attention[j] * hidden[j] for j in pruned), np.zeros(hidden.shape[1])))
    return np.array(tokens).reshape(-1, hidden.shape[1]), entries


def _added(selected: list[int], number: int, num: int, config: PruMergeConfig) -> list[int]:
    others = [i for i in range(num) if i not in selected]
    if config.added_patches == "raster":
        stride = max(1, num // max(number, 1) // 3)
        return [i for i in range(0, num - 1, stride) if i not in selected]
    if config.added_patches == "raster_fixed":
        stride = int(1 / config.ratio)
        return list(range(stride // 2, num - 1, stride))
    if config.added_patches == "uniform":
        points = min(number, len(others))
        return sorted({others[(2 * i + 1) * len(others) // (2 * points)] for i in range(points)})
    if config.added_patches in ("lattice", "lattice_fixed"):
        side = int(num**0.5)
        points = int(np.ceil(np.sqrt(number)))
        if config.added_patches == "lattice_fixed":
            points = max(1, round(side * config.ratio**0.5))
        lines = {(2 * i + 1) * side // (2 * points) for i in range(points)}
        return [i for i in others if i // side in lines and i % side in lines]
    return []


def _similarity(a: np.ndarray, b: np.ndarray, kind: str) -> float:
    if kind == "dot":
        return float(a @ b)
    return float(a @ b / max(np.linalg.norm(a), 1e-12) / max(np.linalg.norm(b), 1e-12))


def random_batch(
    batch: int, patches: int, width: int, seed: int = 0, skew: float = 2.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states, keys, and attention with a heavy tail."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, patches, width)).astype(np.float32)
    keys = rng.normal(size=(batch, patches, width)).astype(np.float32)
    attention = np.exp(skew * rng.normal(size=(batch, patches)))
    attention = (attention / attention.sum(-1, keepdims=True) * 0.9).astype(np.float32)
    return hidden, keys, attention
