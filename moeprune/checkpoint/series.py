"""The tensors of single experts whose names differ in the expert's number alone, and whether any of them is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moeprune.checkpoint.headers import Tensor
from moeprune.errors import InputError

FLOATS = frozenset(("BF16", "F16", "F32", "F64"))


@dataclass(frozen=True, slots=True)
class Series:
    """The tensors of single experts of one module whose names differ in the expert's number alone."""

    module: str
    chunk: bool  # each serves several neighbours
    around: tuple[str, str]  # the number
    numbers: dict[str, int] = field(default_factory=dict)  # name -> number


def check_complete(series: Sequence[Series], experts: int, tensors: Iterable[Tensor]) -> None:
    """Every expert must own the same tensors; a hole would become a wrong number after the cut."""
    for one in series:
        missing = set(range(experts)).difference(one.numbers.values())
        if missing and not one.chunk and not _partly_quantized(one, series, experts, tensors):
            tail = one.around[1].lstrip(".")
            raise InputError(f"{one.module}experts: expert {min(missing)} has no tensor {tail}; fetch the model again")


def _partly_quantized(hole: Series, series: Iterable[Series], experts: int, tensors: Iterable[Tensor]) -> bool:
    """Whether the matrix that a tensor belongs to is plain in some experts, and in the others quantized in one way."""
    dtypes = {tensor.name: tensor.dtype for tensor in tensors}
    owned: dict[int, dict[str, str]] = {expert: {} for expert in range(experts)}  # expert -> tail -> dtype
    for one in series:
        if _matrix(one) == _matrix(hole):
            for name, number in one.numbers.items():
                owned[number][one.around[1]] = dtypes[name]
    plain = {expert for expert, own in owned.items() if {*own.values()} <= FLOATS}
    ways = {(expert in plain, *sorted(own)) for expert, own in owned.items()}
    weights = all(any(tail.endswith(".weight") for tail in owned[expert]) for expert in plain)
    return weights and 0 < len(plain) < len(owned) and len(ways) == 2


def _matrix(one: Series) -> tuple[str, str]:
    """What names the matrix of an expert that a tensor belongs to: experts.N.up_proj, or up_projs.N."""
    head, tail = one.around
    return head, tail.split(".")[1] if tail.count(".") > 1 else ""
