"""The weights of one layer at a time: from the disk, through transformers' own conversion, into the model, and out."""

from __future__ import annotations

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
from moeprune.scoring.formats import mlx
from moeprune.scoring.formats.dequantize import Lazy, Recipe, read_tensor, recipes
from moeprune.scoring.gguf import weights as gguf_weights
from moeprune.scoring.placing import StraightReader, ways

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
        in_memory = _seen(model.state_dict(), model, checkpoint)
        self.mapping = get_model_conversion_mapping(model) + _stacking(model, self.recipes)
        matched = _memory_names(self.recipes, model, self.mapping, in_memory)
        self.memory_name = {name: target for name, (target, _) in matched.items()}
        if checkpoint.container == "gguf":
            self._refuse_without_place(in_memory)
        self.direct = StraightReader(ways(model, checkpoint, self.recipes, self.mapping, matched), device)
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
            layer: sum(checkpoint.tensors[source].nbytes for source in self._converted(layer)) for layer in self.sources
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
        self._ahead: tuple[str, Future[tuple[Tensors, Tensors]]] | None = None

    def _refuse_without_place(self, in_memory: Tensors) -> None:
        """A GGUF file holds its model and nothing else, so what finds no place in it says that it is another."""
        modules = self.model.modules()
        unused = [pattern for m in modules for pattern in getattr(m, "_keys_to_ignore_on_load_unexpected", None) or ()]
        for name, target in self.memory_name.items():
            if target not in in_memory and not any(re.search(pattern, target) for pattern in unused):
                stored = next(iter(self.recipes[name].sources.values()))
                raise InputError(
                    f"{self.checkpoint.folder}: {stored} has no place in {type(self.model).__name__} as the metadata "
                    "describe it; score the original model and cut this file with those scores (--other-scores)"
                )

    def _borrow(self) -> dict[str, dict[str, str]]:
        """Layers whose parameters are those of others, name by name; from here on they are loaded with their owners."""
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
            places = self.direct.places(self.wanted[layer])
            self._ahead = (layer, self._reader.submit(self._read, layer, places))

    def _read(self, layer: str, places: Tensors, skip: Iterable[str] = ()) -> tuple[Tensors, Tensors]:
        """The parameters that are read straight, and the stored tensors that the others are converted from."""
        raw = {source: read_tensor(self.checkpoint.tensors[source]) for source in self._converted(layer, skip)}
        return self.direct.read(places), raw

    def _converted(self, layer: str, skip: Iterable[str] = ()) -> list[str]:
        """The stored tensors of a layer that are not read straight into their places, each once."""
        passed = {*self.direct.ways, *skip}
        names = [name for name in self.sources[layer] if self.memory_name[name] not in passed]
        return list(dict.fromkeys(source for name in names for source in self.recipes[name].sources.values()))

    def load(self, layer: str, skip: Iterable[str] = ()) -> None:
        """Fill a layer's parameters. `skip` names parameters that nobody will look at."""
        ahead, self._ahead = self._ahead, None
        wanted = [name for name in self.wanted[layer] if name not in set(skip)]
        if ahead is not None and ahead[0] == layer:
            filled, raw = ahead[1].result()
        else:
            filled, raw = self._read(layer, self.direct.places(wanted), skip)
        self._empty.update({name: self._exchange(name) for name in wanted})
        for name, tensor in filled.items():
            self._exchange(name, tensor)
        missing = [name for name in wanted if name not in filled]
        self._refuse_missing(layer, self._convert(layer, raw, missing) if raw else missing)
        for name, lent in self.borrowed.get(layer, {}).items():
            self._exchange(name, self.model.get_parameter(lent))

    def _exchange(self, name: str, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """What stands in a parameter's or buffer's place; if there is a tensor, it takes that place."""
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        before: torch.Tensor = getattr(module, attribute)
        if tensor is not None:
            if attribute in module._parameters and not isinstance(tensor, torch.nn.Parameter):
                # Even without gradients a matrix product may round otherwise for a parameter that wants none.
                tensor = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
            setattr(module, attribute, tensor)
        return before

    def _convert(self, layer: str, raw: Tensors, missing: Sequence[str]) -> list[str]:
        """Fill parameters through transformers' own conversion; which of those that were missing still are."""
        tensors = {
            name: Lazy(self.recipes[name], raw, self.dtype, self.device)
            for name in self.sources[layer]
            if all(source in raw for source in self.recipes[name].sources.values())
        }
        raw.clear()
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
        return [name for name in missing if name in info.missing_keys]

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
            why = mlx.UNKNOWN if mlx.is_mlx(self.checkpoint) else "the checkpoint is incomplete"
            raise InputError(
                f"{self.checkpoint.folder} has no tensor for {absent[0]} ({len(absent)} missing {where}); {why}"
            )

    def drop(self, layer: str) -> None:
        """Free a layer's parameters; its other buffers stay, so that the layer can be loaded again."""
        loaded = [name for name in self.wanted[layer] if name in self._empty]
        dropped = {name: self._exchange(name, self._empty.pop(name)) for name in loaded}
        self.direct.keep(dropped[name].data for name in loaded if name in self.direct.ways and layer != OUTSIDE)
        if any(name not in self.direct.ways for name in dropped):
            del dropped
            gc.collect()  # the conversion leaves cycles

    def close(self) -> None:
        """Stop the reader."""
        self._ahead = None
        self._reader.shutdown(wait=False, cancel_futures=True)


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


def _seen(in_memory: Tensors, model: PreTrainedModel, checkpoint: Checkpoint) -> Tensors:
    """The parameters that are run: of MLX's files those of the language model."""
    if mlx.seen(model.config, checkpoint) is model.config:
        return in_memory
    parts = (model.get_decoder(), model.get_output_embeddings())
    text = tuple(f"{name}." for name, module in model.named_modules() if any(module is part for part in parts))
    return {name: tensor for name, tensor in in_memory.items() if name.startswith(text)}


def _memory_names(
    names: Iterable[str],
    model: PreTrainedModel,
    mapping: Sequence[WeightTransform],
    in_memory: Tensors,
) -> dict[str, tuple[str, str | None]]:
    """Name on disk -> name in memory and the source pattern of the converter that it matches, as in transformers."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found = {}
    for name in names:
        match = rename_source_key(name, renamings, converters, model.base_model_prefix, in_memory)
        if match[0] not in in_memory and name in in_memory:
            match = rename_source_key(name, [], [], model.base_model_prefix, in_memory)
        found[name] = match
    return found
