"""How one plain tensor comes from stored ones, and how recipes are made of recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Stored = Mapping[str, torch.Tensor]  # ending of the name -> tensor
Make = Callable[[Stored, torch.dtype], torch.Tensor]  # to the type that computes


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one plain tensor comes from stored ones. Without `make` it is the stored one."""

    sources: Mapping[str, str]  # ending -> stored name
    make: Make | None = None
    row: int | None = None  # of a stack: nothing but this row of each source is moved and decoded

    def of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What it is made of, by ending."""
        found = {ending: tensors[name] for ending, name in self.sources.items()}
        return found if self.row is None else {ending: tensor[self.row] for ending, tensor in found.items()}


def made(recipe: Recipe, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """The plain tensor, of what the recipe asks for."""
    return next(iter(stored.values())).to(dtype) if recipe.make is None else recipe.make(stored, dtype)


def together(parts: Sequence[Recipe], join: Callable[[list[torch.Tensor]], torch.Tensor]) -> Recipe:
    """One tensor of several plain ones."""
    sources = {f"{i}/{ending}": name for i, part in enumerate(parts) for ending, name in part.sources.items()}

    def make(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
        by_name = {name: stored[key] for key, name in sources.items()}
        return join([made(part, part.of(by_name), dtype) for part in parts])

    return Recipe(sources, make)


def changed(recipe: Recipe, change: Callable[[torch.Tensor], torch.Tensor]) -> Recipe:
    """The same tensor turned, shifted or cut."""
    return Recipe(recipe.sources, lambda stored, dtype: change(made(recipe, stored, dtype)), recipe.row)


def one_row(recipe: Recipe, index: int) -> Recipe:
    """One row of a stack, which is made even if it is only taken: who reads sources as they are would take them all."""

    def make(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
        return made(recipe, stored, dtype)

    return Recipe(recipe.sources, make, index)
