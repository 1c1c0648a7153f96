"""Which pruned model is judged when none is named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from moeprune.checking import case, subject
from moeprune.errors import InputError, MachineError
from moeprune.metadata import header, write_json
from moeprune.serving.engine import model_to_serve
from moeprune.settings import Settings
from tests import handmade


def result(folder: Path, name: str, age_s: int) -> None:
    write_json(folder / name, header({"pruning.json": "pruned_model"}.get(name, "reap_metadata")))
    os.utime(folder / name, (10**9 - age_s, 10**9 - age_s))


def test_the_newest_model_and_no_folder_of_results_alone(tmp_path):
    for name, age_s in (("older", 20), ("newer", 10)):
        result(tmp_path / name, "pruning.json", age_s)
        (tmp_path / name / "config.json").write_text("{}")
    result(tmp_path / "demo", "reap_metadata.json", 0)
    assert case.find(Settings(output_path=tmp_path)).pruned == tmp_path / "newer"
    result(tmp_path / "half.partial", "pruning.json", 0)
    (tmp_path / "half.partial" / "config.json").write_text("{}")
    assert case.find(Settings(output_path=tmp_path)).pruned == tmp_path / "newer"
    assert model_to_serve(Settings(output_path=tmp_path), "pruned") == str(tmp_path / "newer")
    for name in ("older", "newer"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(InputError, match="no pruned model in"):
        case.find(Settings(output_path=tmp_path))


def test_only_the_checkpoint_itself_has_a_size(tmp_path):
    folder = handmade.checkpoint(tmp_path / "model", {}, {"a": ("F32", [4])}, {"b": ("F32", [2])})
    alone = case.weight_bytes(folder)
    assert 24 < alone == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    shutil.copytree(folder, folder / "original")
    (folder / "original" / "consolidated.safetensors").write_bytes(b"x" * 1000)
    assert case.weight_bytes(folder) == alone


def test_a_device_that_is_not_here():
    missing = "cuda" if torch.backends.mps.is_available() else "mps"
    with pytest.raises(MachineError, match=f"no {missing} device"):
        subject.device(Settings(device=missing))
