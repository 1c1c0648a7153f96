#!/usr/bin/env python3
"""Add up the scores of several runs on one model: a.json b.json ... -> output/reap_metadata.json"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from moeprune import console, errors
from moeprune.errors import InputError, UsageError
from moeprune.metadata import Sums, digest, header, is_current, read_result, write_json
from moeprune.planning.combine import add, check_inputs, total_of
from moeprune.planning.decision import choose_count, decide, samples_by_domain
from moeprune.planning.plan import Limits
from moeprune.settings import Settings, parser, resolve

KIND = "reap_metadata"


def main(argv: list[str]) -> None:
    """Check that the runs belong together, add them, plan, and write the whole beside nothing of value."""
    files, flags = split(argv)
    settings = resolve("combine", flags)
    target = settings.output_path / "reap_metadata.json"
    runs = [read_result(path, KIND) for path in files]
    made_from = digest("combined", *sorted(str(run.get("inputs", {}).get("fingerprint")) for run in runs))
    if is_current(target, KIND, made_from) and not settings.force:
        console.say(f"{target} is current: the same runs; --force adds them again")
    elif target.exists() and not settings.force:
        raise UsageError(f"{target} holds other scores; choose another folder with --output-path, or pass --force")
    else:
        write_json(target, combined(settings, runs, files, made_from))
    print(target)


def split(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files to add, and the flags."""
    made = parser("combine")
    made.prog, made.usage = "combine", "%(prog)s FILE FILE [FILE ...] [--output-path X] [--force]"
    made.add_argument("files", nargs="+", type=Path, help="reap_metadata.json of runs on the same model")
    chosen = vars(made.parse_args(argv))
    files: list[Path] = chosen.pop("files")
    if len(files) < 2:
        raise UsageError("give at least two reap_metadata.json files to add")
    return files, [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]


def combined(
    settings: Settings, runs: Sequence[Mapping[str, Any]], files: Sequence[Path], made_from: str
) -> dict[str, Any]:
    """The whole result as JSON."""
    inputs = [run["inputs"] for run in runs if isinstance(run.get("inputs"), dict)]
    if len(inputs) < len(runs) or any("scores" not in run for run in runs):
        raise InputError(f"one of {', '.join(map(str, files))} has no scores or inputs; score again")
    check_inputs(inputs, [str(path) for path in files])
    sums = reduce(add, (Sums.from_json(run["scores"]) for run in runs))
    calibration = total_of([entry.get("calibration", {}) for entry in inputs])
    return {
        **header(KIND, ("numpy",)),
        "settings": settings.public(),
        "inputs": {"fingerprint": made_from, "model": inputs[0]["model"], "calibration": calibration},
        "scores": sums.to_json(),
        "plan": planned(settings, runs[0], sums, calibration),
        "warnings": console.warnings(),
        "timing": {},
    }


def planned(
    settings: Settings, run: Mapping[str, Any], sums: Sums, calibration: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The plan at the configured ratio, or nothing: the sums are the result, and stage 2 plans anew."""
    model = run["inputs"]["model"]
    scored = {block.block for block in sums.blocks}
    samples = samples_by_domain(calibration)
    try:
        limits = Limits(model["experts"], model["top_k"], model["groups"], model["top_groups"], model.get("run", 1))
    except KeyError as missing:
        console.warn(f"no plan was made: the runs do not say {missing} of their model")
        return None
    try:
        unscored = {name: limits.experts for name in (run.get("plan") or {}).get("keep", {}) if name not in scored}
        count = choose_count(settings, limits, model.get("model_type", "")).count
        made = decide(settings, sums, count, limits, unscored=unscored, samples=samples)
    except UsageError as error:
        console.warn(f"no plan was made: {error}")
        return None
    for line in made.sentences():
        console.say(line)
    return made.to_json()


if __name__ == "__main__":
    errors.run(main)
