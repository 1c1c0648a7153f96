"""A GGUF file as transformers would have it: a configuration, and a recipe for every parameter.

Tensors keep their names on disk, so blocks, scores and the cut speak of blk.7; recipes carry the names in memory. A
tensor that no rule knows ends the run: what is left out silently would be another model.
Legend: E experts, I inner size of an expert, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from moeprune.checkpoint.folder import Checkpoint
from moeprune.errors import OUT_OF_MEMORY, InputError, reason
from moeprune.scoring.formats.dequantize import Recipe, Stored
from moeprune.scoring.gguf.facts import INSTEAD, Facts, common
from moeprune.scoring.gguf.model import LEAVES, OUTSIDE, Model
from moeprune.scoring.gguf.table import REFUSED, TABLE
from moeprune.scoring.gguf.turns import MADE, PERMUTED, TURNS
from moeprune.scoring.gguf.types import SCALE, check, values

LAYER = re.compile(r"blk\.(?P<layer>\d{1,6})\.(?P<leaf>.+)")
ALONE = re.compile(r"ffn_(?P<kind>gate|up|down)\.(?P<expert>\d{1,6})\.weight")  # files of 2023
UNUSED = re.compile(  # for engines in FP4; part of the configuration; a table of cosines
    r"(\.input_scale|rope_freqs\.weight|attn_rot_embd\.weight)$"
)


class Read(Protocol):
    """Gives the values of a source, or those of one of its rows."""

    def __call__(self, source: str, row: int | None = None, /) -> torch.Tensor:
        """On the device that computes, in the type that does; but what lies in 32 bits stays so, if it is no row."""


NO_CONFIGURATION = (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
Build = Callable[[Read], torch.Tensor]
Way = Callable[[torch.Tensor], torch.Tensor]


def config_of(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The configuration, from the metadata and the shapes."""
    facts = Facts(checkpoint)
    try:
        return AutoConfig.for_model(**_described(facts))
    except NO_CONFIGURATION as error:
        raise InputError(f"{facts.file}: its metadata describe no model that can be ({reason(error)})") from None


def _described(facts: Facts) -> dict[str, Any]:
    model = _model(facts)
    found: dict[str, Any] = {"model_type": model.model_type, "architectures": [model.architecture]}
    return found | common(facts) | model.config(facts)


def _model(facts: Facts) -> Model:
    if facts.architecture not in TABLE:
        why = REFUSED.get(facts.architecture, "no table in moeprune/scoring/gguf/ knows it")
        raise InputError(
            f"{facts.file}: a GGUF file of the architecture {facts.architecture or '(none named)'} can be cut but not "
            f"run here, because {why}; {INSTEAD}"
        )
    return TABLE[facts.architecture]


def recipes(checkpoint: Checkpoint) -> Mapping[str, Recipe]:
    """Name in memory -> recipe. Layers that predict further tokens are not run and have none."""
    facts = Facts(checkpoint)
    layers: dict[int, dict[str, str]] = {}
    for tensor in checkpoint.tensors.values():
        if not UNUSED.search(tensor.name):
            check(tensor.dtype, tensor.name)
            match = LAYER.fullmatch(tensor.name)
            of_layer = layers.setdefault(int(match["layer"]) if match else -1, {})
            of_layer[match["leaf"] if match else tensor.name] = tensor.name
    model, found = _model(facts), dict[str, Recipe]()
    for layer, leaves in sorted(layers.items()):
        if layer < facts.layers:
            found |= _Part(facts, model, layer, leaves).recipes()
    return found


