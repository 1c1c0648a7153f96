"""Write the generated half of the built-in set anew: python -m moeprune.scoring.calibration.builtin.generate

The other files (chat, code, languages, prose) were written by hand. All of it is this project's own text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from moeprune.scoring.calibration.builtin import problems, requests, structured

SAMPLES = 72  # of each domain

MAKERS: dict[str, tuple[Callable[[Random], dict[str, Any]], ...]] = {
    "maths": problems.MATHS,
    "reasoning": problems.REASONING,
    "tools": (requests.tool_chat,),
    "data": (structured.conversion, structured.conversion, structured.question, structured.log),
}


def main(folder: Path) -> None:
    """Write the generated files into a folder, always the same."""
    for domain, makers in MAKERS.items():
        rng = Random(domain)
        lines: dict[str, None] = {}  # in order, each once
        while len(lines) < SAMPLES:
            lines[json.dumps(makers[len(lines) % len(makers)](rng), ensure_ascii=False)] = None
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent)
