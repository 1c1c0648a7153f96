"""The verdict: every check passes, fails or was not tested, and says why. A warning is a pass that should be read.

A check sees the report as it will be written, so that a verdict can always be traced to its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeprune.checking import fidelity, statistics
from moeprune.settings import Settings

PASS, FAIL, NOT_TESTED = "pass", "fail", "not tested"
NOTICEABLE_KL = 0.05  # between an 8-bit and a 4-bit quantization: below it few people notice

DRIFT = 0.02  # texts in another script than the parent's, at the lower end of the interval
CHANCE_SHARE = 0.85  # of the KL of a drawn cut; REAP has 0.05 (25%), 0.27 (50%) and 0.73 (75%) on the demo-sized model


@dataclass(frozen=True, slots=True)
class Check:
    """One verdict."""

    name: str
    status: str
    reason: str
    warning: bool = False


def run(report: Mapping[str, Any], settings: Settings) -> tuple[Check, ...]:
    """All checks, in the order of the table."""
    return tuple(check for rule in CHECKS for check in rule(report, settings))


Rule = Callable[[Mapping[str, Any], Settings], "list[Check]"]


def _structure(report: Mapping[str, Any], _settings: Settings) -> list[Check]:
    """Is it exactly the parent without the dropped experts?"""
    found = report.get("structure")
    if not found or found.get("status") == NOT_TESTED:
        return [Check("structure", NOT_TESTED, found["reason"] if found else _missing(report))]
    return [Check("structure", found["status"], found["reason"], bool(found.get("warning")))]


def _fidelity(report: Mapping[str, Any], settings: Settings) -> list[Check]:
    """KL, loss and top token against the thresholds."""
    if not report.get("fidelity"):
        return [Check(name, NOT_TESTED, _missing(report)) for name in ("KL", "loss", "same top token")]
    row = report["fidelity"]["overall"]
    if row["kl"] >= fidelity.NOT_A_NUMBER:
        return [
            Check(
                "KL", FAIL, "what the pruned model computes is not a number: weights are NaN, infinite or far too large"
            )
        ]
    low, high = row["kl_interval"]
    kl = f"mean KL divergence to the parent {row['kl']:.3f} ({low:.3f} to {high:.3f}), median {row['kl_median']:.3f}"
    loss = f"{row['parent_loss']:.3f} -> {row['loss']:.3f} nats per token"
    top = f"the parent's most likely token stays so for {row['same_top']:.1%} of the tokens"
    return [
        _limit("KL", kl, row["kl"] > settings.max_kl, f"limit {settings.max_kl:g}", row["kl"] > NOTICEABLE_KL),
        _limit("loss", loss, row["loss_increase"] > settings.max_loss_increase,
               f"limit +{settings.max_loss_increase:g}", row["loss_increase"] > NOTICEABLE_KL),
        _limit("same top token", top, row["same_top"] < settings.min_same_top,
               f"limit {settings.min_same_top:.0%}", row["same_top"] < 0.95),
    ]  # fmt: skip


def _domains(report: Mapping[str, Any], settings: Settings) -> list[Check]:
    """A cut can be good on average and ruin one domain; that is said, with the domain's name."""
    if not report.get("fidelity"):
        return []
    rows = report["fidelity"]["domains"]
    name, row = max(rows.items(), key=lambda item: item[1]["kl"])
    text = f"{name}: mean KL divergence {row['kl']:.3f}, loss {row['parent_loss']:.3f} -> {row['loss']:.3f}"
    return [Check("worst domain", PASS, text, row["kl"] > max(settings.max_kl, 2 * NOTICEABLE_KL))]