class _Part:
    """One layer, or what is outside the layers (-1). `left` maps the leaves not yet used to names on disk."""

    def __init__(self, facts: Facts, model: Model, layer: int, leaves: Mapping[str, str]) -> None:
        self.facts, self.model, self.left = facts, model, dict(leaves)
        self.names = {**(OUTSIDE if layer < 0 else LEAVES), **model.leaves}
        self.turns = {**TURNS, **(PERMUTED if model.permuted else {}), **model.turns}
        self.prefix = "" if layer < 0 else f"{model.layers}.{layer}."

    def recipes(self) -> dict[str, Recipe]:
        """All of them."""
        found = dict([*self._experts(), *self._made()])
        found |= dict([self._plain(leaf) for leaf in [*self.left] if leaf in self.names or not leaf.endswith(SCALE)])
        if self.left:
            raise self._unknown(next(iter(self.left)))
        return {self.prefix + name: recipe for name, recipe in found.items()}

    def _unknown(self, leaf: str) -> InputError:
        return InputError(
            f"{self.facts.file}: {self.left[leaf]} is not known for the architecture {self.facts.architecture}; add it "
            f"to the tables in moeprune/scoring/gguf/, or {INSTEAD}"
        )

    def _target(self, leaf: str) -> str:
        """The name in memory, empty where none is known."""
        stem, _, ending = leaf.rpartition(".")
        return self.names.get(leaf) or (f"{self.names[stem]}.{ending}" if stem in self.names else "")

    def _plain(self, leaf: str) -> tuple[str, Recipe]:
        """A tensor that is one in memory, too."""
        target = self._target(leaf)
        if not target:
            raise self._unknown(leaf)
        return target, self._recipe({"": leaf}, partial(_whole, turn=self._turn(leaf)))

    def _turn(self, leaf: str) -> Way | None:
        return partial(self.turns[leaf], self.facts) if leaf in self.turns else None

    def _made(self) -> Iterator[tuple[str, Recipe]]:
        """Parameters of several tensors; where the file has such a one as a whole, too, its parts say no more."""
        whole = {self._target(leaf) for leaf in self.left}
        for target, made in {**MADE, **self.model.made}.items():
            if target in whole:
                for leaf in made.leaves:
                    self.left.pop(leaf, None)
            elif made.leaves[0] in self.left:
                turns = {leaf: self._turn(leaf) for leaf in made.leaves}
                build = partial(_joined, turns=turns, join=partial(made.join, self.facts))
                yield target, self._recipe({leaf: leaf for leaf in made.leaves}, build)

    def _experts(self) -> Iterator[tuple[str, Recipe]]:
        """The stacks that the model has in memory, whichever way they lie on disk."""
        for ending in ("weight", "bias") if self.model.experts else ():
            target = f"{self.model.experts}.{{}}_proj{'_bias' if ending == 'bias' else ''}"
            for name, kinds in self.model.stacks.items():
                whole, apart = f"ffn_{name}_exps.{ending}", {kind: f"ffn_{kind}_exps.{ending}" for kind in kinds}
                build = partial(_stack, kinds=kinds, model=self.model, experts=self._count())
                if whole in self.left:
                    yield target.format(name), self._recipe({name: whole}, partial(build, kinds=(name,)))
                elif apart[kinds[0]] in self.left:
                    yield target.format(name), self._recipe(apart, build)
                elif f"ffn_{kinds[0]}.0.weight" in self.left and ending == "weight":
                    alone = [match for leaf in self.left if (match := ALONE.fullmatch(leaf)) and match["kind"] in kinds]
                    sources = {f"{match['kind']}.{match['expert']}": match[0] for match in alone}
                    yield target.format(name), self._recipe(sources, partial(build, alone=True))

    def _count(self) -> int:
        return int(self.facts["expert_count"])

    def _recipe(self, leaves: Mapping[str, str], build: Build) -> Recipe:
        """The recipe that builds a parameter of these tensors, their factors applied."""
        sources: dict[str, str] = {}
        for source, leaf in leaves.items():
            if leaf not in self.left:
                raise InputError(f"{self.facts.file}: {self.prefix or 'the model'} lacks {leaf}; fetch the file again")
            sources[source] = self.left.pop(leaf)
            factor = leaf.removesuffix(".weight") + SCALE
            if factor in self.left and factor not in self.names:  # some models have a place of its own for it
                sources[source + SCALE] = self.left.pop(factor)
        tensors = self.facts.checkpoint.tensors
        kinds = {source: tensors[name].dtype for source, name in sources.items()}
        return Recipe(sources, partial(_make, build=build, kinds=kinds, names=tuple(sources.values())))


def _make(
    stored: Stored, dtype: torch.dtype, build: Build, kinds: Mapping[str, str], names: tuple[str, ...]
) -> torch.Tensor:
    """A router's bias, say, must not be rounded: transformers rounds what it does not keep in 32 bits."""

    def read(source: str, row: int | None = None, /) -> torch.Tensor:
        exact = row is None and kinds[source] == "F32"
        return values(stored, source, kinds[source], torch.float32 if exact else dtype, row)

    try:
        return build(read)
    except (ArithmeticError, IndexError, RuntimeError) as error:  # shapes and counts that do not fit each other
        if type(error).__name__ in OUT_OF_MEMORY:
            raise
        parts = ", ".join(names)
        raise InputError(f"no parameter can be made of {parts} ({reason(error)}); fetch the file again") from None


def _whole(read: Read, turn: Way | None) -> torch.Tensor:
    return read("") if turn is None else turn(read(""))


def _joined(
    read: Read, turns: Mapping[str, Way | None], join: Callable[[list[torch.Tensor]], torch.Tensor]
) -> torch.Tensor:
    return join([read(leaf) if turn is None else turn(read(leaf)) for leaf, turn in turns.items()])


def _stack(read: Read, kinds: tuple[str, ...], model: Model, experts: int, alone: bool = False) -> torch.Tensor:
    """[E, 2I, H] and [E, H, I], an expert at a time, or as the model has them."""

    def one(expert: int) -> torch.Tensor:
        parts = [read(f"{kind}.{expert}") if alone else read(kind, expert) for kind in kinds]
        if model.by_turns and kinds == ("gate_up",):
            parts = list(parts[0].chunk(2))
        joined = torch.stack(parts, dim=1).flatten(0, 1) if model.by_turns else torch.cat(parts)
        return joined.T if model.columns and joined.dim() == 2 else joined

    first = one(0)
    stacked = first.new_empty(experts, *first.shape)
    stacked[0] = first
    for expert in range(1, experts):
        stacked[expert] = one(expert)
    return stacked
