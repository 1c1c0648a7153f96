"""Experts that a plan must not remove: those that work for special tokens, or super experts (arXiv 2507.23279).

Special tokens (begin of text, marks of roles) are left out of the sums that rank experts. An expert works mostly for
them when they have
    more than half of its g |f| over all tokens, and at least one Eth of the g |f| of all experts on special tokens.
The sums see little of such an expert, but every text needs it, so it stays.

An expert is an outlier when the largest absolute component that it ever put out lies above
    threshold = max(99.5th percentile, largest / 10)      over the experts of all layers.
A super expert is an outlier in the first three quarters of the MoE layers, counted in their real order; dense layers
and next-token-prediction heads are not among them.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeprune.arrays import Array, np
from moeprune.errors import UsageError
from moeprune.metadata import BlockSums, Sums
from moeprune.planning.plan import Limits
from moeprune.planning.saliency import check_measured

PERCENTILE = 99.5
SHARE_OF_LARGEST = 0.1
EARLY_LAYERS = (3, 4)  # super experts are looked for in the first 3 of 4 layers
MOSTLY = 0.5  # of what an expert does, on special tokens
SPECIAL_PLACES = 0.5  # of the experts that stay, at most so many because of special tokens


def protect(sums: Sums, kind: str, trunk: Sequence[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Block -> its protected experts, for the kinds none, super and outliers; auto is `for_special_tokens`.

    `trunk` names the MoE blocks of the trunk in order of depth; without it they are all blocks as they were run.
    """
    if kind in {"auto", "none"}:
        return {}
    if kind not in {"super", "outliers"}:
        raise UsageError(f"protection {kind!r} is not known; use auto, none, super or outliers")
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


def for_special_tokens(sums: Sums, limits: Limits, count: int) -> dict[str, tuple[int, ...]]:
    """Block -> the experts that work mostly for special tokens, where those do not count.

    Of each group of the router they take no more than SPECIAL_PLACES of its places; the strongest go first.
    """
    places = int(count // limits.groups * SPECIAL_PLACES) // limits.run
    found = {block.block: _mostly_special(block) for block in sums.blocks}
    chosen = {name: _strongest(strength_E, limits.groups, places) for name, strength_E in found.items()}
    return {name: experts for name, experts in chosen.items() if experts}


def _mostly_special(block: BlockSums) -> Array:
    """The g |f| of special tokens, by expert; zero for experts that work mostly for others."""
    special_E: Array = block.values.get("special_sum", np.zeros((1, block.experts))).sum(axis=0)
    if not special_E.any():
        return special_E
    text_E = block.values["gate_norm_sum"].sum(axis=0)
    chosen_E = (special_E > MOSTLY * (special_E + text_E)) & (special_E >= special_E.sum() / block.experts)
    strength_E: Array = np.where(chosen_E, special_E, 0.0)
    return strength_E


def _strongest(strength_E: Array, groups: int, places: int) -> tuple[int, ...]:
    ranked_GE = np.argsort(-strength_E.reshape(groups, -1), axis=1, kind="stable")[:, :places]
    offset_G = np.arange(groups)[:, None] * (len(strength_E) // groups)
    return tuple(sorted(int(j) for j in (ranked_GE + offset_G).ravel() if strength_E[j] > 0))
