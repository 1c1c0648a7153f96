"""Stage 3 as a command: is there a current result, else judge; then the page, the model card, and the exit code."""

from __future__ import annotations

from typing import Any

from moeprune import console, metadata
from moeprune.checking import lm_eval, model_card, report
from moeprune.checking.case import Case, find, fingerprint
from moeprune.errors import ResultError, UsageError
from moeprune.results import FILES, VERDICT
from moeprune.settings import Settings


def main(settings: Settings) -> None:
    """Judge the pruned model; stdout gets the path of the result, a failed check ends in exit code 5."""
    if settings.parent_endpoint and not settings.endpoint:
        raise UsageError("--parent-endpoint needs --endpoint, the server of the pruned model")
    lm_eval.check(settings)
    case = None if settings.endpoint else find(settings)
    target = settings.output_path / FILES[VERDICT]
    key = fingerprint(case, settings)
    current = not settings.force and metadata.is_current(target, VERDICT, key)
    if current:
        console.say(f"{target} is current, about {case.pruned if case else settings.endpoint}; --force judges again")
        result = metadata.read_result(target, VERDICT)
        if not (settings.output_path / report.NAME).exists():
            report.write(settings.output_path)
    else:
        from moeprune.checking.judge import judge

        console.say(f"judging  {case.pruned} by {case.parent or 'itself'}" if case else f"judging  {settings.endpoint}")
        with metadata.claimed(settings.output_path):
            # First, so that a misspelt task ends the stage before the long part.
            tasks = {"lm_eval": lm_eval.run(case, settings)} if case and settings.lm_eval else {}
            result = judge(case, settings, key) | tasks
            metadata.write_json(target, result)
        report.write(settings.output_path)
        _write_card(case, result)
    show(result)
    print(target)
    failed = [check for check in result["checks"] if check["status"] == "fail"]
    if failed:
        name = settings.endpoint or (case.pruned if case else "")
        raise ResultError(f"{name} failed: " + "; ".join(f"{c['name']}: {c['reason']}" for c in failed))


def _write_card(case: Case | None, result: dict[str, Any]) -> None:
    """The numbers go into the pruned folder's README.md, where that can be written."""
    if case is None:
        return
    try:
        model_card.write(case.pruned, case.parent, result)
    except PermissionError as error:
        console.warn(f"the model card was not written: {error.filename} is not writable")


def show(result: dict[str, Any]) -> None:
    """Every check in one line."""
    for check in result["checks"]:
        mark = "warning" if check["warning"] and check["status"] == "pass" else check["status"]
        console.say(f"{mark:>10}  {check['name']}: {check['reason']}")
    console.say(f"{'verdict':>10}  {result['verdict']}, {result['summary']}")
    for line in lm_eval.lines(result.get("lm_eval", {})):
        console.say(line)
