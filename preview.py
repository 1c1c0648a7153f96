#!/usr/bin/env python3
"""Before the cut: what each ratio, metric or plan would lose, all in one pass. Writes output/preview.json."""

from __future__ import annotations

from dataclasses import replace

from moeprune import errors
from moeprune.planning.decision import check_words
from moeprune.settings import resolve
from moeprune.values import listed


def main(argv: list[str]) -> None:
    """Resolve the settings before the heavy imports, so that a typing error costs no time."""
    chosen = resolve("preview", argv)
    for metric in listed(chosen.metrics) or [chosen.metric]:
        check_words(replace(chosen, metric=metric))
    from moeprune.checking import preview

    preview.main(chosen)


if __name__ == "__main__":
    errors.run(main)
