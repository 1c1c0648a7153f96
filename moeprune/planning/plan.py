"""Scores and limits -> which experts stay. Every block keeps the same number, as serving engines want it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction

from moeprune.arrays import Array, np
from moeprune.checkpoint.families import Layout
from moeprune.errors import UsageError


@dataclass(frozen=True, slots=True)
class Limits:
    """What the router of the model demands of the number of experts."""

    experts: int
    top_k: int
    groups: int = 1
    top_groups: int = 1
    run: int = 1  # neighbours that share a tensor, so that they stay or go together

    @classmethod
    def of(cls, layout: Layout) -> Limits:
        """What the router of this model demands."""
        return cls(layout.experts, layout.top_k, layout.groups, layout.top_groups, layout.run)

    @property
    def smallest(self) -> int:
        """The smallest count that the router can work with."""
        return next(count for count in range(1, self.experts + 1) if not self.objection(count))

    def objection(self, count: int) -> str:
        """Why this many experts cannot stay, or nothing."""
        if count == self.experts:
            return ""
        if not 1 <= count <= self.experts:
            return f"there are {self.experts} experts in a layer"
        if count < self.top_k:
            return f"the router chooses {self.top_k} experts for each token"
        if count // max(self.groups, 1) % self.run:
            return f"{self.run} neighbours share a tensor, so they are kept or removed together"
        if self.groups <= 1:
            return ""
        if count % self.groups:
            return f"the router works on {self.groups} groups of the same size"
        if count // self.groups < 2:
            return f"the router ranks {self.groups} groups by their two best experts"
        if self.top_groups * (count // self.groups) < self.top_k:
            return (
                f"{self.top_groups} groups of {count // self.groups} are fewer than the {self.top_k} experts per token"
            )
        return ""


@dataclass(frozen=True, slots=True)
class Plan:
    """The experts that stay, ascending, by block; and the blocks whose list no score decided."""

    count: int
    experts: int
    keep: dict[str, tuple[int, ...]]
    unscored: tuple[str, ...] = ()
    protected: Mapping[str, tuple[int, ...]] | None = None


def keep_count(
    limits: Limits,
    *,
    ratio: float = 0.0,
    keep: int = 0,
    target_bytes: int = 0,
    fixed_bytes: int = 0,
    bytes_per_expert: int = 0,
) -> int:
    """How many experts of each layer stay.

    `keep` is taken as it is. A target size gives the largest count whose size, fixed_bytes + count * bytes_per_expert
    (one expert of every layer together), is not above it. A ratio removes floor(experts * ratio), computed exactly:
    100 experts at 0.29 lose 29. Where the router's groups do not allow the count, a ratio takes the next larger one and
    a target size the next smaller one, so that neither promise is broken.
    """
    if keep and target_bytes:
        raise UsageError("keep and target size were both given; give one of them")
    if keep:
        check_count(keep, limits)
        return keep
    if target_bytes:
        return _count_for_size(limits, target_bytes, fixed_bytes, bytes_per_expert)
    start = plain_count(limits.experts, ratio)
    if start < limits.top_k:
        check_count(start, limits)
    return next(count for count in range(start, limits.experts + 1) if not limits.objection(count))


def plain_count(experts: int, ratio: float) -> int:
    """What a ratio leaves before any limit is looked at."""
    return experts - exact(ratio) * experts // 1


def exact(ratio: float) -> Fraction:
    """The ratio that was meant: 0.29 is 29/100 and 0.3333333333333333 is 1/3, not the float beside them."""
    return Fraction(ratio).limit_denominator(1_000_000)


def _count_for_size(limits: Limits, target: int, fixed: int, per_expert: int) -> int:
    affordable = min((target - fixed) // per_expert if per_expert else limits.experts, limits.experts)
    for count in range(affordable, 0, -1):
        if not limits.objection(count):
            return count
    least = limits.smallest
    raise UsageError(
        f"target size {target:,} bytes cannot be reached: the smallest possible, {least} of {limits.experts} experts "
        f"in each layer, takes {fixed + least * per_expert:,} bytes"
    )


def check_count(count: int, limits: Limits) -> None:
    """Refuse a count that the model's router cannot work with, and name the nearest that it can."""
    objection = limits.objection(count)
    if not objection:
        return
    possible = [c for c in range(1, limits.experts + 1) if not limits.objection(c)]
    near = sorted(sorted(possible, key=lambda c: abs(c - count))[:2])
    raise UsageError(
        f"cannot keep {count} of {limits.experts} experts: {objection}; possible nearby: {', '.join(map(str, near))}"
    )


def make_plan(
    scores: Mapping[str, Array],
    count: int,
    limits: Limits,
    protected: Mapping[str, Collection[int]] | None = None,
    unscored: Mapping[str, int] | None = None,
) -> Plan:
    """Keep the `count` best experts of every block: the same number from each group, ties to the lower index.

    `unscored` names blocks that were not run (next-token-prediction heads, mostly) with their number of experts. They
    keep evenly spaced experts of each group: nothing is known of them, and the trunk checks what they draft anyway.
    """
    check_count(count, limits)
    protected = protected or {}
    keep = {
        block: _best(block, score_E, count, limits, frozenset(protected.get(block, ())))
        for block, score_E in scores.items()
    }
    blind = {block: experts for block, experts in (unscored or {}).items() if block not in scores}
    keep |= {block: _evenly_spaced(block, experts, count, limits) for block, experts in blind.items()}
    shown = {block: tuple(sorted(ids)) for block, ids in protected.items() if ids}
    return Plan(count, limits.experts, keep, tuple(blind), shown)


def _best(block: str, score_E: Array, count: int, limits: Limits, protected: frozenset[int]) -> tuple[int, ...]:
    """The best of each group; of experts that share a tensor, the sum counts, and one protects the others."""
    experts, groups, run = len(score_E), limits.groups, limits.run
    if not np.isfinite(score_E).all():
        raise UsageError(f"layer {block} has a score that is not a finite number; score the model again")
    size, quota = _group_sizes(block, experts, count, groups)
    kept: list[int] = []
    for start in range(0, experts, size):
        firsts = range(start, start + size, run)
        guards = {first for first in firsts if protected.intersection(range(first, first + run))}
        if (guarded := run * len(guards)) > quota:
            where = f"group {start // size} of layer {block}" if groups > 1 else f"layer {block}"
            raise UsageError(
                f"{guarded} experts are protected in {where} but only {quota} can be kept; keep more or protect fewer"
            )
        order = sorted((first not in guards, -score_E[first : first + run].sum(), first) for first in firsts)
        kept += [first + i for *_, first in order[: quota // run] for i in range(run)]
    return tuple(sorted(kept))


def _evenly_spaced(block: str, experts: int, count: int, limits: Limits) -> tuple[int, ...]:
    size, quota = _group_sizes(block, experts, count, limits.groups)
    run, chosen = limits.run, quota // limits.run
    firsts = [start + i * (size // run) // chosen * run for start in range(0, experts, size) for i in range(chosen)]
    return tuple(first + i for first in firsts for i in range(run))


def _group_sizes(block: str, experts: int, count: int, groups: int) -> tuple[int, int]:
    if count > experts or experts % groups:
        raise UsageError(f"layer {block} has {experts} experts in {groups} groups; {count} of them cannot be kept")
    return experts // groups, count // groups
