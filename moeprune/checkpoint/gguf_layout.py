"""The experts of a GGUF model: names are llama.cpp's, the same for every family."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from moeprune.checkpoint.headers import Tensor
from moeprune.checkpoint.structure import Block, Part
from moeprune.errors import InputError

OLD = re.compile(r"(?P<head>blk\.\d+\.ffn_(?:gate|up|down)\.)(?P<id>\d{1,6})(?P<tail>\.weight)")  # files of 2023
LAYER = re.compile(r"(?P<block>blk\.(?P<layer>\d{1,6}))\.(?P<rest>.+)")
STACKED = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale|input_scale)")
SHARED_BY_RUN = re.compile(r"ffn_(gate|up|down)_chexps\.(weight|scale)")  # GroveMoE: one for so many neighbours
ROUTER = re.compile(r"(ffn_gate_inp\.(weight|bias)|exp_probs_b(\.bias)?)")
IDS = "ffn_gate_tid2eid.weight"
NOT_PER_EXPERT = re.compile(r"shexp|ffn_norm_exps|ffn_gate_inp\.scale")


def counts(config: Mapping[str, Any], name: str) -> int:
    """A number of the model's own section, such as expert_count; 0 when it is not given."""
    value = config.get(f"{config.get('general.architecture')}.{name}", 0)
    return value if type(value) is int else 0


def find_blocks(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[Block]:
    """All blocks, in the order of their layers."""
    experts = counts(config, "expert_count")
    trunk = trunk_of(config)
    parts: dict[int, list[Part]] = defaultdict(list)
    for tensor in tensors.values():
        match = LAYER.fullmatch(tensor.name)
        if match and (part := _part(tensor, match["rest"], config)):
            parts[int(match["layer"])].append(part)
    blocks = []
    for layer, found in sorted(parts.items()):
        if not any(part.router for part in found):
            raise InputError(f"blk.{layer} holds experts but no router (ffn_gate_inp); the file is damaged")
        _check_complete(found, experts)
        blocks.append(Block(f"blk.{layer}", "trunk" if layer < trunk else "mtp", experts, tuple(found)))
    return blocks


def trunk_of(config: Mapping[str, Any]) -> int:
    """How many layers come before those that predict further tokens."""
    return counts(config, "block_count") - counts(config, "nextn_predict_layers")


def mtp_tensors(tensors: Iterable[str], config: Mapping[str, Any]) -> frozenset[str]:
    """Every tensor of the layers that predict further tokens."""
    layers = {name: int(match["layer"]) for name in tensors if (match := LAYER.fullmatch(name))}
    return frozenset(name for name, layer in layers.items() if layer >= trunk_of(config))


def bits(tensors: Mapping[str, Tensor], blocks: Iterable[Block]) -> tuple[float, float]:
    """Bits that a number takes on average: outside the experts, and in them."""
    experts = {part.tensor for block in blocks for part in block.parts}
    found = []
    for inside in (False, True):
        counted = [tensor for name, tensor in tensors.items() if (name in experts) == inside]
        found.append(8 * sum(t.nbytes for t in counted) / max(1, sum(math.prod(t.shape) for t in counted)))
    return found[0] or 16.0, found[1] or 16.0


def _check_complete(parts: Iterable[Part], experts: int) -> None:
    """Files with one tensor per expert must hold every one."""
    have: dict[str, set[int]] = defaultdict(set)
    for part in parts:
        if part.kind == "expert":
            have[part.around[0]].add(part.expert)
    for head, numbers in have.items():
        if len(numbers) != experts or max(numbers) >= experts:
            wrong = next((number for number in range(experts) if number not in numbers), max(numbers))
            raise InputError(f"{head[:-1]}: expert {wrong} of {experts} is missing or one too many")


def _part(tensor: Tensor, rest: str, config: Mapping[str, Any]) -> Part | None:
    """What a tensor of a layer has to do with experts."""
    experts, run = counts(config, "expert_count"), counts(config, "experts_per_group")
    if match := OLD.fullmatch(tensor.name):
        return Part(tensor.name, "expert", int(match["id"]), (match["head"], match["tail"]))
    if rest == IDS:
        return Part(tensor.name, "ids", router=True)
    if SHARED_BY_RUN.fullmatch(rest):
        if tensor.shape[0] * run != experts:
            raise InputError(f"{tensor.name} has {tensor.shape[0]} rows; {experts} experts in runs of {run} are wrong")
        return Part(tensor.name, "rows", share=run)
    router = ROUTER.fullmatch(rest) is not None
    if router or STACKED.fullmatch(rest):
        if tensor.shape[:1] != (experts,):
            raise InputError(
                f"{tensor.name} has the shape {list(tensor.shape)}, but the file counts {experts} experts; "
                "if its router has rows for something else, add that to moeprune/checkpoint/gguf_layout.py"
            )
        return Part(tensor.name, "rows", router=router)
    if re.search(r"exp|ffn_gate_inp", rest) and not NOT_PER_EXPERT.search(rest):
        raise InputError(f"{tensor.name} is not known; add it to moeprune/checkpoint/gguf_layout.py")
    return None


def same_layers(blocks: Iterable[Block], names: Iterable[str]) -> dict[str, str]:
    """Block of a GGUF -> block of the same layer in the original, so that scores of the original can be used."""
    by_layer = {match[1]: name for name in names if (match := re.search(r"\.(\d+)$", name))}
    layers = {block.name: block.name.rpartition(".")[2] for block in blocks}
    return {block: by_layer[layer] for block, layer in layers.items() if layer in by_layer}
