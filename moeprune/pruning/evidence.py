"""What verify.py looks at, read by its own code: headers, expert numbers in names, counts in configs."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moeprune.errors import InputError, ResultError

PIECE = 1 << 18  # bytes compared at a time: two fit the processor's second cache; every call hands the interpreter over
COUNT_KEYS = re.compile(
    r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts|moe_num_primary_experts)"
)
QUANT_KEYS = re.compile(r"(quantization_config|quantization|compression_config)")
NUMBERED = {"experts", "local_experts", "gate_up_projs", "down_projs", "chunk_experts"}  # a number follows these
NUMBERED |= {"ffn_gate", "ffn_up", "ffn_down"}  # and these in GGUF files of 2023
EXPERT = re.compile(rf"\.(?P<word>{'|'.join(sorted(NUMBERED))})\.(?:expert_)?(?P<number>\d+)(?![^.])")
TOWER = re.compile(r"vision|audio|talker|code2wav|speech")
SINGLE_NOTE = re.compile(r"experts\.\d")
FIRST_SIZE = re.compile(r'("(?:shape|block_size)": \[)(\d+)(?=,)')
LISTED = "tensor_names"


class Stored(NamedTuple):  # there may be a million; a frozen dataclass takes twice as long to make
    """Where one tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def end(self) -> int:
        """Where the next one may begin."""
        return self.start + self.nbytes


Pair = tuple[str, Stored, Stored]  # name, before, after
RUN = 16 << 20  # bytes compared between two looks at whether other work has failed


@dataclass(frozen=True, slots=True)
class File:
    """What the header of a weight file says."""

    tensors: dict[str, Stored]
    notes: dict[str, str]  # its `__metadata__`


