"""Prove a pruned GGUF model against its parent; reads the files by its own code, like verify.py."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from moeprune.errors import ResultError
from moeprune.pruning.evidence import File, Stored
from moeprune.pruning.verify import Verification

# Type number -> (values, bytes) of a block; llama.cpp's ggml.h.
BLOCKS = {
    0: (1, 4),
    1: (1, 2),
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    15: (256, 292),
    16: (256, 66),
    17: (256, 74),
    18: (256, 98),
    19: (256, 50),
    20: (32, 18),
    21: (256, 110),
    22: (256, 82),
    23: (256, 136),
    24: (1, 1),
    25: (1, 2),
    26: (1, 4),
    27: (1, 8),
    28: (1, 8),
    29: (256, 56),
    30: (1, 2),
    34: (256, 54),
    35: (256, 66),
    39: (32, 17),
    40: (64, 36),
    41: (128, 18),
}
INTEGERS = {26: "I32", 27: "I64"}
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, LIST = 8, 9
CHUNK = "_chexps."
COUNTS = ("expert_count", "block_count", "nextn_predict_layers")


class GgufVerification(Verification):
    """One comparison of GGUF files; `parent` are the parent's, in order."""

    def __init__(
        self, parent: Collection[Path], child: Path, keep: Mapping[str, tuple[int, ...]], gone: Collection[str] = ()
    ) -> None:
        self.files = sorted(parent)
        super().__init__(self.files[0].parent, child, keep, gone)

    def _read_parent(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        pairs: dict[str, bytes] = {}
        tensors: dict[str, Stored] = {}
        for file in self.files:
            more, found = _read(file)
            pairs |= {key: value for key, value in more.items() if key not in pairs}
            tensors |= found
        numbers = {key: next((_number(v) for k, v in pairs.items() if k.endswith(f".{key}")), 0) for key in COUNTS}
        self.layers = numbers["block_count"]
        self.trunk = self.layers - numbers["nextn_predict_layers"]
        return {"num_experts": numbers["expert_count"]}, tensors

    def _header(self, path: Path) -> File:
        return File(_read(path)[1], {})

    def finish(self, _left_behind: Collection[Path] = ()) -> None:
        """Nothing missing, all blocks cut alike, and only the counts among the keys changed."""
        self._check_gone()
        after: dict[str, Stored] = {}
        files = sorted(self.child.glob("*.gguf"))
        if len(files) != len(self.files):
            raise ResultError(f"{self.child} holds {len(files)} GGUF files; the parent has {len(self.files)}")
        for old, new in zip(self.files, files, strict=True):
            pairs, tensors = _read(new)
            after |= tensors
            self._check_pairs(new, _read(old)[0], pairs)
        self._check_present(after)
        self._check_blocks(after)
        self._check_chunks(after)

    def _expected_rows(self, name: str, before: Stored, after: Stored, block: str) -> tuple[int, list[int]]:
        """GroveMoE: a row for each run of neighbours, which stay or go together."""
        if CHUNK not in name or not block:
            return super()._expected_rows(name, before, after, block)
        run, keep = self.experts[block] // before.shape[0], self.keep[block]
        rows = [expert // run for expert in keep[::run]]
        if [row * run + i for row in rows for i in range(run)] != list(keep) or len(rows) != after.shape[0]:
            raise ResultError(f"{name} has {after.shape[0]} rows, which are not those of the kept experts")
        return 0, rows

    def _check_chunks(self, after: Mapping[str, Stored]) -> None:
        for name in (name for name in self.origin if CHUNK in name):
            run = self.experts[self.block_of[self.origin[name]]] // self.before[self.origin[name]].shape[0]
            if after[name].shape[0] * run != self.count:
                raise ResultError(f"{name} has {after[name].shape[0]} rows for {self.count} experts in runs of {run}")

    def _check_gone(self) -> None:
        """Only layers behind the trunk may go, and then nothing of them may stay."""
        behind = {name for name in self.before if (m := re.match(r"blk\.(\d+)\.", name)) and int(m[1]) >= self.trunk}
        if self.gone and self.gone != behind:
            name = min(self.gone ^ behind)
            raise ResultError(f"{name} was {'dropped' if name in self.gone else 'kept'}, unlike the layers it is among")

    def _check_pairs(self, path: Path, old: Mapping[str, bytes], new: Mapping[str, bytes]) -> None:
        if list(old) != list(new):
            raise ResultError(f"{path} has other keys than the parent, or in another order")
        right = {"expert_count": self.count, "tensors.count": len(self.origin)}
        if self.gone:
            right |= {"block_count": self.trunk, "nextn_predict_layers": 0}
        for key, value in new.items():
            section, _, name = key.partition(".")
            if name in right and section not in ("general", "tokenizer"):
                if _number(value) != right[name]:
                    raise ResultError(f"{path}: {key} does not say {right[name]}")
            elif value != (old[key] if section in ("general", "tokenizer") else self._per_layer(old[key])):
                raise ResultError(f"{path}: the key {key} has changed")

    def _per_layer(self, value: bytes) -> bytes:
        """A list of one number for each layer is as long as there are layers; any other value stays."""
        kind, inner, count = struct.unpack_from("<IIQ", value) if len(value) >= 16 else (0, 0, 0)
        if not self.gone or kind != LIST or inner == TEXT or count != self.layers:
            return value
        return struct.pack("<IIQ", kind, inner, self.trunk) + value[16 : 16 + self.trunk * WIDTHS[inner]]


def _number(value: bytes) -> int:
    return int.from_bytes(value[4:], "little")


def _read(path: Path) -> tuple[dict[str, bytes], dict[str, Stored]]:
    """The keys of a file with type and value as bytes, and its tensors."""
    with path.open("rb") as file:

        def number(code: str) -> int:
            return int(struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0])

        def text() -> bytes:
            length = file.read(8)
            return length + file.read(int.from_bytes(length, "little"))

        def value(kind: int) -> bytes:
            if kind == TEXT:
                return text()
            if kind != LIST:
                return file.read(WIDTHS[kind])
            inner, count = number("I"), number("Q")
            content = b"".join(text() for _ in range(count)) if inner == TEXT else file.read(count * WIDTHS[inner])
            return struct.pack("<IQ", inner, count) + content

        file.seek(8)  # magic and version
        tensor_count, pair_count = number("Q"), number("Q")
        pairs = {}
        for _ in range(pair_count):
            key, kind = text()[8:].decode(), number("I")
            pairs[key] = struct.pack("<I", kind) + value(kind)
        infos = []
        for _ in range(tensor_count):
            name = text()[8:].decode()
            sizes = [number("Q") for _ in range(number("I"))]
            infos.append((name, sizes, number("I"), number("Q")))
        alignment = int.from_bytes(pairs["general.alignment"][4:], "little") if "general.alignment" in pairs else 32
        base = -(-file.tell() // alignment) * alignment
    return pairs, {name: _stored(path, sizes, kind, base + at, alignment) for name, sizes, kind, at in infos}


def _stored(path: Path, sizes: list[int], kind: int, start: int, alignment: int) -> Stored:
    values, size = BLOCKS[kind]
    nbytes = math.prod(sizes) // values * size
    if start % alignment or start + nbytes > path.stat().st_size:
        raise ResultError(f"{path} has a tensor at byte {start} that does not lie where it should")
    return Stored(path, INTEGERS.get(kind, f"type {kind}"), tuple(reversed(sizes)), start, nbytes)
