"""Numbers with their uncertainty: Wilson intervals for rates, bootstrap intervals for means over domains.

Legend: N samples, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rate = tuple[int, int]  # hits, of how many
Sums = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # domain -> by sample: sums of values, of weights
Z_95 = 1.959964
RESAMPLES = 1000


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a rate; (0, 1) when nothing was seen."""
    if count == 0:
        return 0.0, 1.0
    rate, square = hits / count, Z_95**2 / count
    middle = (rate + square / 2) / (1 + square)
    half = Z_95 / (1 + square) * math.sqrt(rate * (1 - rate) / count + square / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def needed_to_see(rate: float, worse: float) -> int:
    """Samples per model to tell two rates apart: two-sided 5% test, 80% power, normal approximation."""
    z_80 = 0.841621
    spread = Z_95 * math.sqrt((rate + worse) * (1 - (rate + worse) / 2)) + z_80 * math.sqrt(
        rate * (1 - rate) + worse * (1 - worse)
    )
    return math.ceil((spread / (worse - rate)) ** 2)


def difference(own: Rate, parent: Rate, weight: float = 1.0) -> tuple[float, float]:
    """The 95% interval of own rate - weight * parent's rate, from both Wilson intervals (Newcombe's method 10).

    Both answer the same prompts, which makes the truth a little surer than this takes it to be.
    """
    (low, high), (parent_low, parent_high) = wilson(*own), wilson(*parent)
    rate, base = own[0] / max(own[1], 1), parent[0] / max(parent[1], 1)
    middle = rate - weight * base
    down = math.hypot(rate - low, weight * (parent_high - base))
    up = math.hypot(high - rate, weight * (base - parent_low))
    return middle - down, middle + up


def lower_end_of_worst(value: float, low: float, count: int) -> float:
    """The lower end of the interval of the worst of `count` values, widened so that 1 of 20 such worst ones is wrong.

    `low` is the lower end of its own 95% interval; a normal distribution is assumed (Bonferroni).
    """
    return value - (value - low) * NormalDist().inv_cdf(1 - 0.025 / count) / Z_95


def macro_interval(sums_N: Sums, seed: int) -> tuple[float, tuple[float, float]]:
    """Mean over domains of sum(value) / sum(weight), with a 95% bootstrap interval."""
    point, draws_R = macro_draws(sums_N, seed)
    return point, interval_of(draws_R)


def interval_of(draws_R: Array) -> tuple[float, float]:
    """The middle 95% of bootstrap draws."""
    low, high = np.quantile(draws_R, (0.025, 0.975))
    return float(low), float(high)


def macro_draws(sums_N: Sums, seed: int) -> tuple[float, Array]:
    """Mean over domains of sum(value) / sum(weight), and the same of each bootstrap draw.

    `sums_N` gives for each domain the samples' sums of values and of weights (tokens). Whole samples are drawn again
    within their domain, because the tokens of one sample are not independent. With one seed, the draws of several
    models on the same samples are the same samples.
    """
    generator = np.random.default_rng(seed)
    points, draws_R = [], np.zeros(RESAMPLES)
    for values, weights in sums_N.values():
        value_N, weight_N = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
        points.append(value_N.sum() / weight_N.sum())
        times_RN = generator.multinomial(len(value_N), np.full(len(value_N), 1 / len(value_N)), size=RESAMPLES)
        total_R = times_RN @ weight_N
        draws_R += np.where(total_R > 0, times_RN @ value_N / np.maximum(total_R, 1e-300), points[-1])
    return float(np.mean(points)), draws_R / len(points)
