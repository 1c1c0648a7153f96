"""The demo model scored once for all tests of the judge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "model"
HELD_OUT = ROOT / "demo" / "evaluation.jsonl"


@pytest.fixture(scope="session")
def scored(tmp_path_factory) -> Path:
    """An output folder with the scores of the demo model."""
    output = tmp_path_factory.mktemp("scored")
    paths = ["--model-path", DEMO, "--calibration-path", ROOT / "demo" / "calibration.jsonl", "--output-path", output]
    subprocess.run([sys.executable, ROOT / "reap.py", *paths, "--device", "cpu"], check=True)
    return output


@pytest.fixture(scope="session")
def good_keep(scored) -> dict[int, list[int]]:
    """Layer -> the half of the experts that the scores name."""
    keep = json.loads((scored / "reap_metadata.json").read_text())["plan"]["keep"]
    return {int(block.rpartition(".")[2]): ids for block, ids in keep.items()}
