"""The number formats that are understood: what their tensors are named, and how they become numbers.

Which format a tensor is in is read from its own name, type and companions. To add a format, add an entry to TABLE, and
what makes its numbers to decoding.py; the arithmetic lies in unpack.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from moeprune.scoring.formats import decoding, torchao, vptq
from moeprune.scoring.formats.decoding import Make, Quantization, Stored


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a weight."""

    name: str
    endings: Mapping[str, str]  # ending -> types it may have, as in the header; the first is the weight's
    optional: tuple[str, ...]  # endings that may be there too
    plain: str  # ending of the plain tensor
    make: Make
    applies: Callable[[Quantization], bool] = lambda _quantization: True


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
AO = {"_qdata": f"{FP8} I8 U8 I32", "_scale": f"{SCALES} {F8}"}
HQQ = {"W_q": f"U8 I32 {REAL}", "scale": REAL, "zero": REAL, "shape": "I64", "packing": "U8"}
QUANTO = {"weight._data": f"I8 {FP8}", "weight._scale": REAL}
QUANTO_DENSE = {"weight._data._data": "U8", "weight._scale": REAL, "weight._shift": f"I8 {REAL}"}
AQLM = {"codes": "I8 I16 I32", "codebooks": REAL, "scales": REAL}
BITNET = {"weight": f"U8 {REAL}", "weight_scale": REAL}
GEMMA = {"weight": "U8 I8", "weight_scale": "F32"}
GEMMA_TABLE = {"embedding_quantized": "U8 I8", "embedding_scale": "F32"}
VPTQ = {"indices": "I32", "centroids.weight": REAL}
VPTQ_MORE = (
    "res_centroids.weight",
    "outlier_indices",
    "outlier_centroids.weight",
    "perm",
    "weight_scale",
    "weight_bias",
)
AO_TILES = {"_qdata": "I32", "_scale_and_zero": REAL}
# The first entry whose tensors are all there is taken.
TABLE = tuple(
    _smoothed(form)
    for form in (
        Format("MXFP4, stacked", {"_blocks": "U8", "_scales": "U8"}, (), "", decoding.mxfp4_stacked),
        Format("BitNet", BITNET, (), "weight", decoding.bitnet, _method("bitnet")),
        Format("INT, Gemma", GEMMA, (), "weight", decoding.gemma, _method("gemma")),
        Format("INT, Gemma's embeddings", GEMMA_TABLE, (), "weight", decoding.gemma, _method("gemma")),
        Format("NVFP4, modelopt", NVFP4, SVDQUANT, "weight", decoding.nvfp4_multiplied),
        Format("NVFP4, modelopt, stacked", NVFP4_STACKED, (), "", decoding.nvfp4_multiplied),
        Format("NVFP4, compressed-tensors", NVFP4_PACKED, (), "weight", decoding.nvfp4_divided),
        Format("MXFP4, compressed-tensors", MXFP4_PACKED, (), "weight", decoding.by_power),
        Format("MXFP4, Quark and modelopt", {"weight": "U8", "weight_scale": POWERS}, (), "weight", decoding.by_power),
        Format("INT4, modelopt", {"weight": "U8", "weight_scale": REAL}, (), "weight", decoding.int4_modelopt),
        Format("INT, compressed-tensors", PACKED_INT, (*ZERO, "weight_g_idx"), "weight", decoding.compressed_int),
        Format("FP8 by block", {"weight": FP8, "weight_scale_inv": SCALES}, (), "weight", decoding.fp8),
        Format("FP8 by tensor or channel", {"weight": FP8, "weight_scale": SCALES}, (), "weight", decoding.fp8),
        Format("FP8, DeepSeek-V4", {"weight": FP8, "scale": SCALES}, (), "weight", decoding.fp8),
        Format("FP8, stacked", {"": FP8, "_scale_inv": SCALES}, (), "", decoding.fp8),
        Format("FP8, stacked", {"": FP8, "_weight_scale": SCALES}, (), "", decoding.fp8),
        Format("FP8, stacked", {"": FP8, "_scale": SCALES}, (), "", decoding.fp8),
        Format("FP4, DeepSeek-V4", {"weight": "I8 U8", "scale": "F8_E8M0"}, (), "weight", decoding.by_power),
        Format("INT8, compressed-tensors", {"weight": "I8", "weight_scale": REAL}, ZERO, "weight", decoding.int8),
        Format("INT8, bitsandbytes", {"weight": "I8", "SCB": "F32"}, (), "weight", decoding.bitsandbytes_8bit),
        Format("NF4, bitsandbytes", NF4, NESTED, "weight", decoding.bitsandbytes_4bit),
        Format("FP4, bitsandbytes", BNB_FP4, NESTED, "weight", decoding.bitsandbytes_4bit),
        Format("AWQ", GPTQ_LIKE, (), "weight", decoding.awq, _method("awq")),
        Format("GPTQ", GPTQ_LIKE, ("g_idx",), "weight", decoding.gptq, _method("gptq", "round")),
        Format("MLX", {"weight": "U32", "scales": f"{REAL} U8"}, ("biases", "qbiases"), "weight", decoding.mlx),
        Format("HQQ", HQQ, (), "weight", decoding.hqq),
        Format("Quanto", QUANTO, (), "weight", decoding.quanto),
        Format("Quanto, 4 and 2 bits", QUANTO_DENSE, (), "weight", decoding.quanto),
        Format("AQLM", AQLM, (), "weight", decoding.aqlm),
        Format("VPTQ", VPTQ, VPTQ_MORE, "weight", vptq.decoded),
        Format("torchao", AO, ("_zero_point", "_per_tensor_scale"), "", torchao.decoded),
        Format("torchao, in tiles", AO_TILES, (), "", torchao.decoded),
    )
)
