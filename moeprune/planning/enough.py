"""Is the calibration enough? How much the plan would change with other samples, and which domain's chance does it.

Each domain's samples lie in S slices. A plan from the first half of the slices and one from the second half differ
because of chance alone. The noise of a score falls with the square root of the samples, and so does the number of
experts on the wrong side of the cut: if the halves disagree on a share x of the experts that stay, the plan from all
samples disagrees with one from endless samples on about x / 2 (each half has twice the variance of the whole, and the
halves are both noisy). Legend of the array suffixes: D domains, S slices, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moeprune.arrays import Array, NDArray, np
from moeprune.metadata import BlockSums, Sums
from moeprune.planning import saliency
from moeprune.planning.outcome import coverage, coverage_metric
from moeprune.planning.plan import Limits, Plan, make_plan
from moeprune.planning.saliency import METRICS

ENOUGH = 0.05  # a plan is settled when at most this share of the experts that stay depends on chance,
LITTLE = 0.005  # or when those experts hardly matter: a plan from other samples keeps almost as much saliency
MOST = 100.0  # no domain is asked for more than this times its samples

if TYPE_CHECKING:
    Chosen = NDArray[np.bool_]  # [D, S]: which slices of which domains count


@dataclass(frozen=True, slots=True)
class How:
    """How the plan under test is made."""

    metric: str
    blend: str
    weights: Mapping[str, float]
    seed: int
    count: int
    limits: Limits
    protected: Mapping[str, tuple[int, ...]]

    def plan(self, sums: Sums) -> Plan:
        """The plan that these sums give."""
        return make_plan(self.scores(sums), self.count, self.limits, self.protected)

    def scores(self, sums: Sums) -> dict[str, Array]:
        """The scores that the plan is made from."""
        groups = self.limits.groups
        return saliency.scores(sums, self.metric, self.blend, self.weights, self.seed, count=self.count, groups=groups)


@dataclass(frozen=True, slots=True)
class DomainNoise:
    """What the chance in one domain's samples does to the plan."""

    domain: str
    samples: int  # 0: not said
    change: float | None  # share of the experts that stay which depends on it; None: a half of the samples is empty
    factor: float  # times as many samples would make its part small


@dataclass(frozen=True, slots=True)
class Assessment:
    """The answer, and the numbers behind it."""

    verdict: str
    enough: bool | None  # None: it could not be judged
    metric: str  # what the halves were ranked by; the plan's metric where the slices hold it
    jaccard: Mapping[str, float]  # block -> overlap of the two halves' kept sets; 1 is the same set
    change: float | None  # share of the experts that stay which endless samples would exchange
    held_out_loss: float | None  # saliency that a half's plan keeps less of the other half than that half's own plan
    convergence: tuple[float, ...]  # share of the final kept set found with the first 1, 2, ... slices
    domains: tuple[DomainNoise, ...]  # the noisiest first

    def sentences(self) -> list[str]:
        """Rank stability, the curve and the verdict in words."""
        if not self.jaccard:
            return [self.verdict]
        worst = min(self.jaccard, key=lambda name: self.jaccard[name])
        curve = ", ".join(f"{share:.0%}" for share in self.convergence)
        return [
            f"stability: the kept sets of two halves of the samples overlap {np.mean(list(self.jaccard.values())):.0%} "
            f"(Jaccard; least {self.jaccard[worst]:.0%} in {worst}); the first samples, by slices of "
            f"1/{len(self.convergence)}, find {curve} of the final set",
            self.verdict,
        ]


def assess(sums: Sums, how: How, samples: Mapping[str, int] | None = None) -> Assessment:
    """Judge whether the samples settle the plan. `samples` counts the calibration samples by domain."""
    metric = _metric_of_slices(sums, how.metric)
    slices = _slice_count(sums)
    if how.count == how.limits.experts:
        return _unjudged("nothing is removed")
    if not metric or slices < 2:
        return _unjudged("the metric is random" if how.metric == "random" else "there are no sums by slice")
    how = replace(how, metric=metric)
    everything = np.ones((len(sums.domains), slices), dtype=bool)
    sums_A, sums_B = (restrict(sums, half) for half in _halves(everything))
    plan_A, plan_B = how.plan(sums_A), how.plan(sums_B)
    change = _difference(plan_A, plan_B) / 2
    loss = max(_loss(sums_B, plan_A, plan_B), _loss(sums_A, plan_B, plan_A))
    noise = _domain_noise(sums, how, samples or {}, slices)
    enough = None if any(d.change is None for d in noise) else change <= ENOUGH or loss <= LITTLE
    return Assessment(
        verdict=_verdict(enough, change, loss, noise),
        enough=enough,
        metric=metric,
        jaccard={name: _jaccard(plan_A.keep[name], plan_B.keep[name]) for name in plan_A.keep},
        change=change,
        held_out_loss=loss,
        convergence=_convergence(sums, how, slices),
        domains=noise,
    )


def restrict(sums: Sums, chosen_DS: Chosen) -> Sums:
    """The sums of the chosen slices alone: what a run on those samples would have measured."""
    return replace(sums, blocks=tuple(_restrict_block(block, chosen_DS) for block in sums.blocks))


