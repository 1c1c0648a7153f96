"""When experts get new numbers, lists of module names must follow: quantization settings, modelopt's side files.

An entry may be a name, or a pattern. A pattern that holds for all experts of a block alike stays byte for byte. One
that picks some experts is expanded against the OLD names first (`experts.1*` also means 10 to 19), mapped, and written
as names. New numbers are a subset of the old ones, so an entry that met nothing before meets nothing after.
"""

from __future__ import annotations

import fnmatch
import json
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moeprune.checkpoint.families import Block, Layout, new_name
from moeprune.checkpoint.folder import Checkpoint
from moeprune.checkpoint.formats import NAME_LISTS, NVIDIA_LISTS, STACK_SIZES, quantization_of, torchao_stacks
from moeprune.errors import InputError
from moeprune.metadata import read_json

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
GLOBS = ("modelopt", "modelopt_fp4", "quark")  # their patterns are globs, everybody else's regular expressions
PATTERN = re.compile(r"[*?+\\\[\](){}|^$]")
MARK = re.compile(r"re:|[+-]:")  # compressed-tensors and torchao; GPTQModel's dynamic
NUMBERED = re.compile(r"(?<![A-Za-z_])(?:chunk_)?experts\.(?:expert_|[a-z_]+\.)?\d+(\.|$)")
WEIGHTS = (".weight", ".qweight", ".weight_packed", "._weight_qdata", ".W_q", ".weight._data", ".codes", ".indices")
TENSOR_NAMES = "tensor_names"  # torchao's list of all tensors, in the header of a shard


@dataclass(frozen=True)
class Names:
    """Every module and tensor of single experts, before and after."""

    new: Mapping[str, str | None]  # None: it goes
    leaves: Collection[str]  # those that own a weight
    alike: Collection[frozenset[str]]  # names that differ in the expert's number alone
    by_tail: Mapping[str, str]  # what follows the prefix of the model -> name
    ordered: Sequence[str]


def _names(layout: Layout, keep: Mapping[str, Sequence[int]]) -> Names:
    new: dict[str, str | None] = {}
    leaves: dict[str, None] = {}
    alike: dict[str, set[str]] = defaultdict(set)
    for block in layout.blocks:
        for part in block.parts:
            if part.kind not in ("expert", "tail"):
                continue
            before, behind = part.around
            old, renamed = part.tensor.removesuffix(behind), new_name(part, block.experts, keep[block.name])
            for end in [i for i, letter in enumerate(behind) if letter == "."] + [len(behind)]:
                name = f"{old}{behind[:end]}"
                new[name] = None if renamed is None else f"{renamed.removesuffix(behind)}{behind[:end]}"
                alike[f"{before}#{behind[:end]}"].add(name)
            leaves |= {part.tensor.removesuffix(end): None for end in WEIGHTS if part.tensor.endswith(end)}
    return Names(new, leaves, [*map(frozenset, alike.values())], {_tail(name): name for name in new}, sorted(new))