def _against_chance(report: Mapping[str, Any], _settings: Settings) -> list[Check]:
    """A thoughtful choice of experts beats a drawn one clearly, whatever the model and the ratio."""
    drawn = report.get("random_cuts")
    if not drawn or not report.get("fidelity"):
        why = report.get("not_masked") or ("nothing was cut" if drawn == [] else _missing(report))
        return [Check("better than chance", NOT_TESTED, why)]
    own = report["fidelity"]["overall"]["kl"]
    chance = sum(row["kl"] for row in drawn) / len(drawn)
    text = f"KL {own:.3f}; {len(drawn)} cuts of the same size with drawn experts cost {chance:.3f} on average"
    bad = own > CHANCE_SHARE * chance and own > NOTICEABLE_KL
    return [_limit("better than chance", text, bad, f"limit {CHANCE_SHARE:.0%} of that", own > 0.6 * chance)]


def _text(report: Mapping[str, Any], settings: Settings) -> list[Check]:
    """Is the generated text broken more often than the parent's?"""
    generation = report.get("generation")
    if not generation:
        return [
            Check("generated text", NOT_TESTED, report.get("not_tested", {}).get("generation", "nothing generated"))
        ]
    own, parents = (generation["rates"]["broken"][who] for who in ("pruned", "parent"))
    base = parents["rate"] if parents else 0.0
    text = f"{own['hits']} of {own['count']} texts are broken (loops, empty, broken characters)"
    text += f", {parents['hits']} of the parent's" if parents else "; the parent was not asked"
    bad = own["rate"] - base > settings.max_broken
    worse = (
        statistics.more_often(own["hits"], own["count"], parents["hits"], parents["count"]) > 2 if parents else False
    )
    return [
        _limit("generated text", text, bad, f"limit {settings.max_broken:.0%} more", worse),
        *_rate_checks(generation),
        *_script(generation),
    ]


def _rate_checks(generation: Mapping[str, Any]) -> list[Check]:
    found = [
        _rate_check(name, generation["rates"][rate], worse_is_more)
        for name, rate, worse_is_more in (
            ("loops", "loop", True), ("endings", "not ended", True), ("answers", "correct", False),
            ("JSON", "valid JSON", False), ("tool calls", "right JSON keys", False),
        )
    ]  # fmt: skip
    if not generation["enough_prompts"]:
        reason = f"{generation['prompts']} prompts cannot show a doubling of a 3% loop rate; that needs "
        found[0] = Check("loops", NOT_TESTED, f"{reason}{generation['needed_prompts']} ({found[0].reason})", True)
    return found


def _script(generation: Mapping[str, Any]) -> list[Check]:
    """Has the model changed its language? Seen by the letters alone."""
    drift = generation.get("script_drift")
    if not drift or not drift["count"]:
        return [Check("script", NOT_TESTED, "no prompt for which both models wrote letters")]
    moves = ", ".join(f"{move} ({count})" for move, count in drift["moves"].items())
    text = f"{drift['hits']} of {drift['count']} texts are in another script than the parent's"
    return [Check("script", PASS, f"{text}: {moves}" if moves else text, drift["interval"][0] > DRIFT)]


def _rate_check(name: str, rates: Mapping[str, Any], worse_is_more: bool) -> Check:
    own, parents = rates["pruned"], rates["parent"]
    if not own["count"] or parents is None:
        return Check(name, NOT_TESTED, "the parent was not asked" if own["count"] else "no prompt asks for it")
    low, high = own["interval"]
    text = f"{own['rate']:.1%} ({low:.1%} to {high:.1%}), parent {parents['rate']:.1%}"
    z = statistics.more_often(own["hits"], own["count"], parents["hits"], parents["count"])
    return Check(name, PASS, text, (z if worse_is_more else -z) > statistics.Z_95)


def _limit(name: str, text: str, bad: bool, limit: str, notable: bool) -> Check:
    return Check(name, FAIL if bad else PASS, f"{text}; {limit}", notable)


def _missing(report: Mapping[str, Any]) -> str:
    return str(report.get("not_tested", {}).get("fidelity", "no parent to compare with"))


CHECKS: tuple[Rule, ...] = (_structure, _fidelity, _against_chance, _domains, _text)
