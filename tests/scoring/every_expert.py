"""An oracle of mode full for every family: each expert on each token in float64, by the model's own code or by hand.

p is the router's probability as published for the family, from the product with the router's matrix; f(x) is what one
expert puts out when it alone is chosen, with a gate of one. Sums over all tokens of a domain.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import Module
from torch.nn.functional import silu
from torch.overrides import TorchFunctionMode

from moeprune.scoring.calibration.batching import Batch

# All others take the softmax over the logits of all experts.
SIGMOID = {
    *("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa", "hy_v3"),
    *("hy_v4", "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "dots1", "dots3_note", "exaone_moe", "flint"),
    *("inkling2_text", "inkling_mm_model", "inkling_text", "kimi_k25", "kimi_linear", "kolibri1", "laguna", "lfm2_moe"),
    *("mimo_v2_flash", "minimax_m2", "minimax_m3_vl", "muse_spark", "nemotron_h", "solar_open", "step3p7"),
    *("llama4", "llama4_text", "minimax_m3_vl_text"),
}
EXPERTS = 8
PRODUCTS = {torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm}


def probabilities(family: str, logits_TE: torch.Tensor, model: Any) -> torch.Tensor:
    """Of all that the router can choose."""
    if family.startswith("inkling"):
        logits_TE = logits_TE[:, :EXPERTS]  # the others weigh the shared experts
    if family == "muse_spark":
        logits_TE = logits_TE * model.config.text_config.output_multiplier
    if family == "deepseek_v4":
        scores_TE = torch.nn.functional.softplus(logits_TE.double()).sqrt()
    else:
        scores_TE = logits_TE.double().sigmoid() if family in SIGMOID else logits_TE.double().softmax(-1)
    return scores_TE / scores_TE.sum(-1, keepdim=True)


class Products(TorchFunctionMode):
    """Keeps what is multiplied with a router's matrix."""

    def __init__(self, matrices: dict[int, str]) -> None:
        super().__init__()
        self.matrices = matrices  # address -> site
        self.logits: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            for operand in [*args, *(kwargs or {}).values()]:
                address = operand.untyped_storage().data_ptr() if isinstance(operand, torch.Tensor) else None
                if address in self.matrices:
                    self.logits[self.matrices[address]] = result.detach().flatten(0, -2)
                    self.inputs[self.matrices[address]] = args[0].detach().flatten(0, -2)
        return result


