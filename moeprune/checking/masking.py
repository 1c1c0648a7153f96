"""A parent whose dropped experts cannot be chosen: exactly what the cut model has to compute.

The router's logits of dropped experts become minus infinity before the model's own softmax, sigmoid, groups and top-k.
A correction bias with one entry per expert is masked too, because sigmoid routers add it after the logits. Where a
table of tokens chooses the experts (DeepSeek-V4), it names the substitutes that the cut will name.
Works for every router that owns a matrix with one row per expert and applies it once, beside a module named `experts`
or around its stacks (JetMoE); anything else is refused with a clear line.
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
from moeprune.pruning.rewrite import renumbered_TK

Keep = Mapping[str, Sequence[int]]  # block name on disk -> ids of the experts that stay
PRODUCTS = {torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm}


class CannotMask(InputError):
    """The experts of this kind of model cannot be masked, so nothing can be said about cuts before they are made."""


# Experts whose cut computes something else than a mask can show, and why.
UNMASKABLE = {
    "NllbMoeExperts": "transformers takes NLLB-MoE's table of zeros and ones for expert numbers, so a cut runs others",
}
LAYER_NUMBER = re.compile(r"\.(\d+)(?:\.|$)")

# The variant that the running forward belongs to. A context variable, so that greenlets keep theirs apart.
active: ContextVar[Keep | None] = ContextVar("active", default=None)


@dataclass(frozen=True, eq=False)
class Routed:
    """One layer's router and experts in memory."""

    layer: int
    name: str
    block: torch.nn.Module
    router: torch.nn.Module  # its forward makes the logits
    matrix: torch.nn.Module  # the module in it that owns the matrix
    experts: torch.nn.Module
    count: int
    rows: int  # of the router's matrix: the experts, and behind them what always stays (zero or shared experts)


Seen = Callable[[Routed, torch.Tensor], None]


def routed_blocks(model: Any) -> tuple[Routed, ...]:
    """Every module with experts and the router beside them, in the order of the layers."""
    modules = dict(model.named_modules())
    zero = int(getattr(model.config.get_text_config(), "zero_expert_num", 0) or 0)  # LongCat: experts without weights
    found = []
    for name, module in modules.items():
        owns = hasattr(module, "router") and hasattr(module, "output_linear")  # JetMoE, in attention too
        experts, parent = (module.output_linear, name) if owns else (module, name.rpartition(".")[0])
        count = int(experts.num_experts) if owns else _expert_count(name, experts)
        count -= zero if isinstance(experts, torch.nn.ModuleList) or count > zero else 0
        inner = _router(modules[parent], experts, count) if count else ""
        if inner:
            block, matrix = modules[parent], modules[f"{parent}.{inner}"]
            router = modules[f"{parent}.{inner.split('.')[0]}"]
            rows = _rows(matrix, count)
            found.append(Routed(layer_number(name), parent, block, router, matrix, experts, count, rows))
    if not found:
        raise CannotMask(f"no router with experts was found in {type(model).__name__}; its experts cannot be masked")
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
    return next((p.shape[0] for p in module.parameters() if p.ndim == 3), 0) or int(getattr(module, "num_experts", 0))


def _rows(module: torch.nn.Module, count: int) -> int:
    """Rows of the module's own matrix that could be a router of `count` experts; 0 when it has none."""
    rows = [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 2]
    return next((r for r in sorted(rows) if count <= r < 2 * count), 0)


def _router(block: torch.nn.Module, experts: torch.nn.Module, count: int) -> str:
    """Name of the module beside the experts that owns the matrix with a row per expert; names decide if unclear."""
    inside = set(experts.modules())
    owners = [n for n, m in block.named_modules() if n and m not in inside and _rows(m, count)]
    named = [n for n in owners if re.search(r"(^|\.)(gate|router|classifier|wg)(\.|$)", n)]
    exact = [n for n in owners if _rows(block.get_submodule(n), count) == count]
    candidates = [n for n in named if n in exact] or named or exact
    return candidates[0] if candidates else ""


