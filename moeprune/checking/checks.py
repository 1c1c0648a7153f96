"""The verdict: every check passes, fails or was not tested, and says why. A warning is a pass that should be read.

A check sees the report as it will be written, so that a verdict can always be traced to its numbers. It fails when the
whole 95% interval lies beyond its limit; where only the estimate does, chance could have done it, and it warns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeprune.checking import fidelity, statistics
from moeprune.settings import Settings

PASS, FAIL, NOT_TESTED = "pass", "fail", "not tested"
NOTICEABLE_KL = 0.05  # between an 8-bit and a 4-bit quantization: below it few people notice
NOTICEABLE_TOP = 0.95  # share of tokens whose most likely one is the parent's
NOTICEABLE_CHANCE = 0.6  # of the KL of drawn cuts; REAP has 0.05 (25% cut), 0.27 (50%), 0.73 (75%) on the demo model


@dataclass(frozen=True, slots=True)
class Check:
    """One verdict."""

    name: str
    status: str
    reason: str
    warning: bool = False
    lost: str = ""  # in a few words for the last line, where something was clearly lost


def run(report: Mapping[str, Any], settings: Settings) -> tuple[Check, ...]:
    """All checks, in the order of the table."""
    return tuple(check for rule in CHECKS for check in rule(report, settings))


def closing(checks: Sequence[Check]) -> str:
    """What stands behind the word of the verdict, so that nobody takes a pass for a model as good as its parent."""
    counts = Counter(check.status for check in checks)
    names = {status: ", ".join(c.name for c in checks if c.status == status) for status in (FAIL, NOT_TESTED)}
    warned = sum(check.warning and check.status == PASS for check in checks)
    parts = [f"{counts[FAIL]} failed ({names[FAIL]})"] if counts[FAIL] else []
    parts.append(f"{counts[PASS]} of {len(checks)} checks passed" + (f", {warned} with a warning" if warned else ""))
    if counts[NOT_TESTED]:
        parts.append(f"{counts[NOT_TESTED]} not tested ({names[NOT_TESTED]})")
    lost = {check.name: check.lost for check in checks if check.lost}
    told = ", ".join(lost[name] for name in TOLD if name in lost)
    return (f"with losses: {told}; " if told else "") + ", ".join(parts)


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
        why = "what the pruned model computes is not a number: weights are NaN, infinite or far too large"
        return [Check("KL", FAIL, why)]
    (low, high), worse, top = row["kl_interval"], row["loss_increase_interval"], row["same_top_interval"]
    kl = f"mean KL divergence to the parent {row['kl']:.3f} ({low:.3f} to {high:.3f}), median {row['kl_median']:.3f}"
    loss = f"{row['parent_loss']:.3f} -> {row['loss']:.3f} nats per token ({worse[0]:+.3f} to {worse[1]:+.3f})"
    same = f"most likely token as the parent's for {row['same_top']:.1%} ({top[0]:.1%} to {top[1]:.1%}) of the tokens"
    return [
        _above("KL", kl, (low, row["kl"]), settings.max_kl, notable=row["kl"] > NOTICEABLE_KL),
        _above("loss", loss, (worse[0], row["loss_increase"]), settings.max_loss_increase,
               notable=row["loss_increase"] > NOTICEABLE_KL,
               lost=f"loss {row['parent_loss']:.2f} -> {row['loss']:.2f}"),
        _above("same top token", same, (-top[1], -row["same_top"]), -settings.min_same_top,
               limit=f"limit {settings.min_same_top:.0%}", notable=row["same_top"] < NOTICEABLE_TOP,
               lost=f"same top token {row['same_top']:.0%}"),
    ]  # fmt: skip


def _domains(report: Mapping[str, Any], settings: Settings) -> list[Check]:
    """A cut can be good on average and ruin one domain; that is said, with the domain's name."""
    if not report.get("fidelity"):
        return [Check("worst domain", NOT_TESTED, _missing(report))]
    rows = report["fidelity"]["domains"]
    name, row = max(rows.items(), key=lambda item: item[1]["kl"])
    text = f"{name}: mean KL divergence {row['kl']:.3f}, loss {row['parent_loss']:.3f} -> {row['loss']:.3f}"
    low = statistics.lower_end_of_worst(row["kl"], row["kl_interval"][0], len(rows))
    notable = row["kl"] > max(settings.max_kl, 2 * NOTICEABLE_KL)
    lost = f"worst domain {name} (loss {row['parent_loss']:.2f} -> {row['loss']:.2f})"
    return [_above("worst domain", text, (low, row["kl"]), settings.max_domain_kl, notable=notable, lost=lost)]


