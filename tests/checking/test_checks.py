"""Each check against a report made by hand: fails only where the whole interval is beyond its limit."""

from __future__ import annotations

from typing import Any

import pytest

from moeprune.checking import checks, statistics
from moeprune.settings import Settings


def row(kl: float, width: float = 0.1) -> dict[str, Any]:
    """A row of fidelity whose intervals are this wide to both sides."""
    return {
        "kl": kl, "kl_interval": [kl - width, kl + width], "kl_median": kl / 2,
        "parent_loss": 1.0, "loss": 1.0 + kl, "loss_increase": kl, "loss_increase_interval": [kl - width, kl + width],
        "same_top": 0.9, "same_top_interval": [0.88, 0.92],
    }  # fmt: skip


def rate(hits: int, count: int, parent: int | None) -> dict[str, Any]:
    """A rate of the pruned model and of its parent on as many prompts."""

    def one(number: int) -> dict[str, Any]:
        share = number / count if count else None
        return {"hits": number, "count": count, "rate": share, "interval": list(statistics.wilson(number, count))}

    return {"pruned": one(hits), "parent": None if parent is None else one(parent)}


def report(**changes: Any) -> dict[str, Any]:
    """A sound cut, but for the changes."""
    rates = {
        "broken": rate(0, 800, 0), "loop": rate(1, 800, 0), "not ended": rate(0, 800, 0),
        "correct": rate(540, 642, 632), "valid JSON": rate(34, 40, 40), "right JSON keys": rate(33, 40, 40),
    }  # fmt: skip
    drift = {"hits": 0, "count": 484, "interval": list(statistics.wilson(0, 484)), "moves": {}}
    domains = {f"d{i}": row(0.3) for i in range(19)} | {"python": row(1.3, 0.4)}
    found = {
        "structure": {"status": "pass", "reason": "same"},
        "fidelity": {"overall": row(0.385, 0.05), "domains": domains},
        "random_cuts": [{"kl": 1.1}, {"kl": 1.2}],
        "share_of_chance": {"share": 0.33, "interval": [0.28, 0.4]},
        "generation": {"prompts": 800, "needed_prompts": 749, "enough_prompts": True},
    }
    found["generation"] |= {"rates": rates, "script_drift": drift}
    for name, value in changes.items():
        place = found["generation"]["rates"] if name in rates else found
        place[name] = value
    return found


def verdicts(changes: dict[str, Any], **settings: Any) -> dict[str, checks.Check]:
    return {check.name: check for check in checks.run(report(**changes), Settings(**settings))}


def fidelity(**overall: Any) -> dict[str, Any]:
    return {"fidelity": {"overall": row(0.385, 0.05) | overall, "domains": {"a": row(0.3)}}}


FAILING = {
    "KL": fidelity(kl=1.0, kl_interval=[0.9, 1.1]),
    "loss": fidelity(loss_increase=0.7, loss_increase_interval=[0.6, 0.8]),
    "same top token": fidelity(same_top=0.4, same_top_interval=[0.35, 0.45]),
    "better than chance": {"share_of_chance": {"share": 0.9, "interval": [0.8, 1.0]}},
    "worst domain": {"fidelity": {"overall": row(0.385), "domains": {"a": row(0.3), "b": row(3.0, 0.5)}}},
    "generated text": {"broken": rate(300, 800, 20)},
    "loops": {"loop": rate(48, 800, 24)},
    "endings": {"not ended": rate(300, 800, 20)},
    "answers": {"correct": rate(400, 642, 632)},
    "JSON": {"valid JSON": rate(22, 40, 40)},
    "JSON keys": {"right JSON keys": rate(22, 40, 40)},
    "script": {"generation": report()["generation"] | {
        "script_drift": {"hits": 60, "count": 484, "interval": list(statistics.wilson(60, 484)), "moves": {}}
    }},
}  # fmt: skip
UNSURE = {
    "KL": fidelity(kl=0.6, kl_interval=[0.4, 0.8]),
    "loss": fidelity(loss_increase=0.6, loss_increase_interval=[0.4, 0.8]),
    "same top token": fidelity(same_top=0.58, same_top_interval=[0.54, 0.62]),
    "better than chance": {"share_of_chance": {"share": 0.8, "interval": [0.7, 0.9]}},
    "worst domain": {"fidelity": {"overall": row(0.3), "domains": {f"d{i}": row(1.7, 0.4) for i in range(20)}}},
    "generated text": {"broken": rate(2, 20, 0)},
    "endings": {"not ended": rate(3, 20, 0)},
    "answers": {"correct": rate(14, 20, 19)},
}


