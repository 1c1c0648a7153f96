"""Which tensors belong to which expert, and which config entries count experts.

The structure of a checkpoint is read from names and shapes, block by block (structure.py). The tables here hold what
those cannot tell. To add a family that is not recognised: extend a table below, or the names in structure.py.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeprune.checkpoint import gguf_layout
from moeprune.checkpoint.complete import DEPTH_KEYS, check_layers
from moeprune.checkpoint.folder import Checkpoint
from moeprune.checkpoint.structure import Block, Hints, Part, find_blocks, is_tower, renamed
from moeprune.errors import InputError

__all__ = ["Block", "Layout", "Part", "config_without_mtp", "mtp_tensors", "new_name", "renamed", "understand"]

COUNT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
    "moe_num_primary_experts",
)
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
    "experts_top_k",
    "moe_num_active_primary_experts",
    "num_selected_experts",
    "moe_router_topk",
)
GROUP_KEYS = ("n_group", "num_expert_group")  # not n_groups, which counts the groups of a Mamba layer
MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")
DEEPEST = 20  # nesting of a config beyond which nothing is looked for

# Rows behind the experts' own in the router that always stay, last: config key of their number, or the number.
TAILS: dict[str, str | int] = {
    "longcat_flash": "zero_expert_num",  # identity experts
    "zaya": 1,  # "skip this layer"
    "inkling_mm_model": "n_shared_experts",  # shared experts, weighted by the router
    "inkling_text": "n_shared_experts",
}
# Routers that the config says nothing about, or that ignore what it says.
FIXED_TOP_K = {"phimoe": 2, "nllb-moe": 2, "switch_transformers": 1, "zaya": 1}
# Routers that take one expert from each of as many groups as a token has experts, without a key that says so.
ONE_PER_GROUP = {"pangu_pro_moe", "PanguProMoE"}
# Two kinds of experts numbered one behind the other, with a router column each.
TWO_KINDS = {"ernie4_5_vl_moe", "ernie4_5_moe_vl", "ernie4_5_vl_moe_text"}
REFUSED = {
    "doge": "its experts are combinations of product keys, not entries that can be taken out one by one",
    "vitpose_backbone": "its experts are chosen by the data set and not by a router",
}


@dataclass(frozen=True)
class Layout:
    """All blocks of a model, and the numbers that govern them together."""

    model_type: str
    experts: int
    top_k: int
    groups: int  # 1 where routing is not limited to groups of experts
    top_groups: int
    blocks: tuple[Block, ...]
    count_keys: tuple[tuple[str | int, ...], ...]  # path of every config entry that says how many experts there are
    run: int = 1  # experts that only go together, as neighbours

    @property
    def by_name(self) -> dict[str, Block]:
        """The blocks under their names."""
        return {block.name: block for block in self.blocks}


def understand(checkpoint: Checkpoint) -> Layout:
    """The layout of a checkpoint, or an InputError that says what was found and where to add it."""
    if checkpoint.container == "gguf":
        return _understand_gguf(checkpoint)
    config = checkpoint.config
    model_type = str(config.get("model_type", ""))
    if model_type in REFUSED:
        raise InputError(f"{model_type} cannot be pruned: {REFUSED[model_type]}")
    found = [(path, scope) for path, scope in scopes(config) if any(key in scope for key in COUNT_KEYS)]
    counts = [count for _, scope in found for count in _counts(scope)]
    blocks = find_blocks(checkpoint.tensors, _hints(config, model_type, counts))
    if not blocks:
        kind = f"a {model_type} model" if model_type else "a model of unknown type"
        raise InputError(
            f"{checkpoint.folder} holds {kind} without experts: none of its {len(checkpoint.tensors)} tensors is named "
            "or shaped like one. If it is a mixture of experts, add its names to moeprune/checkpoint/structure.py"
        )
    experts = _one_count(blocks)
    governing = [(path, scope) for path, scope in found if experts in _counts(scope)]
    if not governing:
        said = ", ".join(sorted({f"{key}={scope[key]}" for _, scope in found for key in COUNT_KEYS if key in scope}))
        raise InputError(
            f"the tensors hold {experts} experts per layer, but config.json says {said or 'nothing about experts'}; "
            "if the key has another name, add it to COUNT_KEYS in moeprune/checkpoint/families.py"
        )
    # Of several parts that count experts, the innermost says most; an outer one may name the count alone.
    scope = {key: value for _, part in governing for key, value in part.items() if value is not None}
    top_k = FIXED_TOP_K.get(model_type) or largest(scope, TOP_K_KEYS) or _top_k_elsewhere(checkpoint)
    check_layers(checkpoint, blocks, scope)
    groups = top_k if model_type in ONE_PER_GROUP else _groups(scope)
    return Layout(
        model_type=model_type,
        experts=experts,
        top_k=top_k,
        groups=groups,
        top_groups=min(largest(scope, ("topk_group",)) or groups, groups),
        blocks=tuple(blocks),
        count_keys=tuple(
            path + key for path, part in governing for key in _count_paths(part) if _at(part, key) == experts
        ),
        run=max(part.share for block in blocks for part in block.parts),
    )


def _top_k_elsewhere(checkpoint: Checkpoint) -> int:
    """Experts per token, from any part of the config; it cannot be guessed, for a cut below it breaks the model."""
    found = max(largest(scope, TOP_K_KEYS) for _, scope in scopes(checkpoint.config))
    if found < 1:
        raise InputError(
            f"{checkpoint.folder / 'config.json'} does not say how many experts the router chooses for a token; add "
            "num_experts_per_tok to it, or the name of the model's own key to TOP_K_KEYS in "
            "moeprune/checkpoint/families.py"
        )
    return found


def _understand_gguf(checkpoint: Checkpoint) -> Layout:
    """The layout of a GGUF model, whose names and keys are the same for every family."""
    config = checkpoint.config
    architecture = str(config.get("general.architecture", ""))
    blocks = gguf_layout.find_blocks(checkpoint.tensors, config)
    if not blocks:
        raise InputError(f"{checkpoint.shards[0]} holds a {architecture or 'nameless'} model without experts")
    top_k = gguf_layout.counts(config, "expert_used_count")
    if top_k < 1:
        raise InputError(
            f"{checkpoint.shards[0]} does not say {architecture}.expert_used_count; convert the model again"
        )
    groups = max(gguf_layout.counts(config, "expert_group_count"), 1)
    return Layout(
        model_type=architecture,
        experts=_one_count(blocks),
        top_k=top_k,
        groups=groups,
        top_groups=min(gguf_layout.counts(config, "expert_group_used_count") or groups, groups),
        blocks=tuple(blocks),
        count_keys=((f"{architecture}.expert_count",),),
        run=max(part.share for block in blocks for part in block.parts),
    )


def scopes(config: Mapping[str, Any], path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every nested dictionary of a config with its path, outermost first; towers for images and sound left out."""
    yield path, config
    for key, value in config.items():
        if (
            isinstance(value, dict)
            and len(path) < DEEPEST
            and not is_tower(key)
            and key not in ("quantization_config", "quantization")
        ):
            yield from scopes(value, (*path, key))


