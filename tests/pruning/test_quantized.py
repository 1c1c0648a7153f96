"""Quantized checkpoints stay what they were: loaded by transformers, and slicing commutes with dequantizing.

The tiny files are written here as their makers ship them: gpt-oss in MXFP4 by OpenAI, FP8 in blocks by DeepSeek.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import prune_model
from tests import tiny
from tests.pruning import cutting
from tests.pruning import test_every_family as oracle

Tensors = dict[str, torch.Tensor]
FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], quantization: dict) -> Path:
    """Replace weights by packed ones and say so in the config."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}, indent=2))
    return folder


def to_mxfp4(tensors: Tensors) -> Tensors:
    """Each [E, in, out] as blocks [E, out, in/32, 16] of two values a byte and scales [E, out, in/32], both random."""
    generator = torch.Generator().manual_seed(0)
    packed = {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inside, outside = tensor.shape
            shape = (experts, outside, inside // 32)
            packed[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
        else:
            packed[name] = tensor
    return packed


def gpt_oss(folder: Path, experts: int) -> Path:
    """gpt-oss in MXFP4; attention, router, embeddings and biases are not quantized."""
    parent = tiny.make("gpt_oss", folder, num_local_experts=experts, num_experts_per_tok=4)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return rewrite(parent, to_mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": kept})


def dequantized(path: Path, quantization: object) -> torch.nn.Module:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, dtype=torch.float32, output_loading_info=True
    )
    assert not {what: names for what, names in info.items() if names}
    return model.eval()


def test_gpt_oss_as_openai_ships_it(tmp_path: Path) -> None:
    parent = gpt_oss(tmp_path / "parent", 32)
    how = transformers.Mxfp4Config(dequantize=True)
    model = dequantized(parent, how)
    whole = oracle.forward(model)
    before = sum(path.stat().st_size for path in parent.glob("*.safetensors"))
    for count in (24, 16, 8, 6, 4):
        keep = cutting.keep_lists(parent, count, seed=count)
        child = cutting.cut(parent, keep, "--force")
        with oracle.masked(model, parent, child, keep):
            expected = oracle.forward(model)
        difference = (oracle.forward(dequantized(child, how)) - expected).abs().max()
        assert difference < oracle.TOLERANCE * max(1, expected.abs().max())
        assert (whole - expected).abs().max() > 1e-3
        after = sum(path.stat().st_size for path in child.glob("*.safetensors"))
        old, new = load_file(parent / "model.safetensors"), load_file(child / "model.safetensors")
        assert old.keys() == new.keys()
        of_experts = sum(t.nbytes for name, t in old.items() if ".experts." in name or ".router." in name)
        assert after == pytest.approx(before - of_experts * (32 - count) / 32, rel=0.01)
        for name, tensor in old.items():
            block = ".".join(name.split(".")[:3])
            stays = tensor[keep[block]] if ".experts." in name or ".router." in name else tensor
            assert torch.equal(new[name], stays), name
    for part in ("router.bias", "gate_up_proj_bias", "down_proj_bias", "self_attn.sinks", "self_attn.q_proj.bias"):
        assert sum(part in name for name in new) == 3


def test_sizes_of_a_dry_run_are_those_of_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = gpt_oss(tmp_path / "parent", 32)
    for count in (24, 16, 8, 6, 4):
        keep = cutting.keep_lists(parent, count)
        plan = cutting.write_plan(tmp_path / "plan.json", keep)
        prune_model.main(["--model-path", str(parent), "--plan", str(plan), "--dry-run"])
        predicted = json.loads(capsys.readouterr().out)["after_bytes"]
        child = cutting.cut(parent, keep, "--force")
        capsys.readouterr()
        assert predicted == (child / "model.safetensors").stat().st_size


def to_fp8(tensors: Tensors) -> Tensors:
    """Weights of experts and attention in FP8, one scale for each block of 32 x 32."""
    result = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and ("experts" in name or "self_attn" in name):
            blocks = tensor.reshape(tensor.shape[0] // 32, 32, tensor.shape[1] // 32, 32)
            scale = blocks.abs().amax(dim=(1, 3)) / 448
            result[name] = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
            result[f"{name}_scale_inv"] = scale
        else:
            result[name] = tensor
    return result


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_fp8_in_blocks(family: str, tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    settings["modules_to_not_convert"] = ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(3))]
    if family == "deepseek_v3":
        dense = [f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down")]
        settings["modules_to_not_convert"] += dense
    sizes = {"kv_lora_rank": 32, "qk_rope_head_dim": 32} if family == "deepseek_v3" else {}
    parent = rewrite(tiny.make(family, tmp_path / "parent", **sizes), to_fp8, settings)
    keep = cutting.keep_lists(parent, 4)
    child = cutting.cut(parent, keep)
    how = transformers.FineGrainedFP8Config(
        **{k: v for k, v in settings.items() if k != "quant_method"}, dequantize=True
    )
    model = dequantized(parent, how)
    with oracle.masked(model, parent, child, keep):
        expected = oracle.forward(model)
    difference = (oracle.forward(dequantized(child, how)) - expected).abs().max()
    assert difference < oracle.TOLERANCE * max(1, expected.abs().max())
    assert (
        load_file(child / "model.safetensors")["model.layers.1.mlp.experts.0.up_proj.weight"].dtype
        == torch.float8_e4m3fn
    )


def mxfp4_values(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    values = torch.stack([FP4_VALUES[(blocks & 15).long()], FP4_VALUES[(blocks >> 4).long()]], dim=-1).flatten(-2)
    return torch.ldexp(values, scales[..., None].int() - 127).flatten(-2)


def nvfp4_values(packed: torch.Tensor, scales: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    values = torch.stack([FP4_VALUES[(packed & 15).long()], FP4_VALUES[(packed >> 4).long()]], dim=-1).flatten(-2)
    blocks = values.unflatten(-1, (-1, 16)) * scales.float()[..., None]
    return blocks.flatten(-2) * whole.reshape(-1, 1, 1)


def affine_values(packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """MLX with 4 bits and groups of 32: the lowest bits of each word come first."""
    words = torch.from_numpy(packed.numpy().view(np.uint8).copy())
    values = torch.stack([words & 15, words >> 4], dim=-1).flatten(-2).unflatten(-1, (-1, 32)).float()
    return (values * scales[..., None] + biases[..., None]).flatten(-2)


def fp8_values(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return weight.float() * scale.repeat_interleave(32, dim=-2).repeat_interleave(32, dim=-1)


E, OUT, IN = 8, 64, 96
RANDOM = {
    torch.uint8: lambda shape, g: torch.randint(0, 256, shape, generator=g, dtype=torch.uint8),
    torch.uint32: lambda shape, g: torch.randint(0, 2**31, shape, generator=g, dtype=torch.int64).to(torch.uint32),
    torch.float8_e4m3fn: lambda shape, g: torch.rand(shape, generator=g).to(torch.float8_e4m3fn),
    torch.float32: lambda shape, g: torch.rand(shape, generator=g),
}
# Stacked layouts: what makes one value tensor, companions by the end of their names.
STACKED = {
    "mxfp4": (mxfp4_values, {"_blocks": (torch.uint8, (OUT, 3, 16)), "_scales": (torch.uint8, (OUT, 3))}),
    "modelopt nvfp4": (
        nvfp4_values,
        {
            "": (torch.uint8, (OUT, 48)),
            "_weight_scale": (torch.float8_e4m3fn, (OUT, 6)),
            "_weight_scale_2": (torch.float32, ()),
        },
    ),
    "fp8 block": (fp8_values, {"": (torch.float8_e4m3fn, (OUT, IN)), "_scale_inv": (torch.float32, (2, 3))}),
    "mlx affine": (
        affine_values,
        {
            ".weight": (torch.uint32, (OUT, IN // 8)),
            ".scales": (torch.float32, (OUT, 3)),
            ".biases": (torch.float32, (OUT, 3)),
        },
    ),
}


@pytest.mark.parametrize("name", STACKED)
def test_slicing_commutes_with_dequantizing(name: str, tmp_path: Path) -> None:
    values, parts = STACKED[name]
    generator = torch.Generator().manual_seed(1)
    folder = "mlp.switch_mlp" if name.startswith("mlx") else "mlp.experts"
    tensors = {"model.layers.0.mlp.gate.weight": torch.rand(E, IN, generator=generator)}
    stems = [f"model.layers.0.{folder}.{kind}_proj" for kind in ("gate_up", "down")]
    for stem in stems:
        for suffix, (dtype, shape) in parts.items():
            tensors[stem + suffix] = RANDOM[dtype]((E, *shape), generator)
    parent = tmp_path / "parent"
    parent.mkdir()
    save_file(tensors, parent / "model.safetensors", {"format": "pt"})
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": E, "num_experts_per_tok": 2}
    (parent / "config.json").write_text(json.dumps(config | {"hidden_size": IN}))
    keep = {"model.layers.0": [1, 2, 6]}
    new = load_file(cutting.cut(parent, keep) / "model.safetensors")
    for stem in stems:
        whole = values(*(tensors[stem + suffix] for suffix in parts))
        assert torch.equal(values(*(new[stem + suffix] for suffix in parts)), whole[keep["model.layers.0"]])
