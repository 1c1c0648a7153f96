"""From the stored parts of one weight to its values, format by format; the arithmetic lies in unpack.py.

Each function takes what is stored, by the ending of its name, and the settings: the checkpoint's with the module's own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moeprune.errors import InputError
from moeprune.scoring.formats import unpack

Stored = Mapping[str, torch.Tensor]  # ending of the name -> tensor
Quantization = Mapping[str, Any]
Make = Callable[[Stored, Quantization], torch.Tensor]


def mxfp4_stacked(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    """gpt-oss: blocks of 32 FP4 values under a power of two, experts stacked, outputs first; inputs first here."""
    value = unpack.fp4(stored["_blocks"]) * unpack.exponents(stored["_scales"]).unsqueeze(-1)
    return value.flatten(-2).transpose(1, 2)


def fp8(stored: Stored, quantization: Quantization) -> torch.Tensor:
    """FP8 with one scale for all, a row, or a block."""
    weight, scale = _first_two(stored)
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = unpack.exponents(scale)
    return unpack.scaled(weight, scale, _block(quantization))


def by_power(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    """FP4 under powers of two."""
    weight, scale = _first_two(stored)
    return unpack.scaled(unpack.fp4(weight), unpack.exponents(scale))


def nvfp4_divided(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    """compressed-tensors NVFP4: its outer scale divides."""
    scale = stored["weight_scale"].float() / stored["weight_global_scale"].float()
    return unpack.scaled(unpack.fp4(stored["weight_packed"]), scale)


def nvfp4_multiplied(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    """NVFP4 of modelopt and torchao: the outer scale multiplies."""
    weight, scale = _first_two(stored)
    outer = next((stored[ending] for ending in stored if ending.endswith(("_scale_2", "_per_tensor_scale"))), None)
    turned = weight.shape[-2] != scale.shape[-2]  # [E, I/2, O]: modelopt leaves the stacks of Llama 4 and gpt-oss so
    if turned:
        weight, scale = weight.mT, scale.mT
    scale = scale.float()
    if outer is not None:
        outer = outer.float()
        if outer.dim() and weight.dim() > 2:  # stacked: one for each expert, or one for each half of its rows
            outer = unpack.spread(outer.reshape(len(weight), -1, 1), scale.shape)
        scale = scale * outer
    value = unpack.scaled(unpack.fp4(weight), scale)
    if "svdquant_lora_a" in stored:
        value = value + stored["svdquant_lora_b"].float() @ stored["svdquant_lora_a"].float()
    return value.mT if turned else value


def compressed_int(stored: Stored, quantization: Quantization) -> torch.Tensor:
    """compressed-tensors' packed integers."""
    shape = stored["weight_shape"].tolist()
    bits = _compressed_bits(quantization) or stored["weight_packed"].shape[-1] * 32 // shape[-1]
    value, zero = unpack.integers(stored["weight_packed"], bits, shape[-1]) - 2 ** (bits - 1), None
    scale = stored["weight_scale"]
    if "weight_zero_point" in stored:
        zero = unpack.integers(stored["weight_zero_point"].mT.contiguous(), bits, shape[-2]).mT - 2 ** (bits - 1)
    return unpack.grouped(value, scale, zero, stored.get("weight_g_idx"), _group(quantization))


def _compressed_bits(quantization: Quantization) -> int:
    """The number of bits where the settings name just one; else 0."""
    bits = {int(weights["num_bits"]) for weights in _weights(quantization) if weights.get("type") == "int"}
    return bits.pop() if len(bits) == 1 else 0