def _count_paths(scope: Mapping[str, Any]) -> Iterator[tuple[str | int, ...]]:
    """Where one dictionary counts experts; a list counts them layer by layer, or kind by kind."""
    for key in COUNT_KEYS:
        value = scope.get(key)
        if type(value) is int and value > 0:
            yield (key,)
        elif isinstance(value, list):
            yield from ((key, i) for i, item in enumerate(value) if type(item) is int and item > 0)


def _counts(scope: Mapping[str, Any]) -> list[int]:
    return [_at(scope, path) for path in _count_paths(scope)]


def _at(config: Any, path: Sequence[str | int]) -> Any:
    for step in path:
        config = config[step]
    return config


def largest(scope: Mapping[str, Any], keys: Sequence[str]) -> int:
    """The largest number under any of the keys, whose values may be lists; 0 when there is none."""
    values = [scope[key] for key in keys if key in scope]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return max((item for item in flat if type(item) is int), default=0)


def _groups(scope: Mapping[str, Any]) -> int:
    """Groups that the router chooses among before it chooses experts."""
    if scope.get("topk_method") == "greedy":
        return 1
    return max(largest(scope, GROUP_KEYS), 1)


def _hints(config: Mapping[str, Any], model_type: str, counts: Sequence[int]) -> Hints:
    """What the tables and the config say about the structure."""
    inner = [scope for _, scope in scopes(config)]
    types = {model_type, *(str(scope.get("model_type", "")) for scope in inner)}
    tail = next((TAILS[name] for name in sorted(types) if name in TAILS), 0)
    return Hints(
        counts=tuple(dict.fromkeys(counts)),
        depth=max((largest(scope, DEPTH_KEYS) for scope in inner), default=0),
        tail=tail if isinstance(tail, int) else max(largest(scope, (tail,)) for scope in inner),
        two_kinds=bool(types & TWO_KINDS),
        hidden=max(largest(scope, ("hidden_size", "d_model")) for scope in inner),
    )


