"""Where an observer looks in a model: TABLE of the ways in which transformers runs experts.

Nearly all families hand (hidden states, indices, gates) to an experts module that may be run by a shared grouped
implementation. That one offers a place behind the experts and in front of the gates, meant for a norm, where the
outputs can be seen. The few families with loops or products of their own have an adapter each, and experts that are
modules run by unknown code are asked (asking.py). All of them only look: the forward stays the model's own, to the bit.

Legend of the array suffixes: T tokens, K experts per token, S slots sorted by expert, E experts, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from moeprune.checkpoint.families import Block
from moeprune.console import warn
from moeprune.errors import InputError
from moeprune.scoring.asking import attach_modules, one_after_another
from moeprune.scoring.hooks import Removable, Undo
from moeprune.scoring.loading import LayerLoader
from moeprune.scoring.observer import Observer, RunAll, Site
from moeprune.scoring.odd_experts import attach_jetmoe, attach_llama4

# Experts whose sum is multiplied with a constant, by themselves or by their block: module, owner -> the constant.
FACTORS: dict[str, Callable[[Any, Any], Any]] = {
    "BeamExperts": lambda _module, owner: owner.routed_scaling_factor,
    "LagunaExperts": lambda _module, owner: owner.routed_scaling_factor,
    "MiniMaxM3VLExperts": lambda _module, owner: owner.routed_scaling_factor,
    "Step3p7Experts": lambda _module, owner: owner.routed_scaling_factor,
    "OpenAIPrivacyFilterExperts": lambda _module, owner: owner.num_experts,  # of one token: its router divides by it
    "NllbMoeExperts": lambda module, _owner: 1 - module.moe_token_dropout,
}
# Routers whose gate values do not tell which function of their logits is the probability.
SCORES_OF = {
    "Llama4TextExperts": "sigmoid",  # goes into the expert's input, and of one expert alone
    "PhimoeExperts": "softmax",  # over what is left of the logits after each choice
    "NllbMoeExperts": "softmax",
    "SwitchTransformersExperts": "softmax",
}
# What a person should know about the experts of a class before the scores are used.
REMARKS = {
    "NllbMoeExperts": "transformers 5.23 takes NLLB-MoE's table of zeros and ones for expert numbers, so that only "
    "experts 0 and 1 ever run; only scores of --scoring-mode full mean anything (metric full)",
}


def _no_factor(_module: Module, _owner: Module) -> float:
    return 1.0


Attach = Callable[[Observer, Site, Module], list[Removable]]


@dataclass(frozen=True, slots=True)
class Adapter:
    """How one kind of experts is recognised, and how it is watched."""

    name: str
    fits: Callable[[Module], bool]
    attach: Attach


def arguments(module: Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Reads hidden states, indices and gates off a call, whatever the family names them."""
    signature = inspect.signature(type(module).forward)

    def read(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, index, gate = list(signature.bind(module, *args, **kwargs).arguments.values())[1:4]
        return x.reshape(-1, x.shape[-1]), index, gate

    return read


def by_indices(module: Module, experts: int) -> RunAll:
    """Mode full through the module itself: every token is sent to every expert."""

    def run(x_TH: torch.Tensor, _rows: slice) -> None:
        index_TE = torch.arange(experts, device=x_TH.device).expand(len(x_TH), experts)
        module(x_TH, index_TE, torch.ones(len(x_TH), experts, dtype=x_TH.dtype, device=x_TH.device))

    return run


def uses_grouped(module: Module) -> bool:
    """Experts of transformers' registry that run by one of its grouped implementations."""
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return hasattr(module, "has_post_expert_norm") and implementation in ("grouped_mm", "batched_mm")


def attach_grouped(observer: Observer, site: Site, module: Module) -> list[Removable]:
    """Look at the place of the norm behind the experts; where a family has that norm, look behind it."""
    read = arguments(module)

    def before(_module: Module, args: Any, kwargs: Any) -> None:
        x_TH, index_TK, gate_TK = read(args, kwargs)
        expert_S, order_S = torch.sort(index_TK.reshape(-1))  # as the grouped experts of transformers sort
        observer.begin(site, expert_S, order_S // index_TK.shape[-1], gate_TK.reshape(-1)[order_S], x_TH)

    def after(_module: Module, args: Any, kwargs: Any, _output: Any) -> None:
        observer.every_expert(site, module, read(args, kwargs)[0], by_indices(module, site.block.experts))

    hooks: list[Removable] = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    if module.has_post_expert_norm:
        norm = module.get_submodule("post_expert_norm")
        hooks.append(norm.register_forward_hook(lambda _module, _args, y_SH: (observer.outputs(site, y_SH), None)[1]))
        return hooks

    def remove() -> None:
        vars(module)["has_post_expert_norm"] = False
        del vars(module)["post_expert_norm"]

    vars(module)["has_post_expert_norm"] = True
    vars(module)["post_expert_norm"] = lambda y_SH: observer.outputs(site, y_SH)
    return [*hooks, Undo(remove)]


class GateSpy(TorchFunctionMode):
    """Keeps what is multiplied with a column of gates: rows of an expert's output, one gate for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("mul", "__mul__") and isinstance(args[1], torch.Tensor):
            y_SH, gates = args[0], args[1]
            if y_SH.dim() == 2 and gates.shape == (len(y_SH), 1):
                self.rows.append(y_SH)
        return func(*args, **(kwargs or {}))


def attach_loop(observer: Observer, site: Site, module: Module) -> list[Removable]:
    """Collect the loop's outputs expert by expert; within one they come in the order of torch.where on [K, T]."""
    read = arguments(module)
    spies: list[GateSpy] = []
    if isinstance(module, torch.nn.ModuleDict):
        run_all = one_after_another(observer, site, list(module.values()))
    else:
        run_all = by_indices(module, site.block.experts)

    def before(_module: Module, _args: Any, _kwargs: Any) -> None:
        spies.append(GateSpy())
        spies[-1].__enter__()  # type: ignore[no-untyped-call]

    def after(_module: Module, args: Any, kwargs: Any, _output: Any) -> None:
        spy = spies.pop()
        spy.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        x_TH, index, gate_TK = read(args, kwargs)
        mask_TKE = index if index.dim() == 3 else torch.nn.functional.one_hot(index)
        expert_S, k_S, token_S = mask_TKE.permute(2, 1, 0).nonzero(as_tuple=True)
        if sum(map(len, spy.rows)) != len(expert_S):
            raise InputError(f"{site.path} does not run its experts as expected; add an adapter to {__name__}")
        ours = int((expert_S < site.block.experts).sum())  # identity experts come behind them
        expert_S, k_S, token_S = expert_S[:ours], k_S[:ours], token_S[:ours]
        y_SH = torch.cat(spy.rows)[:ours] if spy.rows else x_TH[:0]
        observer.begin(site, expert_S, token_S, gate_TK[token_S, k_S], x_TH)
        observer.outputs(site, y_SH)
        observer.every_expert(site, module, x_TH, run_all)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


def runs_a_loop(module: Module) -> bool:
    """Experts that loop over those hit, in ascending order, and multiply each one's rows with their gates."""
    names = list(inspect.signature(type(module).forward).parameters)
    return len(names) == 4 and "experts" in type(module).__name__.lower()


# The first that fits is taken.
ADAPTERS = (
    Adapter("grouped", uses_grouped, attach_grouped),
    Adapter("llama4", lambda module: type(module).__name__ == "Llama4TextExperts", attach_llama4),
    Adapter("jetmoe", lambda m: hasattr(m, "output_linear") and hasattr(m, "router"), attach_jetmoe),
    Adapter("loop", runs_a_loop, attach_loop),
    Adapter("modules", lambda m: isinstance(m, torch.nn.ModuleList | torch.nn.ModuleDict), attach_modules),
)


def find_sites(observer: Observer, blocks: Sequence[Block]) -> None:
    """Find the modules that run each block's experts. Blocks that the model does not run (MTP) have none."""
    modules = dict(observer.stream.model.named_modules())
    for block in blocks:
        paths = _paths(observer.stream.loader, modules, block)
        layers = {path: observer.stream.loader.layer_of(path) for path in paths}
        first = min(layers.values(), key=observer.stream.order.__getitem__, default="")
        for path in (path for path in paths if layers[path] == first):  # of two halves with the same weights, the first
            kind = type(modules[path]).__name__
            factor = FACTORS.get(kind, _no_factor)
            value = float(factor(modules[path], modules[path.rpartition(".")[0]]))
            observer.sites.append(Site(block, path, first, value, scoring=SCORES_OF.get(kind, "")))
            if kind in REMARKS:
                warn(REMARKS[kind])


def _paths(loader: LayerLoader, modules: Mapping[str, Module], block: Block) -> list[str]:
    """The modules that the block's expert tensors go into; beside the block's router where that is known."""
    experts = [
        target
        for p in block.parts
        if not p.router and p.kind != "ids" and p.share == 1  # what neighbours share is no expert of its own
        for target in loader.targets_of(p.tensor)
    ]
    routers = [target for part in block.parts if part.router for target in loader.targets_of(part.tensor)]
    paths: dict[str, None] = {}
    for target in dict.fromkeys(experts):
        path = next((p for p in _ancestors(target) if p in modules and adapter_of(modules[p])), None)
        if path is not None and loader.layer_of(path):
            paths[_beside(path, routers, modules)] = None
    return list(paths)


def _beside(path: str, routers: Sequence[str], modules: Mapping[str, Module]) -> str:
    """Experts of two kinds may lie together on disk; in memory each kind is beside its router."""
    owner, _, name = path.rpartition(".")
    if any(router.startswith(f"{owner}.") for router in routers):
        return path
    return next((f"{p}.{name}" for router in routers for p in _ancestors(router) if f"{p}.{name}" in modules), path)


def _ancestors(path: str) -> list[str]:
    """a.b.c, a.b, a."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def adapter_of(module: Module) -> Adapter | None:
    """The adapter for a module that runs experts."""
    return next((adapter for adapter in ADAPTERS if adapter.fits(module)), None)


@contextmanager
def attached(observer: Observer) -> Iterator[None]:
    """Hook the observer into every site, for a while."""
    hooks: list[Removable] = []
    try:
        for site in observer.sites:
            module = observer.stream.model.get_submodule(site.path)
            adapter = adapter_of(module)
            assert adapter is not None
            hooks += attach_kinds(observer, site) + adapter.attach(observer, site, module)
            if observer.mode != "routed":
                hooks += attach_router(observer, site)
        yield
    finally:
        for hook in reversed(hooks):
            hook.remove()


def attach_kinds(observer: Observer, site: Site) -> list[Removable]:
    """Where text and images have experts of their own (ERNIE-4.5-VL), remember which tokens go to this site's."""
    modules = site.path.split(".")
    if modules[-2:-1] not in (["text_moe"], ["vision_moe"]):
        return []
    both = observer.stream.model.get_submodule(".".join(modules[:-2]))
    signature = inspect.signature(type(both).forward)

    def split(_module: Module, args: Any, kwargs: Any) -> None:
        kind = signature.bind(both, *args, **kwargs).arguments.get("moe_mm_token_type_ids")
        site.rows = None  # without images all tokens are text
        if kind is not None and bool(kind.any()):
            site.rows = (kind.reshape(-1).bool() == (modules[-2] == "vision_moe")).nonzero().squeeze(-1)

    return [both.register_forward_pre_hook(split, with_kwargs=True)]


def attach_router(observer: Observer, site: Site) -> list[Removable]:
    """Look at what the modules put out that own the router's tensors."""
    loader, modules = observer.stream.loader, dict(observer.stream.model.named_modules())
    targets = [target for part in site.block.parts if part.router for target in loader.targets_of(part.tensor)]
    owners = dict.fromkeys(target.rpartition(".")[0] for target in targets)

    def look(_module: Module, _args: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, torch.Tensor) and value.dim() >= 2 and value.is_floating_point():
                observer.router_gave(site, value)
                return

    return [modules[path].register_forward_hook(look) for path in owners if path in modules and path != site.path]
