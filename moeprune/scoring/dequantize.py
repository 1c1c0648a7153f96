"""Tensors on disk -> plain tensors under plain names, so that a quantized checkpoint loads like any other.

A recipe says which stored tensors make up one plain tensor and how. Which format a tensor is in is read from its own
name, type and companions, tensor by tensor: one checkpoint may mix formats. To add a format, add an entry to TABLE.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moeprune.checkpoint import gguf
from moeprune.checkpoint.folder import Checkpoint, Tensor
from moeprune.checkpoint.formats import quantization_of
from moeprune.errors import InputError
from moeprune.scoring import unpack

Stored = Mapping[str, torch.Tensor]  # ending of the name -> tensor
Make = Callable[[Stored, torch.dtype], torch.Tensor]  # to the type that computes
Quantization = Mapping[str, Any]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one plain tensor comes from stored ones. Without `make` it is the stored one."""

    sources: Mapping[str, str]  # ending -> stored name
    make: Make | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a weight: what its tensors are named, and how they become numbers."""

    name: str
    endings: Mapping[str, str]  # ending -> types it may have, as in the header; the first is the weight's
    optional: tuple[str, ...]  # endings that may be there too
    plain: str  # ending of the plain tensor
    make: Callable[[Stored, Quantization], torch.Tensor]
    applies: Callable[[Quantization], bool] = lambda _quantization: True


def _mxfp4_stacked(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    value = unpack.fp4(stored["_blocks"]) * unpack.exponents(stored["_scales"]).unsqueeze(-1)
    return value.flatten(-2).transpose(1, 2)


def _fp8(stored: Stored, quantization: Quantization) -> torch.Tensor:
    (weight, scale), block = _first_two(stored), quantization.get("weight_block_size")
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = unpack.exponents(scale)
    return unpack.scaled(weight, scale, (int(block[0]), int(block[1])) if block else None)


def _by_power(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    weight, scale = _first_two(stored)
    return unpack.scaled(unpack.fp4(weight), unpack.exponents(scale))


def _nvfp4_divided(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    scale = stored["weight_scale"].float() / stored["weight_global_scale"].float()
    return unpack.scaled(unpack.fp4(stored["weight_packed"]), scale)


def _nvfp4_multiplied(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    weight, scale, outer = tuple(stored.values())[:3]
    outer = outer.float()
    if outer.dim() and weight.dim() > 2:  # stacked: one for each expert, or one for each half of its rows
        outer = unpack.spread(outer.reshape(len(weight), -1, 1), scale.shape)
    return unpack.scaled(unpack.fp4(weight), scale.float() * outer)


def _compressed_int(stored: Stored, quantization: Quantization) -> torch.Tensor:
    shape = stored["weight_shape"].tolist()
    bits = _compressed_bits(quantization) or stored["weight_packed"].shape[-1] * 32 // shape[-1]
    value, zero = unpack.integers(stored["weight_packed"], bits, shape[-1]) - 2 ** (bits - 1), None
    scale = stored["weight_scale"]
    if "weight_zero_point" in stored:
        zero = unpack.integers(stored["weight_zero_point"].mT.contiguous(), bits, shape[-2]).mT - 2 ** (bits - 1)
    return unpack.grouped(value, scale, zero, stored.get("weight_g_idx"))


def _compressed_bits(quantization: Quantization) -> int:
    """The number of bits where the settings name just one; else 0."""
    groups = [group.get("weights") or {} for group in quantization.get("config_groups", {}).values()]
    bits = {int(weights["num_bits"]) for weights in groups if weights.get("type") == "int"}
    return bits.pop() if len(bits) == 1 else 0


def _int8(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    value, scale, zero = stored["weight"], stored["weight_scale"], stored.get("weight_zero_point")
    return unpack.scaled(value.int() - zero.int() if zero is not None else value, scale)


def _bitsandbytes_8bit(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    return stored["weight"].float() * (stored["SCB"].float().unsqueeze(-1) / 127)


def _bits(stored: Stored) -> int:
    """Zero points lie as densely as the weights: bits = words * 32 / outputs. A module may have its own number."""
    words, outputs = stored["qzeros"].shape[-1], stored["scales"].shape[-1]
    if words * 32 % outputs:
        raise InputError(f"{outputs} outputs with {words} words of zero points: the number of bits is unclear")
    return words * 32 // outputs


def _awq(stored: Stored, _quantization: Quantization) -> torch.Tensor:
    if _bits(stored) != 4:
        raise InputError(f"AWQ with {_bits(stored)} bits is not understood; only 4 are known")
    return unpack.awq(stored["qweight"], stored["qzeros"], stored["scales"])


def _gptq(stored: Stored, quantization: Quantization) -> torch.Tensor:
    tensors = stored["qweight"], stored["qzeros"], stored["scales"], stored.get("g_idx")
    first = quantization.get("checkpoint_format", "gptq") != "gptq_v2"
    return unpack.gptq(*tensors, bits=_bits(stored), first_version=first)


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
    if "biases" not in stored:
        return _mlx_float(weight, scale, str(quantization.get("mode", "mxfp4")))
    group = int(quantization.get("group_size", 64))
    bits = weight.shape[-1] * 32 // (scale.shape[-1] * group)  # may differ from module to module
    value = unpack.integers(weight, bits)
    index_I = torch.arange(value.shape[-1], device=value.device) // group
    spread = scale.float().index_select(-1, index_I), stored["biases"].float().index_select(-1, index_I)
    return value.float() * spread[0] + spread[1]


def _mlx_float(weight: torch.Tensor, scale: torch.Tensor, mode: str) -> torch.Tensor:
    raw = weight.view(torch.uint8)
    value = raw.view(torch.float8_e4m3fn) if mode == "mxfp8" else unpack.fp4(raw)
    return unpack.scaled(value, scale.view(torch.float8_e4m3fn) if mode == "nvfp4" else unpack.exponents(scale))


def _first_two(stored: Stored) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = tuple(stored.values())[:2]
    return first, second


def _method(*words: str) -> Callable[[Quantization], bool]:
    def applies(quantization: Quantization) -> bool:
        named = f"{quantization.get('quant_method', '')} {quantization.get('packing_format', '')}".lower()
        return any(word in named for word in words)

    return applies


REAL = "F32 BF16 F16"
SCALES = f"{REAL} F8_E8M0 U8"
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
MXFP4_PACKED = {"weight_packed": "U8", "weight_scale": "U8 F8_E8M0"}
ZERO = ("weight_zero_point",)
# The first entry whose tensors are all there is taken.
TABLE = (
    Format("MXFP4, stacked", {"_blocks": "U8", "_scales": "U8"}, (), "", _mxfp4_stacked),
    Format("NVFP4, modelopt", NVFP4, (), "weight", _nvfp4_multiplied),
    Format("NVFP4, modelopt, stacked", NVFP4_STACKED, (), "", _nvfp4_multiplied),
    Format("NVFP4, compressed-tensors", NVFP4_PACKED, (), "weight", _nvfp4_divided),
    Format("MXFP4, compressed-tensors", MXFP4_PACKED, (), "weight", _by_power),
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
    Format("MLX", {"weight": "U32", "scales": f"{REAL} U8"}, ("biases",), "weight", _mlx),
)
# MLX stacks experts under a name of its own; transformers knows them one by one.
MLX_STACK = re.compile(r"(?P<module>.*\.)(?:switch_mlp|switch_glu)\.(?P<rest>.+)")


def recipes(checkpoint: Checkpoint) -> Mapping[str, Recipe]:
    """Plain name -> recipe, for every tensor of the checkpoint."""
    quantization = quantization_of(checkpoint)
    made: dict[str, Recipe] = {}
    used: set[str] = set()
    for name in checkpoint.tensors:
        found = _match(name, checkpoint, quantization)
        if found is not None:
            form, stem, sources = found
            used.update(sources.values())
            own = quantization.get(stem.rstrip("."))  # MLX: a module's own settings
            settings = {**quantization, **own} if isinstance(own, dict) else quantization
            made[stem + form.plain] = Recipe(sources, _with(form.make, settings))
    made |= {name: Recipe({"": name}) for name in checkpoint.tensors if name not in used}
    return dict(item for name, recipe in made.items() for item in _unstacked(name, recipe, checkpoint))


def _with(make: Callable[[Stored, Quantization], torch.Tensor], settings: Quantization) -> Make:
    return lambda stored, dtype: make(stored, settings).to(dtype)


def _match(name: str, checkpoint: Checkpoint, quantization: Quantization) -> tuple[Format, str, dict[str, str]] | None:
    """The format whose weight this tensor is, its stem, and its companions."""
    for form in TABLE:
        main = next(iter(form.endings))
        stem = name.removesuffix(main)
        whole = not main[:1].isalpha() or stem[-1:] in ("", ".")  # qweight is no weight
        if not name.endswith(main) or not whole or not form.applies(quantization):
            continue
        names = {ending: stem + ending for ending in form.endings}
        if all(_has(checkpoint, names[ending], types) for ending, types in form.endings.items()):
            extra = {ending: stem + ending for ending in form.optional if stem + ending in checkpoint.tensors}
            return form, stem, names | extra
    return None


def _has(checkpoint: Checkpoint, name: str, types: str) -> bool:
    return name in checkpoint.tensors and checkpoint.tensors[name].dtype in types.split()


def _unstacked(name: str, recipe: Recipe, checkpoint: Checkpoint) -> Iterator[tuple[str, Recipe]]:
    """One recipe for each expert of an MLX stack; any other as it is."""
    match = MLX_STACK.fullmatch(name)
    if match is None:
        yield name, recipe
        return
    experts = checkpoint.tensors[next(iter(recipe.sources.values()))].shape[0]
    for expert in range(experts):
        plain = f"{match['module']}experts.{expert}.{match['rest']}"
        yield plain, Recipe(recipe.sources, partial(_one_expert, make=recipe.make, expert=expert))


def _one_expert(stored: Stored, dtype: torch.dtype, make: Make | None, expert: int) -> torch.Tensor:
    rows = {ending: tensor[expert] for ending, tensor in stored.items()}
    return make(rows, dtype) if make is not None else next(iter(rows.values())).to(dtype)


class Lazy:
    """A plain tensor that is made when transformers asks for it, on the device that computes."""

    def __init__(self, recipe: Recipe, stored: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device):
        self.recipe, self.dtype, self.device = recipe, dtype, device
        self.stored = {ending: stored[name] for ending, name in recipe.sources.items()}

    def __getitem__(self, _everything: Any) -> torch.Tensor:
        if self.recipe.make is None:
            return next(iter(self.stored.values()))
        on_device = {ending: tensor.to(self.device) for ending, tensor in self.stored.items()}
        return self.recipe.make(on_device, self.dtype).contiguous()


def read_tensor(tensor: Tensor) -> torch.Tensor:
    """The bytes of a tensor, read into memory of its own."""
    blocks = tensor.dtype in gguf.NUMBERS and tensor.dtype not in DTYPES  # of bytes along the last axis
    if not blocks and tensor.dtype not in DTYPES:
        raise InputError(f"{tensor.file}: {tensor.name} has dtype {tensor.dtype}, which torch cannot hold")
    buffer = torch.empty(tensor.nbytes, dtype=torch.uint8)
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        if tensor.nbytes and file.readinto(buffer.numpy().data) != tensor.nbytes:
            raise InputError(f"{tensor.file} became shorter while it was read; nobody may write to the model meanwhile")
    return buffer.view(*tensor.shape[:-1], -1) if blocks else buffer.view(DTYPES[tensor.dtype]).view(tensor.shape)