def _weights(quantization: Quantization) -> list[Mapping[str, Any]]:
    """What compressed-tensors says about weights, group by group."""
    groups = quantization.get("config_groups")
    return [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []


def _block(quantization: Quantization) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the settings say so."""
    structures = [weights.get("block_structure") for weights in _weights(quantization)]
    said = [quantization.get("weight_block_size"), quantization.get("block_size"), *structures]
    block = next((item for item in said if isinstance(item, list) and len(item) >= 2), None)
    return (int(block[-2]), int(block[-1])) if block else None


def _group(quantization: Quantization) -> int | None:
    """Inputs that share a scale, where the settings name one number."""
    said = {weights.get("group_size") for weights in _weights(quantization)} or {quantization.get("group_size")}
    group = said.pop() if len(said) == 1 else None
    return group if isinstance(group, int) else None


def int8(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    """Whole bytes, signed, with or without zero points."""
    (value, scale), zero = _first_two(stored), next((stored[name] for name in stored if "zero_point" in name), None)
    if zero is None:
        return unpack.scaled(value, scale)
    return unpack.scaled(value.int() - unpack.spread(zero, value.shape).int(), scale)


def int4_modelopt(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    """modelopt INT4."""
    weight, scale = _first_two(stored)
    return unpack.scaled(unpack.signed_nibbles(weight, axis=-2), scale)


def bitsandbytes_8bit(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    """bitsandbytes LLM.int8: a scale for each row."""
    return stored["weight"].float() * (stored["SCB"].float().unsqueeze(-1) / 127)


def _bits(stored: Stored) -> int:
    """Zero points lie as densely as the weights: bits = words * 32 / outputs. A module may have its own number."""
    words, outputs = stored["qzeros"].shape[-1], stored["scales"].shape[-1]
    if words * 32 % outputs:
        raise InputError(f"{outputs} outputs with {words} words of zero points: the number of bits is unclear")
    return words * 32 // outputs


def awq(stored: Stored, quantization: Quantization) -> torch.Tensor:
    """AWQ."""
    bits = _bits(stored)
    if str(quantization.get("version", "gemm")).lower() == "gemv":
        return _awq_gemv(stored, quantization, bits)
    if bits != 4 and "gptqmodel" not in json.dumps(quantization.get("meta") or {}).lower():
        raise InputError(
            f"AWQ with {bits} bits is packed in one order by GPTQModel and expected in another by vLLM, and this file "
            "does not say that GPTQModel made it; only 4 bits are unambiguous"
        )
    return unpack.awq(stored["qweight"], stored["qzeros"], stored["scales"], bits, _group(quantization))


def _awq_gemv(stored: Stored, quantization: Quantization, bits: int) -> torch.Tensor:
    """The other version lies as a matrix should, outputs first, and its scales and zero points end in padding."""
    value_OI, group = unpack.integers(stored["qweight"], bits), _group(quantization)
    if group is None:
        raise InputError("AWQ in the version 'gemv' needs its group_size in the settings; add it to config.json")
    groups = value_OI.shape[-1] // group if group > 0 else 1
    zero_OG = unpack.integers(stored["qzeros"], bits, groups)
    return unpack.grouped(value_OI, stored["scales"][..., :groups], zero_OG, group=group)


def gptq(stored: Stored, quantization: Quantization) -> torch.Tensor:
    """GPTQ, and AutoRound's own layout of it."""
    tensors = stored["qweight"], stored["qzeros"], stored["scales"], stored.get("g_idx")
    first = quantization.get("checkpoint_format", "gptq") != "gptq_v2"
    if "round" in str(quantization.get("quant_method", "")).lower():  # AutoRound's own layout: zero points as they are
        layout = str(quantization.get("packing_format") or quantization.get("backend") or "")
        first = "gptq" in layout and "gptqmodel" not in layout
    return unpack.gptq(*tensors, bits=_bits(stored), first_version=first, group=_group(quantization))


def bitsandbytes_4bit(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    """bitsandbytes NF4 and FP4, whose shape and code stand beside the weight."""
    state_name = next(name for name in stored if "quant_state" in name)
    state = json.loads(bytes(stored[state_name].cpu().numpy()))
    absmax = stored["weight.absmax"]
    if "weight.nested_absmax" in stored:
        nested = stored["weight.nested_absmax"], state["nested_offset"], state["nested_blocksize"]
        absmax = unpack.nested_absmax(absmax, stored["weight.nested_quant_map"], *nested)
    shape = tuple(state["shape"])
    return unpack.bitsandbytes_4bit(stored["weight"], stored["weight.quant_map"], absmax, shape, state["blocksize"])


def mlx(stored: Stored, quantization: Quantization) -> torch.Tensor:
    """MLX: affine groups, or floats under scales of one byte."""
    weight, scale = stored["weight"], stored["scales"]
    bias = stored.get("biases", stored.get("qbiases"))
    if bias is None:
        return _mlx_float(weight, scale, str(quantization.get("mode", "mxfp4")))
    group = int(quantization.get("group_size", 64))
    bits = weight.shape[-1] * 32 // (scale.shape[-1] * group)  # may differ from module to module
    return unpack.affine(unpack.integers(weight, bits), scale, bias, group)


def _mlx_float(weight: torch.Tensor, scale: torch.Tensor, mode: str) -> torch.Tensor:
    if scale.dtype != torch.uint8:
        raise InputError(f"MLX in the mode {mode!r} has scales of one byte, not {scale.dtype}")
    raw = weight.view(torch.uint8)
    value = raw.view(torch.float8_e4m3fn) if mode == "mxfp8" else unpack.fp4(raw)
    return unpack.scaled(value, scale.view(torch.float8_e4m3fn) if mode == "nvfp4" else unpack.exponents(scale))


def _first_two(stored: Stored) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = tuple(stored.values())[:2]
    return first, second


def bitnet(stored: Stored, quantization: Quantization) -> torch.Tensor:
    """BitNet: -1, 0 and 1, packed share over share; one of its two layers divides by the scale."""
    weight, scale = _first_two(stored)
    if weight.dtype == torch.uint8:
        weight = unpack.pieces(weight, 2, high_first=False).char() - 1
    divides = str(quantization.get("linear_class", "bitlinear")) == "bitlinear"
    return weight.float() / scale.float() if divides else weight.float() * scale.float()


def gemma(stored: Stored, quantization: Quantization) -> torch.Tensor:
    """Gemma's own: signed values, shifted to be unsigned where a byte holds several; a scale for each row."""
    packed, scale = _first_two(stored)
    if packed.dtype == torch.int8:
        return unpack.scaled(packed, scale)
    bits = int(quantization.get("num_bits", 4))
    return unpack.scaled(unpack.in_bytes(packed, bits).char() - 2 ** (bits - 1), scale)


def hqq(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    """HQQ: groups as rows (or columns) of a grid of its own, which is packed share over share."""
    packing = re.fullmatch(r"(\d)bit_u?(8|32)", bytes(stored["packing"].cpu().numpy()).decode(errors="replace"))
    if packing is None:
        raise InputError(
            "HQQ packed this weight in a way that is not known; add it to moeprune/scoring/formats/decoding.py"
        )
    packed, shape = stored["W_q"], stored["shape"].tolist()
    if packed.is_floating_point():
        packed = packed.view(torch.int32 if packing[2] == "32" else torch.uint8)
    value = unpack.pieces(packed, int(packing[1]), high_first=True)[: math.prod(shape) // packed.shape[-1]]
    return ((value.float() - stored["zero"].float()) * stored["scale"].float()).reshape(shape)


def quanto(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    """Quanto's bytes with a scale for each output; what it packs more densely does not say which shape it has."""
    if "weight._shift" in stored:
        raise InputError(
            "Quanto's weights of 4 and 2 bits do not say how many outputs they have, so they cannot be scored; score "
            "the original checkpoint and cut this one with its scores"
        )
    return unpack.scaled(stored["weight._data"], stored["weight._scale"])


def aqlm(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    """AQLM: sums of entries of codebooks, each a block of outputs and inputs, times a scale for each row of blocks."""
    blocks = unpack.codebooks(stored["codes"], stored["codebooks"]) * stored["scales"].float()
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)
