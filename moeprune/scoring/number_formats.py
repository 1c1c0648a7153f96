"""The number formats that are understood: what their tensors are named, and how they become numbers.

Which format a tensor is in is read from its own name, type and companions. To add a format, add an entry to TABLE; the
arithmetic lies in unpack.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from moeprune.errors import InputError
from moeprune.scoring import unpack

Stored = Mapping[str, torch.Tensor]  # ending of the name -> tensor
Quantization = Mapping[str, Any]
Make = Callable[[Stored, Quantization], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a weight."""

    name: str
    endings: Mapping[str, str]  # ending -> types it may have, as in the header; the first is the weight's
    optional: tuple[str, ...]  # endings that may be there too
    plain: str  # ending of the plain tensor
    make: Make
    applies: Callable[[Quantization], bool] = lambda _quantization: True


def _mxfp4_stacked(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    value = unpack.fp4(stored["_blocks"]) * unpack.exponents(stored["_scales"]).unsqueeze(-1)
    return value.flatten(-2).transpose(1, 2)


def _fp8(stored: Stored, quantization: Quantization) -> torch.Tensor:
    weight, scale = _first_two(stored)
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = unpack.exponents(scale)
    return unpack.scaled(weight, scale, _block(quantization))


def _by_power(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    weight, scale = _first_two(stored)
    return unpack.scaled(unpack.fp4(weight), unpack.exponents(scale))


def _nvfp4_divided(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    scale = stored["weight_scale"].float() / stored["weight_global_scale"].float()
    return unpack.scaled(unpack.fp4(stored["weight_packed"]), scale)


def _nvfp4_multiplied(stored: Stored, _quantization: Quantization) -> torch.Tensor:
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


def _compressed_int(stored: Stored, quantization: Quantization) -> torch.Tensor:
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


def _int8(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    (value, scale), zero = _first_two(stored), next((stored[name] for name in stored if "zero_point" in name), None)
    if zero is None:
        return unpack.scaled(value, scale)
    return unpack.scaled(value.int() - unpack.spread(zero, value.shape).int(), scale)


def _int4_modelopt(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    weight, scale = _first_two(stored)
    return unpack.scaled(unpack.signed_nibbles(weight), scale)


def _bitsandbytes_8bit(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    return stored["weight"].float() * (stored["SCB"].float().unsqueeze(-1) / 127)


def _bits(stored: Stored) -> int:
    """Zero points lie as densely as the weights: bits = words * 32 / outputs. A module may have its own number."""
    words, outputs = stored["qzeros"].shape[-1], stored["scales"].shape[-1]
    if words * 32 % outputs:
        raise InputError(f"{outputs} outputs with {words} words of zero points: the number of bits is unclear")
    return words * 32 // outputs


def _awq(stored: Stored, quantization: Quantization) -> torch.Tensor:
    version, bits = str(quantization.get("version", "gemm")).lower(), _bits(stored)
    if version != "gemm":
        raise InputError(f"AWQ in the version {version!r} is laid out for one kernel; only 'gemm' is understood")
    if bits != 4 and "gptqmodel" not in json.dumps(quantization.get("meta") or {}).lower():
        raise InputError(
            f"AWQ with {bits} bits is packed in one order by GPTQModel and expected in another by vLLM, and this file "
            "does not say that GPTQModel made it; only 4 bits are unambiguous"
        )
    return unpack.awq(stored["qweight"], stored["qzeros"], stored["scales"], bits, _group(quantization))


def _gptq(stored: Stored, quantization: Quantization) -> torch.Tensor:
    tensors = stored["qweight"], stored["qzeros"], stored["scales"], stored.get("g_idx")
    first = quantization.get("checkpoint_format", "gptq") != "gptq_v2"
    if "round" in str(quantization.get("quant_method", "")).lower():  # AutoRound's own layout: zero points as they are
        layout = str(quantization.get("packing_format") or quantization.get("backend") or "")
        first = "gptq" in layout and "gptqmodel" not in layout
    return unpack.gptq(*tensors, bits=_bits(stored), first_version=first, group=_group(quantization))


def _bitsandbytes_4bit(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    state_name = next(name for name in stored if "quant_state" in name)
    state = json.loads(bytes(stored[state_name].cpu().numpy()))
    absmax = stored["weight.absmax"]
    if "weight.nested_absmax" in stored:
        nested = stored["weight.nested_absmax"], state["nested_offset"], state["nested_blocksize"]
        absmax = unpack.nested_absmax(absmax, stored["weight.nested_quant_map"], *nested)
    shape = tuple(state["shape"])
    return unpack.bitsandbytes_4bit(stored["weight"], stored["weight.quant_map"], absmax, shape, state["blocksize"])


def _mlx(stored: Stored, quantization: Quantization) -> torch.Tensor:
    weight, scale = stored["weight"], stored["scales"]
    bias = stored.get("biases", stored.get("qbiases"))
    if bias is None:
        return _mlx_float(weight, scale, str(quantization.get("mode", "mxfp4")))
    group = int(quantization.get("group_size", 64))
    bits = weight.shape[-1] * 32 // (scale.shape[-1] * group)  # may differ from module to module
    value = unpack.integers(weight, bits)
    index_I = torch.arange(value.shape[-1], device=value.device) // group
    return value.float() * scale.float().index_select(-1, index_I) + bias.float().index_select(-1, index_I)


def _mlx_float(weight: torch.Tensor, scale: torch.Tensor, mode: str) -> torch.Tensor:
    if scale.dtype != torch.uint8:
        raise InputError(f"MLX in the mode {mode!r} has scales of one byte, not {scale.dtype}")
    raw = weight.view(torch.uint8)
    value = raw.view(torch.float8_e4m3fn) if mode == "mxfp8" else unpack.fp4(raw)
    return unpack.scaled(value, scale.view(torch.float8_e4m3fn) if mode == "nvfp4" else unpack.exponents(scale))


def _first_two(stored: Stored) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = tuple(stored.values())[:2]
    return first, second


def _torchao(make: Make) -> Make:
    """torchao says in the shard's metadata what a tensor is; what is laid out for one GPU kernel is refused."""

    def checked(stored: Stored, about: Quantization) -> torch.Tensor:
        kind = str(about.get("_type", "a tensor that its header does not describe"))
        if kind not in TORCHAO_TYPES:
            raise InputError(f"torchao's {kind} is not understood; only {', '.join(TORCHAO_TYPES)} are")
        if about.get("is_swizzled_scales"):
            raise InputError("torchao shuffled these scales for one GPU kernel, which is not understood")
        return make(stored, about)

    return checked


def _smoothed(form: Format) -> Format:
    """The format, with the factors that AWQ and SmoothQuant put on a layer's inputs counted to its weight."""

    def make(stored: Stored, quantization: Quantization) -> torch.Tensor:
        value = form.make(stored, quantization)
        factors = [stored[ending] for ending in SMOOTHING if ending in stored]
        return value * factors[0].float() if factors else value

    return replace(form, optional=(*form.optional, *SMOOTHING), make=make)


def _method(*words: str) -> Callable[[Quantization], bool]:
    def applies(quantization: Quantization) -> bool:
        named = f"{quantization.get('quant_method', '')} {quantization.get('packing_format', '')}".lower()
        return any(word in named for word in words)

    return applies


REAL = "F32 BF16 F16"
POWERS = "F8_E8M0 U8"
SCALES = f"{REAL} {POWERS}"
FP8 = "F8_E4M3 F8_E5M2"
F8 = "F8_E4M3"
PACKED_INT = {"weight_packed": "I32", "weight_scale": REAL, "weight_shape": "I64 I32"}
GPTQ_LIKE = {"qweight": "I32", "qzeros": "I32", "scales": REAL}
BNB = {"weight": "U8", "weight.absmax": "F32 U8", "weight.quant_map": "F32"}
NF4 = BNB | {"weight.quant_state.bitsandbytes__nf4": "U8"}
BNB_FP4 = BNB | {"weight.quant_state.bitsandbytes__fp4": "U8"}
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
NVFP4 = {"weight": "U8", "weight_scale": F8, "weight_scale_2": REAL}
NVFP4_STACKED = {"": "U8", "_weight_scale": F8, "_weight_scale_2": REAL}
NVFP4_PACKED = {"weight_packed": "U8", "weight_scale": F8, "weight_global_scale": REAL}
MXFP4_PACKED = {"weight_packed": "U8", "weight_scale": POWERS}
ZERO = ("weight_zero_point",)
SVDQUANT = ("svdquant_lora_a", "svdquant_lora_b")
SMOOTHING = ("pre_quant_scale", "_act_pre_scale")
TORCHAO_TYPES = ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor", "MXTensor", "NVFP4Tensor")
AO_ZERO, AO_OUTER = ("_zero_point",), ("_per_tensor_scale",)
# The first entry whose tensors are all there is taken.
TABLE = tuple(
    _smoothed(form)
    for form in (
        Format("MXFP4, stacked", {"_blocks": "U8", "_scales": "U8"}, (), "", _mxfp4_stacked),
        Format("NVFP4, modelopt", NVFP4, SVDQUANT, "weight", _nvfp4_multiplied),
        Format("NVFP4, modelopt, stacked", NVFP4_STACKED, (), "", _nvfp4_multiplied),
        Format("NVFP4, compressed-tensors", NVFP4_PACKED, (), "weight", _nvfp4_divided),
        Format("MXFP4, compressed-tensors", MXFP4_PACKED, (), "weight", _by_power),
        Format("MXFP4, Quark and modelopt", {"weight": "U8", "weight_scale": POWERS}, (), "weight", _by_power),
        Format("INT4, modelopt", {"weight": "U8", "weight_scale": REAL}, (), "weight", _int4_modelopt),
        Format("INT, compressed-tensors", PACKED_INT, (*ZERO, "weight_g_idx"), "weight", _compressed_int),
        Format("FP8 by block", {"weight": FP8, "weight_scale_inv": SCALES}, (), "weight", _fp8),
        Format("FP8 by tensor or channel", {"weight": FP8, "weight_scale": SCALES}, (), "weight", _fp8),
        Format("FP8, DeepSeek-V4", {"weight": FP8, "scale": SCALES}, (), "weight", _fp8),
        Format("FP8, stacked", {"": FP8, "_scale_inv": SCALES}, (), "", _fp8),
        Format("FP8, stacked", {"": FP8, "_weight_scale": SCALES}, (), "", _fp8),
        Format("FP8, stacked", {"": FP8, "_scale": SCALES}, (), "", _fp8),
        Format("FP4, DeepSeek-V4", {"weight": "I8 U8", "scale": "F8_E8M0"}, (), "weight", _by_power),
        Format("INT8, compressed-tensors", {"weight": "I8", "weight_scale": REAL}, ZERO, "weight", _int8),
        Format("INT8, bitsandbytes", {"weight": "I8", "SCB": "F32"}, (), "weight", _bitsandbytes_8bit),
        Format("NF4, bitsandbytes", NF4, NESTED, "weight", _bitsandbytes_4bit),
        Format("FP4, bitsandbytes", BNB_FP4, NESTED, "weight", _bitsandbytes_4bit),
        Format("AWQ", GPTQ_LIKE, (), "weight", _awq, _method("awq")),
        Format("GPTQ", GPTQ_LIKE, ("g_idx",), "weight", _gptq, _method("gptq", "round")),
        Format("MLX", {"weight": "U32", "scales": f"{REAL} U8"}, ("biases", "qbiases"), "weight", _mlx),
        Format("FP8, torchao", {"_qdata": FP8, "_scale": SCALES}, (), "", _torchao(_fp8)),
        Format("INT, torchao", {"_qdata": "I8", "_scale": REAL}, AO_ZERO, "", _torchao(_int8)),
        Format("NVFP4, torchao", {"_qdata": "U8", "_scale": F8}, AO_OUTER, "", _torchao(_nvfp4_multiplied)),
        Format("MXFP4, torchao", {"_qdata": "U8", "_scale": "F8_E8M0"}, (), "", _torchao(_by_power)),
    )
)
