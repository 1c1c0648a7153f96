"""The weights of one layer at a time: from the disk, through transformers' own conversion, into the model, and out."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from moeprune.checkpoint.folder import Checkpoint
from moeprune.errors import InputError
from moeprune.scoring import gguf_weights
from moeprune.scoring.dequantize import Lazy, Recipe, read_tensor, recipes

Tensors = dict[str, torch.Tensor]
ONE_BY_ONE = re.compile(r"\bexperts\.\d+\.(gate|up|down)_proj\.weight$")
OUTSIDE = ""  # the name for everything that is in no layer: embeddings, final norm, head


class LayerLoader:
    """Knows which tensors on disk make up which layer, and loads and drops a layer's parameters."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, layers: Sequence[str], device: torch.device):
        transformers_logging.disable_progress_bar()
        self.model, self.checkpoint, self.device = model, checkpoint, device
        self.layers = frozenset(layers)
        self.dtype = model.dtype
        of_container = gguf_weights.recipes if checkpoint.container == "gguf" else recipes
        self.recipes: Mapping[str, Recipe] = of_container(checkpoint)
        in_memory = model.state_dict()
        self.mapping = get_model_conversion_mapping(model) + _stacking(model, self.recipes)
        self.memory_name = _memory_names(self.recipes, model, self.mapping, in_memory)
        self.sources: dict[str, list[str]] = {layer: [] for layer in (*layers, OUTSIDE)}
        for name, target in self.memory_name.items():
            if target in in_memory:
                self.sources[self.layer_of(target)].append(name)
        self.wanted: dict[str, list[str]] = {layer: [] for layer in (*layers, OUTSIDE)}
        for name in in_memory:
            self.wanted[self.layer_of(name)].append(name)
        self.nbytes = {
            layer: sum(in_memory[name].numel() * in_memory[name].element_size() for name in names)
            for layer, names in self.wanted.items()
        }
        self.stored_bytes = {
            layer: sum(checkpoint.tensors[source].nbytes for source in self._sources(names))
            for layer, names in self.sources.items()
        }
        self.borrowed = self._borrow()
        self.dequantizes = any(recipe.make is not None for recipe in self.recipes.values())
        self._targets: dict[str, list[str]] = {}
        for name, recipe in self.recipes.items():
            for source in recipe.sources.values():
                self._targets.setdefault(source, []).append(self.memory_name[name])
        for names in self._targets.values():
            names += [name for pairs in self.borrowed.values() for name, lent in pairs.items() if lent in names]
        self._empty: dict[str, torch.Tensor] = {}  # what stood in a parameter's place before it was loaded
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
        self._ahead: tuple[str, Future[Tensors]] | None = None

    def _borrow(self) -> dict[str, dict[str, str]]:
        """Layers that share parameters with others, name by name; from here on they are loaded with their lenders."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        borrowed = {}
        for layer in self.layers:
            pairs = {
                name: tied[name] for name in self.wanted[layer] if self.layer_of(tied.get(name, "")) not in ("", layer)
            }
            for lender in {self.layer_of(name) for name in pairs.values()}:
                self.sources[layer] = [*self.sources[layer], *self.sources[lender]]
                self.wanted[layer] = [*self.wanted[layer], *self.wanted[lender]]
                borrowed[layer] = pairs
        return borrowed

    def layer_of(self, name: str) -> str:
        """The layer that a module or parameter belongs to, or OUTSIDE."""
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        return next((prefix for prefix in prefixes if prefix in self.layers), OUTSIDE)

    def targets_of(self, stored: str) -> list[str]:
        """The parameters in memory that a tensor on disk goes into."""
        return self._targets.get(stored, [])

    def read_ahead(self, layer: str) -> None:
        """Begin to read a layer in a thread."""
        if self._ahead is None or self._ahead[0] != layer:
            self._ahead = (layer, self._reader.submit(self._read, layer))

    def _read(self, layer: str, skip: Iterable[str] = ()) -> Tensors:
        skipped = set(skip)
        names = [name for name in self.sources[layer] if self.memory_name[name] not in skipped]
        return {source: read_tensor(self.checkpoint.tensors[source]) for source in self._sources(names)}

    def _sources(self, names: Iterable[str]) -> list[str]:
        """The stored tensors that these plain ones are made of, each once."""
        return list(dict.fromkeys(source for name in names for source in self.recipes[name].sources.values()))

    def load(self, layer: str, skip: Iterable[str] = ()) -> None:
        """Fill a layer's parameters. `skip` names parameters that nobody will look at."""
        ahead, self._ahead = self._ahead, None
        raw = ahead[1].result() if ahead is not None and ahead[0] == layer else self._read(layer, skip)
        state = self.model.state_dict(keep_vars=True)
        wanted = [name for name in self.wanted[layer] if name not in set(skip)]
        self._empty.update({name: state[name] for name in wanted})
        tensors = {
            name: Lazy(self.recipes[name], raw, self.dtype, self.device)
            for name in self.sources[layer]
            if all(source in raw for source in self.recipes[name].sources.values())
        }
        del raw
        info, _ = convert_and_load_state_dict_in_model(
            self.model,
            tensors,
            LoadStateDictConfig(
                dtype=self.dtype,
                dtype_plan=self.model._get_dtype_plan(self.dtype),
                device_map={"": self.device},
                weight_mapping=self.mapping,  # type: ignore[arg-type]
            ),
        )
        if info.conversion_errors:
            name, text = next(iter(info.conversion_errors.items()))
            raise InputError(f"{self.checkpoint.folder}: cannot convert {name}: {str(text).strip().splitlines()[-1]}")
        if info.mismatched_keys:
            name, found, expected = next(iter(info.mismatched_keys))
            raise InputError(
                f"{self.checkpoint.folder}: {name} has shape {tuple(found)} where the config promises {tuple(expected)}"
            )
        self._refuse_missing(layer, [name for name in wanted if name in info.missing_keys])
        for name, lent in self.borrowed.get(layer, {}).items():
            self._put(name, self.model.get_parameter(lent))

    def refuse_empty(self, skip: Iterable[str] = ()) -> None:
        """What lies outside the layers must be complete once tied; it may not be tied to a layer that comes later."""
        state, skipped = self.model.state_dict(keep_vars=True), set(skip)
        empty = [name for name in self.wanted[OUTSIDE] if state[name].is_meta and name not in skipped]
        if empty:
            raise InputError(
                f"{type(self.model).__name__} cannot be streamed: {empty[0]} is no layer's own and not on the disk"
            )

    def _refuse_missing(self, layer: str, missing: Sequence[str]) -> None:
        """Tied parameters may be missing outside the layers; anything else must be on disk."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        allowed = set(tied) | set(tied.values())
        absent = [name for name in missing if name not in allowed]
        if absent:
            where = layer or "outside the layers"
            raise InputError(
                f"{self.checkpoint.folder} has no tensor for {absent[0]} ({len(absent)} missing {where}); "
                "the checkpoint is incomplete"
            )

    def drop(self, layer: str) -> None:
        """Free a layer's parameters; its other buffers stay, so that the layer can be loaded again."""
        for name in self.wanted[layer]:
            empty = self._empty.pop(name, None)
            if empty is not None:
                self._put(name, empty)
        release_memory()

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        path, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(path), attribute, tensor)

    def close(self) -> None:
        """Stop the reader."""
        self._ahead = None
        self._reader.shutdown(wait=False, cancel_futures=True)


