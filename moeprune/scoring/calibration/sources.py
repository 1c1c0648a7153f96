"""Where calibration samples come from: the calibration setting as a list of sources, each with its parts.

No torch here: `request_digest` must answer at once whether a result is current.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moeprune import metadata
from moeprune.errors import InputError, UsageError
from moeprune.scoring.calibration import hub
from moeprune.scoring.calibration.presets import PRESETS, plan_for
from moeprune.scoring.calibration.readers import READERS, Rows
from moeprune.settings import Settings

BUILTIN = Path(__file__).parent / "builtin"
ENTRY = re.compile(r"(?P<name>[^\[\]():,]+)(\[(?P<subset>[^\[\]]+)\])?(\((?P<split>[^()]+)\))?(:(?P<limit>\d+))?")
SHARD_ENDING = re.compile(r"[-_.]\d+[-_]of[-_]\d+$")
TEXT_ENDINGS = {".txt", ".md"}
MANY_TEXTS = 16  # text files directly in a folder: up to here each names a domain, beyond they are one
DIGEST_WHOLE = 256_000_000  # bytes of calibration files that are digested by content; beyond, by size and time


@dataclass(frozen=True)
class Part:
    """One file or data set, with the domain of samples that name none."""

    name: str  # relative to the source: the same on every machine
    domain: str
    rows: Callable[[], Rows] = field(compare=False)
    path: Path | None = None
    mapped: bool = False  # its columns are known; the columns setting is for the others
    endless: bool = False  # read only as far as needed


@dataclass(frozen=True)
class Source:
    """One entry of the calibration setting; `limit` is its own number of samples, if it names one."""

    name: str
    parts: tuple[Part, ...]
    limit: int | None = None


def parse_sources(spec: str, seed: int = 0, token: str = "") -> list[Source]:
    """The entries of the calibration setting: files, folders and data sets; empty means the built-in set."""
    if not spec:
        return [local_source(BUILTIN)]
    if Path(spec).expanduser().exists():
        return [local_source(Path(spec).expanduser())]
    return [_entry(text.strip(), spec, seed, token) for text in spec.split(",")]


def _entry(text: str, spec: str, seed: int, token: str) -> Source:
    match = ENTRY.fullmatch(text)
    if match is None:
        raise UsageError(f"calibration data {spec!r}: {text!r} is not name[subset](split):N")
    limit = int(match["limit"]) if match["limit"] else None
    if limit == 0:
        raise UsageError(f"calibration data {spec!r}: {text!r} asks for no samples")
    path = Path(match["name"]).expanduser()
    if path.exists():
        return local_source(path, limit)
    if match["name"] in PRESETS:
        raise UsageError(f"calibration data {spec!r}: the preset {match['name']} stands alone, without other entries")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", match["name"]) is None or path.suffix.lower() in READERS:
        presets = ", ".join(PRESETS)
        raise InputError(
            f"calibration data not found at {match['name']}; give a file, a folder, a hub data set (owner/name), "
            f"a preset ({presets}), or nothing for the built-in set"
        )
    return _hub_source(match["name"], match["subset"], match["split"], limit, seed, token)


def _hub_source(name: str, subset: str | None, split: str | None, limit: int | None, seed: int, token: str) -> Source:
    label = name + (f"[{subset}]" if subset else "") + (f"({split})" if split else "")
    rows = partial(hub.stream, name, subset, split, seed, token)
    part = Part(label, hub.domain_of(name, subset), rows, mapped=name in hub.REGISTRY, endless=True)
    return Source(label, (part,), limit)


def local_source(path: Path, limit: int | None = None) -> Source:
    """A file, or every readable file below a folder in the order of their names."""
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise InputError(f"{path}: unknown kind of file; these are read: {' '.join(READERS)}")
        return Source(path.name, (_file_part(path, path.name, _stem(path)),), limit)
    files = sorted(file for file in path.rglob("*") if file.is_file() and _is_data(file.relative_to(path)))
    if not files:
        raise InputError(f"{path}: no calibration file in this folder; these are read: {' '.join(READERS)}")
    texts = sum(file.parent == path and file.suffix.lower() in TEXT_ENDINGS for file in files)
    parts = (_file_part(f, f.relative_to(path).as_posix(), _folder_domain(f, path, texts)) for f in files)
    return Source(path.resolve().name, tuple(parts), limit)


def _file_part(path: Path, name: str, domain: str) -> Part:
    ending = path.suffix.lower()
    return Part(name, domain, partial(READERS[ending], path), path, mapped=ending in TEXT_ENDINGS)


def _is_data(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return file.suffix.lower() in READERS and not hidden and file.stem.lower() not in ("readme", "license")


def _stem(path: Path) -> str:
    return SHARD_ENDING.sub("", path.stem)


def _folder_domain(file: Path, folder: Path, texts: int) -> str:
    """A subfolder names the domain of its files, else the file does; many small texts together are one domain."""
    if file.parent != folder:
        return file.relative_to(folder).parts[0]
    if file.suffix.lower() in TEXT_ENDINGS and texts > MANY_TEXTS:
        return folder.resolve().name
    return _stem(file)


def request_digest(settings: Settings) -> str:
    """What was asked for and the state of the files, without reading samples: equal means the same calibration.

    Files of together more than DIGEST_WHOLE bytes are known by size and time of change, smaller ones by content.
    """
    plan = plan_for(settings)
    sources = parse_sources(plan.spec, settings.seed)
    paths = [part.path for source in sources for part in source.parts if part.path is not None]
    whole = sum(path.stat().st_size for path in paths) <= DIGEST_WHOLE
    asked = (plan, settings.seed, settings.columns, settings.thinking, settings.system_prompt, settings.batch_size)
    names = [(source.limit, *(part.name for part in source.parts)) for source in sources]
    states: list[str | Path] = [path if whole else f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths]
    return metadata.digest(
        repr(asked[1:]), repr((plan.max_samples, plan.max_seq_len, plan.packing)), repr(names), *states
    )


def describe(sources: Iterable[Source]) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of every file, and the names of data sets, for the result's provenance."""
    described: list[dict[str, Any]] = []
    for part in (part for source in sources for part in source.parts):
        if part.path is None:
            described.append({"data_set": part.name})
            continue
        with part.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        described.append({"file": part.name, "size_bytes": part.path.stat().st_size, "sha256": digest})
    return described
