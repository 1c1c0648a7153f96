"""Dequantized tensors, bit for bit, against implementations that share nothing with ours.

Where transformers can do it, its own code is the oracle; else numbers are packed here the way each format's authors
publish it, from known integers, so that the expected result needs no unpacking. Where the format's own library is
installed, it is asked too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moeprune.checkpoint.folder import open_checkpoint
from moeprune.scoring.formats.dequantize import Lazy, read_tensor, recipes

FP4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def plain(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any], dtype=torch.float32):
    """Plain name -> tensor, of a checkpoint with these stored tensors."""
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {"model_type": "any", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    opened = open_checkpoint(folder)
    stored = {name: read_tensor(tensor) for name, tensor in opened.tensors.items()}
    return {name: Lazy(r, stored, dtype, torch.device("cpu"))[...] for name, r in recipes(opened).items()}


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


def bytes_(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def fp8(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 3).to(torch.float8_e4m3fn)


def test_what_is_not_quantized_stays_as_it_is(tmp_path):
    tensors = {"a.weight": torch.randn(3, 4), "b.weight_scale": torch.randn(2), "c.scales": torch.randn(2)}
    found = plain(tmp_path, tensors, {})
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        same(found[name], tensor)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_mxfp4_of_gpt_oss(tmp_path, dtype):
    blocks, scales = bytes_(3, 10, 4, 16), torch.randint(115, 135, (3, 10, 4), dtype=torch.uint8)
    found = plain(tmp_path, {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales}, {}, dtype)
    same(found["e.down_proj"], convert_moe_packed_tensors(blocks, scales, dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "grid", "name"),
    (
        ((256, 384), (2, 3), "weight_scale_inv"),
        ((64, 96), (64, 1), "weight_scale"),
        ((64, 96), (1, 1), "weight_scale"),
        ((4, 64, 96), (4, 2, 3), "weight_scale_inv"),
    ),
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_fp8(tmp_path, shape, grid, name, dtype):
    weight, scale = fp8(*shape), torch.rand(grid) + 0.1
    found = plain(tmp_path, {"m.weight": weight, f"m.{name}": scale}, {"quant_method": "fp8"}, dtype)
    same(found["m.weight"], Fp8Dequantize(None)._dequantize_one(weight, scale, dtype))


def test_fp8_with_a_last_block_cut_short(tmp_path):
    weight, scale = fp8(200, 300), torch.rand(2, 3) + 0.1
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    found = plain(tmp_path, {"m.weight": weight, "m.weight_scale_inv": scale}, settings)["m.weight"]
    for row, column in ((0, 0), (127, 127), (128, 127), (199, 255), (199, 256), (5, 299)):
        assert found[row, column] == weight[row, column].float() * scale[row // 128, column // 128]


@pytest.mark.parametrize("ending", ("_scale_inv", "_weight_scale"))
def test_fp8_stacked_with_a_scalar_or_a_scale_for_each(tmp_path, ending):
    weight = fp8(4, 64, 96)
    for scale in (torch.rand(4, 1, 96) + 0.1, torch.rand(4, 1, 1) + 0.1, torch.rand(()) + 0.1):
        found = plain(tmp_path, {"e.gate_up_proj": weight, f"e.gate_up_proj{ending}": scale}, {})
        same(found["e.gate_up_proj"], weight.float() * scale)


def test_fp8_with_scales_that_are_powers_of_two(tmp_path):
    weight, raw = fp8(256, 256), torch.randint(120, 130, (2, 2), dtype=torch.uint8)
    found = plain(tmp_path, {"m.weight": weight, "m.scale": raw.view(torch.float8_e8m0fnu)}, {})
    same(found["m.weight"], Fp8Dequantize(None)._dequantize_one(weight, raw, torch.float32))


def test_fp4_of_deepseek_v4(tmp_path):
    weight, raw = bytes_(16, 64).view(torch.int8), torch.randint(120, 130, (16, 4), dtype=torch.uint8)
    scale = raw.view(torch.float8_e8m0fnu)
    found = plain(tmp_path, {"w1.weight": weight, "w1.scale": scale}, {"quant_method": "fp8", "expert_dtype": "fp4"})
    same(found["w1.weight"], Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32))


def nibbles(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP4 numbers, and the same packed two to a byte, the first in the low half."""
    code = np.random.default_rng(0).integers(0, 16, shape)
    value = np.array([*FP4_VALUES, *(-value for value in FP4_VALUES)])[code]
    packed = (code[..., 0::2] | code[..., 1::2] << 4).astype(np.uint8)
    return torch.from_numpy(value).float(), torch.from_numpy(packed)


