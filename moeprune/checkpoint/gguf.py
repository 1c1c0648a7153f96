"""GGUF files: read the header of one, and write one with other numbers in it.

Layout: magic, version, counts; key-value pairs; for each tensor its name, dimensions (fastest first), type and offset;
then, aligned, the tensors. Every quantized type packs whole blocks along the fastest dimension, so rows along the
slowest one (the experts) are plain byte ranges whatever the type.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moeprune.checkpoint.headers import Tensor
from moeprune.errors import InputError

# Type number -> name, values in a block, bytes of a block.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
Value = int | float | bool | str


@dataclass(frozen=True)
class Entry:
    """One key-value pair: its bytes on disk, and the value unless it is an array."""

    type: int
    raw: bytes
    value: Value | None


@dataclass(frozen=True)
class Header:
    """All that precedes the tensors of one file."""

    version: int
    entries: Mapping[str, Entry]
    tensors: Mapping[str, Tensor]  # in file order; shapes slowest axis first
    alignment: int


class Bytes(Protocol):
    """Those of a whole file, wherever they are."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes: ...


class _Reader:
    """A cursor over the bytes of a file that never trusts a length."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path, self.data, self.at = path, data, 0

    def number(self, code: str) -> Any:
        size = struct.calcsize(code)
        return struct.unpack(f"<{code}", self.skip(size))[0]

    def skip(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            wanted = f"{size:,} bytes wanted at {self.at:,}"
            raise InputError(f"{self.path} is truncated or damaged: {wanted}; fetch it again")
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self) -> str:
        try:
            return self.skip(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{self.path} has a damaged header: text at byte {self.at} is not UTF-8") from None

    def entry(self) -> Entry:
        kind = self.number("I")
        start = self.at
        value = self.value(kind)
        return Entry(kind, self.data[start : self.at], value)

    def value(self, kind: int) -> Value | None:
        """One value; an array is passed over."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])  # type: ignore[no-any-return]
        if kind == STRING:
            length = self.number("Q")
            return self.skip(length).decode("utf-8", errors="replace")
        if kind != ARRAY:
            raise InputError(f"{self.path} has a damaged header: value of unknown type {kind} at byte {self.at}")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[inner]))
        elif inner == STRING:
            for _ in range(min(count, len(self.data))):
                self.skip(self.number("Q"))
        else:
            raise InputError(f"{self.path} has a damaged header: array of type {inner} at byte {self.at}")
        return None


def read_header(path: Path) -> Header:
    """The header of one GGUF file, every claim checked."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is no GGUF file: it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return parse(path, data)


def parse(path: Path, data: Bytes) -> Header:
    """The header at the beginning of a file's bytes."""
    reader = _Reader(path, data)
    reader.skip(4)
    version = reader.number("I")
    if version not in (2, 3):
        raise InputError(f"{path} is GGUF of version {version}; versions 2 and 3 in little-endian order can be read")
    tensor_count, entry_count = reader.number("Q"), reader.number("Q")
    entries: dict[str, Entry] = {}
    for _ in range(_sane(path, entry_count, len(data))):
        key = reader.text()
        if key in entries:
            raise InputError(f"{path} has a damaged header: key {key} appears twice")
        entries[key] = reader.entry()
    infos = [_info(reader) for _ in range(_sane(path, tensor_count, len(data)))]
    alignment = entries["general.alignment"].value if "general.alignment" in entries else 32
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"{path} has a damaged header: alignment {alignment} is no power of two")
    base = _aligned(reader.at, alignment)
    tensors = [_tensor(path, info, base, alignment) for info in infos]
    _check_places(path, tensors, len(data))
    return Header(version, entries, {tensor.name: tensor for tensor in tensors}, alignment)


def _sane(path: Path, count: int, size: int) -> int:
    if count > size // 8:
        raise InputError(f"{path} has a damaged header: {count:,} entries cannot fit into {size:,} bytes")
    return count


def _info(reader: _Reader) -> tuple[str, list[int], int, int]:
    """Name, dimensions as on disk, type, offset."""
    name = reader.text()
    axes = reader.number("I")
    if axes > 8:
        raise InputError(f"{reader.path} has a damaged header: tensor {name} has {axes} axes")
    return name, [reader.number("Q") for _ in range(axes)], reader.number("I"), reader.number("Q")


