"""Disk forms that transformers reads but does not write, cut and loaded: stacked, mixed, FP8 and MXFP4 experts.

The cut model must compute what its parent computes when the dropped experts cannot be chosen; quantized checkpoints are
dequantized by transformers itself, on both sides.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.pruning import cutting
from tests.pruning.test_every_family import forward, masked

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def stack(tensors: dict[str, torch.Tensor], layers: set[int]) -> dict[str, torch.Tensor]:
    """Experts of some layers as one gate_up_proj [E, 2I, H] and one down_proj [E, H, I]."""
    result, found = {}, {}
    for name, tensor in tensors.items():
        match = EXPERT.fullmatch(name)
        if match and int(re.search(r"layers\.(\d+)", name)[1]) in layers:
            found.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            result[name] = tensor
    for module, parts in found.items():
        numbers = sorted({number for number, _ in parts})
        both = [torch.cat([parts[e, "gate"], parts[e, "up"]]) for e in numbers]
        result[f"{module}.gate_up_proj"] = torch.stack(both)
        result[f"{module}.down_proj"] = torch.stack([parts[e, "down"] for e in numbers])
    return result


def fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts in FP8 with one scale per 128 x 128, as DeepSeek ships them."""
    result = {}
    for name, tensor in tensors.items():
        if EXPERT.fullmatch(name):
            scale = tensor.abs().max() / 448
            result[name] = (tensor / scale).to(torch.float8_e4m3fn)
            result[f"{name}_scale_inv"] = scale.reshape(1, 1)
        else:
            result[name] = tensor
    return result


def mxfp4(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random blocks of four-bit values with scales near one, as gpt-oss is shipped; other tensors as they are."""
    result, chance = {}, torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, width, rows = tensor.shape
            shape = (experts, rows, width // 32, 16)
            result[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=chance)
            result[f"{name}_scales"] = torch.randint(120, 126, shape[:3], dtype=torch.uint8, generator=chance)
        else:
            result[name] = tensor
    return result


PLAIN = ["self_attn", "gate", "router", "embed_tokens", "lm_head", "shared_experts", r"model.layers.0.mlp"]
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FORMS = {
    "qwen3_moe stacked": ("qwen3_moe", lambda tensors: stack(tensors, {0, 1, 2}), None),
    "qwen3_5_moe as on the hub": ("qwen3_5_moe", lambda tensors: stack(tensors, {0, 1, 2}), None),
    "deepseek_v3 mixed": ("deepseek_v3", lambda tensors: stack(tensors, {2}), None),
    "glm4_moe fp8": ("glm4_moe", fp8, FP8 | {"modules_to_not_convert": PLAIN}),
    "gpt_oss mxfp4": ("gpt_oss", mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": PLAIN}),
}


def load(family: str, path: Path) -> torch.nn.Module:
    settings = tiny.read_config(path).get("quantization_config")
    kinds = {"fp8": transformers.FineGrainedFP8Config, "mxfp4": transformers.Mxfp4Config}
    extra = {}
    if settings:
        given = {k: v for k, v in settings.items() if k not in ("quant_method", "weight_block_size")}
        extra["quantization_config"] = kinds[settings["quant_method"]](dequantize=True, **given)
    kind = getattr(transformers, tiny.FAMILIES[family][0])
    model, info = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **extra)
    wrong = {what: names for what, names in info.items() if names}
    assert not wrong, wrong
    return model.eval().float()


@pytest.mark.parametrize("form", FORMS)
def test_cut_equals_masked_parent(form: str, tmp_path: Path) -> None:
    family, change, settings = FORMS[form]
    parent = tiny.make(family, tmp_path / "parent")
    before = load_file(parent / "model.safetensors")
    after = change(before)
    assert after.keys() != before.keys()
    save_file(after, parent / "model.safetensors", {"format": "pt"})
    if settings:
        config = tiny.read_config(parent) | {"quantization_config": settings}
        (parent / "config.json").write_text(json.dumps(config))
    keep = cutting.keep_lists(parent, 6)
    child = cutting.cut(parent, keep)
    model = load(family, parent)
    whole = forward(model)
    with masked(model, parent, child, keep):
        expected = forward(model)
    assert (forward(load(family, child)) - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert (whole - expected).abs().max() > 1e-3, "the mask changed nothing, so this proves nothing"
