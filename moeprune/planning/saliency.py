"""From sums to one score per expert: the table of metrics, and how the domains of the calibration data are blended.

Symbols, for expert j of a block: g gate value, f expert output, x layer input, p router probability; sum_j runs over
the n_j tokens routed to j, sum_T over all T tokens. Legend of the array suffixes: D domains, E experts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moeprune.errors import UsageError
from moeprune.metadata import STATISTICS, Array, BlockSums, Sums

# What the score of a block is computed from: the block, the factor of each domain's sums, the seed.
Formula = Callable[[BlockSums, Array, int], Array]


@dataclass(frozen=True, slots=True)
class Metric:
    """One way to rank the experts of a block; the larger score stays."""

    formula: str
    needs: tuple[str, ...]  # statistics of metadata.STATISTICS; "gram" is the matrix for ean_ca
    score: Formula
    total: bool  # adds up over tokens, so that an expert's share of the block's total means something


def _safe_ratio(top_E: Array, bottom_E: Array) -> Array:
    """top / bottom, and 0 where there is nothing to divide by: an expert that saw no token scores 0."""
    return np.divide(top_E, bottom_E, out=np.zeros_like(top_E), where=bottom_E > 0)


def _total(statistic: str, formula: str) -> Metric:
    def score(block: BlockSums, factor_D: Array, _seed: int) -> Array:
        return np.asarray(factor_D @ block.values[statistic])

    return Metric(formula, (statistic,), score, total=True)


def _per_routed_token(statistic: str, formula: str) -> Metric:
    def score(block: BlockSums, factor_D: Array, _seed: int) -> Array:
        return _safe_ratio(factor_D @ block.values[statistic], factor_D @ block.values["count"])

    return Metric(formula, (statistic, "count"), score, total=False)


def _per_token(statistic: str, formula: str) -> Metric:
    def score(block: BlockSums, factor_D: Array, _seed: int) -> Array:
        tokens = float(factor_D @ block.tokens_D)
        total_E = np.asarray(factor_D @ block.values[statistic])
        return total_E / tokens if tokens > 0 else np.zeros_like(total_E)

    return Metric(formula, (statistic,), score, total=True)


def _norm_of_mean(block: BlockSums, factor_D: Array, _seed: int) -> Array:
    assert block.gram_EDD is not None  # check_measured has refused it
    squared_E = (block.gram_EDD @ factor_D) @ factor_D
    return _safe_ratio(np.sqrt(np.maximum(squared_E, 0.0)), factor_D @ block.values["count"])


def _largest(block: BlockSums, factor_D: Array, _seed: int) -> Array:
    return np.asarray(np.max(block.values["max_abs"] * (factor_D > 0)[:, None], axis=0))


def _random(block: BlockSums, _factor_D: Array, seed: int) -> Array:
    # The block's name is part of the seed: the same choice whatever other blocks are there.
    return np.random.default_rng([seed % 2**32, zlib.crc32(block.block.encode())]).random(block.experts)


METRICS = {
    "reap": _per_routed_token("gate_norm_sum", "sum_j g |f| / n_j"),
    "reap_l2": _per_routed_token("gate_norm_sq_sum", "sum_j (g |f|)^2 / n_j"),
    "frequency": _total("count", "n_j"),
    "ean_sum": _total("norm_sum", "sum_j |f|"),
    "ean_mean": _per_routed_token("norm_sum", "sum_j |f| / n_j"),
    "ean_ca": Metric("|sum_j f| / n_j", ("gram", "count"), _norm_of_mean, total=False),
    "weighted_frequency_sum": _total("gate_sum", "sum_j g"),
    "weighted_ean_sum": _total("gate_norm_sum", "sum_j g |f|"),
    "weighted_ean_sum_l2": _total("gate_norm_sq_sum", "sum_j (g |f|)^2"),
    "max_activations": Metric("max_j |component of f|", ("max_abs",), _largest, total=False),
    "random": Metric("uniform in [0, 1), by seed and block name", (), _random, total=False),
    "full": _per_token("full_sum", "sum_T p |f| / T"),
    "router": _per_token("router_sum", "sum_T p |x| / T"),
}

# What each scoring mode measures; the modes routed and full also give the Gram matrices.
ROUTER_ALONE = {"count", "gate_sum", "gate_sq_sum"}
MEASURED = {
    "routed": STATISTICS.keys() - {"full_sum", "router_sum"},
    "full": STATISTICS.keys() - {"router_sum"},
    "router": ROUTER_ALONE | {"router_sum"},
}

# How domains are blended. factor_D multiplies each domain's sums; share is a score over the block's total of scores.
BLENDS = {
    "pooled": "every token counts the same: the score of the added sums",
    "weighted": "the score of a mix with w_d tokens of domain d, however many were seen; without weights: balanced",
    "shares": "sum_d w_d share_d / sum_d w_d: every domain has the same say, or as much as its weight",
    "maxmin": "the order of removal that keeps the worst domain's remaining share largest at every step",
}


def resolve(sums: Sums, metric: str = "auto", blend: str = "auto", weighted: bool = False) -> tuple[str, str]:
    """The metric and the blend behind "auto".

    Several domains: shares of weighted_ean_sum, the REAP criterion before its division by n_j. Measured on a small
    trained model it had the lowest KL at 25, 50 and 75%. Shares of `reap` itself would let rare loud experts fill a
    domain's share, so `reap` is chosen where nothing is shared: one domain, or the blends pooled and weighted. A
    metric that is a mean is blended as published, pooled, unless another blend is named.
    """
    several = len(sums.domains) > 1
    if metric not in {"auto", *METRICS}:
        raise UsageError(f"metric {metric!r} is not known; use auto or one of {', '.join(METRICS)}")
    if blend not in {"auto", *BLENDS}:
        raise UsageError(f"blend {blend!r} is not known; use auto or one of {', '.join(BLENDS)}")
    if blend == "auto":
        share = several and (metric == "auto" or METRICS[metric].total)
        blend = "shares" if share else "weighted" if weighted else "pooled"
    if metric == "auto":
        routed = "weighted_ean_sum" if several and blend in {"shares", "maxmin"} else "reap"
        metric = {"routed": routed, "full": "full", "router": "router"}[sums.mode]
    return metric, blend


def scores(
    sums: Sums, metric: str = "auto", blend: str = "auto", weights: Mapping[str, float] | None = None, seed: int = 42
) -> dict[str, Array]:
    """One score [E] per block; the experts with the largest stay. Experts that no token was routed to score 0.

    `weights` are by domain; a domain that is not named weighs 1.
    """
    metric, blend = resolve(sums, metric, blend, bool(weights))
    if weights and blend not in {"weighted", "shares"}:
        raise UsageError(f"weights have no meaning for the blend {blend}; use the blend weighted or shares")
    weights_D = _weights(sums.domains, weights or {})
    return {block.block: _block_score(block, metric, blend, weights_D, seed) for block in sums.blocks}


def _weights(domains: tuple[str, ...], weights: Mapping[str, float]) -> Array:
    unknown = sorted(set(weights) - set(domains))
    if unknown:
        raise UsageError(f"no domain {unknown[0]!r} in the calibration data; it has {', '.join(domains)}")
    weights_D = np.array([weights.get(name, 1.0) for name in domains], dtype=np.float64)
    if not np.isfinite(weights_D).all() or (weights_D < 0).any() or not (weights_D > 0).any():
        raise UsageError("weights must be finite, at least 0, and one of them above 0")
    return weights_D


def _block_score(block: BlockSums, metric: str, blend: str, weights_D: Array, seed: int) -> Array:
    check_measured(block, metric)
    if blend == "pooled" or metric == "random":
        return METRICS[metric].score(block, np.ones_like(weights_D), seed)
    if blend == "weighted":
        return METRICS[metric].score(block, _safe_ratio(weights_D, block.tokens_D), seed)
    share_DE = shares(block, metric, seed)
    if blend == "maxmin":
        return order_of_removal(share_DE)
    weights_D = weights_D * (share_DE.sum(axis=1) > 0)  # a domain that left no trace in this block has no say
    blended_E: Array = weights_D @ share_DE
    return np.asarray(blended_E / max(float(weights_D.sum()), 1e-300))


def check_measured(block: BlockSums, metric: str) -> None:
    """Refuse a metric whose statistics the scoring mode did not measure."""
    there = set(block.values) | ({"gram"} if block.gram_EDD is not None else set())
    missing = [name for name in METRICS[metric].needs if name not in there]
    if missing:
        possible = [name for name, entry in METRICS.items() if there.issuperset(entry.needs)]
        raise UsageError(
            f"metric {metric} needs {', '.join(missing)}, which block {block.block} has not measured; "
            f"choose one of {', '.join(possible)}, or score again in another mode"
        )


def shares(block: BlockSums, metric: str, seed: int = 42) -> Array:
    """[D, E]: what part of each domain's total score belongs to each expert; a domain without any is all 0."""
    score = METRICS[metric].score
    score_DE = np.stack([score(block, one_D, seed) for one_D in np.eye(len(block.tokens_D))])
    total_D1 = score_DE.sum(axis=1, keepdims=True)
    share_DE: Array = np.divide(score_DE, total_D1, out=np.zeros_like(score_DE), where=total_D1 > 0)
    return share_DE