def release_memory() -> None:
    """Give freed memory back to the system: cycles that the conversion leaves, and what the C library keeps.

    Without this a process grows with every layer, because each layer's tensors are freed in another order than made.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library without malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _stacking(model: PreTrainedModel, names: Iterable[str]) -> list[WeightTransform]:
    """Conversions for experts that lie one by one where the family ships them stacked, as AWQ leaves Qwen3-VL-MoE."""
    if not any(ONE_BY_ONE.search(name) for name in names):
        return []
    known = get_model_conversion_mapping(model)
    if any("experts.*" in pattern for entry in known for pattern in entry.source_patterns):
        return []
    stacked = next((m for m in model.modules() if {"gate_up_proj", "down_proj"} <= m._parameters.keys()), None)
    if stacked is None:
        return []
    gate_up, down = stacked.get_parameter("gate_up_proj"), stacked.get_parameter("down_proj")
    turned = gate_up.shape[1] == down.shape[2]  # inputs come before outputs, as in Llama 4
    turn = [Transpose(1, 2)] if turned else []
    gate_and_up = ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"]
    merged = [MergeModulelist(dim=0), Concatenate(dim=1), *turn]
    return [
        WeightConverter(gate_and_up, "experts.gate_up_proj", operations=merged),
        WeightConverter("experts.*.down_proj.weight", "experts.down_proj", operations=[MergeModulelist(dim=0), *turn]),
    ]


def _memory_names(
    names: Iterable[str],
    model: PreTrainedModel,
    mapping: Sequence[WeightTransform],
    in_memory: dict[str, torch.Tensor],
) -> dict[str, str]:
    """Name on disk -> name in memory, as transformers itself would rename it."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found = {}
    for name in names:
        target = rename_source_key(name, renamings, converters, model.base_model_prefix, in_memory)[0]
        if target not in in_memory and name in in_memory:
            target = rename_source_key(name, [], [], model.base_model_prefix, in_memory)[0]
        found[name] = target
    return found
