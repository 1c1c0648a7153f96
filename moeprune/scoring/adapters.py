"""Where an observer looks in a model: TABLE of the ways in which transformers runs experts.

Nearly all families hand (hidden states, indices, gates) to an experts module that may be run by a shared grouped
implementation. That one offers a place behind the experts and in front of the gates, meant for a norm, where the outputs
can be seen. The few families with loops or products of their own have an adapter each. All of them only look: the
forward stays the model's own, to the bit.

Legend of the array suffixes: T tokens, K experts per token, S slots sorted by expert, E experts, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from moeprune.errors import InputError, UsageError
from moeprune.scoring.observer import Observer, Site

# Experts whose block multiplies their sum with a constant of its own, and the constant's name there.
FACTORS = dict.fromkeys(
    ("BeamExperts", "LagunaExperts", "MiniMaxM3VLExperts", "Step3p7Experts"), "routed_scaling_factor"
)


class Removable(Protocol):
    """A hook that can be taken off again."""

    def remove(self) -> None:
        """Take it off."""


@dataclass
class Undo:
    """Calls a function when removed."""

    remove: Callable[[], None]


Attach = Callable[[Observer, Site, Module], list[Removable]]


@dataclass(frozen=True, slots=True)
class Adapter:
    """How one kind of experts is recognised, and how it is watched."""

    name: str
    fits: Callable[[Module], bool]
    attach: Attach
    every_expert: bool = True  # whether mode full can run all experts on all tokens through it


def arguments(module: Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Reads hidden states, indices and gates off a call, whatever the family names them."""
    signature = inspect.signature(type(module).forward)

    def read(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, index, gate = list(signature.bind(module, *args, **kwargs).arguments.values())[1:4]
        return x.reshape(-1, x.shape[-1]), index, gate

    return read


def uses_grouped(module: Module) -> bool:
    """Experts of transformers' registry that run by one of its grouped implementations."""
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return hasattr(module, "has_post_expert_norm") and implementation in ("grouped_mm", "batched_mm")


def attach_grouped(observer: Observer, site: Site, module: Module) -> list[Removable]:
    """Look at the place of the norm behind the experts; where a family has that norm, look behind it."""
    read = arguments(module)

    def before(_module: Module, args: Any, kwargs: Any) -> None:
        x_TH, index_TK, gate_TK = read(args, kwargs)
        observer.routed(site, index_TK, gate_TK, x_TH)

    def after(_module: Module, args: Any, kwargs: Any, _output: Any) -> None:
        observer.every_expert(site, module, read(args, kwargs)[0])

    hooks: list[Removable] = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    if module.has_post_expert_norm:
        norm: Module = module.post_expert_norm  # type: ignore[assignment]
        hooks.append(norm.register_forward_hook(lambda _module, _args, y_SH: (observer.outputs(site, y_SH), None)[1]))
        return hooks

    def remove() -> None:
        module.has_post_expert_norm = False
        del module.post_expert_norm

    module.has_post_expert_norm = True
    module.post_expert_norm = lambda y_SH: observer.outputs(site, y_SH)
    return [*hooks, Undo(remove)]


class LinearSpy(TorchFunctionMode):
    """Keeps the results of products with slices of one stacked weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.start, self.end = weight.data_ptr(), weight.data_ptr() + weight.numel() * weight.element_size()
        self.rows: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and self.start <= args[1].data_ptr() < self.end:
            self.rows.append(result)
        return result


def runs_a_loop(module: Module) -> bool:
    """Experts that loop over those hit, in ascending order: a stacked down_proj, or a submodule that gives the output."""
    return "forward" in vars(type(module)) and (
        isinstance(getattr(module, "down_proj", None), torch.nn.Parameter) or bool(_output_modules(module))
    )


def _output_modules(module: Module) -> list[Module]:
    if isinstance(module, torch.nn.ModuleDict):
        return list(module.values())
    return [module.mlp] if type(module).__name__ == "DbrxExperts" else []  # type: ignore[list-item]


def attach_loop(observer: Observer, site: Site, module: Module) -> list[Removable]:
    """Collect the loop's outputs expert by expert; within one they come in the order of torch.where on [K, T]."""
    read = arguments(module)
    rows: list[torch.Tensor] = []
    spies: list[LinearSpy] = []
    hooks: list[Removable] = [
        inner.register_forward_hook(lambda _module, _args, y: rows.append(y.reshape(-1, y.shape[-1])))
        for inner in _output_modules(module)
    ]

    def before(_module: Module, _args: Any, _kwargs: Any) -> None:
        rows.clear()
        if not _output_modules(module):
            spies.append(LinearSpy(module.down_proj))  # type: ignore[arg-type]
            spies[-1].__enter__()

    def after(_module: Module, args: Any, kwargs: Any, _output: Any) -> None:
        if spies:
            spy = spies.pop()
            spy.__exit__(None, None, None)
            rows.extend(spy.rows)
        x_TH, index, gate_TK = read(args, kwargs)
        expert_S, k_S, token_S = _order_of_loop(index, site.block.experts)
        if sum(map(len, rows)) != len(expert_S):
            raise InputError(f"{site.path} does not run its experts as expected; add an adapter to {__name__}")
        y_SH = torch.cat(rows) if rows else x_TH[:0]
        observer.begin(site, expert_S, token_S, gate_TK[token_S, k_S], x_TH)
        observer.outputs(site, y_SH)

    hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
    hooks.append(module.register_forward_hook(after, with_kwargs=True))
    return hooks


def _order_of_loop(index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expert, choice and token of every slot. Indices [T, K], or a mask [T, K, E]; ids beyond the experts are not ours."""
    mask_TKE = index if index.dim() == 3 else torch.nn.functional.one_hot(index)
    expert_S, k_S, token_S = mask_TKE[..., :experts].permute(2, 1, 0).nonzero(as_tuple=True)
    return expert_S, k_S, token_S


def attach_llama4(observer: Observer, site: Site, module: Module) -> list[Removable]:
    """Here the gate multiplies the expert's input, and every expert runs on every token, most with an input of zeros.

    What an expert contributes is f(g x), so its norm is scored with a gate of one.
    """
    block = observer.stream.model.get_submodule(site.path.rpartition(".")[0])
    chosen: list[torch.Tensor] = []

    def routed(_module: Module, args: Any, output: Any) -> None:
        chosen[:] = [torch.topk(output[1], block.top_k, dim=1).indices, args[0]]  # type: ignore[arg-type]

    def after(_module: Module, _args: Any, y: torch.Tensor) -> None:
        index_TK, x_TH = chosen
        expert_S, order_S = torch.sort(index_TK.reshape(-1), stable=True)
        token_S = order_S // index_TK.shape[-1]
        observer.begin(site, expert_S, token_S, torch.ones_like(expert_S), x_TH)
        observer.outputs(site, y[expert_S * len(x_TH) + token_S])

    router: Module = block.router  # type: ignore[assignment]
    return [router.register_forward_hook(routed), module.register_forward_hook(after)]


def attach_jetmoe(observer: Observer, site: Site, module: Module) -> list[Removable]:
    """The router sorts the tokens itself and says how many each expert gets; the attention's experts work the same way."""

    def routed(_module: Module, args: Any, output: Any) -> None:
        _, token_S, gate_S, sizes, _ = output
        x_TH = args[0].reshape(-1, args[0].shape[-1])
        counts_E = torch.tensor(sizes, device=token_S.device)
        expert_S = torch.repeat_interleave(torch.arange(len(sizes), device=token_S.device), counts_E)
        observer.begin(site, expert_S, token_S, gate_S, x_TH)

    router: Module = module.router  # type: ignore[assignment]
    outputs: Module = module.output_linear  # type: ignore[assignment]
    return [
        router.register_forward_hook(routed),
        outputs.register_forward_hook(lambda _module, _args, y_SH: (observer.outputs(site, y_SH), None)[1]),
    ]


# The first that fits is taken.
ADAPTERS = (
    Adapter("grouped", uses_grouped, attach_grouped),
    Adapter("llama4", lambda m: type(m).__name__ == "Llama4TextExperts", attach_llama4, every_expert=False),
    Adapter(
        "jetmoe", lambda m: hasattr(m, "output_linear") and hasattr(m, "router"), attach_jetmoe, every_expert=False
    ),
    Adapter("loop", runs_a_loop, attach_loop, every_expert=False),
)


def find_sites(observer: Observer, blocks: Sequence[Any]) -> None:
    """Find the modules that run each block's experts. Blocks that the model does not run (MTP) have none."""
    loader, model = observer.stream.loader, observer.stream.model
    modules = dict(model.named_modules())
    for block in blocks:
        paths: dict[str, None] = {}
        for part in block.parts:
            if not part.router and part.kind != "ids":
                for target in loader.targets_of(part.tensor):
                    path = next((p for p in _ancestors(target) if p in modules and adapter_of(modules[p])), None)
                    if path is not None and loader.layer_of(path):
                        paths[path] = None
        for path in paths:
            factor = FACTORS.get(type(modules[path]).__name__)
            owner = modules[path.rpartition(".")[0]]
            observer.sites.append(
                Site(block, path, loader.layer_of(path), float(getattr(owner, factor)) if factor else 1.0)
            )


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
            if observer.mode == "full" and not adapter.every_expert:
                raise UsageError(f"mode full cannot run all experts of {type(module).__name__}; use mode routed")
            hooks += adapter.attach(observer, site, module)
            if observer.mode != "routed":
                hooks += attach_router(observer, site)
        yield
    finally:
        for hook in reversed(hooks):
            hook.remove()


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
