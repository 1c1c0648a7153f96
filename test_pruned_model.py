#!/usr/bin/env python3
"""Stage 3: judge the pruned model against its parent. Writes output/test_report.json; exit code 5 when it is broken."""

from __future__ import annotations

from moeprune import errors
from moeprune.checking import stage
from moeprune.settings import resolve


def main(argv: list[str]) -> None:
    """The settings, then the stage."""
    stage.main(resolve("test", argv))


if __name__ == "__main__":
    errors.run(main)
