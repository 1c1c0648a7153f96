"""Checkpoints that quantization libraries wrote (tests/data): our numbers are theirs, and a cut changes none of them.

What each library makes of its own file stands in made.json as digests; tests/data/make.py wrote both.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moeprune.checkpoint.families import understand
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import InputError
from moeprune.scoring.formats.dequantize import Lazy, read_tensor, recipes
from tests import tiny
from tests.data.make import FOLDER, MAKERS, digest
from tests.pruning import cutting
from tests.scoring import streamed

KEPT = 3
STACKED = re.compile(r"experts\.(gate_up|down)_proj(_bias)?$")


@functools.cache
def plain(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint as transformers gets it."""
    opened = open_checkpoint(folder)
    stored = {name: read_tensor(tensor) for name, tensor in opened.tensors.items()}
    return {name: Lazy(r, stored, dtype, torch.device("cpu"))[...] for name, r in recipes(opened).items()}


def made(name: str) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((FOLDER / name / "made.json").read_text())
    return about


@functools.cache
def cut(name: str, work: Path) -> tuple[Path, dict[str, list[int]]]:
    """The checkpoint with other experts in each layer, and which ones stayed."""
    parent = shutil.copytree(FOLDER / name, work / "parent", ignore=shutil.ignore_patterns("made.json"))
    keep = cutting.keep_lists(parent, KEPT, seed=2)
    return cutting.cut(parent, keep), keep


def test_every_library_left_a_checkpoint() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/made.json")} == set(MAKERS)


@pytest.mark.parametrize("name", MAKERS)
def test_numbers_are_those_of_the_library(name: str) -> None:
    about = made(name)
    found = plain(FOLDER / name, getattr(torch, about["dtype"]))
    assert len(about["plain"]) >= 4
    assert {weight for weight, expected in about["plain"].items() if digest(found[weight]) != expected} == set()


@pytest.mark.parametrize("name", MAKERS)
def test_slicing_commutes_with_dequantizing(name: str, tmp_path: Path) -> None:
    child, keep = cut(name, tmp_path)
    before, after = plain(FOLDER / name, torch.float32), plain(child, torch.float32)
    for tensor, value in before.items():
        ids = keep[".".join(tensor.split(".")[:3])] if ".layers." in tensor else []
        number = re.search(r"\.experts\.(\d+)\.", tensor)
        if number is not None:
            new = f".experts.{ids.index(int(number[1]))}." if int(number[1]) in ids else None
            assert new is None or torch.equal(after.pop(tensor.replace(number[0], new)), value), tensor
        else:
            of_experts = STACKED.search(tensor) or re.search(r"\.mlp\.(gate|router)\.(weight|bias)$", tensor)
            assert torch.equal(after.pop(tensor), value[ids] if of_experts else value), tensor
    assert not {tensor for tensor in after if "weight" in tensor}


@pytest.mark.parametrize("name", MAKERS)
def test_parent_and_child_are_scored_as_their_values(name: str, tmp_path: Path) -> None:
    child, _ = cut(name, tmp_path)
    data = streamed.batches(count=2, length=8, vocabulary=60)
    for folder in (FOLDER / name, child):
        values = tmp_path / f"plain {folder.name}"
        values.mkdir()
        wanted = {
            n: t.contiguous() for n, t in plain(folder, torch.float32).items() if not n.endswith(("_scale", "_shape"))
        }
        save_file(wanted, values / "model.safetensors", {"format": "pt"})
        config = {key: value for key, value in tiny.read_config(folder).items() if "quantization" not in key}
        (values / "config.json").write_text(json.dumps(config))
        found, expected = (streamed.score(path, data, tmp_path) for path in (folder, values))
        for a, b in zip(found.blocks, expected.blocks, strict=True):
            assert a.values["norm_sum"].any()
            for key, array in a.values.items():
                np.testing.assert_array_equal(array, b.values[key], err_msg=f"{a.block} {key}")


@pytest.mark.parametrize("name", ["ct_int4", "ct_fp8", "awq", "gptq"])
def test_an_expert_may_be_left_plain_in_part(name: str, tmp_path: Path) -> None:
    """As libraries leave the matrices that suffer most: cut, and scored as its values."""
    folder = shutil.copytree(FOLDER / name, tmp_path / "mixed", ignore=shutil.ignore_patterns("made.json"))
    matrix = "model.layers.0.mlp.experts.1.up_proj"
    value = plain(FOLDER / name, torch.bfloat16)[f"{matrix}.weight"]
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith(f"{matrix}.")}
    save_file(tensors | {f"{matrix}.weight": value.contiguous()}, folder / "model.safetensors", {"format": "pt"})
    keep = {f"model.layers.{layer}": [1, 2, 3] for layer in range(2)}
    child = cutting.cut(folder, keep)
    before, after = plain(folder, torch.float32), plain(child, torch.float32)
    for new, old in enumerate(keep["model.layers.0"]):
        for kind in ("gate", "up", "down"):
            found = after[f"model.layers.0.mlp.experts.{new}.{kind}_proj.weight"]
            assert torch.equal(found, before[f"model.layers.0.mlp.experts.{old}.{kind}_proj.weight"])
    data = streamed.batches(count=1, vocabulary=60)
    found, expected = (streamed.score(path, data, tmp_path).blocks[0].values for path in (folder, FOLDER / name))
    np.testing.assert_allclose(found["norm_sum"], expected["norm_sum"], rtol=0.02)


@pytest.mark.parametrize("lost", ["weight_scale", "weight"])
def test_half_of_a_quantized_matrix_is_a_hole(lost: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER / "ct_fp8", tmp_path / "hole")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.0.mlp.experts.1.up_proj.{lost}"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"expert 1 has no tensor up_proj.{lost}"):
        understand(open_checkpoint(folder))