def _against_chance(report: Mapping[str, Any], settings: Settings) -> list[Check]:
    """A thoughtful choice of experts beats a drawn one clearly, whatever the model and the ratio."""
    drawn, share = report.get("random_cuts"), report.get("share_of_chance")
    if not drawn or not share or not report.get("fidelity"):
        why = report.get("not_masked") or ("nothing was cut" if drawn == [] else _missing(report))
        return [Check("better than chance", NOT_TESTED, why)]
    own, (low, high) = report["fidelity"]["overall"]["kl"], share["interval"]
    chance = sum(row["kl"] for row in drawn) / len(drawn)
    text = f"KL {own:.3f}; {len(drawn)} cuts of the same size with drawn experts cost {chance:.3f} on average, "
    text += f"so it has {share['share']:.0%} ({low:.0%} to {high:.0%}) of that"
    if own <= NOTICEABLE_KL:  # where hardly anything is lost, chance does well too
        return [Check("better than chance", PASS, text)]
    return [_above("better than chance", text, (low, share["share"]), settings.max_chance,
                   limit=f"limit {settings.max_chance:.0%}", notable=share["share"] > NOTICEABLE_CHANCE)]  # fmt: skip


def _text(report: Mapping[str, Any], settings: Settings) -> list[Check]:
    """Is the generated text broken, endless, wrong or in another script more often than the parent's?"""
    generation = report.get("generation")
    if not generation:
        why = report.get("not_tested", {}).get("generation", "nothing generated")
        return [Check(name, NOT_TESTED, why) for name in TEXT_CHECKS]
    rates, within = generation["rates"], f"within {settings.max_new_tokens} tokens"
    found = [
        _broken(rates["broken"], settings.max_broken),
        _more("loops", f"loop {within}", rates["loop"], settings.max_loops),
        _more("endings", f"do not end {within}", rates["not ended"], settings.max_unended),
        _fewer("answers", rates["correct"], settings.min_answers),
        _fewer("JSON", rates["valid JSON"], settings.min_answers),
        _fewer("JSON keys", rates["right JSON keys"], settings.min_answers),
    ]
    if not generation["enough_prompts"] and found[1].status == PASS:
        reason = f"{generation['prompts']} prompts cannot show a doubling of a 3% loop rate; that needs "
        found[1] = Check("loops", NOT_TESTED, f"{reason}{generation['needed_prompts']} ({found[1].reason})", True)
    return [*found, _script(generation, settings)]


# What the last line tells, in this order, and how it calls it.
WORDS = {"answers": "right answers", "JSON": "valid JSON", "JSON keys": "right JSON keys",
         "generated text": "broken texts", "loops": "looping texts", "endings": "texts without an end"}  # fmt: skip
TOLD = (*WORDS, "script", "loss", "same top token", "worst domain")
ALIKE = "limit the parent's rate, but for chance"
TEXT_CHECKS = ("generated text", "loops", "endings", "answers", "JSON", "JSON keys", "script")


def _broken(rates: Mapping[str, Any], limit: float) -> Check:
    """What is broken needs no parent to be seen."""
    own, what = rates["pruned"], "are broken (loops, empty, broken characters)"
    if rates["parent"] is not None:
        return _more("generated text", what, rates, limit)
    text = f"{own['hits']} of {own['count']} texts {what}; the parent was not asked"
    return _above("generated text", text, (own["interval"][0], own["rate"]), limit, limit=f"limit {limit:.0%}",
                  notable=own["hits"] > 0)  # fmt: skip


