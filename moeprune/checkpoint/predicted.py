"""A checkpoint of which only config.json and the index are here: names are known, sizes are predicted.

The sum of all tensors is exact, for the index says it. An expert's matrices follow from the config, E experts that map
H numbers to H by way of I; embeddings follow too, and what is left is spread evenly over all other tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.checkpoint import families, formats
from moeprune.checkpoint.folder import INDEX, Checkpoint
from moeprune.checkpoint.headers import Tensor
from moeprune.checkpoint.structure import EXPERT, LOOSE, ROUTER, SHARED, STACKED, is_tower
from moeprune.errors import InputError
from moeprune.metadata import read_json

WIDTH_KEYS = (  # of one expert's hidden layer, the surest first
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "moe_ffn_hidden_size",
    "expert_hidden_size",
    "ffn_hidden_size",
    "intermediate_size",
    "d_ff",
)
HIDDEN_KEYS = ("hidden_size", "d_model", "n_embd")
EXPERT_INPUT_KEYS = ("moe_latent_size", "moe_hidden_size", *HIDDEN_KEYS)
FUSED = re.compile(r"gate_up|w13|w1_w3|gate_and_up|input_linear|experts\.fc1\.weight$")  # two matrices in one tensor
BIAS = re.compile(r"bias$")
COMPANION = re.compile(r"scale|zero|g_idx|qzeros|absmax|quant_|biases$|shape$|perm$|SCB$|weight_format$|act_scale|norm")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|lm_head|word_embeddings|wte)\.weight$")
TYPE_BYTES = {"float32": 4.0, "float64": 8.0, "bfloat16": 2.0, "float16": 2.0}


def index_of(folder: Path) -> dict[str, Any]:
    """The index of the shards, with a weight_map that can be used."""
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} holds neither weights nor {INDEX}; fetch the index too, it is small")
    index = read_json(folder / INDEX, "the index of the shards")
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{folder / INDEX} must hold a weight_map from tensor names to file names; it is damaged")
    return index


def without_weights(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A checkpoint of tensors whose files are not here."""
    shards = tuple(sorted({tensor.file for tensor in tensors.values()}))
    beside = tuple(name for name in (formats.HF_QUANT_CONFIG,) if (folder / name).is_file())
    return Checkpoint(folder, config, tensors, shards, {}, None, beside)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the config says about one expert: E experts that map H numbers to H by way of I."""

    experts: int
    hidden: int
    expert_input: int
    width: int
    vocabulary: int
    plain_bytes: float  # of a weight that is not quantized
    expert_bytes: float  # of an expert's weight, scales and zero points included


def predicted(folder: Path) -> Checkpoint:
    """A checkpoint of which only config and index are here. The sum of its tensors is exact."""
    config = read_json(folder / "config.json", "the model's config.json")
    index = index_of(folder)
    total = index.get("metadata", {}).get("total_size") if isinstance(index.get("metadata"), dict) else None
    if not isinstance(total, int | float) or total <= 0:
        raise InputError(f"{folder / INDEX} does not say total_size, so nothing can be predicted; give the hub id")
    names = index["weight_map"]
    sizes = _sizes(folder, config)
    stored = {name: _stored(name, sizes, names) for name in names}
    known = sum(nbytes for _, nbytes in stored.values())
    rest = int(total) - known
    others = [name for name, (_, nbytes) in stored.items() if not nbytes and not _is_expert(name)]
    if rest < 0 or (rest and not others):
        raise InputError(
            f"{folder}: experts and embeddings would take {known} bytes by the config, and the index says "
            f"{int(total)} in all; give the hub id or the complete model, whose headers can be read"
        )
    tensors = {}
    spread = dict(zip(others, _shares(rest, len(others)), strict=True))
    for name, (shape, nbytes) in stored.items():
        tensors[name] = Tensor(name, "unknown", shape, folder / names[name], 0, nbytes + spread.get(name, 0))
    return without_weights(folder.resolve(), config, tensors)


def _shares(total: int, count: int) -> Iterator[int]:
    """`total` in as many nearly equal whole parts."""
    for i in range(count):
        yield total * (i + 1) // count - total * i // count


def _sizes(folder: Path, config: dict[str, Any]) -> Sizes:
    """The dimensions of the experts, from the innermost config that counts them."""
    scopes = [scope for _, scope in families.scopes(config)]
    counting = [scope for scope in scopes if families.largest(scope, families.COUNT_KEYS)]
    if not counting:
        raise InputError(
            f"{folder / 'config.json'} counts no experts; if the key is a new one, add it to COUNT_KEYS in "
            "moeprune/checkpoint/families.py"
        )
    scope = counting[-1]
    around = [scope, *reversed(scopes)]
    hidden, width = _first(around, HIDDEN_KEYS), _first([scope, *_inside(scope), *around], WIDTH_KEYS)
    if not hidden or not width:
        raise InputError(f"{folder / 'config.json'} does not say how wide its experts are; give the hub id instead")
    plain = plain_bytes(config)
    quantized = formats.quantization_of(without_weights(folder, config, {}))
    return Sizes(
        experts=families.largest(scope, families.COUNT_KEYS),
        hidden=hidden,
        expert_input=_first(around, EXPERT_INPUT_KEYS),
        width=width,
        vocabulary=_first(around, ("vocab_size",)),
        plain_bytes=plain,
        expert_bytes=bits_per_weight(quantized, plain * 8) / 8,
    )


def _inside(scope: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The dictionaries directly in a config."""
    return [value for value in scope.values() if isinstance(value, dict)]