class _RouterMode(TorchFunctionMode):
    """Changes the one product of a router's forward that is made with its matrix (or a copy in another type)."""

    def __init__(self, routed: Routed, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        weight = next(p for p in routed.matrix.parameters(recurse=False) if p.ndim == 2 and p.shape[0] == routed.rows)
        self.shapes = {tuple(weight.shape), tuple(weight.shape[::-1])}
        self.rows, self.change, self.seen = routed.rows, change, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in PRODUCTS and result.shape[-1] == self.rows
        if made and any(isinstance(a, torch.Tensor) and tuple(a.shape) in self.shapes for a in args[1:]):
            self.seen += 1
            return self.change(result)
        return result


@contextmanager
def maskable(blocks: Sequence[Routed], seen: Seen | None = None) -> Iterator[None]:
    """Within this, forwards through the blocks obey `active`; `seen` is shown the router logits as they were."""
    worked: Counter[Routed] = Counter()  # how often each router was at work
    with ExitStack() as stack:
        for routed in blocks:
            stack.enter_context(replaced_forward(routed.block, _with_biases(routed, blocks, worked)))
            stack.enter_context(replaced_forward(routed.router, _masked_forward(routed, blocks, worked, seen)))
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


def _dropped(routed: Routed, blocks: Sequence[Routed]) -> torch.Tensor | None:
    """Which rows of the router must not be chosen now; None when all may."""
    keep = active.get()
    stays = None if keep is None else assigned(keep, blocks).get(routed)
    if stays is None:
        return None
    reason = UNMASKABLE.get(type(routed.experts).__name__)
    if reason:
        raise CannotMask(f"{routed.name} cannot be masked: {reason}")
    dropped_R = torch.zeros(routed.rows, dtype=torch.bool, device=next(routed.matrix.parameters()).device)
    dropped_R[: routed.count] = True
    dropped_R[list(stays)] = False
    return dropped_R


def _masked_forward(
    routed: Routed, blocks: Sequence[Routed], worked: Counter[Routed], seen: Seen | None
) -> Callable[..., Any]:
    original = routed.router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        worked[routed] += 1
        dropped_R = _dropped(routed, blocks)
        if dropped_R is None and seen is None:
            return original(*args, **kwargs)

        def change(logits: torch.Tensor) -> torch.Tensor:
            if seen is not None:
                seen(routed, logits)
            return logits if dropped_R is None else logits.masked_fill(dropped_R, float("-inf"))

        with substituted(routed, dropped_R), _RouterMode(routed, change) as mode:
            result = original(*args, **kwargs)
        if mode.seen != 1:
            raise CannotMask(f"the router {routed.name} ({type(routed.router).__name__}) cannot be masked")
        return result

    return forward


@contextmanager
def substituted(routed: Routed, dropped_R: torch.Tensor | None) -> Iterator[None]:
    """Within this, a table that chooses experts by token names those that the cut's table will name."""
    table_TK = getattr(routed.router, "tid2eid", None)
    if table_TK is None or dropped_R is None:
        yield
        return
    before, keep = table_TK.data, (~dropped_R[: routed.count]).nonzero().squeeze(-1)
    rows_TK = renumbered_TK(before.cpu().numpy(), keep.tolist(), routed.count)
    table_TK.data = keep[torch.from_numpy(rows_TK).to(keep.device).long()].to(before)
    try:
        yield
    finally:
        table_TK.data = before


def _with_biases(routed: Routed, blocks: Sequence[Routed], worked: Counter[Routed]) -> Callable[..., Any]:
    """The block's forward, with minus infinity in numbers per expert that are added later (correction biases).

    Some kernels compute the router's product themselves; a router that was passed over was not masked either.
    """
    original = routed.block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        dropped_R = _dropped(routed, blocks)
        if dropped_R is None:
            return original(*args, **kwargs)
        biases = _biases(routed)
        before = [bias.data for bias in biases]
        for bias in biases:
            bias.data = bias.data.masked_fill(dropped_R[: bias.numel()].view_as(bias), float("-inf"))
        earlier = worked[routed]
        try:
            result = original(*args, **kwargs)
        finally:
            for bias, data in zip(biases, before, strict=True):
                bias.data = data
        if worked[routed] == earlier:
            raise CannotMask(f"{routed.name} does not call its router ({type(routed.router).__name__})")
        return result

    return forward


def _biases(routed: Routed) -> list[torch.Tensor]:
    inside = {id(t) for t in (*routed.experts.parameters(), *routed.experts.buffers())}
    named = [*routed.block.named_buffers(), *routed.block.named_parameters()]
    return [
        tensor
        for name, tensor in named
        if "bias" in name and id(tensor) not in inside and tensor.is_floating_point()
        and tensor.numel() in {routed.count, routed.rows} and tensor.shape[-1] == tensor.numel()
    ]  # fmt: skip


def assigned(keep: Keep, blocks: Sequence[Routed]) -> dict[Routed, Sequence[int]]:
    """Which layer in memory each of the plan's blocks is: the number decides, then the likeness of the names."""
    found: dict[Routed, Sequence[int]] = {}
    for name, stays in keep.items():
        same = [
            b for b in blocks if b.layer == layer_number(name) and max(stays, default=0) < b.count and b not in found
        ]
        if same:
            found[max(same, key=lambda block: _likeness(name, block.name))] = stays
    return found


def _likeness(one: str, other: str) -> int:
    return len(set(one.split(".")) & set(other.split(".")))


def random_keep(model: Any, keep: Keep, seed: int) -> dict[str, list[int]]:
    """A plan of the same size whose experts are drawn, with as many from each routing group: what no thought costs."""
    generator = random.Random(seed)
    drawn: dict[str, list[int]] = {}
    for routed, stays in assigned(keep, routed_blocks(model)).items():
        width = routed.count // _groups(model)
        by_group = Counter(expert // width for expert in stays)
        chosen = [generator.sample(range(g * width, (g + 1) * width), n) for g, n in by_group.items()]
        drawn[routed.name] = sorted(expert for group in chosen for expert in group)
    return drawn


def _groups(model: Any) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "n_group", None) or getattr(config, "num_expert_group", None) or 1)


@contextmanager
def keeping(keep: Keep | None) -> Iterator[None]:
    """Forwards inside see only these experts; None means all."""
    token = active.set(keep)
    try:
        yield
    finally:
        active.reset(token)