def _tensor(path: Path, info: tuple[str, list[int], int, int], base: int, alignment: int) -> Tensor:
    name, sizes, kind, offset = info
    if kind not in TYPES:
        raise InputError(f"{path}: tensor {name} has the unknown type {kind}; add its block size to TYPES in gguf.py")
    dtype, values, size = TYPES[kind]
    if offset % alignment or (sizes and sizes[0] % values) or math.prod(sizes) >= 2**60:
        raise InputError(f"{path}: tensor {name} of {dtype} {sizes} at {offset} cannot be; the file is damaged")
    start = base + offset
    return Tensor(name, dtype, tuple(reversed(sizes)), path, start, start + math.prod(sizes) // values * size)


def _check_places(path: Path, tensors: Sequence[Tensor], size: int) -> None:
    names = {tensor.name for tensor in tensors}
    if len(names) < len(tensors):
        raise InputError(f"{path} has a damaged header: two tensors have the same name")
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start < end:
            raise InputError(f"{path}: tensor {tensor.name} overlaps the one before it; the file is damaged")
        end = tensor.end
    if end > size:
        raise InputError(f"{path} is truncated: {size:,} bytes, its tensors need {end:,}; fetch the file again")


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def values(headers: Sequence[Header]) -> dict[str, Any]:
    """Every scalar and text of a set of files under its key; the first file to name a key is believed."""
    merged: dict[str, Any] = {}
    for header in headers:
        for key, entry in header.entries.items():
            if entry.value is not None:
                merged.setdefault(key, entry.value)
    return merged


def length(entry: Entry) -> int:
    """How many values an array holds."""
    count: int = struct.unpack_from("<Q", entry.raw, 4)[0] if entry.type == ARRAY else 0
    return count


def numbers(entry: Entry) -> list[Any]:
    """What an array of numbers holds; nothing where the entry is anything else."""
    if entry.type != ARRAY or (kind := struct.unpack_from("<I", entry.raw)[0]) not in SCALARS:
        return []
    return list(struct.unpack_from(f"<{length(entry)}{SCALARS[kind]}", entry.raw, 12))


def texts(entry: Entry) -> list[str] | None:
    """What an array of texts holds; nothing where the entry is anything else."""
    if entry.type != ARRAY or struct.unpack_from("<I", entry.raw)[0] != STRING:
        return None
    found, at = [], 12
    for _ in range(length(entry)):
        (size,) = struct.unpack_from("<Q", entry.raw, at)
        found.append(entry.raw[at + 8 : at + 8 + size].decode("utf-8", errors="replace"))
        at += 8 + size
    return found


def with_number(entry: Entry, number: int) -> bytes:
    """The bytes of the entry with another number in it."""
    return struct.pack(f"<{SCALARS[entry.type]}", number)


def shortened(entry: Entry, count: int) -> bytes:
    """The bytes of an array of numbers, the first so many of them."""
    (kind,) = struct.unpack_from("<I", entry.raw)
    return struct.pack("<IQ", kind, count) + entry.raw[12 : 12 + count * struct.calcsize(SCALARS[kind])]


def new_header(header: Header, changes: Mapping[str, bytes], tensors: Sequence[Tensor]) -> tuple[bytes, list[int]]:
    """The bytes of a header with changed values, padded up to the tensors, and where each tensor begins in the file.

    `tensors` are those of the new file, in order; of each, name, dtype, shape and nbytes are used. A key that is not
    there stays away. The writer pads every tensor to `header.alignment`.
    """
    parts = [b"GGUF", struct.pack("<IQQ", header.version, len(tensors), len(header.entries))]
    for key, entry in header.entries.items():
        parts += [_text(key), struct.pack("<I", entry.type), changes.get(key, entry.raw)]
    at, offsets = 0, []
    for tensor in tensors:
        offsets.append(at)
        sizes = tuple(reversed(tensor.shape))
        parts += [_text(tensor.name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        parts.append(struct.pack("<IQ", NUMBERS[tensor.dtype], at))
        at = _aligned(at + tensor.nbytes, header.alignment)
    size = sum(map(len, parts))
    base = _aligned(size, header.alignment)
    return b"".join(parts) + bytes(base - size), [base + offset for offset in offsets]


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def split_set(path: Path, there: Callable[[Path], bool] = Path.is_file) -> list[Path]:
    """All files of the set that a file belongs to, in order; the file alone when it is no part of one."""
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    files = [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [file.name for file in files if not there(file)]
    if missing:
        raise InputError(f"{path} is part of a set of {count}, but {missing[0]} is missing; fetch it again")
    return files
