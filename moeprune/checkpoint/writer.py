"""Write a checkpoint: byte ranges streamed into new safetensors files, all of it beside the result, then renamed.

growing.py moves the bytes; here is which of them, in what order, and what makes a folder of files a result.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from json.encoder import encode_basestring as quoted
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moeprune.checkpoint.growing import PAGE, Growing
from moeprune.checkpoint.headers import BITS
from moeprune.console import size
from moeprune.errors import FULL_DISK, InputError, MachineError
from moeprune.metadata import alone_in, sync

SYNC_FILE_RANGE_WRITE = 2
INDEX = "model.safetensors.index.json"


class Entry(NamedTuple):
    """One tensor of a new file: ranges of bytes of an old file or, where they must be computed, what `make` yields."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: Path
    ranges: tuple[tuple[int, int], ...] = ()
    make: Callable[[], Iterable[bytes]] | None = None


@dataclass(frozen=True)
class NewFile:
    """One file of weights to write: its first bytes, then the entries in this order."""

    name: str
    head: bytes
    entries: tuple[Entry, ...]
    indexed: bool = False
    alignment: int = 1  # every entry is padded to a multiple of this

    @cached_property
    def nbytes(self) -> int:
        """Its size on disk."""
        return len(self.head) + sum(entry.nbytes + -entry.nbytes % self.alignment for entry in self.entries)


