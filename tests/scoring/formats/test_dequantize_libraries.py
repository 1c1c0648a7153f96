"""The same against the formats' own libraries, where they are installed; they are too heavy for every check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.scoring.formats.test_dequantize import plain, same


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("bits", "symmetric"), ((4, True), (4, False), (8, True), (3, False)))
def test_integers_of_compressed_tensors(tmp_path: Path, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    state = {"weight": torch.randn(16, 64, dtype=dtype), "weight_scale": (torch.rand(16, 2) + 0.05).to(dtype)}
    middle = 2 ** (bits - 1)
    state["weight_zero_point"] = torch.randint(-middle, middle, (16, 2), dtype=torch.int8)
    packed = PackedQuantizationCompressor.compress(state, scheme)
    expected = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    groups = {"group_0": {"weights": {"num_bits": bits, "type": "int"}}}
    settings = {"quant_method": "compressed-tensors", "config_groups": groups}
    found = plain(tmp_path, {f"m.{name}": tensor for name, tensor in packed.items()}, settings, dtype)["m.weight"]
    same(found, expected)


@pytest.mark.parametrize("group", (16, 32))
def test_four_bit_floats_of_compressed_tensors(tmp_path: Path, group: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    kind = NVFP4PackedCompressor if group == 16 else MXFP4PackedCompressor
    strategy = "tensor_group" if group == 16 else "group"
    weights = QuantizationArgs(num_bits=4, type="float", symmetric=True, strategy=strategy, group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    state = {"weight_packed": torch.randint(0, 256, (16, 64), dtype=torch.uint8)}
    if group == 16:
        state["weight_scale"] = (torch.rand(16, 8) * 400 + 1).to(torch.float8_e4m3fn)
        state["weight_global_scale"] = torch.tensor([1234.5])
    else:
        state["weight_scale"] = torch.randint(118, 132, (16, 4), dtype=torch.uint8)
    expected = kind.decompress(dict(state), scheme)["weight"]
    settings = {"quant_method": "compressed-tensors"}
    tensors = {f"m.{name}": tensor for name, tensor in state.items()}
    same(plain(tmp_path, tensors, settings, expected.dtype)["m.weight"], expected)


@pytest.mark.parametrize("kind", ("nf4", "fp4"))
@pytest.mark.parametrize("nested", (False, True))
def test_four_bits_of_bitsandbytes(tmp_path: Path, kind: str, nested: bool) -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional

    weight = torch.randn(48, 128)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    expected = functional.dequantize_4bit(packed, state)
    tensors = {f"m.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    found = plain(tmp_path, {"m.weight": packed, **tensors}, {"quant_method": "bitsandbytes"})["m.weight"]
    same(found, expected)


@pytest.mark.parametrize("mode", ("affine", "mxfp4", "nvfp4", "mxfp8"))
@pytest.mark.parametrize("bits", (2, 3, 4, 5, 6, 8))
def test_numbers_of_mlx(tmp_path: Path, mode: str, bits: int) -> None:
    mx = pytest.importorskip("mlx.core")
    if mode != "affine" and bits != (8 if mode == "mxfp8" else 4):
        pytest.skip("no such mode")
    group = {"affine": 64, "mxfp4": 32, "nvfp4": 16, "mxfp8": 32}[mode]
    weight = mx.array(np.random.default_rng(0).standard_normal((16, 128)).astype(np.float32))
    parts = mx.quantize(weight, group_size=group, bits=bits, mode=mode)
    values = mx.dequantize(*parts, group_size=group, bits=bits, mode=mode)
    dtype = torch.float32 if mode == "affine" else torch.bfloat16  # what the library computes in
    expected = torch.from_numpy(np.array(values.astype(mx.float32)))
    names = ("weight", "scales", "biases")
    tensors = {f"m.{name}": torch.from_numpy(np.array(part)) for name, part in zip(names, parts, strict=False)}
    found = plain(tmp_path, tensors, {"bits": bits, "group_size": group, "mode": mode}, dtype)["m.weight"]
    same(found.float(), expected)
