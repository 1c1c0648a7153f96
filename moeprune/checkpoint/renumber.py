"""When experts get new numbers, lists of module names must follow: quantization settings, modelopt's side files.

An entry may be a name, or a pattern. A pattern that holds for all experts of a block alike stays byte for byte. One
that picks some experts is expanded against the OLD names first (`experts.1*` also means 10 to 19), mapped, and written
as names. New numbers are a subset of the old ones, so an entry that met nothing before meets nothing after.
"""

from __future__ import annotations

import fnmatch
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moeprune.checkpoint.families import Layout, new_name
from moeprune.checkpoint.folder import Checkpoint
from moeprune.checkpoint.formats import NAME_LISTS, quantization_of
from moeprune.checkpoint.structure import EXPERT
from moeprune.errors import InputError
from moeprune.metadata import read_json

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
GLOBS = ("modelopt", "modelopt_fp4", "quark")  # their patterns are globs, everybody else's regular expressions
PATTERN = re.compile(r"[*?+\\\[\](){}|^$]")
MARK = re.compile(r"re:|[+-]:")  # compressed-tensors and torchao; GPTQModel's dynamic
NUMBERED = re.compile(r"(?<![A-Za-z_])experts\.(?:expert_)?\d+(\.|$)")
WEIGHTS = (".weight", ".qweight", ".weight_packed")


class Renumbering:
    """Old module names of experts, their new ones, and how lists of them change."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, keep: Mapping[str, Sequence[int]]) -> None:
        self.names: dict[str, str | None] = {}  # module or tensor of one expert -> its new name; None: it goes
        self.leaves: dict[str, None] = {}  # those that own a weight
        self.experts: dict[str, set[str]] = defaultdict(set)  # name without its number -> all names of that form
        for block in layout.blocks:
            for part in block.parts:
                if part.kind in ("expert", "tail"):
                    self._add(part.tensor, new_name(part, block.experts, keep[block.name]))
        self.sorted = sorted(self.names)
        self.tails = {_tail(name): name for name in self.names}
        self.globs = _uses_globs(checkpoint)
        self.checkpoint = checkpoint

    def _add(self, old: str, new: str | None) -> None:
        match = EXPERT.fullmatch(old)
        if match is None:
            return
        start = match.start("id")
        rest = old[match.end("id") :].split(".")
        for depth in range(1, len(rest) + 1):
            tail = ".".join(rest[:depth])
            new_id = None if new is None else new[start : len(new) - len(old[match.end("id") :])]
            name = f"{old[: match.end('id')]}{tail}"
            self.names[name] = None if new_id is None else f"{old[:start]}{new_id}{tail}"
            self.experts[f"{old[:start]}#{tail}"].add(name)
        if old.endswith(WEIGHTS):
            self.leaves[old.rpartition(".")[0]] = None

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
                if (after := self.names_in(before, globs=True)) != before:
                    changed[path.as_posix()] = after
        return changed

    def metadata(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """The `__metadata__` of a shard; torchao describes tensors there under their names."""
        return {new: text for name, text in metadata.items() for new in self.entry(name, self.globs)}

    def names_in(self, value: Any, globs: bool) -> Any:
        """Any JSON value with the names in its lists and keys renumbered."""
        if isinstance(value, dict):
            return {
                new: self.names_in(item, globs) for key, item in value.items() for new in self.entry(str(key), globs)
            }
        if isinstance(value, list):
            return [
                new
                for item in value
                for new in (self.entry(item, globs) if isinstance(item, str) else [self.names_in(item, globs)])
            ]
        return value

    def entry(self, text: str, globs: bool) -> list[str]:
        """What one entry becomes: itself, one new name, several, or nothing."""
        if text in self.names:
            return [new for new in [self.names[text]] if new is not None]
        mark = MARK.match(text)
        if mark or PATTERN.search(text):
            return self._pattern(text, mark[0] if mark else "", globs)
        return self._by_tail(text) if NUMBERED.search(text) else [text]

    def _pattern(self, text: str, mark: str, globs: bool) -> list[str]:
        glob, pattern = globs and not mark, text[len(mark) :]
        matches, prefix = _matcher(pattern, glob), _literal_start(pattern, glob)
        first, last = bisect_left(self.sorted, prefix), bisect_right(self.sorted, f"{prefix}\x7f")
        met = {name for name in self.sorted[first:last] if matches(name)}
        if all(names <= met or not names & met for names in self.experts.values()):
            return [text]
        new = [self.names[name] for name in self.leaves if name in met]
        staying = list(dict.fromkeys(name for name in new if name is not None))
        return [f"{mark}{re.escape(name)}$" for name in staying] if mark in ("+:", "-:") else staying

    def _by_tail(self, text: str) -> list[str]:
        """A name under another prefix, as engines and older versions write it: found by what follows the prefix."""
        old = self.tails.get(_tail(text))
        if old is None:
            known = any(_tail(text).startswith(f"{tail}.") or tail.endswith(f".{text}") for tail in self.tails)
            if known:
                raise InputError(
                    f"the quantization settings name {text!r}, which is no module of this checkpoint but may mean one; "
                    "write its full name, or take the entry out"
                )
            return [text]
        new = self.names[old]
        return [] if new is None else [text.removesuffix(_tail(old)) + _tail(new)]


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
