"""The number types of GGUF: blocks of bytes -> values, a chunk at a time, so that little is needed beside the result.

transformers brings what most files are made of (K-quants, IQ); the types that it lacks are in TABLE. All give float32
first, rounded once to the type that computes. Legend: N blocks, B bytes of a block, V values of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers.integrations.gguf.dequant import GGML_NAME
from transformers.integrations.gguf.dequant import dequantize as dequantize_known

from moeprune.checkpoint import gguf
from moeprune.errors import InputError

PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}
SCALE = ".scale"  # beside NVFP4: a factor for the matrix, or for each expert
AT_ONCE = 2**20  # values; the steps between take some 10 times as many bytes, and four times more run slower
FP4_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def dequantize(raw: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Bytes [..., row bytes] of a type -> values [..., row], on the device that the bytes are on."""
    if kind in PLAIN:
        found = raw.view(PLAIN[kind])
        return found.to(dtype) if found.is_floating_point() else found
    make = _maker(kind)
    _, values, size = gguf.TYPES[gguf.NUMBERS[kind]]
    blocks_NB = raw.reshape(-1, size)
    made_NV = torch.empty(len(blocks_NB), values, dtype=dtype, device=raw.device)
    step = AT_ONCE // values
    for start in range(0, len(blocks_NB), step):
        made_NV[start : start + step] = make(blocks_NB[start : start + step])
    return made_NV.view(*raw.shape[:-1], -1)


def values(
    stored: Mapping[str, torch.Tensor], source: str, kind: str, dtype: torch.dtype, row: int | None = None
) -> torch.Tensor:
    """The values of a source or of one of its rows, times the factor that may lie beside it."""
    raw, factor = stored[source], stored.get(source + SCALE)
    raw = raw if row is None else raw[row]
    if factor is None:
        return dequantize(raw, kind, dtype)
    factor = factor if factor.numel() == 1 or row is None else factor[row]
    value = dequantize(raw, kind, torch.float32)
    return (value * factor.reshape(-1, *[1] * (value.dim() - 1))).to(dtype)


def check(kind: str, name: str) -> None:
    """Refuse a type whose values cannot be made."""
    if kind not in PLAIN and kind not in TABLE and kind not in GGML_NAME.values():
        raise InputError(
            f"{name} is stored as {kind}, whose values cannot be made here; score the original model and cut this file "
            "with those scores (--other-scores)"
        )


def _maker(kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    number = gguf.NUMBERS[kind]
    return TABLE.get(kind, lambda blocks: dequantize_known(blocks.reshape(-1), number).view(len(blocks), -1))


def _half(bytes_N2: torch.Tensor) -> torch.Tensor:
    """One number of 16 bits for each block, as a column."""
    return bytes_N2.contiguous().view(torch.float16).float()


def _nibbles(bytes_NB: torch.Tensor) -> torch.Tensor:
    """All low halves of the bytes, then all high ones."""
    return torch.cat((bytes_NB & 15, bytes_NB >> 4), dim=-1)


def _bits(bytes_NB: torch.Tensor) -> torch.Tensor:
    """The single bits, lowest first."""
    places = torch.arange(8, dtype=torch.uint8, device=bytes_NB.device)
    return ((bytes_NB.unsqueeze(-1) >> places) & 1).flatten(-2)


def _q5_0(blocks_NB: torch.Tensor) -> torch.Tensor:
    five = _nibbles(blocks_NB[:, 6:]) | (_bits(blocks_NB[:, 2:6]) << 4)
    return _half(blocks_NB[:, :2]) * (five.float() - 16)


def _q5_1(blocks_NB: torch.Tensor) -> torch.Tensor:
    five = _nibbles(blocks_NB[:, 8:]) | (_bits(blocks_NB[:, 4:8]) << 4)
    return _half(blocks_NB[:, :2]) * five.float() + _half(blocks_NB[:, 2:4])


def _tq1_0(blocks_NB: torch.Tensor) -> torch.Tensor:
    """Five digits of base three in each byte, as a fraction: a digit is what a product with three pushes over 256."""
    parts = []
    for start, end, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        powers = 3 ** torch.arange(digits, device=blocks_NB.device)
        moved = (blocks_NB[:, None, start:end].int() * powers.int().view(1, -1, 1)) & 255
        parts.append(((moved * 3) >> 8).flatten(1))
    return _half(blocks_NB[:, 52:54]) * (torch.cat(parts, dim=1).float() - 1)


def _tq2_0(blocks_NB: torch.Tensor) -> torch.Tensor:
    places = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=blocks_NB.device).view(1, 1, 4, 1)
    two = (blocks_NB[:, :64].reshape(-1, 2, 1, 32) >> places) & 3
    return _half(blocks_NB[:, 64:66]) * (two.flatten(1).float() - 1)


def _fp4(bytes_NB: torch.Tensor) -> torch.Tensor:
    """Twice the values of E2M1."""
    table = torch.tensor(FP4_DOUBLED, dtype=torch.float32, device=bytes_NB.device)
    return table[_nibbles(bytes_NB).int()]


def _mxfp4(blocks_NB: torch.Tensor) -> torch.Tensor:
    halved = torch.ldexp(torch.ones(len(blocks_NB), 1, device=blocks_NB.device), blocks_NB[:, :1].int() - 128)
    return halved * _fp4(blocks_NB[:, 1:])


def _nvfp4(blocks_NB: torch.Tensor) -> torch.Tensor:
    """Four scales of E4M3 without a sign, each for 16 values; 0x7F, which is no number, stands for zero."""
    raw = blocks_NB[:, :4].int()
    power, fraction = (raw >> 3) & 15, (raw & 7).float()
    scale_N4 = torch.where(power == 0, torch.ldexp(fraction, power - 10), torch.ldexp(fraction + 8, power - 11))
    scale_N4 = torch.where(raw == 127, 0.0, scale_N4)
    return (scale_N4.unsqueeze(-1) * _fp4(blocks_NB[:, 4:].reshape(-1, 4, 8))).flatten(1)


TABLE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
