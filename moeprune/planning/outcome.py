"""What a plan does, in numbers for a person and for JSON: what stays of each domain's saliency, and what was close.

Coverage of a domain is the share of its total saliency in a block that belongs to experts that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeprune.arrays import Array, np
from moeprune.metadata import IMAGE, BlockSums, Sums
from moeprune.planning.plan import Plan
from moeprune.planning.saliency import METRICS, never_routed, shares

MOSTLY = 2 / 3  # of what an expert does, images and text weighing the same, for it to work mostly for images
NAMED = 5  # layers whose experts are named in a line
COVERAGE_METRICS = ("weighted_ean_sum", "full", "router", "frequency")  # the first that was measured


@dataclass(frozen=True, slots=True)
class BlockOutcome:
    """One block of a plan."""

    block: str
    keep: tuple[int, ...]
    scores: tuple[float, ...]  # by expert; empty where nothing was measured
    worst_kept: float | None
    best_removed: float | None
    coverage: Mapping[str, float]  # domain -> share kept; a domain without tokens here is absent
    never_routed: tuple[int, ...]
    protected: tuple[int, ...]
    for_images: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """A whole plan."""

    count: int
    experts: int
    coverage_metric: str
    coverage: Mapping[str, float]  # mean over the blocks, the worst domain first
    never_routed: int
    blocks: tuple[BlockOutcome, ...]

    def sentences(self) -> list[str]:
        """The plan in a few lines."""
        lines = [f"{self.count} of {self.experts} experts kept in each of {len(self.blocks)} MoE layers"]
        if self.coverage:
            shown = [f"{name} {share:.1%}" for name, share in list(self.coverage.items())[:5]]
            lines.append(f"share of the score kept, worst domains first: {', '.join(shown)}")
        if self.never_routed:
            measured = sum(len(block.scores) for block in self.blocks)
            stay = sum(len({*block.never_routed} & {*block.keep}) for block in self.blocks)
            lines.append(f"{self.never_routed} of {measured} experts saw no token at all; {stay} of them are kept")
        if any(block.for_images for block in self.blocks):
            lines.append(self._about_images())
        if any(block.protected for block in self.blocks):
            total = sum(len(block.protected) for block in self.blocks)
            named = _named([(block.block, block.protected) for block in self.blocks if block.protected])
            lines.append(f"kept whatever their score, as --protect says: {total} experts ({named})")
        blind = [block.block for block in self.blocks if not block.scores]
        if blind:
            lines.append(f"{', '.join(blind)} had no scores: evenly spaced experts are kept there")
        return lines

    def _about_images(self) -> str:
        seeing = [block for block in self.blocks if block.for_images]
        total = sum(len(block.for_images) for block in seeing)
        stay = sum(len({*block.for_images} & {*block.keep}) for block in seeing)
        named = _named([(block.block, block.for_images) for block in seeing])
        return (
            f"{total} experts work mostly for images, {stay} of them are kept; to keep more of them, weigh the domains "
            f"that end in {IMAGE.strip()} with --weights ({named})"
        )


def _named(experts: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    """The experts of the first layers by number, and how many layers there are besides."""
    named = [f"{block}: {', '.join(map(str, numbers))}" for block, numbers in experts[:NAMED]]
    more = [f"{len(experts) - NAMED} more layers in the result file"] if len(experts) > NAMED else []
    return "; ".join([*named, *more])


def outcome(plan: Plan, sums: Sums, scores: Mapping[str, Array]) -> Outcome:
    """What `plan`, made from these scores of these sums, keeps and loses."""
    by_name = {block.block: block for block in sums.blocks}
    metric = coverage_metric(sums)
    protected = plan.protected or {}
    blocks = tuple(
        _block_outcome(by_name[name], keep, scores[name], metric, sums.domains, protected.get(name, ()))
        if name in scores
        else BlockOutcome(name, keep, (), None, None, {}, (), ())
        for name, keep in plan.keep.items()
    )
    return Outcome(
        count=plan.count,
        experts=plan.experts,
        coverage_metric=metric,
        coverage=_mean_coverage(blocks, sums.domains),
        never_routed=sum(len(block.never_routed) for block in blocks),
        blocks=blocks,
    )


def coverage_metric(sums: Sums) -> str:
    """The total that coverage is a share of: what routed experts really added, where that was measured."""
    there = set.intersection(*(set(block.values) for block in sums.blocks)) if sums.blocks else set()
    return next(name for name in COVERAGE_METRICS if there.issuperset(METRICS[name].needs) or name == "frequency")


def for_images(block: BlockSums, metric: str, domains: tuple[str, ...]) -> tuple[int, ...]:
    """Experts that do at least their part for images, an Eth of it, and little else: MOSTLY of their work is for them.

    An expert's work for images is its share of the image domains' saliency, mean over those that reach the block; its
    work for text likewise. So it does not matter how many image tokens there were for each token of text.
    """
    share_DE = shares(block, metric)
    reached_D, image_D = share_DE.any(axis=1), np.array([name.endswith(IMAGE) for name in domains])
    if not (reached_D & image_D).any():
        return ()
    image_E = share_DE[reached_D & image_D].mean(axis=0)
    text_E = share_DE[reached_D & ~image_D].mean(axis=0) if (reached_D & ~image_D).any() else np.zeros(block.experts)
    chosen_E = (image_E >= 1 / block.experts) & (image_E >= MOSTLY * (image_E + text_E))
    return tuple(np.flatnonzero(chosen_E).tolist())


def coverage(block: BlockSums, keep: tuple[int, ...], metric: str, domains: tuple[str, ...]) -> dict[str, float]:
    """Domain -> the share of its saliency in this block that `keep` holds."""
    share_DE = shares(block, metric)
    kept_D = share_DE[:, list(keep)].sum(axis=1)
    return {name: float(kept_D[d]) for d, name in enumerate(domains) if share_DE[d].any()}


def _block_outcome(
    block: BlockSums,
    keep: tuple[int, ...],
    score_E: Array,
    metric: str,
    domains: tuple[str, ...],
    protected: tuple[int, ...],
) -> BlockOutcome:
    removed = np.setdiff1d(np.arange(len(score_E)), keep)
    return BlockOutcome(
        block=block.block,
        keep=keep,
        scores=tuple(score_E.tolist()),
        worst_kept=float(score_E[list(keep)].min()),
        best_removed=float(score_E[removed].max()) if len(removed) else None,
        coverage=coverage(block, keep, metric, domains),
        never_routed=never_routed(block),
        protected=protected,
        for_images=for_images(block, metric, domains),
    )


def _mean_coverage(blocks: tuple[BlockOutcome, ...], domains: tuple[str, ...]) -> dict[str, float]:
    by_domain = {name: [b.coverage[name] for b in blocks if name in b.coverage] for name in domains}
    means = {name: float(np.mean(found)) for name, found in by_domain.items() if found}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def to_json(result: Outcome, how: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's entry in a result file: how it was made, block -> ids that stay, and what that does."""
    return {
        "how": dict(how),
        "experts": result.experts,
        "kept": result.count,
        "coverage_metric": result.coverage_metric,
        "coverage": dict(result.coverage),
        "never_routed": result.never_routed,
        "keep": {block.block: list(block.keep) for block in result.blocks},
        "blocks": [
            {
                "block": block.block,
                "scores": list(block.scores),
                "worst_kept": block.worst_kept,
                "best_removed": block.best_removed,
                "coverage": dict(block.coverage),
                "never_routed": list(block.never_routed),
                "protected": list(block.protected),
                "for_images": list(block.for_images),
            }
            for block in result.blocks
        ],
    }