def _more(name: str, what: str, rates: Mapping[str, Any], limit: float) -> Check:
    """A rate that must not be more than `limit` above the parent's."""
    own, parents = rates["pruned"], rates["parent"]
    if not own["count"] or parents is None:
        return Check(name, NOT_TESTED, "the parent was not asked" if own["count"] else "nothing was generated")
    low, _ = statistics.difference((own["hits"], own["count"]), (parents["hits"], parents["count"]))
    text = f"{own['hits']} of {own['count']} texts {what}, {parents['hits']} of the parent's"
    more = own["rate"] - parents["rate"] if limit else low  # without a limit one more text is not yet a warning
    return _above(name, text, (low, more), limit, limit=f"limit {limit:.0%} more" if limit else ALIKE, notable=low > 0,
                  lost=f"{WORDS[name]} {parents['rate']:.1%} -> {own['rate']:.1%}")  # fmt: skip


def _fewer(name: str, rates: Mapping[str, Any], limit: float) -> Check:
    """A rate that must be at least `limit` of the parent's."""
    own, parents = rates["pruned"], rates["parent"]
    if not own["count"] or parents is None:
        return Check(name, NOT_TESTED, "the parent was not asked" if own["count"] else "no prompt asks for it")
    if not parents["hits"]:
        return Check(name, NOT_TESTED, f"the parent gets none of {parents['count']} right, so nothing could be lost")
    hits, base = (own["hits"], own["count"]), (parents["hits"], parents["count"])
    low, high = own["interval"]
    text = f"{own['rate']:.1%} ({low:.1%} to {high:.1%}) of {own['count']} right, parent {parents['rate']:.1%}"
    short = limit * parents["rate"] - own["rate"]
    surely = -statistics.difference(hits, base, limit)[1]
    return _above(name, text, (surely, short), 0.0, limit=f"limit {limit:.0%} of the parent's",
                  notable=statistics.difference(hits, base)[1] < 0,
                  lost=f"{WORDS[name]} {parents['rate']:.0%} -> {own['rate']:.0%}")  # fmt: skip


def _script(generation: Mapping[str, Any], settings: Settings) -> Check:
    """Has the model changed its language? Seen by the letters alone."""
    drift = generation.get("script_drift")
    if not drift or not drift["count"]:
        return Check("script", NOT_TESTED, "no prompt for which both models wrote letters")
    moves = ", ".join(f"{move} ({count})" for move, count in drift["moves"].items())
    text = f"{drift['hits']} of {drift['count']} texts are in another script than the parent's"
    low, rate = drift["interval"][0], drift["hits"] / drift["count"]
    limit = settings.max_script_drift
    text = f"{text}: {moves}" if moves else text
    return _above("script", text, (low, rate), limit, limit=f"limit {limit:.0%}", notable=low > limit / 2,
                  lost=f"{rate:.0%} of the texts in another script")  # fmt: skip


def _above(
    name: str, text: str, found: tuple[float, float], bound: float, *, notable: bool, limit: str = "", lost: str = ""
) -> Check:
    """Fail when even the lower end of the interval is above the bound; `found` is that end, and the estimate."""
    low, value = found
    shown = f"{text}; {limit or f'limit {bound:g}'}"
    lost = lost if notable or low > bound else ""
    if low > bound:
        return Check(name, FAIL, shown, lost=lost)
    if value > bound:
        return Check(name, PASS, f"{shown}, which it may be beyond: too few samples to be sure", True, lost)
    return Check(name, PASS, shown, notable, lost)


def _missing(report: Mapping[str, Any]) -> str:
    return str(report.get("not_tested", {}).get("fidelity", "no parent to compare with"))


CHECKS: tuple[Rule, ...] = (_structure, _fidelity, _against_chance, _domains, _text)
