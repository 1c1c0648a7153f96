"""A router that bitsandbytes has quantized, cut exactly.

The four-bit values of an expert lie together, two to a byte, and so do their scales, one for every `blocksize` values.
With double quantization the scales are themselves stored in eight bits, 256 neighbours to a scale of their own, and
such a run rarely ends where an expert does. Then they are written as what they mean, in float32, as if they had been
quantized once: code[absmax] * nested_absmax + nested_offset, which is what bitsandbytes computes when it loads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeprune.arrays import NDArray, np
from moeprune.checkpoint.headers import Tensor
from moeprune.errors import InputError


@dataclass(frozen=True)
class Made:
    """A tensor of the result whose bytes had to be computed."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


def made(tensor: Tensor, read: Callable[[str], bytes], experts: int, keep: Sequence[int]) -> Made | None:
    """The new form of a companion of a quantized router; None for one that has no place any more."""
    name = tensor.name
    base, _, companion = name.rpartition(".weight.")
    if companion.startswith("nested_"):
        return None
    if companion.startswith("quant_state"):
        state = _state(name, read(name), experts)
        inner = {key: value for key, value in state.items() if not key.startswith("nested_")}
        content = json.dumps(inner | {"shape": [len(keep), *state["shape"][1:]]}).encode()
        return Made("U8", (len(content),), content)
    scales_EB = _scales(base, read, experts)
    kept_KB = np.ascontiguousarray(scales_EB[list(keep)])
    return Made("F32", (kept_KB.size,), kept_KB.tobytes())


def _state(name: str, text: bytes, experts: int) -> Mapping[str, Any]:
    try:
        state = json.loads(text)
    except ValueError:
        raise InputError(f"{name} is not the JSON that bitsandbytes writes; the file is damaged") from None
    shape, block = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or len(shape) != 2 or shape[0] != experts or not isinstance(block, int):
        raise InputError(
            f"{name} describes a matrix of {shape} in blocks of {block}, not a router of {experts} experts"
        )
    if shape[1] % block:
        raise InputError(
            f"{name}: blocks of {block} values run across experts of {shape[1]}; dequantize the router first"
        )
    return state  # type: ignore[no-any-return]


def _scales(base: str, read: Callable[[str], bytes], experts: int) -> NDArray[np.float32]:
    """The scale of every block [E, B], in float32."""
    names = [f"{base}.weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
    state = next(_state(name, read(name), experts) for name in names if _there(read, name))
    raw = read(f"{base}.weight.absmax")
    if "nested_blocksize" not in state:
        return np.frombuffer(raw, dtype="<f4").reshape(experts, -1)
    code = np.frombuffer(read(f"{base}.weight.nested_quant_map"), dtype="<f4")
    coarse = np.frombuffer(read(f"{base}.weight.nested_absmax"), dtype="<f4")
    fine = np.frombuffer(raw, dtype=np.uint8)
    of_block = np.arange(len(fine)) // state["nested_blocksize"]
    scales: NDArray[np.float32] = code[fine] * coarse[of_block] + np.float32(state["nested_offset"])
    return scales.reshape(experts, -1)


def _there(read: Callable[[str], bytes], name: str) -> bool:
    try:
        read(name)
    except KeyError:
        return False
    return True
