"""Open a checkpoint folder: config, headers, index and side files. Nothing in it is believed before it is checked.

A folder from the hub is somebody else's work. A file that is cut short, an index that names files elsewhere, a link
that leaves the folder: each ends in one line, before a byte of weights is read.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any

from moeprune.checkpoint import gguf, hub
from moeprune.checkpoint.headers import Tensor, read_header
from moeprune.console import warn
from moeprune.errors import InputError, UsageError
from moeprune.metadata import digest, read_json

__all__ = ["Checkpoint", "Tensor", "check_outside", "locate_model", "open_checkpoint"]

INDEX = "model.safetensors.index.json"
# Second copies of the weights in another container. They would still hold every expert, so they never go along.
OTHER_WEIGHTS = re.compile(
    r"(^|/)(original|metal|onnx|openvino)/"
    r"|(^|/)(pytorch_model|tf_model|flax_model|consolidated|rust_model)[^/]*$"
    r"|\.(pth|pt|ckpt|h5|msgpack|onnx|onnx_data|ot|gguf|tflite|nemo)$"
)
SAMPLE_BYTES = 65_536  # of weights per shard that enter the fingerprint


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk whose every tensor has been located; `tensors` includes those of files outside the index."""

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    shards: tuple[Path, ...]
    shard_metadata: Mapping[Path, Mapping[str, str]]
    index: dict[str, Any] | None
    side_files: tuple[Path, ...]  # relative to the folder; whatever is not weights
    other_weights: tuple[Path, ...] = ()  # relative too; second copies of the weights, to be left behind
    container: str = "safetensors"  # or gguf

    @property
    def total_bytes(self) -> int:
        """What all tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def place(self) -> Path:
        """What a person would name: the folder, or the first GGUF file, as a folder may hold several models."""
        return self.shards[0] if self.container == "gguf" else self.folder

    @cached_property
    def fingerprint(self) -> str:
        """A digest of config, names, shapes, places and a sample of each shard's weights; little of it is read."""
        files = {shard: shard.name for shard in self.shards}
        tensors = sorted(self.tensors.values(), key=attrgetter("name"))
        places = [f"{name} {dtype} {shape} {files[file]} {start}" for name, dtype, shape, file, start, _ in tensors]
        return digest(json.dumps(self.config), "\n".join(places), *(_sample(shard) for shard in self.shards))

    def read_bytes(self, name: str) -> bytes:
        """The bytes of one tensor."""
        tensor = self.tensors[name]
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            data = file.read(tensor.nbytes)
        if len(data) != tensor.nbytes:
            raise InputError(f"{tensor.file} became shorter while it was read; nobody may write to the model meanwhile")
        return data


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read every header of the checkpoint in a folder, or of a GGUF file; what is damaged or hostile is refused."""
    if folder.is_file() and folder.suffix == ".gguf":
        return _open_gguf(folder)
    if not folder.is_dir():
        what = "is a file, not a model" if folder.exists() else "is not there"
        raise InputError(f"{folder} {what}; name the folder with config.json and the weights, or a GGUF file")
    root = folder.resolve()
    files = sorted(_files(root, root))
    if Path("config.json") not in files and (only := _only_gguf(root, files)):
        return _open_gguf(only)
    config = read_json(root / "config.json", "the model's config.json")
    index = read_json(root / INDEX, "the index of the shards") if Path(INDEX) in files else None
    shards = _shards(root, files, index)
    headers = {shard: read_header(shard) for shard in shards}
    tensors = _merged({shard: header[0] for shard, header in headers.items()})
    if index is not None:
        _check_index(root, index, {shard: header[0] for shard, header in headers.items()})
    taken = {shard.relative_to(root) for shard in shards} | {Path(INDEX)}
    rest = [file for file in files if file not in taken]
    return Checkpoint(
        folder=root,
        config=config,
        tensors=tensors,
        shards=shards,
        shard_metadata={shard: header[1] for shard, header in headers.items()},
        index=index,
        side_files=tuple(file for file in rest if not OTHER_WEIGHTS.search(file.as_posix())),
        other_weights=tuple(file for file in rest if OTHER_WEIGHTS.search(file.as_posix())),
    )


def _open_gguf(path: Path) -> Checkpoint:
    files = gguf.split_set(path.absolute())  # not resolved: in the hub cache only the link has the name
    return of_gguf({file: gguf.read_header(file) for file in files})


def of_gguf(headers: Mapping[Path, gguf.Header]) -> Checkpoint:
    """A GGUF model: its config is the flat list of key-value pairs, arrays left out."""
    files = tuple(headers)
    return Checkpoint(
        folder=files[0].parent,
        config=gguf.values(list(headers.values())),
        tensors=_merged({file: header.tensors for file, header in headers.items()}),
        shards=files,
        shard_metadata={},
        index=None,
        side_files=(),
        container="gguf",
    )


def _only_gguf(root: Path, files: Sequence[Path]) -> Path | None:
    """The one GGUF model of a folder, by its first file."""
    names = [file for file in files if file.suffix == ".gguf" and not file.name.startswith("mmproj")]
    models = [file for file in names if (match := gguf.SPLIT.fullmatch(file.name)) is None or int(match["number"]) == 1]
    if len(models) > 1:
        raise InputError(f"{root} holds {len(models)} GGUF models; give the path of one, such as {root / models[0]}")
    return root / models[0] if models else None


def _files(root: Path, folder: Path) -> Iterator[Path]:
    """Every regular file, relative to root. Folders whose name starts with a dot belong to git or a downloader."""
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if entry.is_symlink():
            _check_link(root, path)
        kind = path.stat().st_mode
        if stat.S_ISREG(kind):
            yield path.relative_to(root)
        elif not stat.S_ISDIR(kind):
            raise InputError(f"{path} is neither a file nor a folder; remove it from the model folder")
        elif not entry.name.startswith("."):
            yield from _files(root, path)


def _check_link(root: Path, path: Path) -> None:
    """A link may lead to a file of the same folder, or into the blobs of the hub cache that the folder lies in."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise InputError(f"{path} is a link that leads nowhere; fetch the file again") from None
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if target.is_dir() or not any(target.is_relative_to(place) for place in allowed):
        raise InputError(f"{path} is a link that leaves the model folder (to {target}); put the file itself there")