def test_a_good_cut_of_the_demo_model_passes_with_warnings():
    found = verdicts({})
    assert {check.status for check in found.values()} == {"pass"}
    assert {name for name, check in found.items() if check.warning} == {
        "KL", "loss", "same top token", "worst domain", "answers", "JSON", "JSON keys",
    }  # fmt: skip


@pytest.mark.parametrize("name", FAILING)
def test_what_lies_wholly_beyond_its_limit_fails_alone(name):
    found = verdicts(FAILING[name])
    assert [check.name for check in found.values() if check.status == "fail"] == [name]
    assert "limit" in found[name].reason


@pytest.mark.parametrize("name", UNSURE)
def test_what_only_may_lie_beyond_its_limit_warns(name):
    check = verdicts(UNSURE[name])[name]
    assert (check.status, check.warning) == ("pass", True)
    assert "may be beyond" in check.reason


LIMITS = {
    "KL": {"max_kl": 2.0},
    "loss": {"max_loss_increase": 2.0},
    "same top token": {"min_same_top": 0.3},
    "better than chance": {"max_chance": 1.0},
    "worst domain": {"max_domain_kl": 9.0},
    "generated text": {"max_broken": 0.5},
    "loops": {"max_loops": 0.05},
    "endings": {"max_unended": 0.5},
    "answers": {"min_answers": 0.1},
    "JSON": {"min_answers": 0.1},
    "JSON keys": {"min_answers": 0.1},
    "script": {"max_script_drift": 0.2},
}


@pytest.mark.parametrize("name", FAILING)
def test_every_limit_is_a_setting(name):
    assert verdicts(FAILING[name], **LIMITS[name])[name].status == "pass"


def test_a_few_loops_more_are_chance_and_a_doubling_is_not():
    assert verdicts({"loop": rate(30, 800, 24)})["loops"] == checks.Check(
        "loops",
        "pass",
        "30 of 800 texts loop within 96 tokens, 24 of the parent's; limit the parent's rate, but for chance",
    )
    assert verdicts({"loop": rate(144, 2000, 72)})["loops"].status == "fail"


def test_answers_that_the_parent_does_not_know_cannot_be_lost():
    assert verdicts({"correct": rate(0, 642, 0)})["answers"].status == "not tested"


def test_without_a_parent_only_what_needs_none_is_tested():
    alone = {name: rate(600, 800, None) for name in ("broken", "loop", "not ended", "correct")}
    found = verdicts({**alone, "fidelity": None, "random_cuts": None, "structure": None})
    tested = {name for name, check in found.items() if check.status != "not tested"}
    assert tested == {"generated text", "JSON", "JSON keys", "script"}
    assert found["generated text"].status == "fail"


def test_the_last_line_says_what_was_lost_and_counts():
    def closing(changes: dict[str, Any]) -> str:
        return checks.closing(checks.run(report(**changes), Settings()))

    assert closing({}) == (
        "with losses: right answers 98% -> 84%, valid JSON 100% -> 85%, right JSON keys 100% -> 82%, "
        "loss 1.00 -> 1.39, same top token 90%, worst domain python (loss 1.00 -> 2.30); "
        "13 of 13 checks passed, 7 with a warning"
    )
    failing = closing({"loop": rate(48, 800, 24), "structure": None})
    assert "right JSON keys 100% -> 82%, looping texts 3.0% -> 6.0%, loss" in failing
    assert failing.endswith("; 1 failed (loops), 11 of 13 checks passed, 7 with a warning, 1 not tested (structure)")


def test_a_model_that_lost_nothing_is_not_said_to_have():
    same = rate(632, 642, 632)
    nothing = fidelity(kl=0.0, kl_interval=[0, 0], loss_increase=0.0, same_top=1.0)
    nothing["fidelity"]["domains"] = {"a": row(0.0, 0.0)}
    found = verdicts({**nothing, "correct": same, "valid JSON": rate(40, 40, 40), "right JSON keys": rate(40, 40, 40)})
    assert checks.closing(tuple(found.values())) == "13 of 13 checks passed"


def test_the_difference_of_two_rates_is_newcombes():
    """Newcombe 1998, table II: 56/70 and 48/80, 9/10 and 3/10, 10/10 and 0/20."""
    for own, parent, interval in (
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((10, 10), (0, 20), (0.6791, 1.0)),
    ):
        assert statistics.difference(own, parent) == pytest.approx(interval, abs=1e-3)
