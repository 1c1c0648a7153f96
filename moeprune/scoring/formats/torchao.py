"""torchao's tensors: the header of the shard says under the plain name what a tensor is; its parts lie beside it.

`experts.down_proj` is stored as `experts._down_proj_qdata`, `experts._down_proj_scale` and others. KINDS are all that
torchao 0.18 can save as safetensors; what it lays out anew for a CPU or shuffles for one kernel, it cannot.
"""

from __future__ import annotations

import torch

from moeprune.errors import InputError
from moeprune.scoring.formats import decoding, unpack
from moeprune.scoring.formats.decoding import Make, Quantization, Stored


def plain_name(stem: str) -> str:
    """The name under which torchao describes a tensor."""
    module, _, attribute = stem.rpartition(".")
    return f"{module}.{attribute.removeprefix('_')}"


def decoded(stored: Stored, about: Quantization) -> torch.Tensor:
    """The values of one tensor, by what its description says that it is."""
    kind = str(about.get("_type", "a tensor that its header does not describe"))
    if kind not in KINDS:
        raise InputError(f"torchao's {kind} is not understood; only {', '.join(KINDS)} are")
    if about.get("is_swizzled_scales"):
        raise InputError("torchao shuffled these scales for one GPU kernel, which is not understood")
    return KINDS[kind](stored, about)


def _mx(stored: Stored, about: Quantization) -> torch.Tensor:
    four_bits = not stored["_qdata"].dtype.is_floating_point
    return decoding.by_power(stored, about) if four_bits else decoding.fp8(stored, about)


def _int4(stored: Stored, about: Quantization) -> torch.Tensor:
    """Signed values, the first input of two in the low nibble; groups come first in scales and zero points [G, O]."""
    value_OI = unpack.signed_nibbles(stored["_qdata"], axis=-1)
    return unpack.affine(value_OI, stored["_scale"].mT, stored["_zero_point"].mT, about["block_size"][-1])


def _int4_in_tiles(stored: Stored, about: Quantization) -> torch.Tensor:
    """Tiles of tensor cores, outputs and inputs padded to whole ones; scale and zero point [G, O, 2] of value - 8."""
    scale_OG, zero_OG = (part.mT for part in stored["_scale_and_zero"].unbind(-1))
    value = unpack.affine(unpack.tiles(stored["_qdata"]) - 8, scale_OG, zero_OG, about["block_size"][-1])
    outputs, inputs = about["shape"][-2:]
    return value[..., :outputs, :inputs]


def _int4_in_words(stored: Stored, about: Quantization) -> torch.Tensor:
    """Unsigned values, eight in a word, lowest bits first, as Intel's GPUs have them."""
    zero_GO = stored["_zero_point"]
    if zero_GO.is_floating_point():
        raise InputError("torchao packed this Int4PlainInt32Tensor for an NPU, in an order that is not documented")
    value_OI = unpack.integers(stored["_qdata"], 4)
    return unpack.grouped(value_OI, stored["_scale"].mT, zero_GO.mT.int(), group=about["block_size"][-1])


KINDS: dict[str, Make] = {
    "Float8Tensor": decoding.fp8,
    "Int8Tensor": decoding.int8,
    "IntxUnpackedToInt8Tensor": decoding.int8,
    "MXTensor": _mx,
    "NVFP4Tensor": decoding.nvfp4_multiplied,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _int4_in_tiles,
    "Int4PlainInt32Tensor": _int4_in_words,
}
