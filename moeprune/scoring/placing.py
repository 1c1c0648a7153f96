"""Stored tensors that go straight into their parameter: read from the file to the place where the model wants them.

Most of transformers' conversions only lay tensors side by side: experts are stacked, gate and up projections joined.
The inverse of that is a view, so every stored tensor has a place in the finished parameter and needs no copy of its
own. What is computed from stored tensors (dequantized, interleaved, split) has no such place; loading.py converts it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightTransform,
    build_glob_alternation,
    dot_natural_key,
)

from moeprune.checkpoint.folder import Checkpoint, Tensor
from moeprune.errors import InputError
from moeprune.scoring.formats.dequantize import DTYPES, Recipe, read_tensor

Pieces = list[torch.Tensor]
# The inverse of an operation: pieces of its result, and how many kinds of tensors went in -> pieces of what went in.
INVERSE: dict[type[ConversionOps], Callable[[Any, Pieces, int], Pieces]] = {
    Transpose: lambda operation, pieces, _kinds: [piece.transpose(operation.dim0, operation.dim1) for piece in pieces],
    Concatenate: lambda operation, pieces, kinds: [part for p in pieces for part in p.chunk(kinds, operation.dim)],
    MergeModulelist: lambda operation, pieces, _kinds: [part for p in pieces for part in p.unbind(operation.dim)],
}


@dataclass(frozen=True, slots=True)
class Straight:
    """A parameter whose stored tensors lie side by side in it."""

    like: torch.Tensor  # of its shape and type, without content
    sources: tuple[Tensor, ...]  # in the order of the places
    operations: tuple[ConversionOps, ...] = ()
    kinds: int = 1  # of tensors that are joined: gate and up projections are two

    def places(self, whole: torch.Tensor) -> Pieces:
        """The views of the whole parameter that the sources go into."""
        pieces = [whole]
        for operation in reversed(self.operations):
            pieces = INVERSE[type(operation)](operation, pieces, self.kinds)
        return pieces

    def fits(self) -> bool:
        """Whether every source is a tensor of plain numbers with a place of its own shape."""
        shapes = [source.shape for source in self.sources if source.dtype in DTYPES]
        return shapes == [tuple(place.shape) for place in self.places(self.like)]


def straight(
    stored: Mapping[str, Tensor],
    patterns: Mapping[str, str | None],
    converters: Iterable[WeightConverter],
    like: torch.Tensor,
) -> Straight | None:
    """How these stored tensors go straight into a parameter; None if they must be converted.

    `patterns` says for each of them which source of which converter it is, if any, as transformers matches names.
    """
    names: dict[str | None, list[str]] = defaultdict(list)
    for name in sorted(patterns, key=dot_natural_key):  # the order in which transformers stacks
        names[patterns[name]].append(name)
    found = Straight(like, tuple(stored[name] for name in names[None])) if set(names) == {None} else None
    converter = next((entry for entry in converters if set(names) <= set(entry.source_patterns)), None)
    if converter is not None and len(converter.target_patterns) == 1:
        if any(type(operation) not in INVERSE or _is_unclear(operation) for operation in converter.operations):
            return None
        ordered = [stored[name] for pattern in converter.source_patterns for name in names.get(pattern, ())]
        found = Straight(like, tuple(ordered), tuple(converter.operations), len(names))
    return found if found is not None and found.fits() else None


def _is_unclear(operation: Any) -> bool:
    """Operations that do one thing or another."""
    return getattr(operation, "check_dims", False) or getattr(operation, "num_shards_attribute", None) is not None


def ways(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    mapping: Sequence[WeightTransform],
    matched: Mapping[str, tuple[str, str | None]],
) -> dict[str, Straight]:
    """The parameters that need no conversion. `matched`: plain name -> parameter, source pattern of its converter."""
    in_memory = model.state_dict()
    patterns: dict[str, dict[str, str | None]] = {}
    for name, (target, pattern) in matched.items():
        if target in in_memory:
            patterns.setdefault(target, {})[name] = pattern
    kept = model._get_dtype_plan(model.dtype)  # what the family computes in another type than the rest
    expression, globs, _ = build_glob_alternation(list(kept))
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found = {}
    for target, own in patterns.items():
        if any(recipes[name].make is not None for name in own):
            continue
        match = expression.search(target) if kept else None
        dtype = kept[globs[str(match.lastgroup)]] if match else in_memory[target].dtype
        like = torch.empty(in_memory[target].shape, dtype=dtype, device="meta")
        stored = {name: checkpoint.tensors[next(iter(recipes[name].sources.values()))] for name in own}
        way = straight(stored, own, converters, like)
        if way is not None:
            found[target] = way
    return found


class StraightReader:
    """Reads the parameters that need no conversion, layer after layer into the same memory.

    Memory that is used for the first time costs more than what is read into it, as the system clears it page by page.
    """

    def __init__(self, ways: Mapping[str, Straight], device: torch.device) -> None:
        self.ways, self.device = ways, device
        self._spare: list[torch.Tensor] = []
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def places(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Memory for those of these parameters that are read straight; what is kept and fits none of them is freed."""
        found = {name: self._place(self.ways[name].like) for name in names if name in self.ways}
        self._spare.clear()
        return found

    def nbytes(self, names: Iterable[str]) -> int:
        """How much memory those of these parameters take that are read straight."""
        return sum(self.ways[name].like.nbytes for name in names if name in self.ways)

    def _place(self, like: torch.Tensor) -> torch.Tensor:
        for index, spare in enumerate(self._spare):
            if spare.shape == like.shape and spare.dtype == like.dtype:
                return self._spare.pop(index)
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self._copying is not None)

    def read(self, places: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Fill the places from the disk; the parameters, on the device that computes."""
        _read_into([(self.ways[name], whole) for name, whole in places.items()])
        if self.device.type == "cpu":
            return dict(places)
        with torch.cuda.stream(self._copying):  # beside what the device computes meanwhile
            moved = {name: whole.to(self.device, non_blocking=True) for name, whole in places.items()}
        if self._copying is not None:
            self._copying.synchronize()
        self._spare = list(places.values())
        return moved

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """These parameters are dropped; the next layer may take their memory."""
        if self.device.type == "cpu":
            self._spare = list(tensors)


def _read_into(parameters: Sequence[tuple[Straight, torch.Tensor]]) -> None:
    """Read every parameter's sources into it, each file from its beginning to its end."""
    todo = [
        (source, place)
        for each, whole in parameters
        for source, place in zip(each.sources, each.places(whole), strict=True)
    ]
    todo.sort(key=lambda pair: (pair[0].file, pair[0].start))
    for path, group in groupby(todo, key=lambda pair: pair[0].file):
        with path.open("rb") as file:
            for source, place in group:
                if DTYPES[source.dtype] != place.dtype or not place.is_contiguous() or not place.dim():
                    place.copy_(read_tensor(source))
                    continue
                file.seek(source.start)
                if source.nbytes and file.readinto(place.view(torch.uint8).numpy().data) != source.nbytes:
                    raise InputError(
                        f"{path} became shorter while it was read; nobody may write to the model meanwhile"
                    )
