"""Layers that predict further tokens are cut with the trunk, or leave with everything that says they are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

import prune_model
from tests import tiny
from tests.pruning import cutting
from tests.pruning import test_every_family as oracle
from tests.pruning.test_cut import scored


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """GLM-4-MoE as its makers ship it: one more layer behind the three of the trunk, with parts of its own."""
    folder = tiny.make("glm4_moe", tmp_path / "parent")
    tensors = load_file(folder / "model.safetensors")
    last = {name: t for name, t in tensors.items() if name.startswith("model.layers.2.")}
    tensors |= {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in last.items()}
    tensors["model.layers.3.eh_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].clone()
    tensors["model.layers.3.enorm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}, indent=2))
    return folder


TRUNK = {"model.layers.1": [0, 3, 4, 7], "model.layers.2": [1, 2, 5, 6]}


def names_of_layer(child: Path, layer: int) -> list[str]:
    return [name for name in load_file(child / "model.safetensors") if name.startswith(f"model.layers.{layer}.")]


def test_cut_with_the_trunk(parent: Path) -> None:
    child = cutting.cut(parent, TRUNK)
    old, new = load_file(parent / "model.safetensors"), load_file(child / "model.safetensors")
    assert json.loads((child / "pruning.json").read_text())["keep"]["model.layers.3"] == [0, 2, 4, 6]
    assert new["model.layers.3.mlp.gate.weight"].equal(old["model.layers.3.mlp.gate.weight"][[0, 2, 4, 6]])
    assert new["model.layers.3.mlp.experts.3.up_proj.weight"].equal(old["model.layers.3.mlp.experts.6.up_proj.weight"])
    assert new["model.layers.3.eh_proj.weight"].equal(old["model.layers.3.eh_proj.weight"])
    assert json.loads((child / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_with_a_list_of_its_own(parent: Path) -> None:
    child = cutting.cut(parent, TRUNK | {"model.layers.3": [0, 1, 2, 3]})
    assert json.loads((child / "pruning.json").read_text())["keep"]["model.layers.3"] == [0, 1, 2, 3]


def test_dropped(parent: Path) -> None:
    child = cutting.cut(parent, TRUNK, "--drop-mtp")
    assert names_of_layer(child, 3) == []
    old, new = (json.loads((path / "config.json").read_text()) for path in (parent, child))
    assert {key: new[key] for key in new if new[key] != old[key]} == {
        "num_nextn_predict_layers": 0,
        "n_routed_experts": 4,
    }
    model = oracle.load("glm4_moe", child)
    whole = cutting.cut(parent, TRUNK, "--force")
    reference = transformers.Glm4MoeForCausalLM.from_pretrained(whole, dtype="float32").eval()
    assert oracle.forward(model).equal(oracle.forward(reference))


def test_the_room_that_they_leave_goes_to_experts(parent: Path, tmp_path: Path) -> None:
    scored(tmp_path, parent, [0, 1, 2, 3])
    flags = ["--model-path", str(parent), "--output-path", str(tmp_path), "--drop-mtp"]
    prune_model.main([*flags, "--keep", "6"])
    (wanted,) = tmp_path.glob("parent-reap-6of8/*.safetensors")
    child = tmp_path / "by-size"
    size = f"{wanted.stat().st_size + 10_000}"  # less than an expert more
    prune_model.main([*flags, "--target-size", size, "--pruned-output-path", str(child)])
    assert json.loads((child / "pruning.json").read_text())["kept"] == 6


def test_nothing_to_drop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.make("mixtral", tmp_path / "parent")
    cutting.cut(folder, cutting.keep_lists(folder, 4), "--drop-mtp")
    assert "no layers that predict further tokens" in capsys.readouterr().err


def test_a_plan_that_names_dropped_layers_is_refused(parent: Path, tmp_path: Path) -> None:
    plan = cutting.write_plan(tmp_path / "plan.json", TRUNK | {"model.layers.3": [0, 1, 2, 3]})
    with pytest.raises(prune_model.errors.UsageError, match=r"names model\.layers\.3"):
        prune_model.main(["--model-path", str(parent), "--plan", str(plan), "--drop-mtp"])
