"""Write safetensors files byte by byte, sound or broken, without the library and without the code under test."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BITS = {"F4": 4, "BF16": 16, "F16": 16, "F32": 32, "I32": 32, "U32": 32, "F64": 64, "I64": 64}  # others: 8
Spec = tuple[str, list[int]]


def header(tensors: Mapping[str, Spec]) -> dict[str, Any]:
    """The header of a sound file that holds these tensors in this order."""
    entries, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * BITS.get(dtype, 8) // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return entries


def write(path: Path, entries: Mapping[str, Any] | str, data: bytes = b"", length: int | None = None) -> None:
    """A file of 8 bytes of length, header and data; `length` overrides the true length of the header."""
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def shard(path: Path, tensors: Mapping[str, Spec], metadata: dict[str, str] | None = None, seed: int = 0) -> None:
    """A sound file with random bytes as weights; long integers are expert numbers, 0, 1, 2 in each row."""
    entries = header(tensors)
    size = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    data = bytearray(random.Random(f"{seed}{path.name}").randbytes(size))
    for entry in entries.values():
        if entry["dtype"] == "I64":
            start, end = entry["data_offsets"]
            numbers = range((end - start) // 8)
            data[start:end] = b"".join((i % entry["shape"][-1]).to_bytes(8, "little") for i in numbers)
    extra = {} if metadata is None else {"__metadata__": metadata}
    write(path, extra | entries, bytes(data))


def checkpoint(folder: Path, config: Mapping[str, Any], *shards: Mapping[str, Spec]) -> Path:
    """A sound checkpoint: one file, or several with an index."""
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        folder.mkdir(parents=True, exist_ok=True)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, tensors in zip(names, shards, strict=True):
        shard(folder / name, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