def _first(scopes: list[Mapping[str, Any]], keys: tuple[str, ...]) -> int:
    """The first of the keys that any of the scopes knows as a number."""
    return next((found for key in keys for scope in scopes if (found := families.largest(scope, (key,)))), 0)


def plain_bytes(config: Mapping[str, Any]) -> float:
    """What a weight takes that is not quantized, by the config."""
    named = (scope[key] for _, scope in families.scopes(config) for key in ("dtype", "torch_dtype") if scope.get(key))
    return TYPE_BYTES.get(str(next(named, "bfloat16")).removeprefix("torch."), 2.0)


def bits_per_weight(quantized: Mapping[str, Any], plain: float = 16.0) -> float:
    """Bits that a weight of an expert takes, with its share of scales and zero points."""
    if not quantized:
        return plain
    name = next((entry.name for entry in formats.FORMATS if entry.recognise(quantized)), "")
    block = quantized.get("weight_block_size") or quantized.get("modules_block_size")
    fixed = {"mxfp4": 4.25, "mxfp4_ct": 4.25, "deepseek_fp4": 4.25, "nvfp4": 4.5, "modelopt_nvfp4": 4.5}
    if name in fixed:
        return fixed[name]
    if name == "fp8":
        return 8 + (32 / math.prod(block) if isinstance(block, list) and block else 0)
    if name in ("ct_fp8", "ct_int8", "modelopt_fp8"):
        return 8.0
    if name == "bitsandbytes":
        return 4.127 if quantized.get("load_in_4bit") else 8.0
    text = json.dumps(quantized)
    bits, group = (_number(text, key) for key in (r"(?:num_)?bits", "group_size"))
    zeros = {"mlx": 16.0, "ct_int4": 0.0}.get(name, float(bits))
    return (bits or 4) + ((16 + zeros) / group if group else 0)


def _number(text: str, key: str) -> int:
    found = re.search(rf'"{key}": (\d+)', text)
    return int(found[1]) if found else 0


def _is_expert(name: str) -> bool:
    return bool(_owned(EXPERT, name) or _owned(STACKED, name))


def _owned(pattern: re.Pattern[str], name: str) -> re.Match[str] | None:
    match = pattern.fullmatch(name)
    return match if match and not is_tower(name) and not SHARED.search(name) else None


def _stored(name: str, sizes: Sizes, names: Mapping[str, str]) -> tuple[tuple[int, ...], int]:
    """The predicted shape and bytes of a tensor; () and 0 where its share of the rest is all that can be said."""
    if _owned(EXPERT, name):
        return _of_expert(name, sizes, ())
    loose = not any("experts." in other or "switch_" in other for other in names)
    if _owned(STACKED, name) or (loose and _owned(LOOSE, name) and _has_router(name, names)):
        return _of_expert(name, sizes, (sizes.experts,))
    if _is_router(name):
        elements = sizes.experts * (1 if name.endswith("bias") else sizes.hidden)
        shape = (sizes.experts,) if name.endswith("bias") else (sizes.experts, sizes.hidden)
        return shape, int(elements * sizes.plain_bytes)
    if EMBEDDING.search(name) and sizes.vocabulary and not is_tower(name):
        return (sizes.vocabulary, sizes.hidden), int(sizes.vocabulary * sizes.hidden * sizes.plain_bytes)
    return (), 0


def _is_router(name: str) -> bool:
    """A router's matrix or bias, beside experts or where a whole name says so."""
    local = re.sub(r".*\.(?:mlp|block_sparse_moe|moe|feed_forward|ffn|mixer|layers\.\d+|\d+)\.(?!\d)", "", name)
    plain = re.search(r"(weight|bias)$", name) and not COMPANION.search(name)
    return bool(plain and ROUTER.match(local) and not is_tower(name) and not SHARED.search(name))


def _has_router(name: str, names: Mapping[str, str]) -> bool:
    match = LOOSE.fullmatch(name)
    return bool(match) and any(other.startswith(match["module"]) and _is_router(other) for other in names)  # type: ignore[index]


def _of_expert(name: str, sizes: Sizes, lead: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """A matrix of an expert, or of all; what lies beside it is in its bits already."""
    count = math.prod(lead)
    both = 2 if FUSED.search(name) else 1
    if name.endswith("correction_bias"):
        return lead, int(count * sizes.plain_bytes)
    if BIAS.search(name):
        width = sizes.expert_input if re.search(r"down|w2|output", name) else both * sizes.width
        return (*lead, width), int(count * width * sizes.plain_bytes)
    shape = (*lead, both * sizes.width, sizes.expert_input)
    return shape, 0 if COMPANION.search(name) else int(math.prod(shape) * sizes.expert_bytes)