def test_nvfp4_of_modelopt(tmp_path):
    value, packed = nibbles(8, 64)
    scale, outer = (torch.rand(8, 4) * 4 + 0.1).to(torch.float8_e4m3fn), torch.tensor(0.037)
    tensors = {"m.weight": packed, "m.weight_scale": scale, "m.weight_scale_2": outer, "m.input_scale": outer.clone()}
    found = plain(tmp_path, tensors, {"quant_method": "modelopt"})
    expected = torch.empty_like(value)
    for o in range(8):
        for i in range(64):
            expected[o, i] = value[o, i] * (scale[o, i // 16].float() * outer)
    same(found["m.weight"], expected)


@pytest.mark.parametrize("halves", (0, 2))
def test_nvfp4_of_modelopt_stacked(tmp_path, halves):
    value, packed = nibbles(3, 8, 64)
    scale = (torch.rand(3, 8, 4) * 4 + 0.1).to(torch.float8_e4m3fn)
    outer = torch.rand(3, 2) if halves else torch.rand(3)
    tensors = {"e.up": packed, "e.up_weight_scale": scale, "e.up_weight_scale_2": outer}
    found = plain(tmp_path, tensors, {"quant_method": "modelopt"})["e.up"]
    for e, o, i in ((0, 0, 0), (2, 3, 63), (1, 4, 17), (2, 7, 30)):
        whole = outer[e, o // 4] if halves else outer[e]
        assert found[e, o, i] == value[e, o, i] * (scale[e, o, i // 16].float() * whole)


def test_nvfp4_of_compressed_tensors(tmp_path):
    value, packed = nibbles(8, 64)
    scale, outer = (torch.rand(8, 4) * 400 + 1).to(torch.float8_e4m3fn), torch.tensor([1234.5])
    tensors = {"m.weight_packed": packed, "m.weight_scale": scale, "m.weight_global_scale": outer}
    found = plain(tmp_path, tensors, {"quant_method": "compressed-tensors"})
    expected = torch.stack([value[:, i] * (scale[:, i // 16].float() / outer) for i in range(64)], dim=1)
    same(found["m.weight"], expected)


def pack(values: np.ndarray, bits: int) -> torch.Tensor:
    """Rows of unsigned integers as one long binary number each, cut into 32-bit words."""
    rows = []
    for row in values.tolist():
        number = sum(int(value) << (bits * position) for position, value in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([number >> (32 * word) & 0xFFFFFFFF for word in range(words)])
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))


@pytest.mark.parametrize(("bits", "symmetric"), ((4, True), (4, False), (8, True), (8, False)))
def test_integers_of_compressed_tensors(tmp_path, bits, symmetric):
    generator = np.random.default_rng(bits)
    q, zero = generator.integers(0, 2**bits, (16, 64)), generator.integers(0, 2**bits, (16, 4))
    scale = torch.rand(16, 4, dtype=torch.bfloat16)
    tensors = {"m.weight_packed": pack(q, bits), "m.weight_scale": scale, "m.weight_shape": torch.tensor([16, 64])}
    if not symmetric:
        tensors["m.weight_zero_point"] = pack(zero.T, bits).T
    settings = {"config_groups": {"a": {"weights": {"num_bits": bits, "type": "int", "symmetric": symmetric}}}}
    found = plain(tmp_path, tensors, {"quant_method": "compressed-tensors", **settings})["m.weight"]
    middle = 2 ** (bits - 1)
    for o in range(16):
        for i in range(64):
            offset = 0 if symmetric else zero[o, i // 16] - middle
            assert found[o, i] == float(q[o, i] - middle - offset) * scale[o, i // 16].float()


def test_int8_of_compressed_tensors_and_of_bitsandbytes(tmp_path):
    weight, scale = torch.randint(-128, 128, (8, 16), dtype=torch.int8), torch.rand(8, 1)
    same(plain(tmp_path, {"m.weight": weight, "m.weight_scale": scale}, {})["m.weight"], weight.float() * scale)
    peaks = scale[:, 0]
    found = plain(tmp_path, {"m.weight": weight, "m.SCB": peaks}, {"quant_method": "bitsandbytes"})["m.weight"]
    same(found, weight.float() * (peaks / 127).unsqueeze(1))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_awq(tmp_path, dtype):
    """Packed as AutoAWQ does: value order[i] of each eight goes into nibble i."""
    generator, order = np.random.default_rng(0), (0, 2, 4, 6, 1, 3, 5, 7)
    q, zero = generator.integers(0, 16, (64, 24)), generator.integers(0, 16, (2, 24))
    scale = torch.rand(2, 24).half()

    def packed(values: np.ndarray) -> torch.Tensor:
        words = np.zeros((len(values), 3), dtype=np.uint32)
        for column in range(3):
            for nibble in range(8):
                words[:, column] |= values[:, column * 8 + order[nibble]].astype(np.uint32) << (nibble * 4)
        return torch.from_numpy(words.view(np.int32))

    tensors = {"m.qweight": packed(q), "m.qzeros": packed(zero), "m.scales": scale}
    found = plain(tmp_path, tensors, {"quant_method": "awq", "bits": 4, "group_size": 32}, dtype)["m.weight"]
    groups = np.arange(64) // 32
    expected = torch.from_numpy(q - zero[groups]).float() * scale[groups].float()  # [inputs, outputs]
    same(found, expected.T.contiguous().to(dtype))


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("version", ("gptq", "gptq_v2"))
@pytest.mark.parametrize("act_order", (False, True))
def test_gptq(tmp_path, bits, version, act_order):
    generator = np.random.default_rng(bits)
    q, zero = generator.integers(0, 2**bits, (64, 32)), generator.integers(1, 2**bits, (2, 32))
    scale, groups = torch.rand(2, 32).half(), np.arange(64) // 32
    if act_order:
        groups = generator.permutation(groups)
    stored_zero = zero - 1 if version == "gptq" else zero
    tensors = {"m.qweight": pack(q.T, bits).T, "m.qzeros": pack(stored_zero, bits), "m.scales": scale}
    tensors["m.g_idx"] = torch.from_numpy(groups).int()
    settings = {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}
    found = plain(tmp_path, tensors, settings)["m.weight"]
    expected = torch.from_numpy(q - zero[groups]).float() * scale[groups].float()
    same(found, expected.T.contiguous())


@pytest.mark.parametrize("bits", (2, 3, 4, 5, 6, 8))
def test_affine_numbers_of_mlx(tmp_path, bits):
    q = np.random.default_rng(bits).integers(0, 2**bits, (8, 128))
    scale, bias = torch.rand(8, 2).half(), torch.randn(8, 2).half()
    tensors = {"m.weight": pack(q, bits).view(torch.uint32), "m.scales": scale, "m.biases": bias}
    found = plain(tmp_path, tensors, {"bits": 4, "group_size": 64})["m.weight"]
    groups = np.arange(128) // 64
    same(found, torch.from_numpy(q).float() * scale.float()[:, groups] + bias.float()[:, groups])


def test_stacked_experts_of_mlx_come_one_by_one(tmp_path):
    q = np.random.default_rng(0).integers(0, 16, (3, 8, 64))
    words = torch.stack([pack(expert, 4) for expert in q]).view(torch.uint32)
    scale, bias = torch.rand(3, 8, 1), torch.randn(3, 8, 1)
    stem = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors = {f"{stem}.weight": words, f"{stem}.scales": scale, f"{stem}.biases": bias}
    found = plain(tmp_path, tensors, {"bits": 4, "group_size": 64})
    assert sorted(found) == [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(3)]
    for e, name in enumerate(sorted(found)):
        same(found[name], torch.from_numpy(q[e]).float() * scale[e] + bias[e])


@pytest.mark.parametrize("nested", (False, True))
def test_four_bits_of_bitsandbytes(tmp_path, nested):
    generator = np.random.default_rng(0)
    code, table = generator.integers(0, 16, 16 * 64), torch.linspace(-1, 1, 16)
    packed = torch.from_numpy((code[0::2] << 4 | code[1::2]).astype(np.uint8)).unsqueeze(1)
    absmax = torch.rand(16) + 0.1
    state: dict[str, Any] = {"shape": [16, 64], "blocksize": 64, "dtype": "float32"}
    tensors = {"m.weight": packed, "m.weight.quant_map": table, "m.weight.absmax": absmax}
    if nested:
        codes, inner, outer = torch.randint(0, 256, (16,), dtype=torch.uint8), torch.rand(256), torch.rand(1)
        absmax = inner[codes.int()] * outer + 0.25
        state |= {"nested_offset": 0.25, "nested_blocksize": 256}
        tensors |= {"m.weight.absmax": codes, "m.weight.nested_quant_map": inner, "m.weight.nested_absmax": outer}
    raw = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    tensors["m.weight.quant_state.bitsandbytes__nf4"] = raw
    found = plain(tmp_path, tensors, {"quant_method": "bitsandbytes"})["m.weight"]
    for o, i in ((0, 0), (3, 1), (15, 63), (8, 32)):
        assert found[o, i] == table[int(code[o * 64 + i])] * absmax[(o * 64 + i) // 64]
