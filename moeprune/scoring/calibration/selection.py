"""Which samples are taken: evenly over the domains, at random, and the same on every machine."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moeprune import console
from moeprune.errors import InputError
from moeprune.scoring.calibration.samples import Row, Sample, find_columns, guess_columns, make_sample
from moeprune.scoring.calibration.sources import Part, Source

DOMAIN_LIMIT = 64  # sums are kept per domain; more would be a column of identifiers, not of domains


@dataclass
class Choice:
    """The samples chosen, and what was seen on the way."""

    samples: list[Sample] = field(default_factory=list)
    seen: int = 0
    empty: int = 0
    columns: dict[str, dict[str, str]] = field(default_factory=dict)  # part -> kind -> column


def choose(source: Source, count: int, seed: int, columns: Mapping[str, str], longest: int) -> Choice:
    """Draw `count` samples in one pass that holds no more than `count` of each domain, clipped to `longest` characters.

    A sample's rank is a hash of the seed, its file's name and its place there; the lowest ranks are drawn. So the draw
    is random over the whole of the data, the same on every machine, and a smaller draw is a part of a larger one.
    A stream without an end in sight (the hub) is instead read only until there are enough.
    """
    choice = Choice()
    pools: dict[str, list[tuple[int, int, Sample]]] = {}
    tie = itertools.count()
    for part in source.parts:
        for index, sample in enumerate(_samples(part, columns, choice)):
            choice.seen += 1
            if sample is None:
                choice.empty += 1
                continue
            pool = pools.setdefault(sample.domain, [])
            if len(pools) > DOMAIN_LIMIT:
                raise InputError(
                    f"{part.name}: more than {DOMAIN_LIMIT} domains; name another column: --columns domain=x"
                )
            _offer(pool, (-_rank(seed, part.name, index), next(tie), _clipped(sample, longest)), count)
            if part.endless and choice.seen - choice.empty >= count:
                break
    if not pools:
        where = next((str(part.path) for part in source.parts if len(source.parts) == 1 and part.path), source.name)
        if choice.seen:
            raise InputError(f"{where}: all {choice.seen} samples in it are empty; name their column with --columns")
        raise InputError(f"{where}: empty; give calibration data that holds samples")
    ordered = {name: [entry[2] for entry in sorted(pool, reverse=True)] for name, pool in pools.items()}
    choice.samples = balanced(ordered, count)
    return choice


def _offer(pool: list[tuple[int, int, Sample]], entry: tuple[int, int, Sample], count: int) -> None:
    if len(pool) < count:
        heapq.heappush(pool, entry)
    elif entry[0] > pool[0][0]:
        heapq.heapreplace(pool, entry)


def _samples(part: Part, named: Mapping[str, str], choice: Choice) -> Iterator[Sample | None]:
    columns: dict[str, str] = {}
    keys: frozenset[str] = frozenset()
    for place, row in part.rows():
        if frozenset(row) != keys or not columns:  # rows of one file may differ: text here, a chat there
            keys = frozenset(row)
            columns = find_columns(row, {} if part.mapped else named, place)
            choice.columns.setdefault(part.name, {}).update(columns)
        sample = make_sample(row, columns, part.domain, place) or _other_content(row, named, part, place)
        yield _located(sample, part) if sample and sample.images else sample


def _other_content(row: Row, named: Mapping[str, str], part: Part, place: str) -> Sample | None:
    """Tables have every column in every row: where the usual content is empty, another may not be."""
    filled = {key: value for key, value in row.items() if value not in (None, "", [])}
    columns = guess_columns(filled, {} if part.mapped else named)
    return make_sample(filled, columns, part.domain, place) if columns else None


def _located(sample: Sample, part: Part) -> Sample:
    """Image paths are relative to the file that names them."""
    if part.path is None:
        return sample
    folder = part.path.parent
    located = (image if isinstance(image, bytes) or "://" in image else str(folder / image) for image in sample.images)
    return replace(sample, images=tuple(located))


def _rank(seed: int, name: str, index: int) -> int:
    text = f"{seed}\0{name}\0{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _clipped(sample: Sample, longest: int) -> Sample:
    """Running text beyond what could ever be used is not kept in memory."""
    return sample if sample.text is None or len(sample.text) <= longest else replace(sample, text=sample.text[:longest])


def balanced(pools: Mapping[str, list[Sample]], count: int) -> list[Sample]:
    """`count` samples with equal shares of the pools, in turn; what a small pool cannot give, the others do."""
    rounds = itertools.zip_longest(*(pools[name] for name in sorted(pools)))
    return list(itertools.islice((sample for turn in rounds for sample in turn if sample is not None), count))


def shares(sources: Sequence[Source], max_samples: int, capped: bool) -> list[int]:
    """How many samples each source gives: its own number, or an equal part of what the others leave.

    `capped`: the named numbers are a proportion when together they exceed `max_samples`.
    """
    named = sum(source.limit or 0 for source in sources)
    if capped and named > max_samples:
        return [max(1, (source.limit or 0) * max_samples // named) for source in sources]
    unnamed = sum(source.limit is None for source in sources)
    each = max(1, (max_samples - named) // unnamed) if unnamed else 0
    return [each if source.limit is None else source.limit for source in sources]


def announce(source: Source, choice: Choice) -> None:
    """Say which columns are used, once per set of columns, and how the samples were drawn."""
    groups: dict[str, list[str]] = {}
    for name, columns in choice.columns.items():
        shown = ", ".join(kind if kind == column else f"{kind} = {column}" for kind, column in columns.items())
        groups.setdefault(shown, []).append(name)
    for shown, names in groups.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.say(f"calibration: {names[0]}{others}: columns {shown}")
    if len(choice.samples) < choice.seen - choice.empty:
        console.say(f"calibration: {source.name}: {len(choice.samples)} of {choice.seen:,} samples, drawn at random")
    elif any(part.endless for part in source.parts):
        console.say(f"calibration: {source.name}: the first {len(choice.samples)} samples of the shuffled stream")