def order_of_removal(share_DE: Array) -> Array:
    """1/E for the expert that may go first, ..., 1 for the one that must stay longest, so that any count can be cut.

    Each step removes the expert whose loss leaves the largest worst-domain share; ties go to the smallest sum of
    shares, then to the higher index. The sets are nested; each is a greedy answer to max over sets of min over domains.
    """
    share_DE = share_DE[share_DE.sum(axis=1) > 0]
    experts = share_DE.shape[1]
    rank_E = np.zeros(experts)
    left_D = share_DE.sum(axis=1)
    mean_E = share_DE.sum(axis=0)
    alive = np.arange(experts)
    for step in range(1, experts + 1):
        worst_left = (left_D[:, None] - share_DE[:, alive]).min(axis=0, initial=np.inf)
        chosen = alive[np.lexsort((-alive, mean_E[alive], -worst_left.round(12)))[0]]
        rank_E[chosen] = step / experts
        left_D = left_D - share_DE[:, chosen]
        alive = alive[alive != chosen]
    return rank_E


def never_routed(block: BlockSums) -> tuple[int, ...]:
    """The experts that no token of any domain was routed to."""
    count_E = block.values["count"].sum(axis=0)
    return tuple(int(j) for j in np.flatnonzero(count_E == 0))


def parse_weights(text: str) -> dict[str, float]:
    """`code=2,chat=1` as a mapping; empty text is no weights."""
    weights: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not equals or not name or not 0 <= value < float("inf") or name in weights:
            raise UsageError(f"weights {text!r}: write domain=number, such as code=2,chat=1, each domain once")
        weights[name] = value
    return weights
