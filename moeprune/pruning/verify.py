"""Prove a result against its parent. This room reads both folders by itself and shares no code with what wrote them.

Every tensor of the parent must be found again, byte by byte, or be one that the keep-lists send away; nothing may be
missing, extra, out of range or left at its old size. A ResultError here means a bug or a bad disk.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from moeprune.arrays import NDArray, np
from moeprune.errors import ResultError
from moeprune.pruning import evidence, four_bit, hqq_router
from moeprune.pruning.evidence import File, Reader, Stored

VISION = ".vision"  # the block of image experts that share a layer with those for text
MTP_KEYS = re.compile(r"num_nextn_predict_layers|mtp_num_hidden_layers|num_mtp_layers|num_mtp_modules")
# Parts of names that say that a tensor has a row for every expert, in safetensors and in GGUF.
ROUTER_WORDS = {"router", "gate", "expert_bias", "e_score_correction_bias", "router_bias"}
ROUTER_WORDS |= {
    "ffn_gate_inp",
    "exp_probs_b",
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_down_exps",
    "ffn_gate_up_exps",
}  # GGUF
OURS = {"pruning.json", "reap_metadata.json", "model.safetensors.index.json"}


Part = dict[str, Stored]


class Verification:
    """One comparison of a result with its parent: `file` for each weight file as it is finished, then `finish`.

    `read` and `compare` are the halves of `file`, for threads that share the work on one file.
    """

    def __init__(self, parent: Path, child: Path, keep: Mapping[str, tuple[int, ...]], gone: Collection[str]) -> None:
        self.parent, self.child, self.keep, self.gone = parent, child, dict(keep), frozenset(gone)
        self.depths = sorted({block.count(".") + 1 for block in keep}, reverse=True)
        self.files_before: list[File] = []
        self.files_after: dict[Path, File] = {}  # those that `read` has seen
        self.config, self.before = self._read_parent()
        self.count = len(next(iter(keep.values())))
        self.places = {block: {old: new for new, old in enumerate(ids)} for block, ids in keep.items()}
        self.block_of = {name: self._block_of(name) for name in self.before if name not in self.gone}
        self.experts = self._experts()
        self.four_bit: dict[str, str] = {}  # parts of quantized routers that are made anew -> the matrix
        self.origin: dict[str, str] = {}  # name in the result -> name before
        for name, block in self.block_of.items():
            self._trace(name, block)

    def _read_parent(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        self.files_before = [evidence.header_of(path) for path in evidence.weight_files(self.parent)]
        return evidence.load(self.parent / "config.json"), evidence.merged(self.files_before)

    def _header(self, path: Path) -> File:
        return evidence.header_of(path, made=True)

    def _block_of(self, name: str) -> str:
        block = ""
        parts = name.split(".", self.depths[0])
        for depth in self.depths:
            start = ".".join(parts[:depth])
            if start in self.keep:
                block = start
                break
        return block + VISION if name.endswith("weight_1") and block + VISION in self.keep else block

    def _experts(self) -> dict[str, int]:
        """The experts of each block before, as the config says; of several counts the one that the names bear out."""
        said = set(evidence.counts_in(self.config))
        if len(said) == 1:
            return dict.fromkeys(self.keep, said.pop())
        numbers: dict[str, set[str]] = {block: set() for block in self.keep}
        lengths: dict[str, set[int]] = {block: set() for block in self.keep}
        for name, block in self.block_of.items():
            if block:
                lengths[block].update(self.before[name].shape)
                if found := evidence.expert_in(name, block):
                    numbers[block].add(found["number"])
        named = {b: {len(ids), len(ids) // 2} if (ids := numbers[b]) else lengths[b] for b in self.keep}
        return {block: max(said & named[block], default=max(self.keep[block]) + 1) for block in self.keep}

    def _trace(self, name: str, block: str) -> None:
        """Note what becomes of a tensor, unless it leaves with its expert."""
        found = evidence.expert_in(name, block) if block else None
        if found is None:
            matrix = self._quantized_router(name) if block else ""
            if matrix:
                self.four_bit[name] = matrix
            if not matrix or ".nested_" not in name:  # its scales are written out
                self.origin[name] = name
            return
        new = self._new_number(block, int(found["number"]), shared=found["word"] == "chunk_experts")
        if new is not None:
            self.origin[f"{name[: found.start('number')]}{new}{name[found.end('number') :]}"] = name

    def _quantized_router(self, name: str) -> str:
        """The router's matrix that a tensor of bitsandbytes or HQQ is a part of, or nothing."""
        matrix = four_bit.matrix_of(name, self.before) or hqq_router.matrix_of(name, self.before)
        return matrix if ROUTER_WORDS & set(matrix.split(".")) and "shared" not in matrix else ""

    def _new_number(self, block: str, number: int, shared: bool) -> int | None:
        """The number of an expert in the result. Text and image experts are numbered one behind the other."""
        places, experts = self.places[block], self.experts[block]
        if shared:  # two neighbours share one
            return places[2 * number] // 2 if 2 * number in places else None
        kinds = [block, block + VISION] if block + VISION in self.keep else [block]
        kind, old = divmod(number, experts)
        if kind >= len(kinds):
            return number - experts + len(places)  # behind all experts, and always there
        new = self.places[kinds[kind]].get(old)
        return None if new is None else new + kind * len(places)

    def file(self, path: Path, go_on: Callable[[], None]) -> None:
        """Compare one finished file of the result with the parent; `go_on` may raise to end it early."""
        for part in self.read(path, 1):
            self.compare(part, go_on)

    def read(self, path: Path, count: int) -> list[Part]:
        """The tensors of a finished file of the result, in at most `count` parts of about the same size."""
        self.files_after[path] = file = self._header(path)
        parts: list[Part] = [{} for _ in range(count)]
        total, done = max(1, sum(tensor.nbytes for tensor in file.tensors.values())), 0
        for name, tensor in file.tensors.items():
            if name not in self.origin:
                raise ResultError(f"{path} holds {name}, which must not be there")
            parts[min(done * count // total, count - 1)][name] = tensor
            done += tensor.nbytes
        return [part for part in parts if part]

    def compare(self, part: Part, go_on: Callable[[], None]) -> None:
        """Compare tensors of the result with the parent's bytes; those that are neighbours in both as one."""
        same: list[evidence.Pair] = []
        with Reader() as reader:
            for name, after in part.items():
                old = self.origin[name]
                before, block = self.before[old], self.block_of[old]
                if old in self.four_bit:  # compared in finish, by value
                    continue
                if before.dtype != after.dtype:
                    raise ResultError(f"{name} has become {after.dtype} from {before.dtype}")
                if before.shape != after.shape:
                    go_on()
                    self._rows(reader, name, before, after, block)
                elif "tid2eid" in name and block:
                    _check_table(name, _table(reader, before), _table(reader, after), self.keep[block])
                else:
                    same.append((name, before, after))
            for run in evidence.neighbours(same):
                go_on()
                _check_same(reader, run)

    def _rows(self, reader: Reader, name: str, before: Stored, after: Stored, block: str) -> None:
        """A tensor that shrank must hold exactly the rows of the experts that stay, and those behind all experts."""
        axis, rows = self._expected_rows(name, before, after, block)
        if "moe_statics" in name and block + VISION in self.keep:
            old, new = (_bytes_along(reader, tensor, axis) for tensor in (before, after))
            lists = (rows, self.keep[block + VISION])
            right = all(np.array_equal(old[i, list(lists[i])], new[i]) for i in range(2))
        elif axis == 0:
            width = before.nbytes // before.shape[0]
            right = reader.equal(before, [(row * width, width) for row in rows], after, after.nbytes)
        else:
            old, new = (_bytes_along(reader, tensor, axis) for tensor in (before, after))
            right = np.array_equal(np.take(old, rows, axis=axis), new)
        if not right:
            raise ResultError(f"{name} does not hold the values of the kept experts")

    def _expected_rows(self, name: str, before: Stored, after: Stored, block: str) -> tuple[int, list[int]]:
        changed = f"{name} went from {list(before.shape)} to {list(after.shape)}"
        if not block or len(before.shape) != len(after.shape) or self.experts[block] == self.count:
            raise ResultError(f"{changed}, and it is in no layer that was cut")
        pairs = list(zip(before.shape, after.shape, strict=True))
        axes = [axis for axis, (old, new) in enumerate(pairs) if old != new]
        experts, keep = self.experts[block], self.keep[block]
        old, new = pairs[axes[0]]
        each, rest = divmod(old - new, experts - len(keep))
        tail = old - experts * each
        if len(axes) != 1 or rest or tail < 0 or new != len(keep) * each + tail:
            raise ResultError(f"{changed}, which is not {len(keep)} of {experts} experts")
        rows = [expert * each + i for expert in keep for i in range(each)]
        return axes[0], rows + list(range(experts * each, old))

    def finish(self, left_behind: Collection[Path] = ()) -> None:
        """What no single file shows: nothing missing, all blocks cut alike, index, config and side files right."""
        unread = sorted({*evidence.weight_files(self.child)} ^ self.files_after.keys())
        if unread:
            raise ResultError(f"{unread[0]} was not compared with the parent, or is not there any more")
        after = evidence.merged(self.files_after.values())
        self._check_present(after)
        self._check_gone()
        with Reader() as reader:
            for matrix in dict.fromkeys(self.four_bit.values()):
                room = hqq_router if matrix.endswith(".W_q") else four_bit
                old, new = (room.companions(matrix, tensors, reader) for tensors in (self.before, after))
                room.check(matrix, old, new, self.keep[self.block_of[matrix]])
        self._check_blocks(after)
        self._check_index(after)
        self._check_notes(after)
        for problem in evidence.differences(self.config, evidence.load(self.child / "config.json"), self._may_change):
            raise ResultError(f"config.json of the result: {problem}")
        self._check_side_files({path.as_posix() for path in left_behind})

    def _check_present(self, after: Mapping[str, Stored]) -> None:
        missing = sorted(self.origin.keys() - after.keys())
        if missing:
            raise ResultError(f"{len(missing)} tensor(s) are missing from the result, first {missing[0]}")

    def _check_gone(self) -> None:
        """Only layers that predict further tokens may go as a whole."""
        layers = [
            v for k, v in evidence.items(self.config) if k in ("num_hidden_layers", "n_layers") and type(v) is int
        ]
        for name in self.gone:
            numbers = [int(n) for n in re.findall(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.", name)]
            if "mtp" not in name and not any(number >= min(layers, default=0) for number in numbers):
                raise ResultError(f"{name} was dropped but belongs to no layer for further tokens")

    def _check_blocks(self, after: Mapping[str, Stored]) -> None:
        """Blocks that are built alike must be cut alike, and none may keep a router of the old size."""
        cut: dict[str, set[str]] = {block: set() for block in self.keep}
        built: dict[str, set[tuple[str, tuple[int, ...]]]] = {block: set() for block in self.keep}
        starred: dict[str, str] = {}  # name within the block -> without numbers; the same in all blocks
        for name, old in self.origin.items():
            if block := self.block_of[old]:
                local, shape = name[len(block) :], self.before[old].shape
                if local not in starred:
                    starred[local] = re.sub(r"(?<=\.)(expert_)?\d+(?=\.)", "*", local)
                built[block].add((starred[local], shape))
                if after[name].shape != shape:
                    cut[block].add(starred[local])
                elif shape[:1] == (self.experts[block],) and self._looks_uncut(block, starred[local]):
                    raise ResultError(f"{name} still has the size for {self.experts[block]} experts")
        alike = {frozenset(built[block]): block for block in self.keep}
        for block in self.keep:
            like = alike[frozenset(built[block])]
            if cut[block] != cut[like]:
                raise ResultError(f"{block} and {like} are built alike but were cut differently")
            if not cut[block] and self.experts[block] > self.count:
                raise ResultError(f"nothing of {block} was cut, not even its router")

    def _looks_uncut(self, block: str, suffix: str) -> bool:
        """Whether a tensor that has kept its E rows should have lost some."""
        words = set(suffix.split("."))
        of_experts = words & (ROUTER_WORDS | evidence.NUMBERED) and "*" not in words and "shared" not in suffix
        if suffix.endswith(".quant_map"):  # the 16 values that four bits can mean
            return False
        return bool(of_experts) and self.count < self.experts[block]

    def _check_index(self, after: Mapping[str, Stored]) -> None:
        path = self.child / "model.safetensors.index.json"
        if (self.parent / path.name).exists() != path.exists():
            raise ResultError(f"{path} must be there exactly when the parent has one")
        if not path.exists():
            return
        index = evidence.load(path)
        listed = index["weight_map"]
        named = set(listed.values())
        right = {
            name: path.name for path, file in self.files_after.items() if path.name in named for name in file.tensors
        }
        if listed != right:
            wrong = min(name for name, _ in listed.items() ^ right.items())
            raise ResultError(f"the index of the result is wrong about {wrong}")
        if index["metadata"]["total_size"] != sum(after[name].nbytes for name in listed):
            raise ResultError("the index of the result states a wrong total_size")

    def _check_notes(self, after: Mapping[str, Stored]) -> None:
        """What shards say in `__metadata__` must be said again; entries on single experts are renumbered."""
        old = evidence.notes(self.files_before, set(self.origin.values()), self.before)
        new = evidence.notes(self.files_after.values(), self.origin.keys(), after)
        wrong = [name for name, _ in sorted(old ^ new)] or evidence.unlisted(self.files_after.values())
        if wrong:
            raise ResultError(f"the __metadata__ of the result is wrong about {wrong[0]}")

    def _may_change(self, key: str, old: Any, new: Any) -> bool:
        """Whether one value of the config may have changed so."""
        if evidence.COUNT_KEYS.fullmatch(key) and type(old) is int:
            return old in self.experts.values() and new == self.count
        return bool(MTP_KEYS.fullmatch(key) and self.gone and new == 0)

    def _check_side_files(self, left_behind: set[str]) -> None:
        for path in evidence.files_below(self.parent):
            name = path.relative_to(self.parent).as_posix()
            weights = path.suffix == ".safetensors" and path.parent == self.parent
            if name in OURS or name in left_behind or name == "config.json" or weights:
                continue
            if not (self.child / name).is_file():
                raise ResultError(f"{name} was not carried along")
            if not re.search(r"quant|recipe", name) and not filecmp.cmp(path, self.child / name, shallow=False):
                raise ResultError(f"{name} differs from the parent's")
        for path in [self.child / "config.json", *self.child.glob("*quant*.json")]:
            self._check_numbers(path)

    def _check_numbers(self, path: Path) -> None:
        """No entry, such as one on quantization, may name an expert that is not there any more."""
        numbers = re.findall(r"[A-Za-z0-9]\.experts\.(\d+)(?![\d*\\\[])", path.read_text(encoding="utf-8"))
        if any(int(number) >= self.count for number in numbers):
            raise ResultError(f"{path.name} of the result names an expert that is not there any more")
        for key, value in evidence.items(evidence.load(path)):
            if evidence.COUNT_KEYS.fullmatch(key) and value in self.experts.values() and value != self.count:
                raise ResultError(f"{path.name} of the result still says {key} = {value}")


def _check_same(reader: Reader, run: Sequence[evidence.Pair]) -> None:
    """All bytes of the run must be the same."""
    (_, before, after), (_, _, last) = run[0], run[-1]
    length = last.end - after.start
    if not reader.equal(before, [(0, length)], after, length):
        wrong = next(
            name for name, before, after in run if not reader.equal(before, [(0, before.nbytes)], after, after.nbytes)
        )
        raise ResultError(f"{wrong} differs from the parent's; check the disk")


def _bytes_along(reader: Reader, tensor: Stored, axis: int) -> NDArray[np.uint8]:
    data = np.frombuffer(reader.read(tensor, 0, tensor.nbytes), np.uint8)
    return data.reshape(*tensor.shape[: axis + 1], -1)


def _table(reader: Reader, tensor: Stored) -> NDArray[np.int64]:
    data = np.frombuffer(reader.read(tensor, 0, tensor.nbytes), {"I64": "<i8", "I32": "<i4"}[tensor.dtype])
    return data.reshape(tensor.shape).astype(np.int64)


def _check_table(name: str, old: NDArray[np.int64], new: NDArray[np.int64], keep: tuple[int, ...]) -> None:
    """Experts that stay keep their places in every row, and no row names one expert twice that did not before."""
    if new.size and not 0 <= new.min() <= new.max() < len(keep):
        raise ResultError(f"{name} names an expert that does not exist")
    for place, expert in enumerate(keep):
        if not (new[old == expert] == place).all():
            raise ResultError(f"{name} is wrong about expert {expert}")
    doubles = [np.any(np.diff(np.sort(table, axis=1), axis=1) == 0, axis=1) for table in (old, new)]
    if np.any(doubles[1] & ~doubles[0]):
        raise ResultError(f"{name} names one expert twice in a row")
