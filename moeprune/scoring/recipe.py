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


def made(recipe: Recipe, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """The plain tensor."""
    return next(iter(stored.values())).to(dtype) if recipe.make is None else recipe.make(stored, dtype)


def together(parts: Sequence[Recipe], join: Callable[[list[torch.Tensor]], torch.Tensor]) -> Recipe:
    """One tensor of several plain ones."""
    sources = {f"{i}/{ending}": name for i, part in enumerate(parts) for ending, name in part.sources.items()}

    def make(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
        own = [{ending: stored[f"{i}/{ending}"] for ending in part.sources} for i, part in enumerate(parts)]
        return join([made(part, tensors, dtype) for part, tensors in zip(parts, own, strict=True)])

    return Recipe(sources, make)


def changed(recipe: Recipe, change: Callable[[torch.Tensor], torch.Tensor]) -> Recipe:
    """The same tensor turned, shifted or cut."""
    return Recipe(recipe.sources, lambda stored, dtype: change(made(recipe, stored, dtype)))


def row(recipe: Recipe, index: int) -> Recipe:
    """One row along the first axis; nothing but that row is decoded."""
    return Recipe(
        recipe.sources,
        lambda stored, dtype: made(recipe, {ending: tensor[index] for ending, tensor in stored.items()}, dtype),
    )
