"""Pixels that exist only while something computes with them: thousands of images take the memory of one.

Every waiting forward keeps its inputs to its end. So it gets stand-ins that know shape and type but hold nothing; the
first operation on one reads its image file again, and only what that operation makes goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from moeprune.errors import InputError

Inputs = Mapping[str, torch.Tensor]


class Pixels(torch.Tensor):
    """A tensor without memory: `make` gives its values whenever an operation needs them."""

    make: Callable[[], torch.Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    @staticmethod
    def __new__(cls, make: Callable[[], torch.Tensor], like: torch.Tensor, shape: Sequence[int] = ()) -> Pixels:
        """A stand-in of the type and place of `like`, and of its shape unless one is given."""
        made = torch.Tensor._make_wrapper_subclass(cls, shape or like.shape, dtype=like.dtype, device=like.device)
        made.make = make
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Any operation: on the values."""
        args, kwargs = tree_map(lambda value: value.make() if isinstance(value, cls) else value, (args, kwargs or {}))
        return operation(*args, **kwargs)


@dataclass(frozen=True)
class Recipe:
    """How the inputs of one document are made, and what came out the first time."""

    again: Callable[[], Inputs]
    name: str
    digest: str
    origin: str

    def __call__(self) -> torch.Tensor:
        """The same values as the first time, or an error."""
        value = self.again()[self.name]
        if digest_of(value) != self.digest:
            raise InputError(f"{self.origin}: its image has changed while it was in use; start the run again")
        return value


def forgotten(inputs: Inputs, again: Callable[[], Inputs], origin: str) -> dict[str, torch.Tensor]:
    """The same inputs with stand-ins for pixels, which `again` makes; whole numbers are small and stay."""
    return {
        name: Pixels(Recipe(again, name, digest_of(value), origin), value) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parts behind each other; of stand-ins a stand-in."""
    if not any(isinstance(part, Pixels) for part in parts):
        return torch.cat(list(parts))
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    return Pixels(lambda: torch.cat([values(part) for part in parts]), parts[0], shape)


def moved(value: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The input where the model is; one that is not of whole numbers takes the model's type."""
    dtype = dtype if value.is_floating_point() else value.dtype
    if not isinstance(value, Pixels):
        return value.to(device, dtype)
    make = value.make
    return Pixels(lambda: make().to(device, dtype), torch.empty(0, device=device, dtype=dtype), value.shape)


def values(value: torch.Tensor) -> torch.Tensor:
    """The tensor itself, also of a stand-in."""
    return value.make() if isinstance(value, Pixels) else value


def digest_of(value: torch.Tensor) -> str:
    """SHA-256 of shape and values; that of a stand-in is known."""
    if isinstance(value, Pixels) and isinstance(value.make, Recipe):
        return value.make.digest
    content = values(value).contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(repr((tuple(value.shape), str(value.dtype))).encode() + content.tobytes()).hexdigest()