class Oracle:
    """Sums that grow while the plain model runs."""

    def __init__(self, family: str, model: Module, observer: Any) -> None:
        self.family, self.model = family, model
        self.sites = {site.path: site for site in observer.sites}
        loader, parameters = observer.stream.loader, dict(model.named_parameters())
        matrices = {}
        for site in observer.sites:
            names = [n for p in site.block.parts if p.router for n in loader.targets_of(p.tensor) if n in parameters]
            for name in names:
                if parameters[name].ndim == 2 and max(parameters[name].shape) >= site.block.experts:
                    matrices[parameters[name].untyped_storage().data_ptr()] = site.path
        self.products = Products(matrices)
        self.sums: dict[str, np.ndarray] = {}
        self.calls: dict[str, tuple[Any, Any]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The model runs within this."""
        with ExitStack() as stack:
            for path in self.sites:
                module = self.model.get_submodule(path)
                attention = type(module).__name__ == "JetMoeMoA"
                hooked = self.model.get_submodule(path.rpartition(".")[0]) if attention else module

                def keep(_module: Module, args: Any, kwargs: Any, path: str = path) -> None:
                    self.calls[path] = (args, kwargs)

                stack.callback(hooked.register_forward_pre_hook(keep, with_kwargs=True).remove)
            with self.products:
                yield

    def add(self, batch: Batch) -> None:
        """The batch has run: every expert on every token of it."""
        for path, (args, kwargs) in self.calls.items():
            module, logits_TE = self.model.get_submodule(path), self.products.logits[path]
            kind, given = type(module).__name__, {"logits_TE": logits_TE, "router_input": self.products.inputs[path]}
            if kind == "JetMoeMoA":
                owner = self.model.get_submodule(path.rpartition(".")[0])
                given |= {"owner": owner, "batch": batch, "rotary": kwargs["position_embeddings"]}
            x = args[0] if args else kwargs["hidden_states"]
            f_TE = BY_HAND.get(kind, by_its_own_code)(module, x_TH=x.flatten(0, -2).double(), **given)
            if kind != "Llama4TextExperts":  # whose gate is inside
                f_TE = probabilities(self.family, logits_TE, self.model)[:, :EXPERTS] * f_TE
            sums_DE = self.sums.setdefault(self.sites[path].block.name, np.zeros((2, EXPERTS)))
            for domain in (0, 1):
                sums_DE[domain] += f_TE[batch.domain_BT.reshape(-1) == domain].sum(0).numpy()
        self.calls.clear()


def by_its_own_code(module: Module, x_TH: torch.Tensor, **_: Any) -> torch.Tensor:
    """Of a module that takes tokens, indices and gates; or of modules that take tokens alone."""
    module = copy.deepcopy(module).double()
    if isinstance(module, torch.nn.ModuleDict):
        return torch.stack([expert(x_TH).norm(dim=-1) for expert in list(module.values())[:EXPERTS]], -1)
    if hasattr(module, "config"):
        module.config._experts_implementation = "eager"
    gate_TK = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(x_TH), 1)
    outputs = [module(x_TH, torch.tensor([e, (e + 1) % EXPERTS]).repeat(len(x_TH), 1), gate_TK) for e in range(EXPERTS)]
    return torch.stack([y.reshape(x_TH.shape).norm(dim=-1) for y in outputs], -1)


def llama4(module: Any, router_input: torch.Tensor, logits_TE: torch.Tensor, **_: Any) -> torch.Tensor:
    """The gate goes into the expert: |f(g x)|."""
    x_TH, norms = router_input.double(), []
    for expert in range(EXPERTS):
        gated_TH = x_TH * logits_TE[:, expert : expert + 1].float().sigmoid().double()
        gate, up = (gated_TH @ module.gate_up_proj[expert].double()).chunk(2, -1)
        norms.append(((up * silu(gate)) @ module.down_proj[expert].double()).norm(dim=-1))
    return torch.stack(norms, -1)


def jetmoe(module: Any, x_TH: torch.Tensor, **_: Any) -> torch.Tensor:
    """One matrix that makes gate and value, one behind them."""
    norms = []
    for expert in range(EXPERTS):
        gate, value = (x_TH @ module.input_linear.weight[expert].double().T).chunk(2, -1)
        norms.append(((silu(gate) * value) @ module.output_linear.weight[expert].double().T).norm(dim=-1))
    return torch.stack(norms, -1)


def jetmoe_attention(module: Any, x_TH: torch.Tensor, owner: Any, batch: Batch, rotary: Any, **_: Any) -> torch.Tensor:
    """An expert makes queries of its own, looks at the same keys as the others, and has a matrix behind."""
    cos, sin = (part.double()[0] for part in rotary)
    norms = []
    for x, real in zip(x_TH.view(*batch.domain_BT.shape, -1), batch.inputs["attention_mask"].bool(), strict=True):
        length = len(x)
        seen = torch.ones(length, length).tril().bool() & (real | torch.eye(length).bool())
        keys, values = (
            half.view(length, -1, owner.head_dim) for half in (x @ owner.kv_proj.weight.double().T).chunk(2, -1)
        )
        by_expert = []
        for expert in range(EXPERTS):
            queries = (x @ module.input_linear.weight[expert].double().T).view(length, -1, owner.head_dim)
            weights = torch.einsum("qhd,khd->hqk", turned(queries, cos, sin), turned(keys, cos, sin)) * owner.scaling
            found = weights.masked_fill(~seen, float("-inf")).softmax(-1)
            out = torch.einsum("hqk,khd->qhd", found, values).reshape(length, -1)
            by_expert.append((out @ module.output_linear.weight[expert].double().T).norm(dim=-1))
        norms.append(torch.stack(by_expert, -1))
    return torch.cat(norms)


def turned(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding; the first half of a head goes with the second."""
    one, two = rows.chunk(2, -1)
    return rows * cos.unsqueeze(1) + torch.cat([-two, one], -1) * sin.unsqueeze(1)


BY_HAND: dict[str, Callable[..., torch.Tensor]] = {
    "Llama4TextExperts": llama4,
    "JetMoeMoE": jetmoe,
    "JetMoeMoA": jetmoe_attention,
}
