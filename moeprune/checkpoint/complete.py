"""Whether the tensors hold every layer that the config promises, experts included.

A download that ended early leaves an index that agrees with the files, and a model that lacks layers. Such a model can
be cut without any complaint, and nobody will load the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moeprune.checkpoint.folder import Checkpoint
from moeprune.checkpoint.structure import Block
from moeprune.errors import InputError

DEPTH_KEYS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")


def check_layers(checkpoint: Checkpoint, blocks: Sequence[Block], scope: Mapping[str, Any]) -> None:
    """Refuse a model with fewer layers than `scope`, the part of its config that counts experts, says it has."""
    # Where a layer has two halves, one key counts the halves. Of two stacks, one key counts the layers of each.
    depth = min((scope[key] for key in DEPTH_KEYS if type(scope.get(key)) is int), default=0)
    present = {stack: layer_numbers(stack, checkpoint.tensors) for stack in stacks(blocks)}
    longest = max(present, key=lambda stack: len(present[stack]), default="")
    for stack, numbers in present.items():
        promised = depth if stack == longest else max(numbers) + 1
        missing = [number for number in range(promised) if number not in numbers] if depth else []
        if missing:
            raise InputError(
                f"{checkpoint.folder}: config.json promises {promised} layers, but no tensor belongs to "
                f"{stack}.{missing[0]} ({len(missing)} missing); fetch the model again"
            )
        _check_routers(checkpoint, stack, numbers, blocks)


def _check_routers(checkpoint: Checkpoint, stack: str, numbers: Iterable[int], blocks: Sequence[Block]) -> None:
    """A layer with a router like those of the others, but without its experts, would stay as it is."""
    routers = {p.tensor.removeprefix(b.name) for b in blocks if stack_of(b.name) == stack for p in b.parts if p.router}
    for layer in {f"{stack}.{number}" for number in numbers} - {block.name for block in blocks}:
        lone = next((f"{layer}{tail}" for tail in routers if f"{layer}{tail}" in checkpoint.tensors), None)
        if lone:
            raise InputError(f"{checkpoint.folder}: the router {lone} has no experts; fetch the model again")


def stacks(blocks: Iterable[Block]) -> dict[str, None]:
    """The prefixes that the trunk's layers share, up to the layer's number."""
    trunk = [block.name for block in blocks if block.role == "trunk"]
    return dict.fromkeys(stack_of(name) for name in trunk if name.rpartition(".")[2].isdigit())


def stack_of(layer: str) -> str:
    """model.layers of model.layers.7."""
    return layer.rpartition(".")[0]


def layer_numbers(stack: str, names: Iterable[str]) -> set[int]:
    """The numbers of all layers of a stack that any tensor belongs to."""
    numbered = re.compile(rf"{re.escape(stack)}\.(\d{{1,6}})\." if stack else r"(\d{1,6})\.")
    return {int(match[1]) for name in names if (match := numbered.match(name))}
