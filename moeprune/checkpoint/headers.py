"""The header of one safetensors file: which tensor lies where. Every claim in it is checked before it is believed."""

from __future__ import annotations

import json
import math
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from moeprune.errors import InputError

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself


class Tensor(NamedTuple):  # there may be a million; a frozen dataclass takes twice as long to make
    """One tensor on disk: bytes `start` to `end` of `file`, absolute. The first axis is the slowest."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size on disk."""
        return self.end - self.start


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, in file order, and its `__metadata__`."""
    size = path.stat().st_size
    entries, length = _header_json(path, size)
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: __metadata__ must map strings to strings; the file is damaged")
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=attrgetter("start", "end"))
    _check_cover(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}, metadata


def _header_json(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header as a dictionary, and its length in bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size == 0:
            raise InputError(f"{path} is empty; fetch the file again")
        if size < 10 or length > size - 8:
            raise InputError(
                f"{path} is truncated: {size:,} bytes, its header alone claims {length:,}; fetch the file again"
            )
        if length > LARGEST_HEADER:
            raise InputError(
                f"{path} claims a header of {length:,} bytes; no sound file has more than {LARGEST_HEADER:,}"
            )
        text = file.read(length)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has a damaged header: {error}") from None
    if not isinstance(entries, dict):
        raise InputError(f"{path} has a damaged header: it must be a JSON object of named tensors")
    return entries, length


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return entries


def _tensor(path: Path, name: str, entry: Any, base: int) -> Tensor:
    """One entry of the header, believed only when dtype, shape and byte range agree."""
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets, dtype = fields.get("shape"), fields.get("data_offsets"), str(fields.get("dtype"))
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise InputError(f"{path}: the header entry of {name} is damaged: {str(entry)[:100]}")
    if dtype not in BITS:
        raise InputError(f"{path}: tensor {name} has the unknown dtype {dtype!r}; add its width to BITS in headers.py")
    start, end = offsets
    if end - start != (math.prod(shape) * BITS[dtype] + 7) // 8:
        raise InputError(
            f"{path}: tensor {name} of {dtype} {shape} cannot take {end - start:,} bytes; the file is damaged"
        )
    return Tensor(name, dtype, tuple(shape), path, base + start, base + end)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of numbers that are not negative."""
    if type(value) is not list:
        return False
    for item in value:  # noqa: SIM110 - a generator takes twice as long
        if type(item) is not int or not 0 <= item < 2**63:
            return False
    return True


def _check_cover(path: Path, tensors: list[Tensor], base: int, size: int) -> None:
    """The tensors must fill the file from its header to its end, without overlap or hole, as the format demands."""
    at = base
    for tensor in tensors:
        if tensor.start != at:
            what = "overlaps the one before it" if tensor.start < at else "leaves a hole before it"
            raise InputError(f"{path}: tensor {tensor.name} {what} (byte {tensor.start:,}, expected {at:,})")
        at = tensor.end
    if at > size:
        raise InputError(f"{path} is truncated: {size:,} bytes, its tensors need {at:,}; fetch the file again")
    if at < size:
        raise InputError(f"{path} has {size - at:,} bytes behind its last tensor; the file is damaged")
