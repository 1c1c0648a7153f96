"""Experts that a plan must not remove, by the published rule for super experts (arXiv 2507.23279).

An expert is an outlier when the largest absolute component that it ever put out lies above
    threshold = max(99.5th percentile, largest / 10)      over the experts of all layers.
A super expert is an outlier in the first three quarters of the MoE layers, counted in their real order; dense layers
and next-token-prediction heads are not among them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeprune.errors import UsageError
from moeprune.metadata import Sums
from moeprune.planning.saliency import check_measured

PERCENTILE = 99.5
SHARE_OF_LARGEST = 0.1
EARLY_LAYERS = (3, 4)  # super experts are looked for in the first 3 of 4 layers


def protect(sums: Sums, kind: str, trunk: Sequence[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Block -> its protected experts, for the kinds none, super and outliers.

    `trunk` names the MoE blocks of the trunk in order of depth; without it they are all blocks as they were run.
    """
    if kind == "none":
        return {}
    if kind not in {"super", "outliers"}:
        raise UsageError(f"protection {kind!r} is not known; use none, super or outliers")
    by_name = {block.block: block for block in sums.blocks}
    order = [name for name in (by_name if trunk is None else trunk) if name in by_name]
    for name in order:
        check_measured(by_name[name], "max_activations")
    if not order:
        return {}
    peaks = {name: np.abs(by_name[name].values["max_abs"]).max(axis=0) for name in order}
    everything = np.concatenate(list(peaks.values()))
    threshold = max(np.percentile(everything, PERCENTILE), everything.max() * SHARE_OF_LARGEST)
    early = len(order) * EARLY_LAYERS[0] // EARLY_LAYERS[1] if kind == "super" else len(order)
    flagged = {name: tuple(int(j) for j in np.flatnonzero(peaks[name] > threshold)) for name in order[:early]}
    return {name: experts for name, experts in flagged.items() if experts}
