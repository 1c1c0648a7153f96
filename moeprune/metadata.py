"""Results as JSON files: written whole or not at all, readable by a person, and able to say what they were made from.

Legend of the array suffixes: D calibration domains, S slices of each domain's samples, E experts of a block.
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune import VERSION
from moeprune.arrays import Array, np
from moeprune.errors import InputError, MachineError

SCHEMA_VERSION = "1.0"
ROOM = 1_000_000  # bytes that must be free for results; those of small models take less

# What is summed per block, domain and expert. g gate value, f expert output, p router probability, x layer input;
# the sums run over the tokens routed to the expert, the last two over all tokens.
STATISTICS = {
    "count": "1",
    "gate_sum": "g",
    "gate_sq_sum": "g^2",
    "norm_sum": "|f|",
    "norm_sq_sum": "|f|^2",
    "gate_norm_sum": "g |f|",
    "gate_norm_sq_sum": "(g |f|)^2",
    "max_abs": "largest |component of f|, also on special tokens (a maximum, not a sum)",
    "special_sum": "g |f| over the special tokens that no other sum counts",
    "full_sum": "p |f| over all tokens (mode full)",
    "router_sum": "p |x| over all tokens (mode router)",
}


IMAGE = " [image]"  # ending of the domain that the image tokens of a domain's samples belong to


@dataclass(frozen=True)
class BlockSums:
    """What the experts of one block did on the calibration data."""

    block: str  # the block's name on disk, such as model.layers.7
    experts: int
    tokens_D: Array  # tokens that passed the block
    values: Mapping[str, Array]  # statistic -> [D, E]; only the statistics that the scoring mode measures
    slices: Mapping[
        str, Array
    ]  # the statistics that plans are made from -> [D, S, E]: the same sums by slice of samples
    gram_EDD: Array | None = None  # inner products between the domains' sums of output vectors, for ean_ca; symmetric


@dataclass(frozen=True)
class Sums:
    """The whole outcome of scoring: enough for every metric, ratio and blend of domains."""

    mode: str
    domains: tuple[str, ...]
    blocks: tuple[BlockSums, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, one entry per block."""
        return {
            "mode": self.mode,
            "domains": list(self.domains),
            "statistics": STATISTICS,
            "blocks": [_block_to_json(block, self.domains) for block in self.blocks],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Sums:
        """The inverse of `to_json`. Damaged sums are refused, so that everything behind here can trust them."""
        try:
            domains = tuple(str(name) for name in data["domains"])
            sums = Sums(str(data["mode"]), domains, tuple(_block_from_json(block, domains) for block in data["blocks"]))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"the scores are damaged: {type(error).__name__} {error}; score the model again") from None
        names = [block.block for block in sums.blocks]
        if not names or not domains or len(set(names)) < len(names) or len(set(domains)) < len(domains):
            raise InputError(
                "the scores are damaged: layers or domains are missing or named twice; score the model again"
            )
        return sums


def _block_to_json(block: BlockSums, domains: tuple[str, ...]) -> dict[str, Any]:
    return {
        "block": block.block,
        "experts": block.experts,
        "tokens": {name: float(block.tokens_D[d]) for d, name in enumerate(domains)},
        "sums": {
            name: {statistic: array_DE[d].tolist() for statistic, array_DE in block.values.items()}
            for d, name in enumerate(domains)
        },
        "slices": {
            name: {statistic: array_DSE[d].tolist() for statistic, array_DSE in block.slices.items()}
            for d, name in enumerate(domains)
        },
        "gram": None if block.gram_EDD is None else _lower_triangles(block.gram_EDD),
    }


def _block_from_json(entry: Mapping[str, Any], domains: tuple[str, ...]) -> BlockSums:
    experts = int(entry["experts"])
    gram = entry.get("gram")
    slices = _stacked(entry, "slices", domains)
    block = BlockSums(
        block=str(entry["block"]),
        experts=experts,
        tokens_D=np.array([entry["tokens"][name] for name in domains], dtype=np.float64),
        values=_stacked(entry, "sums", domains),
        slices=slices,
        gram_EDD=None if gram is None else _symmetric(gram, len(domains)),
    )
    expected: list[tuple[Array, tuple[int, ...]]] = [
        (array, (len(domains), experts)) for array in block.values.values()
    ]
    expected += [(array, (len(domains), array.shape[1], experts)) for array in slices.values()]
    if block.gram_EDD is not None:
        expected.append((block.gram_EDD, (experts, len(domains), len(domains))))
    if any(array.shape != shape or not np.isfinite(array).all() for array, shape in expected):
        raise ValueError(f"layer {block.block} holds arrays of a wrong shape or numbers that are not finite")
    return block


