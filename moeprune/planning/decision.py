"""The whole decision of a run: settings and sums -> a count, a plan, and what a person should know about both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeprune.console import size
from moeprune.errors import UsageError
from moeprune.metadata import Array, Sums
from moeprune.planning import engines, saliency
from moeprune.planning.plan import Limits, Plan, keep_count, make_plan
from moeprune.planning.protection import protect
from moeprune.settings import Settings


@dataclass(frozen=True, slots=True)
class Choice:
    """How many experts of each layer stay, why it is another number than was asked, and what to be warned of."""

    count: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def choose_count(
    settings: Settings, limits: Limits, model_type: str = "", *, fixed_bytes: int = 0, bytes_per_expert: int = 0
) -> Choice:
    """The count from --keep, --target-size or --prune-ratio, moved to what the named engines accept.

    bytes_per_expert is what one expert of every layer takes together, fixed_bytes all the rest. A count given by
    --keep is never moved: it is refused with the reason. Without a named engine the common ones only warn.
    """
    asked = keep_count(
        limits,
        ratio=settings.prune_ratio,
        keep=settings.keep,
        target_bytes=settings.target_size,
        fixed_bytes=fixed_bytes,
        bytes_per_expert=bytes_per_expert,
    )
    named = engines.parse_engines(settings.engine)
    case = engines.Case(asked, limits, model_type, settings.expert_parallel, settings.tensor_parallel)
    count = engines.snap(case, named, -1 if settings.target_size and not settings.keep else 1)
    reasons = [str(o) for o in engines.objections(case, named) if o.severity == "fail"]
    reasons = reasons or [f"{asked} do not divide among {settings.expert_parallel} expert-parallel ranks"]
    if settings.keep and count != asked:
        raise UsageError(f"--keep {asked}: {'; '.join(reasons)}; the nearest that works is {count}")
    notes = [f"{count} experts stay instead of {asked}: {'; '.join(reasons)}"] if count != asked else []
    if settings.target_size and not settings.keep:
        notes.append(f"{count} experts in each layer make {size(fixed_bytes + count * bytes_per_expert)}")
    chosen = engines.Case(count, limits, model_type, settings.expert_parallel, settings.tensor_parallel)
    found = engines.objections(chosen, named or engines.COMMON)
    return Choice(count, tuple(notes), tuple(f"a model with {count} experts {line}" for line in engines.summary(found)))


def block_scores(settings: Settings, sums: Sums) -> dict[str, Array]:
    """Scores as the settings want them."""
    weights = saliency.parse_weights(settings.weights)
    return saliency.scores(sums, settings.metric, settings.blend, weights, settings.seed)


def decide(
    settings: Settings,
    sums: Sums,
    count: int,
    limits: Limits,
    *,
    trunk: Sequence[str] | None = None,
    unscored: Mapping[str, int] | None = None,
) -> Plan:
    """The plan for this count. `trunk` and `unscored` as in protection.protect and plan.make_plan."""
    guarded = protect(sums, settings.protect, trunk)
    return make_plan(block_scores(settings, sums), count, limits, guarded, unscored)