def aligned(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """The entries in an order in which each begins at a multiple of its width, as readers map tensors in place.

    Their own where it will do, so that neighbours stay neighbours and are copied as one; else wide types first.
    """
    at = 0
    for entry in entries:
        if at % max(1, BITS[entry.dtype] // 8):
            return tuple(sorted(entries, key=lambda entry: -BITS[entry.dtype]))
        at += entry.nbytes
    return tuple(entries)


def packed(entries: Iterable[Entry], limit: int) -> list[tuple[Entry, ...]]:
    """The entries in their order, cut into groups of at most `limit` bytes; a larger entry gets a group of its own."""
    groups: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not groups or entry.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(entry)
        room -= entry.nbytes
    return [tuple(group) for group in groups]


def header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """The length and the JSON that a safetensors file begins with, padded with spaces as the format allows."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for entry in entries:
        table[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [at, at + entry.nbytes]}
        at += entry.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * ((_good_phase(entries) - 8 - len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


def _good_phase(entries: Sequence[Entry]) -> int:
    """Where within a page the data should begin, so that most bytes keep their place in it: whole pages copy faster."""
    wanted: Counter[int] = Counter()
    at = 0
    for entry in entries:
        offset = at
        for start, end in entry.ranges:
            wanted[(start - offset) % PAGE] += end - start
            offset += end - start
        at += entry.nbytes
    return next((phase for phase, _ in wanted.most_common() if phase % 8 == 0), 0)  # and 8 keeps every type aligned


def write_file(folder: Path, file: NewFile, go_on: Callable[[], None]) -> Path:
    """Write one file of weights; the caller syncs it. `go_on` is called before each step and may raise."""
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with explained(path), path.open("xb", buffering=0) as raw, contextlib.ExitStack() as opened:
        sources: dict[Path, BinaryIO] = {}
        out = Growing(raw, go_on)
        out.write(file.head)
        for source, start, end, content in _steps(file):
            if content is not None:
                out.write(content)
                continue
            if source not in sources:
                sources[source] = opened.enter_context(source.open("rb", buffering=0))
            out.copy(sources[source], start, end)
        out.flush()
        _check_length(path, file)
    return path


def _check_length(path: Path, file: NewFile) -> None:
    if path.stat().st_size != file.nbytes:
        raise InputError(
            f"a source of {path.name} changed while it was read; run again when nothing writes to the model"
        )


Step = tuple[Path, int, int, bytes | None]


def _steps(file: NewFile) -> Iterator[Step]:
    """(source, start, end, None) for ranges, joined where they touch, and (source, 0, 0, bytes) for other content."""
    held: Step | None = None
    for step in _pieces(file):
        if held and step[3] is None and held[0] == step[0] and held[2] == step[1]:
            held = (held[0], held[1], step[2], None)
            continue
        if held:
            yield held
        held = step if step[3] is None else None
        if held is None:
            yield step
    if held:
        yield held


def _pieces(file: NewFile) -> Iterator[Step]:
    for entry in file.entries:
        for content in entry.make() if entry.make else ():
            yield entry.source, 0, 0, content
        for start, end in entry.ranges:
            yield entry.source, start, end, None
        if gap := -entry.nbytes % file.alignment:
            yield entry.source, 0, 0, bytes(gap)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Name the file in errors of the file system that do not name it."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise MachineError(f"the file system does not take a file as large as {path}; write elsewhere") from None
        error.filename = str(path) if error.errno in FULL_DISK else error.filename or str(path)
        raise


def copy_side_file(source: Path, path: Path) -> None:
    """Carry one small file along, content and permissions; links become files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with explained(path):
        shutil.copyfile(source, path)
        path.chmod(0o644 | (source.stat().st_mode & 0o111))
        sync_file(path)


def write_text(path: Path, text: str) -> None:
    """Write one small file of the result."""
    with explained(path):
        path.write_text(text, encoding="utf-8")
        sync_file(path)


def index_text(files: Sequence[NewFile], old: Mapping[str, Any], elements_before: int) -> str:
    """The index of the new files; what else the old index says about the model is kept where it is still true."""
    entries = {entry.name: (entry, file) for file in files if file.indexed for entry in file.entries}
    about = dict(old.get("metadata") or {})
    about["total_size"] = sum(entry.nbytes for entry, _ in entries.values())
    if "total_parameters" in about:
        counted = about.pop("total_parameters") == elements_before
        if counted:  # quantized checkpoints count otherwise, and then a sum of elements would be wrong
            about["total_parameters"] = sum(math.prod(entry.shape) for entry, _ in entries.values())
    rest = {key: value for key, value in old.items() if key not in ("metadata", "weight_map")}
    begun = json.dumps({"metadata": about, **rest}, indent=2, ensure_ascii=False).removesuffix("\n}")
    # Line by line: with an indentation, the library takes three times as long for 100,000 tensors.
    lines = (f"    {quoted(name)}: {quoted(file.name)}" for name, (_, file) in sorted(entries.items()))
    return begun + ',\n  "weight_map": {\n' + ",\n".join(lines) + "\n  }\n}\n"


def check_room(target: Path, needed: int) -> None:
    """Refuse to start when the disk cannot hold the result."""
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free + size_of_folder(partial_of(target))
    if free < needed:
        raise MachineError(
            f"{folder} has {size(free)} free and the result needs {size(needed)}; make room or write elsewhere"
        )


def size_of_folder(folder: Path) -> int:
    """The bytes of all files below a folder; 0 when it is not there."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def partial_of(target: Path) -> Path:
    """Where a result is made before it gets its name."""
    return target.with_name(target.name + ".partial")


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A fresh folder `<target>.partial` to fill. What a killed run left there is removed; so is a failed attempt."""
    folder = partial_of(target)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, "another output folder"):
        _empty(folder)
        try:
            yield folder
        except BaseException:
            if folder.exists():
                shutil.rmtree(folder)
            raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def start_syncing(path: Path) -> None:
    """Let the disk begin with what a growing file holds, so that it is not idle until the file is finished."""
    handle = os.open(path, os.O_RDONLY)
    try:
        ctypes.CDLL(None).sync_file_range(handle, ctypes.c_int64(0), ctypes.c_int64(0), SYNC_FILE_RANGE_WRITE)
    except AttributeError:  # only Linux has it, and sync_file does the whole work where it is not there
        pass
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with explained(path):
        sync(path)


def publish(folder: Path, target: Path) -> None:
    """Give a finished, synced folder its name; a result that it replaces is removed after that."""
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(inner)
    replaced = target.with_name(target.name + ".replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    if target.exists():
        target.rename(replaced)
    folder.rename(target)
    sync(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
