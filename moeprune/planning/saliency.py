"""From sums to one score per expert: the table of metrics, and how the domains of the calibration data are blended.

Symbols, for expert j of a block: g gate value, f expert output, x layer input, p router probability; sum_j runs over
the n_j tokens routed to j, sum_T over all T tokens. Legend of the array suffixes: D domains, E experts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moeprune.arrays import Array, np
from moeprune.errors import UsageError
from moeprune.metadata import STATISTICS, BlockSums, Sums

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
    "random": Metric("uniform in [0, 1), by seed and layer name", (), _random, total=False),
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
    "maxmin": "shares, with the weights under which the kept experts cover the worst domain most",
}
MAXMIN_STEPS = 100
MAXMIN_RATE = 3.0


def check_metric(metric: str) -> None:
    """Refuse a name that is in no table."""
    if metric not in {"auto", *METRICS}:
        raise UsageError(f"metric {metric!r} is not known; use auto or one of {', '.join(METRICS)}")


def resolve(sums: Sums, metric: str = "auto", blend: str = "auto", weighted: bool = False) -> tuple[str, str]:
    """The metric and the blend behind "auto".

    Several domains: shares of weighted_ean_sum, the REAP criterion before its division by n_j. On data of unequal
    domains its KL was level with plain REAP's at 25% and below it at 50 and 75% (docs/measurements.md, with the blends
    that come near it). Shares of `reap` itself would let rare loud experts fill a domain's share, and in a balanced
    mix it lost to weighted_ean_sum on 12 of 12 draws, so `reap` is chosen for one domain or the blend pooled alone. A
    metric that is a mean is blended as published, pooled, unless another blend is named.
    """
    several = len(sums.domains) > 1
    check_metric(metric)
    if blend not in {"auto", *BLENDS}:
        raise UsageError(f"blend {blend!r} is not known; use auto or one of {', '.join(BLENDS)}")
    if blend == "auto":
        share = several and (metric == "auto" or METRICS[metric].total)
        blend = "shares" if share else "weighted" if weighted else "pooled"
    if metric == "auto":
        routed = "weighted_ean_sum" if several and blend != "pooled" else "reap"
        metric = {"routed": routed, "full": "full", "router": "router"}[sums.mode]
    return metric, blend


def scores(
    sums: Sums,
    metric: str = "auto",
    blend: str = "auto",
    weights: Mapping[str, float] | None = None,
    seed: int = 42,
    *,
    count: int = 0,
    groups: int = 1,
) -> dict[str, Array]:
    """One score [E] per block; the experts with the largest stay. Experts that no token was routed to score 0.

    `weights` are by domain; a domain that is not named weighs 1. The blend maxmin depends on how many experts are to
    stay, `count` (0: half of them), and on the groups of the router.
    """
    metric, blend = resolve(sums, metric, blend, bool(weights))
    if weights and blend not in {"weighted", "shares"}:
        raise UsageError(f"weights have no meaning for the blend {blend}; use the blend weighted or shares")
    weights_D = _weights(sums.domains, weights or {})
    if blend == "maxmin" and metric != "random":
        for block in sums.blocks:
            check_measured(block, metric)
        share_BDE = [shares(block, metric) for block in sums.blocks]
        weights_D = maxmin_weights(share_BDE, count or sums.blocks[0].experts // 2, groups)
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
            f"metric {metric} needs {', '.join(missing)}, which layer {block.block} has not measured; "
            f"choose one of {', '.join(possible)}, or score again in another mode"
        )


def shares(block: BlockSums, metric: str, seed: int = 42) -> Array:
    """[D, E]: what part of each domain's total score belongs to each expert; a domain without any is all 0."""
    score = METRICS[metric].score
    score_DE = np.stack([score(block, one_D, seed) for one_D in np.eye(len(block.tokens_D))])
    total_D1 = score_DE.sum(axis=1, keepdims=True)
    share_DE: Array = np.divide(score_DE, total_D1, out=np.zeros_like(score_DE), where=total_D1 > 0)
    return share_DE


def maxmin_weights(share_BDE: Sequence[Array], count: int, groups: int = 1) -> Array:
    """Weights of the domains under which the best `count` experts of every block cover the worst domain most.

    Coverage is a domain's share on the kept experts, mean over the blocks. By duality the best keep-lists are, but for
    rounding, the best experts under some weights; they are searched by multiplicative updates: a domain that is
    covered better than the worst one loses weight. The best weights that were met are returned.
    Coverage is not quality: on the demo model this raised the worst domain's coverage from 62 to 71% at a 50% cut, but
    its KL was no better than by equal shares. Choose it where coverage itself is the aim.
    """
    traces_BD = np.array([share_DE.sum(axis=1) > 0 for share_DE in share_BDE])
    seen_D = traces_BD.sum(axis=0)
    weights_D: Array = (seen_D > 0) / max(int((seen_D > 0).sum()), 1)
    best_D, best_worst = weights_D, -1.0
    for step in range(1, MAXMIN_STEPS + 1):
        kept_D = sum(_kept_share(share_DE, weights_D, count, groups) for share_DE in share_BDE)
        covered_D = np.divide(kept_D, seen_D, out=np.full(len(seen_D), np.inf), where=seen_D > 0)
        worst = float(covered_D.min())
        if worst > best_worst:
            best_D, best_worst = weights_D, worst
        weights_D = weights_D * np.exp(-MAXMIN_RATE / step**0.5 * (covered_D - worst))
        weights_D = weights_D / weights_D.sum()
    return best_D


def _kept_share(share_DE: Array, weights_D: Array, count: int, groups: int) -> Array:
    """What the best `count` experts under these weights hold of each domain."""
    score_GE = (weights_D @ share_DE).reshape(groups, -1)
    quota = min(count // groups, score_GE.shape[1])
    best_GE = np.argpartition(-score_GE, quota - 1, axis=1)[:, :quota] + np.arange(groups)[:, None] * score_GE.shape[1]
    return np.asarray(share_DE[:, best_GE.ravel()].sum(axis=1))


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