def _shards(root: Path, files: list[Path], index: Mapping[str, Any] | None) -> tuple[Path, ...]:
    """The safetensors files of the top folder: those of the index first, then sidecars that no index names."""
    here = [file for file in files if file.suffix == ".safetensors" and len(file.parts) == 1]
    copies = {file for file in here if file.name.startswith("consolidated")}
    if len(copies) < len(here):  # a second copy in the vendor's own naming; of use only when it is the only one
        here = [file for file in here if file not in copies]
    named = _named_by(index) if index is not None else _numbered_with(here)
    missing = [name for name in named if Path(name) not in files]
    if missing:
        raise InputError(
            f"{root}: {len(missing)} shard(s) of the model are missing, first {missing[0]}; fetch them again"
        )
    if not here:
        raise InputError(f"{root} holds no *.safetensors file; save the model with save_pretrained first")
    return tuple(root / name for name in dict.fromkeys([*named, *(file.name for file in here)]))


def _numbered_with(files: list[Path]) -> list[str]:
    """Where there is no index, the names of the shards tell how many there are: model-00001-of-00004.safetensors."""
    names = set()
    for file in files:
        if match := re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(\.safetensors)", file.name):
            names |= {f"{match[1]}{at:05}-of-{match[3]}{match[4]}" for at in range(1, int(match[3]) + 1)}
    return sorted(names)


def _named_by(index: Mapping[str, Any]) -> list[str]:
    """The shards that the index names, each a plain file name."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{INDEX} must hold a weight_map from tensor names to file names; it is damaged")
    for name in set(weight_map.values()):
        if PurePosixPath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise InputError(f"{INDEX} names {name!r}, which is not a safetensors file of this folder; do not trust it")
    return sorted(set(weight_map.values()))


def _merged(headers: Mapping[Path, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors under their names; one name in two files would leave open which is meant."""
    tensors: dict[str, Tensor] = {}
    for shard, header in headers.items():
        if not tensors.keys().isdisjoint(header):
            twice = next(name for name in header if name in tensors)
            raise InputError(
                f"tensor {twice} lies in {tensors[twice].file.name} and in {shard.name}; remove the stale file"
            )
        tensors |= header
    return tensors