def _lower_triangles(gram_EDD: Array) -> list[list[float]]:
    """Row by row up to the diagonal, for every expert: the other half of a symmetric matrix says nothing new."""
    rows, columns = np.tril_indices(gram_EDD.shape[1])
    triangles: list[list[float]] = gram_EDD[:, rows, columns].tolist()
    return triangles


def _symmetric(triangles: list[list[float]], domains: int) -> Array:
    rows, columns = np.tril_indices(domains)
    gram_EDD = np.zeros((len(triangles), domains, domains))
    gram_EDD[:, rows, columns] = gram_EDD[:, columns, rows] = np.array(triangles, dtype=np.float64)
    return gram_EDD


def _stacked(entry: Mapping[str, Any], key: str, domains: tuple[str, ...]) -> dict[str, Array]:
    per_domain = [entry[key][name] for name in domains]
    statistics = per_domain[0] if per_domain else {}
    if any(one.keys() != statistics.keys() for one in per_domain):
        raise ValueError(f"the {key} of a layer differ in what was measured")
    return {name: np.array([one[name] for one in per_domain], dtype=np.float64) for name in statistics}


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write beside, sync, rename: the file is there whole or not at all. NaN and infinity are refused."""
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        file.write(to_text(data) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make the content of a file, or a rename in a folder, outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_text(value: Any, indent: str = "") -> str:
    """Indented JSON in which a list of numbers or words takes one line, so that a person can read it."""
    inner = indent + "  "
    if isinstance(value, Mapping) and value:
        rows = [f"{inner}{json.dumps(str(key))}: {to_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        return "[\n" + ",\n".join(inner + to_text(item, inner) for item in value) + f"\n{indent}]"
    if isinstance(value, float) and math.isfinite(value):
        return _short(value)
    if isinstance(value, list) and value and all(isinstance(item, float) and math.isfinite(item) for item in value):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def _short(value: float) -> str:
    """A finite number, exactly, and a whole one without its `.0`."""
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file, or one clear line about why not. `what` names the file for a person."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unambiguous)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(f"there is no file at {path}, where {what} should be") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} at {path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{what} at {path} must be a JSON object, not a {type(data).__name__}")
    return data


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two different entries with one name, who could say which is meant?"""
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if entries.setdefault(name, value) != value:
            raise ValueError(f"the name {name!r} appears twice")
    return entries


def read_result(path: Path, kind: str) -> dict[str, Any]:
    """A result of an earlier stage, checked for its kind and schema version."""
    data = read_json(path, kind)
    if data.get("kind") != kind:
        raise InputError(f"{path} is not a {kind} file")
    if str(data.get("schema_version", "")).split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise InputError(f"{path} has schema version {data.get('schema_version')}; this tool reads {SCHEMA_VERSION}")
    return data


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A folder for results, proven before hours of work: it can be written, and no other run does so meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(ROOM))
    with alone_in(folder, "another --output-path"):
        yield


@contextmanager
def alone_in(folder: Path, otherwise: str) -> Iterator[None]:
    """Hold a folder against other runs; the system lets go of it when the process ends, however it does."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MachineError(f"another run is writing in {folder}; wait for it or choose {otherwise}") from None
        yield
    finally:
        os.close(lock)


def is_current(path: Path, kind: str, fingerprint: str) -> bool:
    """Whether the result at `path` was made from exactly these inputs."""
    if not path.exists():
        return False
    try:
        inputs = read_result(path, kind).get("inputs")
    except InputError:
        return False
    return isinstance(inputs, dict) and inputs.get("fingerprint") == fingerprint


def digest(*parts: bytes | str | Path) -> str:
    """SHA-256 over the parts; a Path stands for the content of its file."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        else:
            content = hashlib.sha256(part.encode() if isinstance(part, str) else part).digest()
        total.update(content)
    return total.hexdigest()


def header(kind: str, packages: Iterable[str] = ()) -> dict[str, Any]:
    """What every result starts with: kind, time, tool and environment. Packages are given by their import names."""
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in packages}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "tool": {"name": "moeprune", "version": VERSION, "git_commit": _git_commit()},
        "environment": {
            "python": platform.python_version(),
            "platform": f"{sys.platform}/{platform.machine()}",
            **{name: version for name, version in loaded.items() if version},
        },
    }


def _git_commit() -> str | None:
    try:
        folder = Path(__file__).parent
        done = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as JSON knows them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
