"""From the sums of the scoring stage to what the report draws: colours, orders, curves.

Legend: D domains, E experts, C points of a curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprune.arrays import Array
from moeprune.checking.report.drawing import STEPS
from moeprune.metadata import BlockSums, Sums

POINTS = 41


@dataclass(frozen=True)
class Layer:
    """One routed layer as the report sees it."""

    block: str
    kept: frozenset[int]
    score_E: Array
    load_E: Array  # share of the routed slots
    saliency_DE: Array  # each domain's share
    for_images: frozenset[int]  # experts that work mostly for images


def layers(sums: Sums, plan: dict[str, Any]) -> list[Layer]:
    """Every block with scores, in order."""
    entries = {entry["block"]: entry for entry in plan.get("blocks", [])}
    keep = plan.get("keep", {})
    return [
        _layer(block, keep.get(block.block, range(block.experts)), entries.get(block.block, {}))
        for block in sums.blocks
    ]


def _layer(block: BlockSums, kept: Sequence[int], entry: Mapping[str, Any]) -> Layer:
    score = entry.get("scores")
    saliency_DE = next(block.values[n] for n in ("gate_norm_sum", "full_sum", "router_sum") if n in block.values)
    count_E = block.values.get("count", saliency_DE).sum(0)
    score_E = np.asarray(score, dtype=np.float64) if score else saliency_DE.sum(0)
    return Layer(
        block=block.block,
        kept=frozenset(kept),
        score_E=score_E,
        load_E=_share(count_E),
        saliency_DE=np.stack([_share(row_E) for row_E in saliency_DE]),
        for_images=frozenset(entry.get("for_images", ())),
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


def coverage(layers: Sequence[Layer]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the best experts by the plan's score hold of each domain's score, mean over the layers: x_C, [D, C]."""
    x_C = np.linspace(0, 1, POINTS)
    curves = []
    for layer in layers:
        sums_DE = np.cumsum(layer.saliency_DE[:, order(layer.score_E)], axis=1)
        places = np.linspace(0, 1, sums_DE.shape[1] + 1)
        curves.append([np.interp(x_C, places, np.concatenate([[0.0], row_E])) for row_E in sums_DE])
    curves_LDC = np.array(curves)
    seen_LD = curves_LDC[:, :, -1] > 0  # a domain that left no trace in a layer says nothing there
    total_DC = (curves_LDC * seen_LD[:, :, None]).sum(0)
    return x_C, total_DC / np.maximum(seen_LD.sum(0), 1)[:, None]
