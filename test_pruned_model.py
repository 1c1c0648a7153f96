#!/usr/bin/env python3
"""Stage 3: judge the pruned model against its parent. Writes output/test_report.json; exit code 5 when it is broken."""

from __future__ import annotations

from moeprune import errors, settings


def main(argv: list[str]) -> None:
    """Resolve the settings before the heavy imports, so that a typing error costs no time."""
    chosen = settings.resolve("test", argv)
    from moeprune.checking import judge

    judge.main(chosen)


if __name__ == "__main__":
    errors.run(main)
