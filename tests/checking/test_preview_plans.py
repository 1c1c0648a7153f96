"""Plans from files are previewed only where the model could be cut to them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moeprune.checking import preview
from moeprune.checkpoint.families import understand
from moeprune.errors import InputError, UsageError
from moeprune.settings import Settings
from tests.checking.conftest import DEMO, ROOT
from tests.checkpoint.hub import GATE, GATED, Case, E, layer, write

CONFIG = {"model_type": "deepseek_v3", "n_routed_experts": E, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
REFUSED = {
    "another name": ({"keep": {"model.layers.7": [0, 1, 4, 5]}}, UsageError, "no list for model.layers.0"),
    "a group too small": ({"keep": {"model.layers.0": [0, 1, 2, 4]}}, UsageError, "same number in each"),
    "an expert that is not there": ({"keep": {"model.layers.0": [0, 1, 4, E]}}, UsageError, "between 0 and 7"),
    "a result without a plan": ({"plan": None}, InputError, "a list of ids for each block"),
    "words": ({"keep": {"model.layers.0": ["a"]}}, InputError, "a list of ids for each block"),
}


def variants(tmp_path, plan):
    checkpoint = write(tmp_path / "model", Case(CONFIG, layer("model.layers.0", GATE, GATED), {}))
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    settings = Settings(output_path=tmp_path, plans=str(tmp_path / "plan.json"))
    return preview.variants(settings, checkpoint, understand(checkpoint))


def test_a_plan_that_can_be_cut(tmp_path):
    (found,) = variants(tmp_path, {"plan": {"keep": {"model.layers.0": [0, 1, 4, 7]}}})
    assert (found.name, found.kept, found.keep) == ("plan", 4, {"model.layers.0": (0, 1, 4, 7)})


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_cannot(tmp_path, name):
    plan, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        variants(tmp_path, plan)


def test_without_scores_it_ends_before_torch_is_loaded(tmp_path):
    command = [sys.executable, "-X", "importtime", ROOT / "preview.py", "--output-path", tmp_path, "--model-path", DEMO]
    done = subprocess.run(command, capture_output=True, text=True)
    *imported, last = done.stderr.splitlines()
    assert done.returncode == 3, last
    assert "no scores" in last
    assert "./run.sh reap" in last
    assert not {line.rsplit("|", 1)[-1].strip() for line in imported} & {"torch", "transformers"}