def _one_count(blocks: Sequence[Block]) -> int:
    """The number of experts, which one config entry rules for all blocks alike."""
    counts = {block.experts: block.name for block in blocks}
    if len(counts) > 1:
        (a, first), (b, second) = list(counts.items())[:2]
        raise InputError(f"{first} has {a} experts and {second} has {b}; one config entry cannot count both")
    return blocks[0].experts


def new_name(part: Part, experts: int, keep: Sequence[int]) -> str | None:
    """The name of a tensor of one expert after the cut, or None when it goes. `keep` is the block's keep-list."""
    if part.kind == "tail":
        return renamed(part, part.expert - experts + len(keep))
    at = bisect_left(keep, part.expert * part.share)  # searched, not scanned: large models ask 100,000 times
    stays = at < len(keep) and keep[at] // part.share == part.expert
    return renamed(part, at // part.share + part.shift * len(keep)) if stays else None


def updated_config(checkpoint: Checkpoint, layout: Layout, kept: int) -> dict[str, Any]:
    """The config with every count of experts set to `kept`; nothing else changes, nor the order of keys."""
    config = copy.deepcopy(checkpoint.config)
    for path in layout.count_keys:
        _at(config, path[:-1])[path[-1]] = kept
    return config


def mtp_tensors(checkpoint: Checkpoint, layout: Layout) -> frozenset[str]:
    """Every tensor of the layers that predict further tokens, dense parts and dense layers included."""
    if checkpoint.container == "gguf":
        return gguf_layout.mtp_tensors(checkpoint.tensors, checkpoint.config)
    inner = [scope for _, scope in scopes(checkpoint.config)]
    depth = max((largest(scope, DEPTH_KEYS) for scope in inner), default=0)
    further = max((largest(scope, MTP_KEYS) for scope in inner), default=0)
    stacks = {block.name.rpartition(".")[0] for block in layout.blocks if block.role == "trunk"}
    prefixes = {f"{block.name}." for block in layout.blocks if block.role == "mtp"}
    prefixes |= {f"{stack}.{depth + i}." for stack in stacks for i in range(further)} if depth else set()
    named = re.compile(r"(^|\.)(mtp|nextn)[^.]*\.")
    return frozenset(n for n in checkpoint.tensors if n.startswith(tuple(prefixes)) or named.search(n))


def config_without_mtp(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model without those blocks."""
    result = copy.deepcopy(dict(config))
    for _, scope in scopes(result):
        scope.update({key: 0 for key in MTP_KEYS if type(scope.get(key)) is int})
    return result
