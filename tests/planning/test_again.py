"""Stage 1 with scores that are current: other wishes for the plan are planned in a moment, and nothing is scored."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import reap
from moeprune.checkpoint.families import understand
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import UsageError
from moeprune.metadata import header, write_json
from moeprune.planning.decision import Model, proposal
from moeprune.settings import resolve
from tests.planning.tokens import random_sums


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """The demo model with scores of random tokens that pass for its own."""
    model = reap.Path(reap.__file__).parent / "demo" / "model"
    monkeypatch.chdir(tmp_path)
    flags = [f"--model-path={model}"]
    settings, checkpoint = resolve("reap", flags), open_checkpoint(model)
    layout = understand(checkpoint)
    sums = random_sums(1, blocks=4, experts=layout.experts)
    assert [b.block for b in sums.blocks] == [b.name for b in layout.blocks]
    calibration = {"domains": {"code": {"samples": 30}, "chat": {"samples": 50}}}
    result = {
        **header("reap_metadata"),
        "settings": settings.public(),
        "inputs": {
            "fingerprint": reap.inputs_fingerprint(settings, checkpoint),
            "model": reap.model_facts(checkpoint, layout),
            "calibration": calibration,
        },
        "scores": sums.to_json(),
        "plan": proposal(settings, sums, Model.of(layout), calibration),
        "warnings": [],
        "timing": {},
    }
    write_json(tmp_path / "output" / "reap_metadata.json", result)
    return tmp_path / "output" / "reap_metadata.json", flags


def test_same_wishes_leave_the_result_alone(scored, capsys):
    path, flags = scored
    before = path.read_bytes()
    reap.main(flags)
    assert path.read_bytes() == before and "is current" in capsys.readouterr().err


def test_other_wishes_are_planned_from_the_same_scores(scored):
    path, flags = scored
    before = json.loads(path.read_text())
    program = "import sys, reap; reap.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", program, *flags, "--prune-ratio=0.25", "--metric=reap"],
        check=True,
        env={"PYTHONPATH": str(reap.Path(reap.__file__).parent)},
    )
    after = json.loads(path.read_text())
    assert before["plan"]["kept"] == 16 and after["plan"]["kept"] == 24
    assert (after["plan"]["how"]["metric"], after["plan"]["how"]["blend"]) == ("reap", "pooled")
    assert after["settings"]["values"]["prune_ratio"] == 0.25
    for same in ("scores", "inputs", "created_at"):
        assert after[same] == before[same]


def test_a_wish_that_cannot_be_granted_leaves_the_result_alone(scored):
    path, flags = scored
    before = path.read_bytes()
    for wish in ("--metric=full", "--weights=prose=2", "--prune-ratio=0.99"):
        with pytest.raises(UsageError):
            reap.main([*flags, wish])
    assert path.read_bytes() == before
