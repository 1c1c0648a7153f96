"""Tensors on disk -> plain tensors under plain names, so that a quantized checkpoint loads like any other.

A recipe says which stored tensors make up one plain tensor and how. Formats are told apart tensor by tensor, as one
checkpoint may mix them (number_formats.py); then the layouts that transformers does not know are brought into the one
that it does (rearranged.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from moeprune.checkpoint import gguf
from moeprune.checkpoint.folder import Checkpoint, Tensor
from moeprune.checkpoint.formats import check_scorable, quantization_of
from moeprune.errors import InputError
from moeprune.scoring.formats import torchao
from moeprune.scoring.formats.decoding import Quantization
from moeprune.scoring.formats.rearranged import rearranged
from moeprune.scoring.formats.recipe import Make, Recipe, Stored
from moeprune.scoring.formats.table import TABLE, Format

__all__ = ["Lazy", "Make", "Recipe", "Stored", "read_tensor", "recipes"]

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


PACKED_TYPES = ("I8", "U8", "U32", "F8_E4M3", "F8_E5M2", "F8_E8M0")  # of which weights are not made by themselves


Candidates = Mapping[str, list[tuple[str, Format]]]  # type of the weight -> its ending and format, as TABLE orders them


def _candidates(checkpoint: Checkpoint, quantization: Quantization) -> Candidates:
    """The formats that any tensor can have: few of them, and large models have a million names to match."""
    words = {name.rpartition(".")[2] for name in checkpoint.tensors}
    found: dict[str, list[tuple[str, Format]]] = {}
    for form in TABLE:
        ends = [ending.rpartition(".")[2] for ending in form.endings]
        if form.applies(quantization) and all(any(word.endswith(end) for word in words) for end in ends):
            main, types = next(iter(form.endings.items()))
            for one in types.split():
                found.setdefault(one, []).append((main, form))
    return found


def recipes(checkpoint: Checkpoint) -> Mapping[str, Recipe]:
    """Plain name -> recipe, for every tensor of the checkpoint."""
    check_scorable(checkpoint)
    quantization, about = quantization_of(checkpoint), _about(checkpoint)
    candidates = _candidates(checkpoint, quantization)
    found: dict[str, Recipe] = {}
    used: set[str] = set()
    for name in checkpoint.tensors:
        match = _match(name, checkpoint, candidates)
        if match is not None:
            form, stem, sources = match
            used.update(sources.values())
            plain = torchao.plain_name(stem) if "_qdata" in form.endings else stem + form.plain
            settings = {**quantization, **_own(stem, plain, quantization, about)}
            found[plain] = Recipe(sources, _with(form, settings))
    found |= {name: _stored(name, checkpoint) for name in checkpoint.tensors if name not in used}
    return rearranged(found, checkpoint)


def _stored(name: str, checkpoint: Checkpoint) -> Recipe:
    """A tensor as it lies there; a weight whose scales have no name that is known is refused if it is asked for."""
    tensor, scales = (
        checkpoint.tensors[name],
        [f"{name}_scale", f"{name}_scale_inv", f"{name.rpartition('.')[0]}.scale"],
    )
    scaled = tensor.dtype.startswith("F8") and not any(scale in checkpoint.tensors for scale in scales)
    if tensor.dtype not in PACKED_TYPES or scaled or len(tensor.shape) < 2:
        return Recipe({"": name})

    def refuse(_stored: Stored, _dtype: torch.dtype) -> torch.Tensor:
        raise InputError(
            f"{name} {list(tensor.shape)} is stored as {tensor.dtype} in a way that is not known; add its format to "
            "TABLE in moeprune/scoring/formats/table.py"
        )

    return Recipe({"": name}, refuse)


def _about(checkpoint: Checkpoint) -> dict[str, str]:
    """What shards say beside the tensors, under the tensors' plain names."""
    return {name: text for metadata in checkpoint.shard_metadata.values() for name, text in metadata.items()}


def _own(stem: str, plain: str, quantization: Quantization, about: Mapping[str, str]) -> Quantization:
    """Settings of one module (MLX; VPTQ; Gemma, by a pattern) or tensor (torchao) alone."""
    if plain in about:
        said = json.loads(about[plain])
        return {"_type": said.get("_type"), **said.get("_data", {})}
    module = stem.rstrip(".")
    by_name = {**quantization, **(quantization.get("config_for_layers") or {})}
    patterns = quantization.get("module_quant_configs") or {}
    own = next((own for pattern, own in patterns.items() if re.search(pattern, module)), by_name.get(module))
    return own if isinstance(own, dict) else {}


def _with(form: Format, settings: Quantization) -> Make:
    return lambda stored, dtype: form.make(stored, settings).to(dtype)


def _match(name: str, checkpoint: Checkpoint, candidates: Candidates) -> tuple[Format, str, dict[str, str]] | None:
    """The format whose weight this tensor is, its stem, and its companions."""
    for main, form in candidates.get(checkpoint.tensors[name].dtype, ()):
        if not name.endswith(main):
            continue
        stem = name.removesuffix(main)
        if main[:1].isalpha() and stem[-1:] not in ("", "."):  # qweight is no weight
            continue
        names = {ending: stem + ending for ending in form.endings}
        if all(_has(checkpoint, names[ending], types) for ending, types in form.endings.items()):
            extra = {ending: stem + ending for ending in form.optional if stem + ending in checkpoint.tensors}
            return form, stem, names | extra
    return None


def _has(checkpoint: Checkpoint, name: str, types: str) -> bool:
    return name in checkpoint.tensors and checkpoint.tensors[name].dtype in types.split()


class Lazy:
    """A plain tensor that is made when transformers asks for it, on the device that computes."""

    def __init__(self, recipe: Recipe, stored: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device):
        self.recipe, self.dtype, self.device = recipe, dtype, device
        self.stored = recipe.of(stored)

    def __getitem__(self, _everything: Any) -> torch.Tensor:
        if self.recipe.make is None:
            return next(iter(self.stored.values()))
        on_device = {ending: tensor.to(self.device) for ending, tensor in self.stored.items()}
        return self.recipe.make(on_device, self.dtype).contiguous()


def read_tensor(tensor: Tensor) -> torch.Tensor:
    """The bytes of a tensor, read into memory of its own."""
    blocks = tensor.dtype in gguf.NUMBERS and tensor.dtype not in DTYPES  # of bytes along the last axis
    if not blocks and tensor.dtype not in DTYPES:
        raise InputError(f"{tensor.file}: {tensor.name} has dtype {tensor.dtype}, which torch cannot hold")
    buffer = torch.empty(tensor.nbytes, dtype=torch.uint8)
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        if tensor.nbytes and file.readinto(buffer.numpy().data) != tensor.nbytes:
            raise InputError(f"{tensor.file} became shorter while it was read; nobody may write to the model meanwhile")
    return buffer.view(*tensor.shape[:-1], -1) if blocks else buffer.view(DTYPES[tensor.dtype]).view(tensor.shape)
