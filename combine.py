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
from moeprune.planning.decision import Model, check_words, proposal
from moeprune.results import FILES, SCORES
from moeprune.settings import Settings, parser, resolve


def main(argv: list[str]) -> None:
    """Check that the runs belong together, add them, plan, and write the whole beside nothing of value."""
    files, flags = split(argv)
    settings = resolve("combine", flags)
    check_words(settings)
    target = settings.output_path / FILES[SCORES]
    runs = [read_result(path, SCORES) for path in files]
    made_from = digest("combined", *sorted(str(run.get("inputs", {}).get("fingerprint")) for run in runs))
    if is_current(target, SCORES, made_from) and not settings.force:
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
        **header(SCORES, ("numpy",)),
        "settings": settings.public(),
        "inputs": {"fingerprint": made_from, "model": inputs[0]["model"], "calibration": calibration},
        "scores": sums.to_json(),
        "plan": proposal(settings, sums, Model.of_run(runs[0]), calibration),
        "warnings": console.warnings(),
        "timing": {},
    }


if __name__ == "__main__":
    errors.run(main)
