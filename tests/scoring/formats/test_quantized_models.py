"""A quantized checkpoint scores, to the bit, as the plain checkpoint with the values that it stands for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.scoring import streamed
from tests.scoring.formats.test_dequantize import nibbles, pack

Tensors = dict[str, torch.Tensor]
Both = tuple[Tensors, torch.Tensor]  # what is stored in place of a weight, and what it stands for

LINEAR = re.compile(r"model\.layers\.\d+\.(mlp\.experts\.\d+|self_attn)\.\w+_proj\.weight")


def fp8(weight: torch.Tensor) -> Both:
    scale = torch.rand(-(-len(weight) // 32), weight.shape[1] // 32) / 8 + 0.01
    grid = scale.repeat_interleave(32, 0)[: len(weight)].repeat_interleave(32, 1)
    stored = (weight / grid).clamp(-400, 400).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * grid


def int4(weight: torch.Tensor) -> Both:
    scale = weight.view(len(weight), -1, 32).abs().amax(-1) / 7
    grid = scale.repeat_interleave(32, 1)
    q = (weight / grid).round().clamp(-8, 7)
    words = pack((q + 8).numpy().astype(np.int64), 4)
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}, q * grid


def nvfp4(weight: torch.Tensor) -> Both:
    value, packed = nibbles(*weight.shape)
    scale, outer = torch.rand(len(weight), weight.shape[1] // 16).to(torch.float8_e4m3fn), torch.tensor(0.11)
    grid = (scale.float() * outer).repeat_interleave(16, 1)
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": outer}, value * grid


def awq(weight: torch.Tensor) -> Both:
    generator, order = np.random.default_rng(weight.shape[0]), np.array((0, 2, 4, 6, 1, 3, 5, 7))
    outputs, inputs = weight.shape
    q, zero = generator.integers(0, 16, (inputs, outputs)), generator.integers(6, 10, (inputs // 32, outputs))
    scale = torch.rand(inputs // 32, outputs) / 20
    shuffled = (values.reshape(len(values), -1, 8)[..., order].reshape(values.shape) for values in (q, zero))
    packed = [pack(values, 4) for values in shuffled]
    groups = np.arange(inputs) // 32
    value = torch.from_numpy(q - zero[groups]).float() * scale[groups]
    return {"qweight": packed[0], "qzeros": packed[1], "scales": scale}, value.T.contiguous()


INT4_GROUP = {"group_0": {"weights": {"num_bits": 4, "type": "int"}, "targets": ["Linear"]}}
FORMATS: dict[str, tuple[Callable[[torch.Tensor], Both], dict[str, object]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "int4": (int4, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": INT4_GROUP}),
    "nvfp4": (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32}),
}


def two_copies(
    source: Path, folder: Path, quantize: Callable[[torch.Tensor], Both], settings: object
) -> tuple[Path, Path]:
    """The checkpoint quantized, and plain with the quantized values."""
    torch.manual_seed(0)
    stored, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if LINEAR.fullmatch(name):
            parts, value = quantize(tensor)
            stored |= {name.removesuffix("weight") + ending: part.contiguous() for ending, part in parts.items()}
            plain[name] = value.contiguous()
        else:
            stored[name] = plain[name] = tensor
    return write(source, folder / "quantized", stored, settings), write(source, folder / "plain", plain, None)


def write(source: Path, folder: Path, tensors: Tensors, settings: object) -> Path:
    shutil.copytree(source, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same_scores(quantized: Path, plain: Path, tmp_path: Path) -> None:
    data = streamed.batches()
    found, expected = streamed.score(quantized, data, tmp_path), streamed.score(plain, data, tmp_path)
    assert [block.block for block in found.blocks] == [block.block for block in expected.blocks] != []
    for a, b in zip(found.blocks, expected.blocks, strict=True):
        for name, array in a.values.items():
            np.testing.assert_array_equal(array, b.values[name], err_msg=f"{a.block} {name}")


@pytest.mark.parametrize("name", FORMATS)
def test_scores_are_those_of_the_values(name, tmp_path):
    quantize, settings = FORMATS[name]
    copies = two_copies(streamed.checkpoint("qwen3_moe"), tmp_path, quantize, settings)
    assert_same_scores(*copies, tmp_path)


def test_gpt_oss_as_openai_ships_it(tmp_path):
    source, stored, plain = streamed.checkpoint("gpt_oss"), {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in load_file(source / "model.safetensors").items():
        stored[name] = plain[name] = tensor
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(122, 126, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    quantized = write(source, tmp_path / "quantized", stored, {"quant_method": "mxfp4"})
    assert_same_scores(quantized, write(source, tmp_path / "plain", plain, None), tmp_path)