class Renumbering:
    """How lists of module names change; `keep` is the keep-list of every block."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, keep: Mapping[str, Sequence[int]]) -> None:
        self.checkpoint, self.layout, self.keep = checkpoint, layout, keep
        self.globs = _uses_globs(checkpoint)

    @cached_property
    def names(self) -> Names:
        """Made only when an entry asks for it: a large model has a million."""
        return _names(self.layout, self.keep)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config with the names in its quantization settings renumbered, at every depth."""
        return {
            key: self.names_in(value, self.globs)
            if key in QUANTIZATION_KEYS
            else self.config(value)
            if isinstance(value, dict)
            else value
            for key, value in config.items()
        }

    def side_files(self) -> dict[str, dict[str, Any]]:
        """New contents of the side files that name experts, by relative path."""
        changed = {}
        for path in NAME_LISTS:
            if path in self.checkpoint.side_files:
                before = read_json(self.checkpoint.folder / path, f"the list of modules {path}")
                if (after := self.names_in(before, globs=self.globs or path in NVIDIA_LISTS)) != before:
                    changed[path.as_posix()] = after
        return changed

    def metadata(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """The `__metadata__` of a shard; torchao lists and describes tensors there under their names."""
        return {new: self._about(name, text) for name, text in metadata.items() for new in self.entry(name, self.globs)}

    def _about(self, name: str, text: str) -> str:
        """What torchao says of its tensors: their names, and of a stack the shape, which begins with its experts."""
        block = self.stacks.get(name)
        if block is None and name != TENSOR_NAMES:
            return text
        try:
            before = json.loads(text)
        except ValueError:
            raise InputError(
                f"what the header of a shard says about {name} is not JSON; fetch the file again"
            ) from None
        if block is None:
            after = self.names_in(before, self.globs)
        else:
            count = len(self.keep[block.name])
            after = before | {"_data": shortened(before.get("_data"), block.experts, count)}
        return text if after == before else json.dumps(after)

    @cached_property
    def stacks(self) -> Mapping[str, Block]:
        """Stacks of experts that headers of shards describe."""
        return torchao_stacks(self.layout)

    def names_in(self, value: Any, globs: bool) -> Any:
        """Any JSON value with the names in its lists and keys renumbered."""
        if isinstance(value, dict):
            return {
                new: self.names_in(item, globs) for key, item in value.items() for new in self.entry(str(key), globs)
            }
        if isinstance(value, list):
            in_every_layer = self._in_every_layer([item for item in value if isinstance(item, str)])
            return [
                new
                for item in value
                for new in (
                    in_every_layer[item]
                    if isinstance(item, str) and item in in_every_layer
                    else self.entry(item, globs)
                    if isinstance(item, str)
                    else [self.names_in(item, globs)]
                )
            ]
        return value

    def _in_every_layer(self, items: Sequence[str]) -> dict[str, list[str]]:
        """Names without a layer (`mlp.experts.0.up_proj`), which GPTQ lists for all layers alike, all experts or none.

        The highest numbers go, whatever other numbers a layer's own experts get.
        """
        runs: dict[str, dict[int, str]] = defaultdict(dict)
        for item in items:
            match = NUMBERED.search(item)
            if match and item not in self.names.new and item in self.inside_layers:
                number = re.search(r"\d+", match[0])
                assert number is not None
                start = match.start() + number.start()
                runs[f"{item[:start]}#{item[start + len(number[0]) :]}"][int(number[0])] = item
        kept = {len(ids) for ids in self.keep.values()}
        whole = [run for run in runs.values() if sorted(run) == [*range(self.layout.experts)] and len(kept) == 1]
        return {item: [item] if number < min(kept) else [] for run in whole for number, item in run.items()}

    @cached_property
    def inside_layers(self) -> frozenset[str]:
        """What follows the layer's number in the names of single experts."""
        return frozenset(re.sub(r"^.*?\.\d+\.", "", name) for name in self.names.new)

    def entry(self, text: str, globs: bool) -> list[str]:
        """What one entry becomes: itself, one new name, several, or nothing."""
        mark = MARK.match(text)
        if mark or PATTERN.search(text):
            return self._pattern(text, mark[0] if mark else "", globs)
        if NUMBERED.search(text) is None:
            return [text]
        for start in _starts(text):  # of an expert's module, its tensor, or a word about one
            if start in self.names.new:
                new = self.names.new[start]
                return [] if new is None else [new + text[len(start) :]]
        return self._by_tail(text)

    def _pattern(self, text: str, mark: str, globs: bool) -> list[str]:
        glob, pattern = globs and not mark, text[len(mark) :]
        matches, prefix = _matcher(pattern, glob), _literal_start(pattern, glob)
        names = self.names.ordered
        near = names[bisect_left(names, prefix) : bisect_right(names, f"{prefix}\x7f")]
        met = {name for name in near if matches(name)}
        if not met or all(group <= met or not group & met for group in self.names.alike):
            return [text]
        new = [self.names.new[name] for name in self.names.leaves if name in met]
        staying = list(dict.fromkeys(name for name in new if name is not None))
        return [f"{mark}{re.escape(name)}$" for name in staying] if mark in ("+:", "-:") else staying

    def _by_tail(self, text: str) -> list[str]:
        """A name under another prefix, as engines and older versions write it: found by what follows the prefix."""
        tail = _tail(text)
        old = self.names.by_tail.get(tail)
        if old is None:
            if any(known.endswith(f".{text}") for known in self.names.by_tail):
                raise InputError(
                    f"the quantization settings name {text!r}, which is no module of this checkpoint but may mean one; "
                    "write its full name, or take the entry out"
                )
            return [text]
        new = self.names.new[old]
        return [] if new is None else [text.removesuffix(tail) + _tail(new)]


def _starts(name: str) -> Iterator[str]:
    """The name, and what is left of it when words behind the last dots are taken away."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def shortened(data: Any, experts: int, count: int) -> Any:
    """torchao's description of a stack when fewer experts are in it: the shape, and a block that runs over them all."""
    if not isinstance(data, dict):
        return data
    return {
        key: [count, *value[1:]] if key in STACK_SIZES and isinstance(value, list) and value[:1] == [experts] else value
        for key, value in data.items()
    }


def _tail(name: str) -> str:
    """From the word before the first number on: layers.7.mlp.experts.3 of any prefix."""
    match = re.search(r"[A-Za-z_]+\.\d+\..*", name)
    return match[0] if match else name


def _literal_start(pattern: str, glob: bool) -> str:
    """What every match must begin with, so that few names need a try."""
    if glob:
        return re.split(r"[*?\[]", pattern)[0]
    start = re.split(r"[.*?+\\\[\](){}|^$]", pattern)[0]
    optional = pattern[len(start) : len(start) + 1] in ("*", "?", "{")
    return "" if "|" in pattern else start[:-1] if optional else start


def _matcher(pattern: str, glob: bool) -> Callable[[str], Any]:
    try:
        return re.compile(fnmatch.translate(pattern) if glob else pattern).match
    except re.error as error:
        raise InputError(f"the quantization settings hold the broken pattern {pattern!r}: {error}") from None


def _uses_globs(checkpoint: Checkpoint) -> bool:
    settings = quantization_of(checkpoint)
    return str(settings.get("quant_method", "")).lower() in GLOBS or "producer" in settings
