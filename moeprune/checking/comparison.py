"""One pass of the parent, one of the child: what the cut cost, what it should cost, and what chance would have cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeprune.checking import fidelity, masking
from moeprune.checking.samples import Batch, Sample
from moeprune.checking.subject import Head, Subject
from moeprune.settings import Settings

RANDOM_CUTS = 2
Data = tuple[Sequence[Sample], Sequence[Batch]]


def compare(
    parent: Subject, child: Subject, keep: masking.Keep | None, data: Data, settings: Settings
) -> dict[str, Any]:
    """Fidelity of the child, of drawn cuts of the same size, and the child against the parent with masked experts."""
    _, batches = data
    keep, drawn, why_not = _maskable(parent, keep, settings.seed)
    try:
        whole, *others = parent.variants(batches, [None, *([keep] if keep else []), *drawn])
    except masking.CannotMask as error:
        keep, drawn, why_not = None, [], str(error)
        whole, *others = parent.variants(batches, [None])
    masked = others.pop(0) if keep else None
    (own,) = child.variants(batches, [None])
    wide = max(parent.vocabulary, child.vocabulary)

    def tokens(one: Head, other: Head, *states: Any) -> fidelity.Tokens:
        return fidelity.compare(one, other, batches, states, wide)

    def summary(measured: fidelity.Tokens) -> dict[str, Any]:
        return fidelity.summary(measured, data[0], settings.seed)

    with parent.head() as parents, child.head() as childs:
        cut = tokens(parents, childs, whole, own)
        chance = [tokens(parents, parents, whole, states) for states in others]
        return {
            "fidelity": summary(cut),
            "random_cuts": [_short(summary(one)) for one in chance],
            "share_of_chance": fidelity.share_of(cut, chance, data[0], settings.seed) if chance else None,
            "not_masked": why_not,
            "masked": _short(summary(tokens(parents, childs, masked, own))) if masked else None,
        }


def _maskable(
    parent: Subject, keep: masking.Keep | None, seed: int
) -> tuple[masking.Keep | None, list[dict[str, list[int]]], str]:
    """The plan, drawn plans of its size, and why there are none where the parent's experts cannot be masked."""
    try:
        return keep, _drawn(parent, keep, seed), ""
    except masking.CannotMask as error:
        return None, [], str(error)


def _drawn(parent: Subject, keep: masking.Keep | None, seed: int) -> list[dict[str, list[int]]]:
    """Plans of the same size with drawn experts; none when nothing was cut."""
    if not keep:
        return []
    chosen = masking.assigned(keep, masking.routed_blocks(parent.model))
    if all(len(stays) == block.count for block, stays in chosen.items()):
        return []
    return [masking.random_keep(parent.model, keep, seed + turn) for turn in range(RANDOM_CUTS)]


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row["overall"][name] for name in ("kl", "kl_interval", "kl_p95", "loss", "same_top")}
