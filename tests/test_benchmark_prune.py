"""The benchmark of the cut: checkpoints that are what they are called, and a verdict that can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import checkpoints, prune
from moeprune.checkpoint import families, formats
from moeprune.checkpoint.folder import open_checkpoint
from tests.pruning import cutting

CALLED = {"bf16-stacked": "bf16", "int4": "ct_int4"}  # elsewhere the name is that of the format
GOOD = {"ratio_to_cp_sync": 1.5, "ratio_to_cp": 1.6, "peak_memory_above_interpreter_bytes": 200_000_000}


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_a_checkpoint_of_each_format_is_cut(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, value in {"EXPERTS": 8, "HIDDEN": 256, "INTER": 256}.items():
        monkeypatch.setattr(checkpoints, size, value)
    keep = checkpoints.make(tmp_path / "model", 0.005, name)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert formats.format_of(checkpoint) == CALLED.get(name, name)
    assert {block.name for block in families.understand(checkpoint).blocks} == keep.keys()
    assert checkpoint.total_bytes == pytest.approx(5e6, rel=0.5)
    child = cutting.cut(tmp_path / "model", keep)
    assert prune.bytes_of(child) < 0.8 * prune.bytes_of(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "against", "passed"),
    [
        ({}, "cp_sync", True),
        ({}, "cp", False),
        ({"ratio_to_cp": 1.5}, "cp", True),
        ({"ratio_to_cp_sync": 1.501}, "cp_sync", False),
        ({"peak_memory_above_interpreter_bytes": 200_000_001}, "cp_sync", False),
    ],
)
def test_the_verdict(change: dict, against: str, passed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune.report(GOOD | change, against) is passed
    shown = capsys.readouterr()
    assert json.loads(shown.out)["passed"] is passed
    assert shown.err.splitlines()[-1].startswith("passed: " if passed else "FAILED: ")


def test_ratios_are_of_runs_that_followed_each_other() -> None:
    times = {"prune": [(2.0, 1.0), (9.0, 1.0), (6.0, 1.0)], "cp": [(1.0, 1.0), (3.0, 1.0), (6.0, 1.0)]}
    found = prune.summed_up(times | {"cp_sync": [(2.0, 1.0), (9.0, 1.0), (6.0, 1.0)]})
    assert (found["ratio_to_cp"], found["ratio_to_cp_sync"], found["prune_s"]) == (2.0, 1.0, 6.0)
