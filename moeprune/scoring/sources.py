"""Where calibration samples come from: `REAP_CALIBRATION_PATH` as sources, and a fair, repeatable choice of samples.

No torch here: `request_digest` must answer at once whether a result is current.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune import console
from moeprune.errors import InputError
from moeprune.scoring.readers import READERS, Rows
from moeprune.scoring.samples import Sample, find_columns, make_sample

BUILTIN = Path(__file__).parent / "builtin"
DOMAIN_LIMIT = 64  # sums are kept per domain; more would be a column of identifiers, not of domains
SHARD_ENDING = re.compile(r"[-_.]\d+[-_]of[-_]\d+$")
TEXT_ENDINGS = {".txt", ".md"}


@dataclass(frozen=True)
class Part:
    """One file of a source, with the domain of samples that name none."""

    path: Path
    name: str  # relative to the source: the same on every machine
    domain: str


@dataclass(frozen=True)
class Source:
    """One entry of the calibration setting; `limit` is its own number of samples, if it names one."""

    name: str
    parts: tuple[Part, ...] = ()
    limit: int | None = None


@dataclass
class Choice:
    """The samples chosen, and what was seen on the way."""

    samples: list[Sample] = field(default_factory=list)
    seen: int = 0
    empty: int = 0
    columns: dict[str, dict[str, str]] = field(default_factory=dict)  # file -> kind -> column


def local_source(path: Path, limit: int | None = None) -> Source:
    """A file, or every readable file below a folder in the order of their names."""
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise InputError(f"{path}: unknown kind of file; these are read: {' '.join(READERS)}")
        return Source(path.name, (Part(path, path.name, _stem(path)),), limit)
    files = sorted(file for file in path.rglob("*") if file.is_file() and _is_data(file.relative_to(path)))
    if not files:
        raise InputError(f"{path}: no calibration file in this folder; these are read: {' '.join(READERS)}")
    texts = sum(file.parent == path and file.suffix.lower() in TEXT_ENDINGS for file in files)
    parts = (Part(file, file.relative_to(path).as_posix(), _folder_domain(file, path, texts)) for file in files)
    return Source(path.resolve().name, tuple(parts), limit)


def _is_data(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return file.suffix.lower() in READERS and not hidden and file.stem.lower() not in ("readme", "license")


def _stem(path: Path) -> str:
    return SHARD_ENDING.sub("", path.stem)


def _folder_domain(file: Path, folder: Path, texts: int) -> str:
    """A subfolder names the domain of its files, else the file does; many small texts together are one domain."""
    if file.parent != folder:
        return file.relative_to(folder).parts[0]
    if file.suffix.lower() in TEXT_ENDINGS and texts > DOMAIN_LIMIT // 4:
        return folder.resolve().name
    return _stem(file)


def choose(source: Source, count: int, seed: int, columns: Mapping[str, str], longest: int) -> Choice:
    """Draw `count` samples, evenly over the domains, in one pass that holds no more than `count` of each domain.

    A sample's rank is a hash of the seed, its file's name and its place there; the lowest ranks are drawn. So the draw
    is random over the whole of the data, the same on every machine, and a smaller draw is a part of a larger one.
    """
    choice = Choice()
    pools: dict[str, list[tuple[int, int, Sample]]] = {}
    tie = itertools.count()
    for part in source.parts:
        for index, sample in enumerate(_samples(READERS[part.path.suffix.lower()](part.path), part, columns, choice)):
            choice.seen += 1
            if sample is None:
                choice.empty += 1
                continue
            pool = pools.setdefault(sample.domain, [])
            if len(pools) > DOMAIN_LIMIT:
                raise InputError(
                    f"{part.path}: more than {DOMAIN_LIMIT} domains; name another column: --columns domain=x"
                )
            entry = (-_rank(seed, part.name, index), next(tie), _clipped(sample, longest))
            if len(pool) < count:
                heapq.heappush(pool, entry)
            elif entry[0] > pool[0][0]:
                heapq.heapreplace(pool, entry)
    if not pools:
        raise InputError(f"{source.name}: no samples in it; check the file, or name the columns with --columns")
    choice.samples = balanced(
        {name: [entry[2] for entry in sorted(pool, reverse=True)] for name, pool in pools.items()}, count
    )
    return choice


def _samples(rows: Rows, part: Part, named: Mapping[str, str], choice: Choice) -> Iterator[Sample | None]:
    columns: dict[str, str] = {}
    keys: frozenset[str] = frozenset()
    for place, row in rows:
        if frozenset(row) != keys:  # rows of one file may differ: text here, a chat there
            keys = frozenset(row)
            columns = find_columns(row, named, place)
            choice.columns.setdefault(part.name, {}).update(columns)
        yield make_sample(row, columns, part.domain, place)


def _rank(seed: int, name: str, index: int) -> int:
    text = f"{seed}\0{name}\0{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _clipped(sample: Sample, longest: int) -> Sample:
    """Running text beyond what could ever be used is not kept in memory."""
    if sample.text is None or len(sample.text) <= longest:
        return sample
    return Sample(sample.domain, text=sample.text[:longest], origin=sample.origin)


def balanced(pools: Mapping[str, list[Sample]], count: int) -> list[Sample]:
    """`count` samples with equal shares of the pools; what a small pool cannot give, the others do."""
    taken: list[Sample] = []
    for round_ in itertools.zip_longest(*(pools[name] for name in sorted(pools))):
        taken.extend(sample for sample in round_ if sample is not None)
        if len(taken) >= count:
            break
    return taken[:count]


def parse_sources(text: str) -> list[Source]:
    """The entries of the calibration setting; empty means the built-in set."""
    path = Path(text).expanduser() if text else BUILTIN
    if not path.exists():
        raise InputError(f"calibration data not found at {path}; give a file, a folder or nothing for the built-in set")
    return [local_source(path)]


def files_digest(sources: Iterable[Source]) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of every file, for the result's provenance."""
    described = []
    for part in (part for source in sources for part in source.parts):
        with part.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        described.append({"file": part.name, "size_bytes": part.path.stat().st_size, "sha256": digest})
    return described


def announce(choice: Choice) -> None:
    """Say once per set of columns which of them are used."""
    groups: dict[str, list[str]] = {}
    for name, columns in choice.columns.items():
        shown = ", ".join(f"{kind} = {column}" for kind, column in columns.items())
        groups.setdefault(shown, []).append(name)
    for shown, names in groups.items():
        console.say(
            f"calibration: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: columns {shown}"
        )