def header_of(path: Path, made: bool = False) -> File:
    """The header of a file. In one that was `made`, each tensor begins at a multiple of its width, as readers wish."""
    wrong = ResultError if made else InputError
    length, table = _table(path)
    about = table.pop("__metadata__", None) or {}
    tensors = {}
    base, end = 8 + length, 0
    for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
        (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
        if start != end or (made and (base + start) % _width(stop - start, shape)):
            raise wrong(f"{path}: {name} does not begin where it should")
        end = stop
        tensors[name] = Stored(path, entry["dtype"], shape, base + start, stop - start)
    if path.stat().st_size != base + end:
        raise wrong(f"{path} has {path.stat().st_size:,} bytes, but ends at byte {base + end:,} by its header")
    return File(tensors, about)


def _width(nbytes: int, shape: tuple[int, ...]) -> int:
    """Bytes of one number; 1 for numbers of less than a byte."""
    return nbytes // max(1, math.prod(shape)) or 1


def weight_files(folder: Path) -> list[Path]:
    """All weight files of a folder; a second copy in a vendor's naming does not count."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if not file.name.startswith("consolidated")] or files


def merged(files: Iterable[File]) -> dict[str, Stored]:
    """The tensors of several files."""
    return {name: tensor for file in files for name, tensor in file.tensors.items()}


def notes(files: Iterable[File], names: Collection[str], tensors: Mapping[str, Stored]) -> set[tuple[str, str]]:
    """The entries of `__metadata__` of those weight files that hold some of the names; not those on single experts.

    Where torchao tells a shape that begins as its tensor's does, an E takes the place of that size.
    """
    found = {item for file in files if not file.tensors.keys().isdisjoint(names) for item in file.notes.items()}
    return {(key, _without_size(key, text, tensors)) for key, text in found if not _renumbered(key)}


def _renumbered(key: str) -> bool:
    return key == LISTED or SINGLE_NOTE.search(key) is not None


def _without_size(described: str, text: str, tensors: Mapping[str, Stored]) -> str:
    module, _, attribute = described.rpartition(".")
    stored = tensors.get(f"{module}._{attribute}_qdata")
    if stored is None:
        return text
    return FIRST_SIZE.sub(lambda size: f"{size[1]}E" if int(size[2]) == stored.shape[0] else size[0], text)


def unlisted(files: Iterable[File]) -> list[str]:
    """Tensors that torchao lists in the header of a file and describes nowhere in it."""
    return [name for file in files for name in json.loads(file.notes.get(LISTED, "[]")) if name not in file.notes]


def _table(path: Path) -> tuple[int, dict[str, Any]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return length, json.loads(file.read(length))


class Reader:
    """Bytes of tensors; every file is opened once."""

    def __init__(self) -> None:
        self.handles: dict[Path, int] = {}
        self.buffers = bytearray(PIECE), bytearray(PIECE)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles.values():
            os.close(handle)

    def read(self, tensor: Stored, offset: int, length: int) -> bytes:
        """`length` bytes of a tensor."""
        data = os.pread(self._handle(tensor), length, tensor.start + offset)
        if len(data) != length:
            raise ResultError(f"{tensor.file} is shorter than its header says")
        return data

    def equal(self, before: Stored, pieces: list[tuple[int, int]], after: Stored, total: int) -> bool:
        """Whether pieces (offset, length) behind the start of one tensor are, in a row, `total` bytes of another."""
        at = 0
        for offset, length in _joined(pieces):
            if not self._equal_piece(before, offset, after, at, length):
                return False
            at += length
        return at == total

    def _equal_piece(self, before: Stored, offset: int, after: Stored, at: int, length: int) -> bool:
        whole = length - length % PIECE
        for done in range(0, whole, PIECE):
            self._fill(self.buffers[0], before, offset + done)
            self._fill(self.buffers[1], after, at + done)
            if self.buffers[0] != self.buffers[1]:
                return False
        return self.read(before, offset + whole, length - whole) == self.read(after, at + whole, length - whole)

    def _fill(self, buffer: bytearray, tensor: Stored, offset: int) -> None:
        if os.preadv(self._handle(tensor), [buffer], tensor.start + offset) != len(buffer):
            raise ResultError(f"{tensor.file} is shorter than its header says")

    def _handle(self, tensor: Stored) -> int:
        if tensor.file not in self.handles:
            self.handles[tensor.file] = os.open(tensor.file, os.O_RDONLY)
        return self.handles[tensor.file]


def _joined(pieces: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Pieces that touch, as one."""
    held = (0, 0)
    for offset, length in pieces:
        if held[0] + held[1] == offset:
            held = (held[0], held[1] + length)
        else:
            yield held
            held = (offset, length)
    yield held


def neighbours(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Runs of tensors that follow each other without a gap, before and after; none longer than RUN."""
    run: list[Pair] = []
    behind, room = None, RUN
    for pair in pairs:
        _, before, after = pair
        if run and (room <= 0 or (before.file, before.start, after.start) != behind):
            yield run
            run, room = [], RUN
        run.append(pair)
        behind = (before.file, before.end, after.end)
        room -= after.nbytes
    if run:
        yield run


def expert_in(name: str, block: str) -> re.Match[str] | None:
    """Where the name of a tensor of a block carries the number of the expert that it belongs to."""
    return EXPERT.search(name, len(block))


def counts_in(config: Any) -> Iterator[int]:
    """Every number of experts that a config states, at any depth."""
    for key, value in items(config):
        for item in value if isinstance(value, list) else [value]:
            if COUNT_KEYS.fullmatch(key) and type(item) is int:
                yield item


def items(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth; towers for images and sound have experts of their own."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if not TOWER.search(key):
            yield key, value
            yield from items(value)


def differences(
    old: Any, new: Any, allowed: Callable[[str, Any, Any], bool], at: tuple[str, ...] = ()
) -> Iterator[str]:
    """Every place where two configs differ in a way that is not allowed; sections on quantization are left out."""
    if isinstance(old, dict) and isinstance(new, dict):
        if list(old) != list(new):
            yield f"{'.'.join(at) or 'the top level'} has other keys, or in another order"
        for key in old.keys() & new.keys():
            if not QUANT_KEYS.fullmatch(key):
                yield from differences(old[key], new[key], allowed, (*at, key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for before, after in zip(old, new, strict=True):
            yield from differences(before, after, allowed, at)
    elif old != new and not allowed(at[-1] if at else "", old, new):
        yield f"{'.'.join(at)} went from {old!r} to {new!r}"


def files_below(folder: Path) -> Iterator[Path]:
    """Every file, but not those in folders whose name begins with a dot."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path
        elif not path.name.startswith("."):
            yield from files_below(path)


def load(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    loaded = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(loaded, dict):
        raise ResultError(f"{path} is not a JSON object")
    return loaded
