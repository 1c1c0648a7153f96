"""Adapters of families whose experts neither follow transformers' signature nor loop over what was chosen.

Legend of the array suffixes: T tokens, K experts per token, S slots sorted by expert, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module

from moeprune.scoring.hooks import Removable
from moeprune.scoring.observer import Observer, Site


def attach_llama4(observer: Observer, site: Site, module: Module) -> list[Removable]:
    """Here the gate multiplies the expert's input, and every expert runs on every token, most with an input of zeros.

    What an expert contributes is f(g x), so its norm is scored with a gate of one; in mode full, each with its own g.
    """
    block = observer.stream.model.get_submodule(site.path.rpartition(".")[0])
    chosen: list[torch.Tensor] = []

    def routed(_module: Module, args: Any, output: Any) -> None:
        chosen[:] = [output[1], args[0]]

    def run_all(x_TH: torch.Tensor, rows: slice) -> None:
        gate_ET = torch.sigmoid(chosen[0][rows].float()).to(x_TH.dtype).T
        expert_S = torch.arange(len(gate_ET), device=x_TH.device).repeat_interleave(len(x_TH))
        token_S = torch.arange(len(x_TH), device=x_TH.device).repeat(len(gate_ET))
        site.probability_TE = torch.ones(gate_ET.T.shape, dtype=torch.float64, device=x_TH.device)  # is in the input
        observer.begin(site, expert_S, token_S, gate_ET.reshape(-1), x_TH)
        observer.outputs(site, module.forward(x_TH[token_S] * gate_ET.reshape(-1, 1)))

    def after(_module: Module, _args: Any, y: torch.Tensor) -> None:
        logits_TE, x_TH = chosen
        index_TK = torch.topk(logits_TE, block.top_k, dim=1).indices  # type: ignore[arg-type]
        expert_S, order_S = torch.sort(index_TK.reshape(-1), stable=True)
        token_S = order_S // index_TK.shape[-1]
        observer.begin(site, expert_S, token_S, torch.ones_like(expert_S), x_TH)
        observer.outputs(site, y[expert_S * len(x_TH) + token_S])
        observer.every_expert(site, module, x_TH, run_all)

    router: Module = block.router  # type: ignore[assignment]
    return [router.register_forward_hook(routed), module.register_forward_hook(after)]


def attach_jetmoe(observer: Observer, site: Site, module: Module) -> list[Removable]:
    """The router sorts the tokens itself and says how many each expert gets; so do the attention's experts.

    Mode full runs the same code with all experts chosen; in attention, where tokens look at one another, a whole batch
    at once.
    """
    router: Module = module.router  # type: ignore[assignment]
    outputs: Module = module.output_linear  # type: ignore[assignment]
    attention = (
        None if hasattr(module, "activation") else observer.stream.model.get_submodule(site.path.rpartition(".")[0])
    )

    def routed(_module: Module, args: Any, output: Any) -> None:
        _, token_S, gate_S, sizes, _ = output
        x_TH = args[0].reshape(-1, args[0].shape[-1])
        counts_E = torch.tensor(sizes, device=token_S.device)
        expert_S = torch.repeat_interleave(torch.arange(len(sizes), device=token_S.device), counts_E)
        observer.begin(site, expert_S, token_S, gate_S, x_TH)

    def after(owner: Module, args: Any, kwargs: Any, _output: Any) -> None:
        x_TH = (args[0] if args else kwargs["hidden_states"]).flatten(0, 1)

        def run_all(rows_TH: torch.Tensor, _rows: slice) -> None:
            with all_chosen(owner, site.block.experts):
                owner.forward(rows_TH.unsqueeze(0)) if attention is None else owner.forward(*args, **kwargs)

        observer.every_expert(site, module, x_TH, run_all, step=0 if attention is None else len(x_TH))

    return [
        router.register_forward_hook(routed),
        outputs.register_forward_hook(lambda _module, _args, y_SH: (observer.outputs(site, y_SH), None)[1]),
        (attention or module).register_forward_hook(after, with_kwargs=True),
    ]


@contextmanager
def all_chosen(owner: Module, experts: int) -> Iterator[None]:
    """Within this, routers that take `top_k` experts take all."""
    before = {module: module.top_k for module in owner.modules() if hasattr(module, "top_k")}
    for module in before:
        module.top_k = experts  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, top_k in before.items():
            module.top_k = top_k
