"""The door to lm-eval, with a stand-in of that name which writes down its words and answers as the real one does."""

from __future__ import annotations

import json
import os
import sys

import pytest

from moeprune.checking import lm_eval, stage
from moeprune.checking.case import Case
from moeprune.errors import MachineError, UsageError
from moeprune.settings import Settings

STAND_IN = """
import json, pathlib, sys
words = sys.argv[1:]
given = dict(zip(words[::2], words[1::2]))
if given["--tasks"] == "unknown":
    sys.exit("Tasks were not found: unknown")
model = given["--model_args"].split(",")[0].removeprefix("pretrained=")
folder = pathlib.Path(given["--output_path"], "some__model")
folder.mkdir()
score = 0.5 if model.endswith("parent") else 0.25
results = {"sums": {"alias": "sums", "sample_len": 4, "acc,none": score, "acc_stderr,none": "N/A"}}
(folder / "results_2026.json").write_text(json.dumps({"results": results, "lm_eval_version": "0.4.13"}))
pathlib.Path(model + ".words").write_text(json.dumps(words))
"""


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path / "pruned", tmp_path / "parent", None)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    package = tmp_path / "packages" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), *sys.path[-1:]]))


@pytest.mark.usefixtures("installed")
def test_both_models_are_run_and_the_numbers_kept(case):
    settings = Settings(lm_eval="sums", batch_size=3, dtype="float32", device="cpu")
    lm_eval.check(settings)
    found = lm_eval.run(case, settings)
    assert found["pruned"] == {"version": "0.4.13", "results": {"sums": {"acc,none": 0.25}}}
    assert found["parent"]["results"] == {"sums": {"acc,none": 0.5}}
    assert list(lm_eval.lines(found)) == ["   lm-eval  sums acc: 0.25, parent 0.5"]
    words = json.loads(case.parent.with_name("parent.words").read_text())
    assert f"pretrained={case.parent},dtype=float32" in words
    assert words[words.index("--batch_size") + 1] == "3"
    assert words[words.index("--device") + 1] == "cpu"


@pytest.mark.usefixtures("installed")
def test_a_task_that_fails_is_one_line(case):
    with pytest.raises(MachineError, match="Tasks were not found: unknown"):
        lm_eval.run(case, Settings(lm_eval="unknown"))


def test_what_cannot_be_run_is_refused_before_the_judging(tmp_path, monkeypatch):
    monkeypatch.setattr("moeprune.checking.lm_eval.find_spec", lambda _name: None)
    settings = Settings(lm_eval="sums", output_path=tmp_path)
    with pytest.raises(MachineError, match="pip install lm-eval"):
        stage.main(settings)
    with pytest.raises(UsageError, match="--endpoint"):
        lm_eval.check(Settings(lm_eval="sums", endpoint="http://127.0.0.1:1/v1"))
