"""Checkpoints as mlx-lm and mlx-vlm write them, made here by hand: scored like the one that they were made of.

`./run.sh engines mlx` does the same with the libraries' own conversions, for every family.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import InputError
from moeprune.scoring.building import read_config
from moeprune.scoring.calibration.images import takes_images
from moeprune.scoring.formats import mlx
from moeprune.settings import Settings
from tests import tiny
from tests.scoring import streamed

Tensors = dict[str, torch.Tensor]


def stacked(tensors: Tensors) -> Tensors:
    """...experts.0.up_proj.weight, ... -> ...switch_mlp.up_proj.weight"""
    result: Tensors = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.)experts\.(\d+)\.(.*)", name)
        if match:
            experts.setdefault(f"{match[1]}switch_mlp.{match[3]}", {})[int(match[2])] = tensor
        else:
            result[name] = tensor
    return result | {name: torch.stack([each[e] for e in range(len(each))]) for name, each in experts.items()}


def qwen3_5_moe(tensors: Tensors) -> Tensors:
    """The tower stays, under another name and with its patches turned."""
    result: Tensors = {}
    for name, tensor in stacked(tensors).items():
        if re.search(r"(layernorm|model\.norm|[qk]_norm|model\.language_model\.norm)\.weight$", name):
            result[name] = tensor + 1
        elif "conv1d" in name:
            result[name] = tensor.transpose(1, 2)
        elif "patch_embed.proj.weight" in name:
            result[name] = tensor.movedim(1, -1)
        else:
            result[name] = tensor
    return {
        n.replace("model.language_model.", "language_model.model.")
        .replace("model.visual.", "vision_tower.")
        .replace("lm_head.", "language_model.lm_head."): t
        for n, t in result.items()
    }


def llama4(tensors: Tensors) -> Tensors:
    """The tower is gone; gate and up are apart, outputs first."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=-1)
            result |= {name.replace("gate_up_proj", f"{n}_proj.weight"): m.mT for n, m in (("gate", gate), ("up", up))}
        elif name.endswith("experts.down_proj"):
            result[f"{name}.weight"] = tensor.mT
        elif "vision" not in name and "projector" not in name:
            result[name] = tensor
    return result


def laguna(tensors: Tensors) -> Tensors:
    """mlx-vlm puts text models into a language_model too; gate and up of the experts become one."""
    result = stacked(tensors)
    for name in [name for name in result if name.endswith("switch_mlp.gate_proj.weight")]:
        both = [result.pop(name), result.pop(name.replace("gate_proj", "up_proj"))]
        result[name.replace("gate_proj", "gate_up_proj")] = torch.cat(both, dim=1)
    names = {
        n: n.replace("experts.e_score", "gate.e_score").replace("mlp.gate.weight", "mlp.gate.proj.weight")
        for n in result
    }
    return {f"language_model.{names[n]}": t for n, t in result.items()}


def kimi_linear(tensors: Tensors) -> Tensors:
    """Another name of the module, its matrices and its convolutions; keys and values of each head apart."""
    result: Tensors = {}
    plain = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for name, tensor in stacked(tensors).items():
        key = re.sub(r"switch_mlp\.(w\d)", lambda m: f"switch_mlp.{plain[m[1]]}", name)
        key = key.replace("block_sparse_moe.gate.e_score", "mlp.e_score").replace("block_sparse_moe", "mlp")
        if "kv_b_proj" in key:
            keys, values = tensor.view(4, 32, -1).split(16, dim=1)
            result[key.replace("kv_b_proj", "embed_q")] = keys.mT
            result[key.replace("kv_b_proj", "unembed_out")] = values
        elif "conv1d" in key:
            result[key.replace("_conv1d", "_conv.conv")] = tensor.mT
        else:
            result[key] = tensor
    return result


def step3p7(tensors: Tensors) -> Tensors:
    """Other names of everything about experts, and norms with their one."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        key = name.replace("moe.router_bias", "mlp.gate.router_bias").replace("moe.gate.", "mlp.gate.gate.")
        key = re.sub(r"\.moe\.(\w+_proj)", r".mlp.switch_mlp.\1", key).replace(".share_expert.", ".mlp.share_expert.")
        if name.startswith(("model.", "lm_head.")):
            result[f"language_model.{key}"] = tensor + 1 if "norm" in key else tensor
    return result


@pytest.mark.parametrize("convert", [qwen3_5_moe, llama4, laguna, kimi_linear, step3p7])
def test_the_sums_are_those_of_the_original(tmp_path: Path, convert: Callable[[Tensors], Tensors]) -> None:
    parent = streamed.checkpoint(convert.__name__)
    child = written(tmp_path / "mlx", tiny.read_config(parent), convert(load_file(parent / "model.safetensors")))
    data = streamed.batches(count=1, length=8)
    wanted, found = (streamed.score(folder, data, tmp_path).blocks for folder in (parent, child))
    assert len(wanted) == len(found) > 0
    for one, other in zip(wanted, found, strict=True):
        for name, sums in one.values.items():
            np.testing.assert_allclose(other.values[name], sums, rtol=1e-6, err_msg=f"{one.block} {name}")


def written(folder: Path, config: object, tensors: Tensors, form: str = "mlx") -> Path:
    """A folder of one file."""
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": form})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("form", "sees"), [("mlx", False), ("pt", True)])
def test_of_a_multimodal_model_only_the_text_is_run(tmp_path: Path, form: str, sees: bool) -> None:
    config = tiny.read_config(streamed.checkpoint("qwen3_5_moe"))
    checkpoint = open_checkpoint(written(tmp_path, config, {"a.weight": torch.zeros(1)}, form))
    assert takes_images(mlx.seen(read_config(checkpoint, Settings()), checkpoint)) is sees


def test_what_cannot_be_undone_is_refused(tmp_path: Path) -> None:
    config = tiny.read_config(streamed.checkpoint("muse_spark"))
    with pytest.raises(InputError, match=r"MLX's form of muse_spark cannot be scored: .*--other-scores"):
        streamed.score(written(tmp_path, config, {"a.weight": torch.zeros(1)}), [], tmp_path)


def test_what_lies_there_in_an_unknown_way_is_named(tmp_path: Path) -> None:
    parent = streamed.checkpoint("qwen3_moe")
    tensors = stacked(load_file(parent / "model.safetensors"))
    other = {name.replace("q_proj", "query"): tensor for name, tensor in tensors.items()}
    folder = written(tmp_path, tiny.read_config(parent), other)
    with pytest.raises(
        InputError, match=r"no tensor for \S+q_proj.weight .* add it to a table in moeprune/scoring/formats/mlx.py"
    ):
        streamed.score(folder, streamed.batches(count=1, length=4), tmp_path)