def _check_index(root: Path, index: Mapping[str, Any], headers: Mapping[Path, Mapping[str, Tensor]]) -> None:
    """Each entry of the index must be where it says."""
    of_shard = {shard.name: header for shard, header in headers.items()}
    for name, shard in index["weight_map"].items():
        if name not in of_shard[shard]:
            found = next((other for other, header in of_shard.items() if name in header), None)
            what = f"but it lies in {found}" if found else "but it is not there; fetch the shard again"
            raise InputError(f"{root}: the index lists {name} in {shard}, {what}")


def _sample(shard: Path) -> bytes:
    """Sixteen short pieces, evenly spread over a file."""
    size, pieces = shard.stat().st_size, []
    with shard.open("rb") as file:
        for step in range(16):
            file.seek(size * step // 16)
            pieces.append(file.read(SAMPLE_BYTES // 16))
    return b"".join(pieces)


def locate_model(model: str, token: str = "") -> Path:
    """The folder or GGUF file of a model: a local path, else a hub id that is downloaded (or in the hub's cache)."""
    if not model:
        raise UsageError("no model given; pass --model-path or set REAP_MODEL_PATH to a folder or a hub id")
    path = Path(model).expanduser()
    if path.exists():
        return path
    address = hub.parse(model)
    if not address.quant:
        folder = hub.download(address, token, never=SECOND_COPIES)
        if not (folder / "config.json").is_file():
            repo = address.repo
            raise InputError(f"{repo} has no config.json; if it is a repository of GGUF files, name one: {repo}:Q4_K_M")
        return folder
    return fetched_gguf(address, token)


def fetched_gguf(address: hub.Address, token: str, *, local: bool = False) -> Path:
    """The first file of a GGUF model of the hub, fetched if it is not here and `local` does not forbid it."""
    words = {address.quant or "", (address.quant or "").lower(), (address.quant or "").upper()}
    wanted = [f"{start}{word}[-./]*gguf" for word in words for start in ("", "*[-._/]")]
    folder = hub.download(address, token, only=wanted, never=("*mmproj*",), local=local)
    return folder / named_gguf(address, [file.relative_to(folder) for file in sorted(folder.rglob("*.gguf"))])


def named_gguf(address: hub.Address, files: Sequence[Path]) -> Path:
    """The first file of the one GGUF model of a repository that is named after these numbers, such as Q4_K_M."""
    named = re.compile(rf"(^|[-._/]){re.escape(address.quant or '')}[-./].*gguf", re.IGNORECASE)
    models = [file for file in files if named.search(file.as_posix()) and "mmproj" not in file.name]
    found = _only_gguf(Path(address.repo), models)
    if found is None:
        numbers = f"{address.quant} in its name; look there for one it has"
        raise InputError(f"{address.text}: the repository has no GGUF file with {numbers}")
    return found.relative_to(address.repo)


# What a repository may hold beside the weights: the same once more in another container.
SECOND_COPIES = ("original/*", "metal/*", "onnx/*", "openvino/*", "*.bin", "*.pth", "*.h5", "*.msgpack", "*.gguf",
                 "consolidated*")  # fmt: skip


def check_outside(model: Path, place: Path) -> None:
    """Refuse results in the folder of a model: they would pass for files of it. Beside a GGUF file they may lie."""
    if model.is_dir() and place.expanduser().resolve().is_relative_to(model.resolve()):
        raise UsageError(f"{place} is the folder of the model, or lies in it; choose another folder for results")


def warn_of_other_weights(checkpoint: Checkpoint) -> None:
    """Say which files are left behind because they hold the unpruned weights once more."""
    if checkpoint.other_weights:
        names = ", ".join(file.as_posix() for file in checkpoint.other_weights[:3])
        more = f" and {len(checkpoint.other_weights) - 3} more" if len(checkpoint.other_weights) > 3 else ""
        warn(f"left behind, because they hold the weights of all experts once more: {names}{more}")