def _restrict_block(block: BlockSums, chosen_DS: Chosen) -> BlockSums:
    values = {name: np.einsum("dse,ds->de", array_DSE, chosen_DS) for name, array_DSE in block.slices.items()}
    routed_D = block.slices["count"].sum(axis=(1, 2))
    part_D = np.divide(values["count"].sum(axis=1), routed_D, out=np.zeros_like(routed_D), where=routed_D > 0)
    return replace(block, tokens_D=block.tokens_D * part_D, values=values, gram_EDD=None)


def _metric_of_slices(sums: Sums, metric: str) -> str:
    """The metric itself if the slices hold what it needs, else the nearest that they can give, else nothing."""
    there = set.intersection(*(set(block.slices) for block in sums.blocks)) if sums.blocks else set()
    if metric == "random" or "count" not in there:
        return ""
    near = (metric, "weighted_ean_sum" if METRICS[metric].total else "reap", "frequency")
    return next(name for name in near if there.issuperset(METRICS[name].needs))


def _slice_count(sums: Sums) -> int:
    return min((block.slices["count"].shape[1] for block in sums.blocks if "count" in block.slices), default=0)


def _halves(everything: Chosen) -> tuple[Chosen, Chosen]:
    first = everything.copy()
    first[:, everything.shape[1] // 2 :] = False
    return first, everything & ~first


def _jaccard(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return len(set(a) & set(b)) / len(set(a) | set(b))


def _difference(a: Plan, b: Plan) -> float:
    """The share of the kept experts that the two plans do not have in common, mean over the blocks."""
    return float(np.mean([1 - len(set(a.keep[name]) & set(b.keep[name])) / a.count for name in a.keep]))


def _loss(sums: Sums, foreign: Plan, own: Plan) -> float:
    """How much less saliency of this data a foreign plan keeps than its own: mean over the blocks and domains."""
    metric = coverage_metric(sums)
    lost = []
    for block in sums.blocks:
        theirs = coverage(block, foreign.keep[block.block], metric, sums.domains)
        ours = coverage(block, own.keep[block.block], metric, sums.domains)
        lost += [share - theirs[name] for name, share in ours.items()]
    return float(np.mean(lost)) if lost else 0.0


def _convergence(sums: Sums, how: How, slices: int) -> tuple[float, ...]:
    """How much of the final kept set the first n slices find, n = 1 ... S."""
    plans = []
    for n in range(1, slices + 1):
        chosen_DS = np.zeros((len(sums.domains), slices), dtype=bool)
        chosen_DS[:, :n] = True
        plans.append(how.plan(restrict(sums, chosen_DS)))
    return tuple(1 - _difference(plan, plans[-1]) for plan in plans)


def _domain_noise(sums: Sums, how: How, samples: Mapping[str, int], slices: int) -> tuple[DomainNoise, ...]:
    """Halve one domain at a time while the others keep all their samples, and count what changes."""
    limit = ENOUGH / len(sums.domains) ** 0.5  # independent parts add up by their squares
    found = []
    for d, name in enumerate(sums.domains):
        first_DS, second_DS = np.ones((2, len(sums.domains), slices), dtype=bool)
        first_DS[d, slices // 2 :] = False
        second_DS[d, : slices // 2] = False
        halves = restrict(sums, first_DS), restrict(sums, second_DS)
        change, factor = None, 1.0
        used = [i for i, block in enumerate(sums.blocks) if block.slices["count"][d].any()]
        if used and all(half.blocks[i].values["count"][d].any() for half in halves for i in used):
            change = _difference(how.plan(halves[0]), how.plan(halves[1])) / 2
            factor = min(max((change / limit) ** 2, 1.0), MOST)
        found.append(DomainNoise(name, samples.get(name, 0), change, factor))
    return tuple(sorted(found, key=lambda part: (part.change is not None, -(part.change or 0.0))))


def _verdict(enough: bool | None, change: float, loss: float, noise: tuple[DomainNoise, ...]) -> str:
    chance = f"about {change:.0%} of the kept experts depend on chance in the samples"
    cost = f"a plan from one half of them keeps {loss:.1%} less of the other half's score than its own plan"
    if enough is None:
        few = ", ".join(part.domain for part in noise if part.change is None)
        return f"the calibration could not be judged: too few samples of {few}, give each of them at least 8; {chance}"
    if enough:
        return f"the calibration is enough for data of this kind: {chance}, and {cost}"
    wanted = [part for part in noise if part.factor > 1]
    more = ", ".join(_more(part) for part in wanted[:3]) or "every domain a little"
    return f"the calibration is not enough: {chance}, and {cost}; more would help of: {more}"


def _more(part: DomainNoise) -> str:
    if not part.samples:
        return f"{part.domain} ({part.factor:.1f} times as much)"
    return f"{part.domain} (about {round(part.samples * (part.factor - 1))} more than its {part.samples} samples)"


def _unjudged(why: str) -> Assessment:
    return Assessment(f"whether the calibration is enough was not judged: {why}", None, "", {}, None, None, (), ())
