"""GGUF architectures that transformers itself describes in full: its configuration, names and conversions are used.

Its older tables (qwen3moe and others) leave sizes and constants out, so those architectures are in table.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS, get_gguf_config
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.integrations.gguf.utils import get_gguf_conversion_mapping

from moeprune.checkpoint.folder import Checkpoint
from moeprune.errors import InputError
from moeprune.scoring.dequantize import Recipe, Stored
from moeprune.scoring.gguf.facts import shortest
from moeprune.scoring.gguf.types import SCALE, values

ARCHITECTURES = frozenset(GGUF_ARCHS) & frozenset(GGUF_CONFIG_ARCHS)


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration as transformers makes it; the vocabulary may be larger than the list of words."""
    metadata, _ = read_gguf_metadata(str(checkpoint.shards[0]))
    metadata = {key: shortest(value) for key, value in metadata.items()}
    try:
        config: dict[str, Any] = get_gguf_config(metadata, tuple(checkpoint.tensors))
    except KeyError as error:
        raise InputError(f"{checkpoint.shards[0]} does not say {error}, so its model cannot be built") from None
    kinds = {tensor.dtype for tensor in checkpoint.tensors.values()}
    dtype = "float32" if kinds <= {"F32"} else "bfloat16"
    return config | {"vocab_size": checkpoint.tensors["token_embd.weight"].shape[0], "dtype": dtype}


def recipes(checkpoint: Checkpoint, config: PreTrainedConfig, names: Iterable[str]) -> dict[str, Recipe]:
    """Name in memory -> recipe: the values of one tensor or several, and then transformers' operations on them."""
    mapping = get_gguf_conversion_mapping(str(checkpoint.config["general.architecture"]), config)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    names = list(names)
    sources: dict[str, dict[str, str]] = {}
    used: dict[str, WeightConverter | None] = {}
    for name in names:
        if name.endswith(SCALE):
            continue
        target, pattern = rename_source_key(name, renamings, converters)
        used[target] = by_pattern.get(pattern or "")
        sources.setdefault(target, {})[pattern or target] = name
        if (factor := name.removesuffix(".weight") + SCALE) in names:
            sources[target][(pattern or target) + SCALE] = factor
    kinds = {name: checkpoint.tensors[name].dtype for name in names}
    return {
        target: Recipe(parts, partial(_make, kinds={k: kinds[n] for k, n in parts.items()}, converter=used[target]))
        for target, parts in sources.items()
    }


def _make(
    stored: Stored, dtype: torch.dtype, kinds: Mapping[str, str], converter: WeightConverter | None
) -> torch.Tensor:
    """The sources, in the order of the converter's patterns, and then its operations."""
    if converter is None:
        return _values(stored, next(iter(kinds)), kinds, dtype)
    sources, targets = converter.source_patterns, converter.target_patterns
    found: dict[str, Any] = {key: _values(stored, key, kinds, dtype) for key in sources if key in stored}
    for operation in converter.operations:
        found = operation.convert(found, source_patterns=sources, target_patterns=targets)
    value: torch.Tensor = next(iter(found.values()))
    return value.to(dtype)


def _values(stored: Stored, source: str, kinds: Mapping[str, str], dtype: torch.dtype) -> torch.Tensor:
    """Small tensors in 32 bits, as `w + 1` would lose what it says about w."""
    small = stored[source].dim() < 2
    return values(stored, source, kinds[source], torch.float32 if small else dtype)
