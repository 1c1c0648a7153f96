"""The plan as bytes: exactly one action for every tensor of the parent, and nothing decoded on the way.

copy    the tensor stays as it is
rename  it belongs to one expert that stays and gets that expert's new number
slice   experts lie along one axis; the rows of those that stay are taken, in order
remap   it holds expert numbers, or a shape that counts them; it is written anew
drop    it belongs to an expert, or to a block, that goes
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from moeprune.arrays import NDArray, np
from moeprune.checkpoint import bnb, families, hqq, writer
from moeprune.checkpoint.families import Block, Layout, Part
from moeprune.checkpoint.folder import Checkpoint, Tensor
from moeprune.checkpoint.structure import HQQ
from moeprune.errors import InputError, UsageError

Keep = Mapping[str, tuple[int, ...]]
KINDS = ("copy", "rename", "slice", "remap", "drop")
CHUNK = 16 << 20  # bytes of a strided tensor that are gathered at a time


class Action(NamedTuple):
    """What happens to one tensor of the parent."""

    kind: str
    tensor: Tensor
    name: str  # in the result
    shape: tuple[int, ...]  # in the result
    runs: tuple[tuple[int, int], ...] = ()  # slice: rows [first, behind the last) that stay
    row_bytes: int = 0  # slice
    outer: int = 1  # slice: the runs are taken this many times, where experts do not lie along the slowest axis
    keep: tuple[int, ...] = ()  # remap: the experts that stay
    experts: int = 0  # remap: how many there were
    made: bnb.Made | None = None  # remap: the whole new tensor, where its type changes too

    @property
    def nbytes(self) -> int:
        """What the tensor takes in the result."""
        if self.kind == "drop":
            return 0
        if self.made is not None:
            return len(self.made.content)
        if self.kind == "slice":
            return self.outer * self.row_bytes * sum(end - start for start, end in self.runs)
        return self.tensor.nbytes


def actions(checkpoint: Checkpoint, layout: Layout, keep: Keep, gone: Iterable[str] = ()) -> tuple[Action, ...]:
    """One action for each tensor, in the order of the parent; `gone` names those that leave with a whole block."""
    removed = frozenset(gone)
    owners = _owners(layout)
    done = []
    for name, tensor in checkpoint.tensors.items():
        if name in removed:
            done.append(Action("drop", tensor, "", ()))
        elif name in owners:
            block, part = owners[name]
            done.append(_of_part(checkpoint, tensor, block, part, keep))
        else:
            done.append(Action("copy", tensor, name, tensor.shape))
    _check(done, checkpoint, owners.keys() | removed)
    return tuple(done)


def _owners(layout: Layout) -> dict[str, tuple[Block, Part]]:
    owners: dict[str, tuple[Block, Part]] = {}
    for block in layout.blocks:
        for part in block.parts:
            if part.tensor in owners:
                raise InputError(
                    f"tensor {part.tensor} was found twice in {block.name}; the family table is wrong about it"
                )
            owners[part.tensor] = (block, part)
    return owners


def _of_part(checkpoint: Checkpoint, tensor: Tensor, block: Block, part: Part, all_lists: Keep) -> Action:
    keep = all_lists[block.name]
    if part.kind in ("expert", "tail"):
        name = families.new_name(part, block.experts, keep)
        if name is None:
            return Action("drop", tensor, "", ())
        return Action("copy" if name == tensor.name else "rename", tensor, name, tensor.shape)
    if part.kind == "made":
        maker = hqq.made if HQQ.search(tensor.name) else bnb.made
        made = maker(tensor, checkpoint.read_bytes, block.experts, keep)
        return Action("remap", tensor, tensor.name, made.shape, made=made) if made else Action("drop", tensor, "", ())
    if part.kind == "ids":
        return Action("remap", tensor, tensor.name, tensor.shape, keep=keep, experts=block.experts)
    return _slice(tensor, block, part, [all_lists[name] for name in part.blocks] or [keep])


def _slice(tensor: Tensor, block: Block, part: Part, lists: Sequence[tuple[int, ...]]) -> Action:
    """Rows along the part's axis; with several keep-lists, the axis before it has one row for each list."""
    length, experts = tensor.shape[part.axis], block.experts // part.share
    lists = [tuple(dict.fromkeys(expert // part.share for expert in keep)) for keep in lists]
    if length != experts * part.rows_per_expert + part.tail:
        raise InputError(
            f"{tensor.name} has the shape {list(tensor.shape)}, which does not hold {block.experts} experts"
        )
    outer = math.prod(tensor.shape[: part.axis])
    row_bytes, rest = divmod(tensor.nbytes, outer * length)
    if rest:
        raise InputError(f"{tensor.name}: a row of {tensor.dtype} is not a whole number of bytes, so it cannot be cut")
    pieces = [
        (i * length + start, i * length + end)
        for i, keep in enumerate(lists)
        for start, end in _rows(keep, part.rows_per_expert, experts, part.tail)
    ]
    kept = len(lists[0]) * part.rows_per_expert + part.tail
    shape = (*tensor.shape[: part.axis], kept, *tensor.shape[part.axis + 1 :])
    return Action(
        "slice", tensor, tensor.name, shape, runs=_joined(pieces), row_bytes=row_bytes, outer=outer // len(lists)
    )


def _rows(keep: Sequence[int], rows: int, experts: int, tail: int) -> list[tuple[int, int]]:
    """The rows that stay: those of the experts, then the tail."""
    return [(e * rows, (e + 1) * rows) for e in keep] + ([(experts * rows, experts * rows + tail)] if tail else [])


def _joined(pieces: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbours as one."""
    joined: list[tuple[int, int]] = []
    for start, end in pieces:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)


def _check(done: Sequence[Action], checkpoint: Checkpoint, concerned: Set[str]) -> None:
    names = [action.name for action in done if action.kind != "drop"]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise InputError(f"two tensors would both become {twice}; the family table is wrong about its block")
    unknown = concerned - checkpoint.tensors.keys()
    if unknown:
        raise InputError(f"{min(unknown)} is to be cut but is not in the checkpoint")


def check_keep(blocks: Sequence[Block], keep: Keep) -> None:
    """Refuse keep-lists that do not fit the blocks of the model."""
    wanted = {block.name: block for block in blocks}
    missing, unknown = sorted(wanted.keys() - keep.keys()), sorted(keep.keys() - wanted.keys())
    if missing or unknown:
        what = f"has no list for {missing[0]}" if missing else f"names {unknown[0]}, which the model does not have"
        raise UsageError(f"the plan {what}; the model has {len(wanted)} MoE layers such as {next(iter(wanted))}")
    for name, ids in keep.items():
        last = wanted[name].experts - 1
        if list(ids) != sorted(set(ids)) or not ids or ids[0] < 0 or ids[-1] > last:
            raise UsageError(f"the plan's list for {name} must be ascending expert numbers between 0 and {last}")
    counts = sorted({len(ids) for ids in keep.values()})
    if len(counts) > 1:
        raise UsageError(f"all layers must keep the same number of experts; the plan keeps {counts[0]} to {counts[-1]}")


def check_groups(blocks: Sequence[Block], keep: Keep, groups: int) -> None:
    """A router that chooses among groups first needs the same number of experts from each."""
    for block in blocks:
        shares = Counter(expert * groups // block.experts for expert in keep[block.name])
        if len(set(shares.values())) > 1 or len(shares) < groups:
            raise UsageError(
                f"the plan keeps {[shares[g] for g in range(groups)]} experts in the groups of {block.name}; "
                f"its router needs the same number in each"
            )


def check_runs(blocks: Sequence[Block], keep: Keep, run: int) -> None:
    """Experts that share a further tensor with their neighbours go together or not at all."""
    for block in blocks:
        for first in range(0, block.experts, run):
            here = sum(expert in keep[block.name] for expert in range(first, first + run))
            if 0 < here < run:
                raise UsageError(f"{block.name}: experts {first} to {first + run - 1} share a tensor; keep all or none")


def counts(done: Iterable[Action]) -> dict[str, int]:
    """How many tensors each kind of action concerns; kinds that always exist are listed although zero."""
    found = Counter(action.kind for action in done)
    return {kind: found[kind] for kind in KINDS if found[kind] or kind != "remap"}


ShardMetadata = Mapping[Path, Mapping[str, str]]


def new_files(checkpoint: Checkpoint, done: Sequence[Action], metadata: ShardMetadata) -> tuple[writer.NewFile, ...]:
    """The files of the result: indexed shards packed anew, none larger than the parent's largest; others by name."""
    kept: dict[Path, list[Action]] = {shard: [] for shard in checkpoint.shards}
    sizes = dict.fromkeys(checkpoint.shards, 0)
    for shard, neighbours in groupby(done, attrgetter("tensor.file")):
        for action in neighbours:
            sizes[shard] += action.tensor.nbytes
            if action.kind != "drop":
                kept[shard].append(action)
    indexed = set((checkpoint.index or {}).get("weight_map", {}).values())
    shards = [shard for shard in checkpoint.shards if shard.name in indexed]
    limit = max((sizes[shard] for shard in shards), default=0)
    packs: list[tuple[tuple[writer.Entry, ...], Mapping[str, str]]] = []
    for about, together in _by_metadata(metadata, shards):
        entries = [entry(action) for shard in together for action in kept[shard]]
        packs += [(writer.aligned(group), about) for group in writer.packed(entries, limit)]
    names = [f"model-{i:05d}-of-{len(packs):05d}.safetensors" for i in range(1, len(packs) + 1)]
    packed = [
        writer.NewFile(name, writer.header(entries, about), entries, indexed=True)
        for name, (entries, about) in zip(names, packs, strict=True)
    ]
    alone = [shard for shard in checkpoint.shards if shard.name not in indexed and kept[shard]]
    return (*packed, *(_as_it_was(shard, kept[shard], metadata[shard]) for shard in alone))


def _as_it_was(shard: Path, done: Iterable[Action], metadata: Mapping[str, str]) -> writer.NewFile:
    entries = writer.aligned([entry(action) for action in done])
    return writer.NewFile(shard.name, writer.header(entries, metadata), entries)


def _by_metadata(metadata: ShardMetadata, shards: Iterable[Path]) -> list[tuple[Mapping[str, str], list[Path]]]:
    """Neighbouring shards that may share a file, because their `__metadata__` says the same."""
    groups: list[tuple[Mapping[str, str], list[Path]]] = []
    for shard in shards:
        if not groups or groups[-1][0] != metadata[shard]:
            groups.append((metadata[shard], []))
        groups[-1][1].append(shard)
    return groups


def entry(action: Action) -> writer.Entry:
    """What the writer needs to know of an action's tensor."""
    name, tensor, shape = action.name, action.tensor, action.shape
    if action.kind in ("copy", "rename"):
        return writer.Entry(name, tensor.dtype, shape, tensor.nbytes, tensor.file, ((tensor.start, tensor.end),))
    dtype = action.made.dtype if action.made else tensor.dtype
    plain = (name, dtype, shape, action.nbytes, tensor.file)
    if action.made is not None:
        content = action.made.content
        return writer.Entry(*plain, make=lambda: [content])
    if action.kind == "remap":
        return writer.Entry(*plain, make=lambda: remapped(action))
    if action.outer > 1:
        return writer.Entry(*plain, make=lambda: strided(action))
    at, row = tensor.start, action.row_bytes
    return writer.Entry(*plain, ranges=tuple((at + first * row, at + behind * row) for first, behind in action.runs))


def strided(action: Action) -> Iterator[bytes]:
    """The rows that stay when the experts do not lie along the slowest axis: [outer, experts, bytes], in chunks."""
    tensor = action.tensor
    width = tensor.nbytes // action.outer
    rows = np.concatenate([np.arange(start, end) for start, end in action.runs])
    at_once = max(1, CHUNK // width)
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        for done in range(0, action.outer, at_once):
            count = min(at_once, action.outer - done)
            data = np.frombuffer(_exactly(file.read(count * width), count * width, tensor), dtype=np.uint8)
            yield data.reshape(count, -1, action.row_bytes)[:, rows].tobytes()


def _exactly(data: bytes, wanted: int, tensor: Tensor) -> bytes:
    if len(data) != wanted:
        raise InputError(f"{tensor.file} became shorter while {tensor.name} was read")
    return data


def remapped(action: Action) -> Iterator[bytes]:
    """A table of expert numbers (DeepSeek-V4 `tid2eid`, [tokens, top-k]) in the new numbering."""
    tensor = action.tensor
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        data = _exactly(file.read(tensor.nbytes), tensor.nbytes, tensor)
    table_TK = np.frombuffer(data, dtype={"I64": "<i8", "I32": "<i4"}[tensor.dtype]).reshape(-1, tensor.shape[-1])
    yield renumbered_TK(table_TK, action.keep, action.experts).tobytes()


def renumbered_TK(table_TK: NDArray[np.int64], keep: Sequence[int], experts: int) -> NDArray[np.int64]:
    """New numbers for the experts that stay. A dropped one is replaced by an expert that its row does not hold yet.

    The search for the substitute of expert d in row t begins at (d + t) mod K: this spreads the load of dropped experts
    over all that stay, and the same table always gives the same result.
    """
    count, columns = len(keep), table_TK.shape[1]
    if count < columns:
        raise UsageError(f"each token needs {columns} different experts, and only {count} are kept")
    if table_TK.size and not 0 <= table_TK.min() <= table_TK.max() < experts:
        raise InputError(f"a table of expert numbers holds {table_TK.min()} to {table_TK.max()}; it is damaged")
    new_of_old = np.full(experts, -1, dtype=table_TK.dtype)
    new_of_old[list(keep)] = np.arange(count)
    new_TK = new_of_old[table_TK]
    for column in range(columns):
        rows = np.flatnonzero(new_TK[:, column] < 0)
        substitute = (table_TK[rows, column] + rows) % count
        while (taken := (new_TK[rows] == substitute[:, None]).any(axis=1)).any():
            substitute[taken] = (substitute[taken] + 1) % count
        new_TK[rows, column] = substitute
    return new_TK
