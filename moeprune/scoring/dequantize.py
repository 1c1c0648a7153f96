"""Tensors on disk -> plain tensors under plain names, so that a quantized checkpoint loads like any other.

A recipe says which stored tensors make up one plain tensor and how. Unquantized tensors have the trivial recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moeprune.checkpoint.folder import Checkpoint, Tensor
from moeprune.errors import InputError

Make = Callable[[Sequence[torch.Tensor], torch.dtype], torch.Tensor]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one plain tensor comes from stored ones."""

    sources: tuple[str, ...]
    make: Make


def as_stored(stored: Sequence[torch.Tensor], _dtype: torch.dtype) -> torch.Tensor:
    """The one stored tensor itself."""
    return stored[0]


def recipes(checkpoint: Checkpoint) -> Mapping[str, Recipe]:
    """Plain name -> recipe, for every tensor of the checkpoint."""
    return {name: Recipe((name,), as_stored) for name in checkpoint.tensors}


def read_tensor(tensor: Tensor) -> torch.Tensor:
    """The bytes of a tensor, read into memory of its own."""
    if tensor.dtype not in DTYPES:
        raise InputError(f"{tensor.file}: {tensor.name} has dtype {tensor.dtype}, which torch cannot hold")
    buffer = torch.empty(tensor.nbytes, dtype=torch.uint8)
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        if tensor.nbytes and file.readinto(buffer.numpy().data) != tensor.nbytes:
            raise InputError(f"{tensor.file} became shorter while it was read; nobody may write to the model meanwhile")
    return buffer.view(DTYPES[tensor.dtype]).view(tensor.shape)
