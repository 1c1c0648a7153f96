"""A parent whose dropped experts cannot be chosen: exactly what the cut model has to compute.

The router's logits of dropped experts become minus infinity before the model's own softmax, sigmoid, groups and top-k.
A correction bias with one entry per expert is masked too, because sigmoid routers add it after the logits.
Works for every router that is a module with a [experts, hidden] weight applied by one linear operation (all families of
transformers' experts registry that were tried); anything else is refused with a clear line.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moeprune.errors import InputError

Keep = Mapping[str, Sequence[int]]  # block name on disk -> ids of the experts that stay
PRODUCTS = {torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm}
LAYER_NUMBER = re.compile(r"\.(\d+)(?:\.|$)")

# The variant that the running forward belongs to. A context variable, so that greenlets keep theirs apart.
active: ContextVar[Keep | None] = ContextVar("active", default=None)


@dataclass(frozen=True, eq=False)
class Routed:
    """One layer's router and experts in memory."""

    layer: int
    name: str
    block: torch.nn.Module
    router: torch.nn.Module
    experts: torch.nn.Module
    count: int


Seen = Callable[[Routed, torch.Tensor], None]


def routed_blocks(model: torch.nn.Module) -> tuple[Routed, ...]:
    """Every module with fused experts and the router beside them, in the order of the layers."""
    modules = dict(model.named_modules())
    found = []
    for name, experts in modules.items():
        count = _expert_count(name, experts)
        parent = name.rpartition(".")[0]
        if count and (router := _router(modules[parent], experts, count)) is not None:
            found.append(Routed(layer_number(name), parent, modules[parent], router, experts, count))
    if not found:
        raise InputError(
            f"no router with experts was found in {type(model).__name__}; see moeprune/checking/masking.py"
        )
    return tuple(sorted(found, key=lambda routed: (routed.layer, routed.name)))


def layer_number(name: str) -> int:
    """The number of the layer in a dotted name; the last one, because encoders are numbered before it."""
    numbers = LAYER_NUMBER.findall(name)
    return int(numbers[-1]) if numbers else 0


def _expert_count(name: str, module: torch.nn.Module) -> int:
    if name.rpartition(".")[2] != "experts":
        return 0
    if isinstance(module, torch.nn.ModuleList):
        return len(module)
    return int(getattr(module, "num_experts", 0)) or next((p.shape[0] for p in module.parameters() if p.ndim == 3), 0)


def _router(block: torch.nn.Module, experts: torch.nn.Module, count: int) -> torch.nn.Module | None:
    """The module beside the experts that owns a matrix with one row per expert; names decide between several."""
    inside = set(experts.modules())
    owners = [
        (name, module)
        for name, module in block.named_modules()
        if module not in inside
        and any(p.ndim == 2 and p.shape[0] == count for p in module.parameters(recurse=False))
        and name
    ]
    named = [module for name, module in owners if re.search(r"(^|\.)(gate|router|classifier|wg)(\.|$)", name)]
    candidates = named or [module for _, module in owners]
    return candidates[0] if candidates else None


class _RouterMode(TorchFunctionMode):
    """Changes the one product of a router's forward that has a column per expert."""

    def __init__(self, count: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.count, self.change, self.seen = count, change, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS and isinstance(result, torch.Tensor) and result.shape[-1] == self.count:
            self.seen += 1
            return self.change(result)
        return result


@contextmanager
def maskable(blocks: Sequence[Routed], seen: Seen | None = None) -> Iterator[None]:
    """Within this, forwards through the blocks obey `active`; `seen` is shown the router logits as they were."""
    with ExitStack() as stack:
        for routed in blocks:
            stack.enter_context(replaced_forward(routed.router, _masked_forward(routed, seen)))
        yield


@contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this, `module` computes `forward`; what stood there before (a hook library's wrapper, too) comes back."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _masked_forward(routed: Routed, seen: Seen | None) -> Callable[..., Any]:
    original = routed.router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        keep = active.get()
        stays = None if keep is None else keep_of_layer(keep, routed)
        if stays is None and seen is None:
            return original(*args, **kwargs)
        dropped_E = torch.zeros(routed.count, dtype=torch.bool, device=next(routed.router.parameters()).device)
        if stays is not None:
            dropped_E.logical_not_()[list(stays)] = False

        def change(logits: torch.Tensor) -> torch.Tensor:
            if seen is not None:
                seen(routed, logits)
            return logits.masked_fill(dropped_E, float("-inf"))

        mode = _RouterMode(routed.count, change)
        with _masked_biases(routed, dropped_E), mode:
            result = original(*args, **kwargs)
        if mode.seen != 1:
            raise InputError(f"the router {routed.name} ({type(routed.router).__name__}) cannot be masked")
        return result

    return forward


@contextmanager
def _masked_biases(routed: Routed, dropped_E: torch.Tensor) -> Iterator[None]:
    """One number per expert that is added after the logits, such as e_score_correction_bias."""
    tensors = [*routed.router.named_buffers(), *routed.router.named_parameters()]
    biases = [t for name, t in tensors if "bias" in name and t.shape == dropped_E.shape and t.is_floating_point()]
    before = [bias.data for bias in biases]
    for bias in biases:
        bias.data = bias.data.masked_fill(dropped_E, float("-inf"))
    try:
        yield
    finally:
        for bias, data in zip(biases, before, strict=True):
            bias.data = data


def keep_of_layer(keep: Keep, routed: Routed) -> Sequence[int] | None:
    """The experts that stay in a layer, or None when the plan does not touch it."""
    same = [name for name in keep if layer_number(name) == routed.layer]
    if len(same) > 1:  # two stacks number their layers alike: the longer common beginning decides
        same.sort(key=lambda name: -len(_common(name, routed.name)))
    return keep[same[0]] if same else None


def random_keep(model: Any, keep: Keep, seed: int) -> dict[str, list[int]]:
    """A plan of the same size whose experts are drawn, with as many from each routing group: what no thought costs."""
    generator = random.Random(seed)
    drawn: dict[str, list[int]] = {}
    for routed in routed_blocks(model):
        stays = keep_of_layer(keep, routed)
        if stays is not None:
            width = routed.count // _groups(model)
            by_group = Counter(expert // width for expert in stays)
            chosen = [generator.sample(range(g * width, (g + 1) * width), n) for g, n in by_group.items()]
            drawn[routed.name] = sorted(expert for group in chosen for expert in group)
    return drawn


def _groups(model: Any) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "n_group", None) or getattr(config, "n_groups", None) or 1)


def _common(one: str, other: str) -> list[str]:
    pairs = zip(one.split("."), other.split("."), strict=False)
    return [a for a, b in pairs if a == b]


@contextmanager
def keeping(keep: Keep | None) -> Iterator[None]:
    """Forwards inside see only these experts; None means all."""
    token = active.set(keep)
    try:
        yield
    finally:
        active.reset(token)
