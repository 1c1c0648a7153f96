"""Numbers with their uncertainty: Wilson intervals for rates, bootstrap intervals for means over domains.

Legend: N samples, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
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


def more_often(hits: int, count: int, parent_hits: int, parent_count: int) -> float:
    """How many standard errors the first rate lies above the second (pooled two-proportion z)."""
    if not count or not parent_count:
        return 0.0
    pooled = (hits + parent_hits) / (count + parent_count)
    error = math.sqrt(pooled * (1 - pooled) * (1 / count + 1 / parent_count))
    return (hits / count - parent_hits / parent_count) / error if error else 0.0


def macro_interval(
    sums_N: Mapping[str, tuple[Sequence[float], Sequence[float]]], seed: int
) -> tuple[float, tuple[float, float]]:
    """Mean over domains of sum(value) / sum(weight), with a 95% bootstrap interval.

    `sums_N` gives for each domain the samples' sums of values and of weights (tokens). Whole samples are drawn again
    within their domain, because the tokens of one sample are not independent.
    """
    generator = np.random.default_rng(seed)
    points, draws_R = [], np.zeros(RESAMPLES)
    for values, weights in sums_N.values():
        value_N, weight_N = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
        points.append(value_N.sum() / weight_N.sum())
        times_RN = generator.multinomial(len(value_N), np.full(len(value_N), 1 / len(value_N)), size=RESAMPLES)
        total_R = times_RN @ weight_N
        draws_R += np.where(total_R > 0, times_RN @ value_N / np.maximum(total_R, 1e-300), points[-1])
    low, high = np.quantile(draws_R / len(points), (0.025, 0.975))
    return float(np.mean(points)), (float(low), float(high))
