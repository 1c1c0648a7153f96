"""The whole decision of a run: settings and sums -> a count, a plan, and what a person should know about both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeprune.arrays import np
from moeprune.checkpoint.families import Layout
from moeprune.console import say, size, warn
from moeprune.errors import InputError, UsageError
from moeprune.metadata import BlockSums, Sums, plain
from moeprune.planning import engines, saliency
from moeprune.planning.enough import Assessment, How, assess
from moeprune.planning.outcome import Outcome, outcome, to_json
from moeprune.planning.plan import Limits, Plan, keep_count, make_plan, plain_count
from moeprune.planning.protection import for_special_tokens, protect
from moeprune.settings import Settings

# Settings that change a plan but not what was measured.
PLANNING = {"prune_ratio", "keep", "target_size", "metric", "blend", "weights", "protect"}
PLANNING |= {"engine", "expert_parallel", "tensor_parallel"}
WISHES = ("plan", "keep", "target_size", "prune_ratio")  # each says how many experts are kept


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

    bytes_per_expert is what one expert of every layer takes together, fixed_bytes all the rest; where they are not
    known, a target size is left aside. A count given by --keep is never moved: it is refused with the reason. Without a
    named engine the common ones only warn.
    """
    wish = _strongest(settings)
    keep = settings.keep if wish == "keep" else 0
    target = settings.target_size if wish == "target_size" and bytes_per_expert else 0
    asked = keep_count(
        limits,
        ratio=settings.prune_ratio,
        keep=keep,
        target_bytes=target,
        fixed_bytes=fixed_bytes,
        bytes_per_expert=bytes_per_expert,
    )
    named = engines.parse_engines(settings.engine)
    case = engines.Case(asked, limits, model_type, settings.expert_parallel, settings.tensor_parallel)
    count = engines.snap(case, named, -1 if target else 1)
    reasons = [str(o) for o in engines.objections(case, named) if o.severity == "fail"]
    reasons = reasons or [f"{asked} do not divide among {settings.expert_parallel} expert-parallel ranks"]
    if keep and count != asked:
        raise UsageError(f"--keep {asked}: {'; '.join(reasons)}; the nearest that works is {count}")
    notes = [f"{count} experts are kept instead of {asked}: {'; '.join(reasons)}"] if count != asked else []
    plain = asked if target or keep else plain_count(limits.experts, settings.prune_ratio)
    if asked != plain:
        notes.insert(0, f"{asked} experts are kept instead of {plain}: {limits.objection(plain)}")
    if target:
        notes.append(f"{count} experts in each layer make {size(fixed_bytes + count * bytes_per_expert)}")
    chosen = engines.Case(count, limits, model_type, settings.expert_parallel, settings.tensor_parallel)
    return Choice(count, tuple(notes), tuple(_warnings(chosen, named or engines.COMMON)))


def _strongest(settings: Settings) -> str:
    """Which wish counts: the one from the strongest place, so that a flag beats another wish in `.env`."""
    wishes = [name for name in ("keep", "target_size") if getattr(settings, name)] + ["prune_ratio"]
    return max(wishes, key=lambda name: _strength(settings.origin.get(name, "default")))  # the first of equals


def _strength(origin: str) -> int:
    """3 a flag, 2 the environment, 1 a file, 0 the default; settings.resolve words them so."""
    if origin == "default":
        return 0
    return 3 if origin.startswith("--") else 2 if origin.startswith("environment ") else 1


def _warnings(case: engines.Case, names: Sequence[str]) -> list[str]:
    """What the engines have against the count, hard or soft, and the nearest counts that they have nothing against."""
    found = engines.objections(case, names)
    if not found or case.count == case.limits.experts:  # the parent's own count is not ours to blame
        return []
    free = [c for c in range(1, case.limits.experts) if engines.is_free(replace(case, count=c), names)]
    near = [*[c for c in free if c < case.count][-1:], *[c for c in free if c > case.count][:1]]
    advice = f"; {' and '.join(map(str, near))} would suit them all" if near else ""
    return [f"a model with {case.count} experts {line}{advice}" for line in engines.summary(found)]


@dataclass(frozen=True, slots=True)
class Model:
    """What a plan has to know of the model that it is for."""

    limits: Limits
    model_type: str
    experts: Mapping[str, int]  # block -> number, of every block that is to be cut
    trunk: Sequence[str] | None  # the trunk's blocks in order of depth; None: all that were run

    @classmethod
    def of(cls, layout: Layout) -> Model:
        """From a model's layout."""
        trunk = [block.name for block in layout.blocks if block.role == "trunk"]
        return cls(Limits.of(layout), layout.model_type, {b.name: b.experts for b in layout.blocks}, trunk)

    @classmethod
    def of_run(cls, run: Mapping[str, Any]) -> Model:
        """From the result of a scoring, whose model may be elsewhere."""
        facts = run["inputs"]["model"]
        try:
            demands = {name: facts[name] for name in ("experts", "top_k", "groups", "top_groups")}
        except KeyError as missing:
            raise InputError(f"the scores do not say {missing} of their model; score it again") from None
        limits = Limits(**demands, run=facts.get("run", 1))
        blocks = dict.fromkeys((run.get("plan") or {}).get("keep", {}), limits.experts)
        return cls(limits, facts.get("model_type", ""), blocks, facts.get("trunk"))


