#!/usr/bin/env python3
"""Before the cut: what each ratio, metric or plan would lose, all in one pass. Writes output/preview.json."""

from __future__ import annotations

from dataclasses import replace

from moeprune import errors, settings
from moeprune.planning.decision import check_words


def main(argv: list[str]) -> None:
    """Resolve the settings before the heavy imports, so that a typing error costs no time."""
    chosen = settings.resolve("preview", argv)
    for metric in settings.listed(chosen.metrics) or [chosen.metric]:
        check_words(replace(chosen, metric=metric))
    from moeprune.checking import preview

    preview.main(chosen)


if __name__ == "__main__":
    errors.run(main)
