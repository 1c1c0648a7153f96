"""Cut a checkpoint as a person would, with a plan whose blocks all keep different experts."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import prune_model
from moeprune.checkpoint import families, folder

ROOT = Path(__file__).parent.parent.parent


def keep_lists(parent: Path, count: int, *, seed: int = 0, always: Sequence[int] = ()) -> dict[str, list[int]]:
    """Random keep-lists that the model's groups and runs allow, another one for each block."""
    layout = families.understand(folder.open_checkpoint(parent))
    chance = random.Random(seed)
    keep = {}
    for block in layout.blocks:
        size = block.experts // layout.groups
        runs = [range(g * size, (g + 1) * size, layout.run) for g in range(layout.groups)]
        share = count // layout.groups // layout.run - len(always)
        free = [[first for first in group if first not in always] for group in runs]
        firsts = [*always, *(first for group in free for first in chance.sample(group, share))]
        keep[block.name] = sorted(e + i for e in firsts for i in range(layout.run))
    return keep


def write_plan(path: Path, keep: dict[str, list[int]]) -> Path:
    path.write_text(json.dumps({"keep": keep}))
    return path


def cut(parent: Path, keep: dict[str, list[int]], *flags: str) -> Path:
    """Run the stage in this process and give the folder that it made."""
    work = parent.parent
    plan = write_plan(work / "plan.json", keep)
    prune_model.main(
        ["--model-path", str(parent), "--plan", str(plan), "--pruned-output-path", str(work / "child"), *flags]
    )
    return work / "child"


def run(*argv: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the stage as its own process, with a clean environment."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("REAP_")} | environment
    command = [sys.executable, str(ROOT / "prune_model.py"), *argv]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