@dataclass(frozen=True, slots=True)
class Decision:
    """A plan, what it keeps, and whether the calibration settles it."""

    choice: Choice
    plan: Plan
    how: How
    outcome: Outcome
    assessment: Assessment

    def sentences(self) -> list[str]:
        """What a person should read before cutting."""
        return [*self.outcome.sentences(), *self.assessment.sentences()]

    def to_json(self) -> dict[str, Any]:
        """The entry "plan" of a result file."""
        how = {name: plain(getattr(self.how, name)) for name in ("metric", "blend", "weights", "seed", "count")}
        return to_json(self.outcome, how) | {"calibration": plain(self.assessment)}


def check_words(settings: Settings) -> None:
    """Refuse names and numbers that no model and no data could make right; every stage that plans begins with it."""
    saliency.check_metric(settings.metric)
    weights = saliency.parse_weights(settings.weights)
    if weights and settings.blend in {"pooled", "maxmin"}:
        raise UsageError(f"weights have no meaning for the blend {settings.blend}; use the blend weighted or shares")
    engines.parse_engines(settings.engine)
    typed = [name for name in WISHES if settings.origin.get(name, "").startswith("--")]
    typed = [name for name in typed if name == "prune_ratio" or getattr(settings, name)]  # 0 and "" are no wish
    if len(typed) > 1:
        flags = " and ".join(settings.origin[name] for name in typed)
        raise UsageError(f"{flags} each say how many experts are kept; give one of them")


def check_wishes(settings: Settings, model: Model, domains: tuple[str, ...] = ()) -> None:
    """Refuse before the long scoring what planning would refuse after it; without domains, those that are weighed."""
    choose_count(settings, model.limits, model.model_type)
    domains = domains or tuple(saliency.parse_weights(settings.weights)) or ("all",)
    measured = {name: np.ones((len(domains), 2)) for name in saliency.MEASURED[settings.scoring_mode]}
    gram_EDD = None if settings.scoring_mode == "router" else np.ones((2, len(domains), len(domains)))
    block = BlockSums("to be scored", 2, np.ones(len(domains)), measured, {}, gram_EDD)
    sums = Sums(settings.scoring_mode, domains, (block,))
    saliency.scores(sums, settings.metric, settings.blend, saliency.parse_weights(settings.weights))
    protect(sums, settings.protect)


def samples_by_domain(calibration: Mapping[str, Any]) -> dict[str, int]:
    """The number of samples of each domain, from the calibration's entry in a result file."""
    return {name: int(counts.get("samples", 0)) for name, counts in calibration.get("domains", {}).items()}


def decide(
    settings: Settings,
    sums: Sums,
    model: Model,
    calibration: Mapping[str, Any],
    *,
    fixed_bytes: int = 0,
    bytes_per_expert: int = 0,
) -> Decision:
    """How many experts stay and which, and everything there is to say about it.

    `calibration` is that entry of a result file; bytes as in `choose_count`.
    """
    limits = model.limits
    choice = choose_count(
        settings, limits, model.model_type, fixed_bytes=fixed_bytes, bytes_per_expert=bytes_per_expert
    )
    weights = saliency.parse_weights(settings.weights)
    metric, blend = saliency.resolve(sums, settings.metric, settings.blend, bool(weights))
    protected = protect(sums, settings.protect, model.trunk)
    if settings.protect == "auto":
        protected = for_special_tokens(sums, limits, choice.count)
    how = How(metric, blend, weights, settings.seed, choice.count, limits, protected)
    scores = how.scores(sums)
    plan = make_plan(scores, choice.count, limits, protected, unscored=model.experts)
    assessment = assess(sums, how, samples_by_domain(calibration))
    return Decision(choice, plan, how, outcome(plan, sums, scores), assessment)


def proposal(settings: Settings, sums: Sums, model: Model, calibration: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry "plan" of a result, told to the person who waits; nothing where none can be made.

    Sums alone are a result too: the prune stage plans anew.
    """
    try:
        made = decide(settings, sums, model, calibration)
    except UsageError as error:
        warn(f"no plan was made: {error}")
        return None
    for warning in made.choice.warnings:
        warn(warning)
    for line in made.sentences():
        say(line)
    return made.to_json()
