"""A run that is killed with SIGKILL, at several places, goes on and ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
# Runs reap.py with every layer saved, and kills itself when the given method is entered for the n-th time.
RUN = """
import os, signal, sys
sys.path.insert(0, {root!r})
import reap
from moeprune.scoring import resume
resume.SHARE = 1e9
method, left = {method!r}, [{count}]
if method:
    kept = getattr(resume.SavedState, method)
    def fatal(self, *args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return kept(self, *args)
    setattr(resume.SavedState, method, fatal)
reap.main({argv!r})
"""


def run(model: Path, data: Path, output: Path, method: str = "", count: int = 0) -> subprocess.CompletedProcess[str]:
    argv = ["--model-path", str(model), "--calibration-path", str(data), "--output-path", str(output)]
    argv += ["--device", "cpu", "--batch-size", "2", "--max-seq-len", "32"]
    code = RUN.format(root=str(ROOT), method=method, count=count, argv=argv)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=output, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("resume")
    model = tiny.make("qwen3_moe", folder / "model")
    tiny.tokenizer(model)
    rows = [{"domain": "ab"[i % 2], "text": f"{i} words and numbers {i * 7} " * (1 + i % 3)} for i in range(10)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return model, data


def test_killed_runs_go_on_and_end_with_the_same_bits(inputs, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = run(*inputs, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    output = tmp_path / "killed"
    deaths = (("put", 2), ("put", 8), ("commit", 1), ("remove", 1))  # in a layer, in a later one, between, at the end
    said = []
    for method, count in deaths:
        done = run(*inputs, output, method, count)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (output / "reap_metadata.json").exists()
        said.append("going on behind model.layers." in done.stderr)
    last = run(*inputs, output)
    assert last.returncode == 0, last.stderr
    assert said == [False, False, True, True]
    assert "going on behind model.layers.2" in last.stderr
    expected = json.loads((tmp_path / "whole" / "reap_metadata.json").read_text())
    found = json.loads((output / "reap_metadata.json").read_text())
    assert found["scores"] == expected["scores"]
    assert found["inputs"]["fingerprint"] == expected["inputs"]["fingerprint"]
    assert not (output / "reap_state").exists()


def test_a_state_of_other_inputs_is_not_taken_up(inputs, tmp_path):
    model, data = inputs
    assert run(model, data, tmp_path, "put", 8).returncode == -signal.SIGKILL
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "something else altogether, long enough"}) + "\n", encoding="utf-8")
    done = run(model, other, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on" not in done.stderr
