"""From the sums of the scoring stage to what the report draws: colours, orders, curves.

Legend: D domains, E experts, C points of a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprune.checking.report.drawing import STEPS
from moeprune.metadata import Array, BlockSums, Sums

POINTS = 41


@dataclass(frozen=True)
class Layer:
    """One routed layer as the report sees it."""

    block: str
    kept: frozenset[int]
    score_E: Array
    load_E: Array  # share of the routed slots
    saliency_DE: Array  # each domain's share


def layers(sums: Sums, plan: dict[str, Any]) -> list[Layer]:
    """Every block with scores, in order."""
    scores = {entry["block"]: entry.get("scores") or [] for entry in plan.get("blocks", [])}
    keep = plan.get("keep", {})
    return [
        _layer(block, keep.get(block.block, range(block.experts)), scores.get(block.block)) for block in sums.blocks
    ]


def _layer(block: BlockSums, kept: Sequence[int], score: Sequence[float] | None) -> Layer:
    saliency_DE = next(block.values[n] for n in ("gate_norm_sum", "full_sum", "router_sum") if n in block.values)
    count_E = block.values.get("count", saliency_DE).sum(0)
    score_E = np.asarray(score, dtype=np.float64) if score else saliency_DE.sum(0)
    return Layer(
        block.block, frozenset(kept), score_E, _share(count_E), np.stack([_share(row_E) for row_E in saliency_DE])
    )


def _share(values: Array) -> Array:
    total = values.sum()
    shares: Array = values / total if total > 0 else np.zeros_like(values)
    return shares


def steps(values_E: Array) -> list[int]:
    """Colour steps 0 (least) to 9 (most) by the value's share of the layer's largest, on a square-root scale."""
    finite_E = np.nan_to_num(values_E, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    most = finite_E.max() if len(finite_E) else 0.0
    if most <= 0:
        return [0] * len(values_E)
    return np.minimum((np.sqrt(finite_E / most) * STEPS).astype(int), STEPS - 1).tolist()  # type: ignore[no-any-return]


def order(values_E: Array) -> list[int]:
    """Experts, the largest value first."""
    return np.argsort(-values_E, kind="stable").tolist()  # type: ignore[no-any-return]


def cumulative(rows: Sequence[Array]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each layer: what share the largest experts hold together, at C shares of the experts. Returns x_C, [L, C]."""
    x_C = np.linspace(0, 1, POINTS)
    curves = []
    for row_E in rows:
        sums = np.concatenate([[0.0], np.cumsum(np.sort(row_E)[::-1])])
        curves.append(np.interp(x_C, np.linspace(0, 1, len(sums)), sums))
    return x_C, np.array(curves)
