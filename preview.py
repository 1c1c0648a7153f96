#!/usr/bin/env python3
"""Before the cut: what each ratio, metric or plan would lose, all in one pass. Writes output/preview.json."""

from __future__ import annotations

from dataclasses import replace

from moeprune import errors
from moeprune.errors import InputError
from moeprune.planning.decision import check_words
from moeprune.results import FILES, SCORES
from moeprune.settings import resolve
from moeprune.values import listed


def main(argv: list[str]) -> None:
    """Resolve the settings before the heavy imports, so that a typing error costs no time."""
    chosen = resolve("preview", argv)
    for metric in listed(chosen.metrics) or [chosen.metric]:
        check_words(replace(chosen, metric=metric))
    scores = chosen.output_path / FILES[SCORES]
    if not listed(chosen.plans) and not scores.exists():
        raise InputError(f"no scores at {scores}; run ./run.sh reap first, or give --plans")
    from moeprune.checking import preview

    preview.main(chosen)


if __name__ == "__main__":
    errors.run(main)
