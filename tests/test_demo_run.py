"""The newcomer's command: ./run.sh demo in a fresh copy, twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALLER = {"REAP_GENERATIONS": "40", "REAP_EVALUATION_SAMPLES": "40"}  # the full demo takes a minute longer


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "project"
    folder.mkdir()
    for path in (*ROOT.glob("*.py"), *map(ROOT.joinpath, ("run.sh", "requirements.txt", "moeprune", "demo"))):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder)
    return folder


def demo(folder: Path) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("REAP_")}
    environ |= {"REAP_PYTHON": sys.executable, "HF_TOKEN": "hf_canary", "REAP_RUNTIME": "native", **SMALLER}
    return subprocess.run(["./run.sh", "demo"], cwd=folder, env=environ, capture_output=True, text=True)


def test_the_demo_works_says_what_it_made_and_is_quick_the_second_time(copy):
    first = demo(copy)
    assert first.returncode == 0, first.stderr[-3000:]
    assert first.stdout.split() == [
        "output/demo/reap_metadata.json",
        "output/demo/pruned",
        "output/demo/test_report.json",
    ]
    summary = first.stderr[first.stderr.rindex("\nsize ") :]
    for word in (" MB -> ", "loss ", "verdict  pass", "output/demo/pruned", "output/demo/test_report.json"):
        assert word in summary, summary
    second = demo(copy)
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert second.stderr.count(" is current") == 3
    for path in (copy / "output").rglob("*.json"):
        assert "hf_canary" not in path.read_text(encoding="utf-8"), path
    assert not list((copy / "output").rglob("*.partial"))
