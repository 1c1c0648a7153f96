"""The verification finds every kind of fault. Each test spoils a good result in one way and expects a refusal."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open, torch
from safetensors.numpy import load_file, save_file

from moeprune.checkpoint import families
from moeprune.errors import ResultError
from moeprune.pruning import verify
from tests import tiny
from tests.data.make import FOLDER
from tests.pruning import cutting

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """A folder with parent and good child, in shards, and the keep-lists."""
    work = tmp_path_factory.mktemp("good")
    parent = tiny.make("qwen3_moe", work / "parent", max_shard_size="400KB")
    (parent / "tokenizer.json").write_text("{}")
    keep = cutting.keep_lists(parent, 5)
    cutting.cut(parent, keep)
    return work, keep


@pytest.fixture
def good(made: tuple[Path, dict[str, list[int]]], tmp_path: Path) -> tuple[Path, Path, dict[str, list[int]]]:
    work, keep = made
    shutil.copytree(work / "child", tmp_path / "child")
    return work / "parent", tmp_path / "child", keep


def check(parent: Path, child: Path, keep: dict[str, list[int]], gone: frozenset[str] = frozenset()) -> None:
    proof = verify.Verification(parent, child, {block: tuple(ids) for block, ids in keep.items()}, gone)
    for file in sorted(child.glob("*.safetensors")):
        proof.file(file, lambda: None)
    proof.finish()


def first_shard(child: Path) -> Path:
    return child / "model-00001-of-00002.safetensors"


def change(child: Path, spoil: Callable[[Tensors], object]) -> None:
    """Load the first shard, spoil it, save it."""
    tensors = load_file(first_shard(child))
    spoil(tensors)
    save_file(tensors, first_shard(child), {"format": "pt"})


def edit(path: Path, spoil: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    spoil(data)
    path.write_text(json.dumps(data, indent=2))


def test_the_good_one_passes(good) -> None:
    check(*good)


def test_one_file_in_parts(good) -> None:
    """The parts that threads share have every tensor once, and a fault is found in whichever it lies."""
    parent, child, keep = good
    change(child, lambda tensors: _one_bit(tensors, NORM))
    proof = verify.Verification(parent, child, {block: tuple(ids) for block, ids in keep.items()}, frozenset())
    parts = proof.read(first_shard(child), 3)
    names = [name for part in parts for name in part]
    assert sorted(names) == sorted(load_file(first_shard(child)))
    assert len(parts) == 3
    found = []
    for part in parts:
        try:
            proof.compare(part, lambda: None)
        except ResultError as error:
            found.append((NORM in part, str(error)))
    assert found == [(True, f"{NORM} differs from the parent's; check the disk")]


def test_a_file_that_was_not_compared(good) -> None:
    parent, child, keep = good
    proof = verify.Verification(parent, child, {block: tuple(ids) for block, ids in keep.items()}, frozenset())
    proof.file(first_shard(child), lambda: None)
    with pytest.raises(ResultError, match=r"model-00002-of-00002\.safetensors was not compared"):
        proof.finish()


def _swap(tensors: Tensors, one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other].copy(), tensors[one].copy()


EXPERT = "model.layers.0.mlp.experts.{}.up_proj.weight"
GATE = "model.layers.0.mlp.gate.weight"
NORM = "model.layers.0.input_layernorm.weight"


def _one_bit(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].copy()
    tensors[name].view(np.uint8).reshape(-1)[-1] ^= 1


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: _one_bit(t, EXPERT.format(2)), "experts.2.up_proj.weight differs"),
        (lambda t: _one_bit(t, NORM), "input_layernorm.weight differs"),
        (lambda t: _one_bit(t, GATE), "gate.weight does not hold the values"),
        (lambda t: _swap(t, EXPERT.format(0), EXPERT.format(1)), "differs"),
        (lambda t: t.update({GATE: t[GATE][::-1].copy()}), "does not hold the values"),
        (lambda t: t.update({GATE: t[GATE][:4].copy()}), "which is not 5 of 8"),
        (lambda t: t.update({GATE: np.concatenate([t[GATE], t[GATE][:3]])}), "gate.weight"),
        (lambda t: t.update({NORM: t[NORM][:32].copy()}), "input_layernorm.weight went from"),
        (lambda t: t.update({NORM: t[NORM].astype(np.float16)}), "has become F16"),
        (lambda t: t.pop(EXPERT.format(4)), "missing"),
        (lambda t: t.pop(NORM), "missing"),
        (lambda t: t.update({EXPERT.format(5): t[EXPERT.format(4)]}), "must not be there"),
        (lambda t: t.update({"extra.weight": np.zeros(3)}), "must not be there"),
    ],
)
def test_spoiled_tensors(good, spoil: Callable[[Tensors], object], words: str) -> None:
    change(good[1], spoil)
    with pytest.raises(ResultError, match=words):
        check(*good)


@pytest.mark.parametrize(
    ("file", "spoil", "words"),
    [
        ("config.json", lambda c: c.update(num_local_experts=8), "num_local_experts"),
        ("config.json", lambda c: c.update(num_local_experts=4), "num_local_experts went from 8 to 4"),
        ("config.json", lambda c: c.update(num_experts_per_tok=1), "num_experts_per_tok went from 2 to 1"),
        ("config.json", lambda c: c.pop("hidden_act"), "other keys"),
        ("config.json", lambda c: c.update(architectures=c.pop("architectures")), "in another order"),
        ("model.safetensors.index.json", lambda i: i["metadata"].update(total_size=1), "total_size"),
        ("model.safetensors.index.json", lambda i: i["weight_map"].pop(NORM), "index of the result is wrong"),
        (
            "model.safetensors.index.json",
            lambda i: i["weight_map"].update({NORM: "model-00002-of-00002.safetensors"}),
            "index of the result is wrong",
        ),
        ("tokenizer.json", lambda t: t.update(version=2), "tokenizer.json differs"),
    ],
)
def test_spoiled_json(good, file: str, spoil: Callable[[dict], object], words: str) -> None:
    edit(good[1] / file, spoil)
    with pytest.raises(ResultError, match=words):
        check(*good)


def test_missing_files(good) -> None:
    (good[1] / "generation_config.json").unlink()
    with pytest.raises(ResultError, match=r"generation_config\.json was not carried along"):
        check(*good)
    (good[1] / "model.safetensors.index.json").unlink()
    with pytest.raises(ResultError, match="exactly when the parent has one"):
        check(*good)


def test_lost_metadata(good) -> None:
    tensors = load_file(first_shard(good[1]))
    save_file(tensors, first_shard(good[1]), {"format": "np"})
    with pytest.raises(ResultError, match="__metadata__ of the result is wrong about format"):
        check(*good)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("model.layers.1.mlp.experts.down_proj", '"shape": [3,', '"shape": [5,'),
        ("model.layers.1.mlp.experts.down_proj", '"block_size": [1,', '"block_size": [3,'),
        ("tensor_names", '"model.norm.weight"', '"model.norm.bias"'),
    ],
)
def test_what_torchao_says_of_a_stack(tmp_path: Path, name: str, old: str, new: str) -> None:
    parent = shutil.copytree(FOLDER / "torchao_int4", tmp_path / "parent")
    keep = cutting.keep_lists(parent, 3)
    child = cutting.cut(parent, keep)
    with safe_open(child / "model.safetensors", "np") as file:
        about = file.metadata()
    assert old in about[name]
    rewritten = torch.load_file(child / "model.safetensors")
    torch.save_file(rewritten, child / "model.safetensors", about)
    check(parent, child, keep)
    torch.save_file(rewritten, child / "model.safetensors", about | {name: about[name].replace(old, new)})
    with pytest.raises(ResultError, match=r"__metadata__ of the result is wrong about model\."):
        check(parent, child, keep)


def test_it_shares_no_code_with_what_it_checks() -> None:
    folder = Path(verify.__file__).parent
    found = set()
    for name in ("verify", "verify_gguf", "evidence", "four_bit", "hqq_router"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moeprune"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    rooms = (
        "evidence",
        "evidence.File",
        "evidence.Reader",
        "evidence.Stored",
        "four_bit",
        "hqq_router",
        "verify",
        "verify.Verification",
    )
    allowed = {f"moeprune.pruning.{name}" for name in rooms}
    allowed |= {"moeprune.arrays.np", "moeprune.arrays.NDArray"}  # numpy
    assert found <= allowed | {"moeprune.errors.InputError", "moeprune.errors.ResultError"}


def test_both_sides_name_the_same_keys_of_further_layers() -> None:
    assert set(verify.MTP_KEYS.pattern.split("|")) == set(families.MTP_KEYS)


def test_another_plan(good) -> None:
    parent, child, keep = good
    with pytest.raises(ResultError):
        check(parent, child, {block: sorted({0, 1, 2, 3, 4, 5, 6, 7} - set(ids))[:3] for block, ids in keep.items()})
    keep = {block: list(ids) for block, ids in keep.items()}
    keep["model.layers.1"] = sorted({*keep["model.layers.1"][1:], min(set(range(8)) - set(keep["model.layers.1"]))})
    with pytest.raises(ResultError):
        check(parent, child, keep)


def test_trunk_tensors_cannot_be_gone(good) -> None:
    change(good[1], lambda tensors: tensors.pop(NORM))
    edit(good[1] / "model.safetensors.index.json", lambda i: i["weight_map"].pop(NORM))
    edit(
        good[1] / "model.safetensors.index.json",
        lambda i: i["metadata"].update(total_size=i["metadata"]["total_size"] - 256),
    )
    with pytest.raises(ResultError, match="belongs to no layer for further tokens"):
        check(*good, gone=frozenset({NORM}))


def test_misplaced_bytes(good) -> None:
    """A header that puts a tensor where readers cannot map it."""
    path = first_shard(good[1])
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 2).to_bytes(8, "little") + data[8 : 8 + length] + b"  " + data[8 + length :])
    with pytest.raises(ResultError, match="does not begin where it should"):
        check(*good)


def test_block_left_uncut(tmp_path: Path) -> None:
    """A stacked block that was forgotten as a whole, in a result that is consistent otherwise."""
    parent = tiny.make("gpt_oss", tmp_path / "parent")
    keep = cutting.keep_lists(parent, 5)
    child = cutting.cut(parent, keep)
    old, new = load_file(parent / "model.safetensors"), load_file(child / "model.safetensors")
    new |= {name: tensor for name, tensor in old.items() if name.startswith("model.layers.1.")}
    save_file(new, child / "model.safetensors", {"format": "pt"})
    with pytest.raises(ResultError, match=r"model\.layers\.1"):
        check(parent, child, keep)


def test_remapped_table(tmp_path: Path) -> None:
    parent = tiny.make("deepseek_v4", tmp_path / "parent")
    keep = cutting.keep_lists(parent, 5)
    child = cutting.cut(parent, keep)
    check(parent, child, keep)
    good = load_file(child / "model.safetensors")
    name = next(name for name in good if name.endswith("tid2eid"))
    block = name.removesuffix(".ffn.gate.tid2eid")
    row = next(i for i, ids in enumerate(load_file(parent / "model.safetensors")[name]) if set(ids) <= set(keep[block]))
    for value, words in ((5, "does not exist"), (int(good[name][row, 1]), "wrong about|twice")):
        bad = good | {name: good[name].copy()}
        bad[name][row, 0] = value
        save_file(bad, child / "model.safetensors", {"format": "pt"})
        with pytest.raises(ResultError, match=words):
            check(parent, child, keep)
