"""Experts that are modules of their own, run by code that nobody here has read, such as comes with a checkpoint.

Such a block adds up its experts' outputs, each times a gate: out = rest + sum_e gate_e f_e. So the gates need not be
read off its code, they can be asked for: it runs twice more, with experts that answer nothing, and with experts e that
answer a large number at place e and nothing elsewhere; the difference holds the gates. Then gates times outputs must
be what the block put out, or its code is something else and the run ends.

Legend of the array suffixes: T tokens, S slots (one expert for one token) sorted by expert, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module

from moeprune.errors import InputError
from moeprune.scoring.hooks import Removable, Undo
from moeprune.scoring.observer import Observer, RunAll, Site

SIGNAL = 2.0**20  # a power of two, so large that what the block adds leaves every digit of a gate in place
SIGNAL_FLOAT16 = 2.0**12  # whose largest number is 65504
TOLERANCE = {torch.float32: 1e-3}  # of the norm of what the experts add
TOLERANCE_16_BIT = 0.1
Calls = dict[int, list[tuple[torch.Tensor, torch.Tensor]]]  # expert -> what went in and what came out, call by call
Answer = Callable[[int, torch.Tensor], torch.Tensor]


class Foreign(InputError):
    """A block does not add up its experts as supposed."""


def one_after_another(observer: Observer, site: Site, experts: Sequence[Module]) -> RunAll:
    """Mode full where each expert is a module."""

    def run(x_TH: torch.Tensor, _rows: slice) -> None:
        token_T = torch.arange(len(x_TH), device=x_TH.device)
        for number, expert in enumerate(experts[: site.block.experts]):
            observer.begin(site, torch.full_like(token_T, number), token_T, token_T, x_TH)
            observer.outputs(site, expert(x_TH))

    return run


def attach_modules(observer: Observer, site: Site, module: Module) -> list[Removable]:
    """Keep what each expert gets and gives; behind the block, ask for the gates."""
    experts = list(module.children())
    owner = observer.stream.model.get_submodule(site.path.rpartition(".")[0])
    calls: Calls = {}
    listening = [True]

    def listen(number: int) -> Callable[..., None]:
        def hook(_module: Module, args: Any, output: Any) -> None:
            if listening[0]:
                calls.setdefault(number, []).append((args[0].flatten(0, -2), output.flatten(0, -2)))

        return hook

    def after(owner: Module, args: Any, kwargs: Any, output: Any) -> None:
        heard = {number: _joined(calls[number]) for number in sorted(calls)}
        calls.clear()
        listening[0] = False
        try:
            _observe(observer, site, owner, experts, heard, (args, kwargs, output))
        finally:
            listening[0] = True

    hooks: list[Removable] = [expert.register_forward_hook(listen(i)) for i, expert in enumerate(experts)]
    return [*hooks, owner.register_forward_hook(after, with_kwargs=True), Undo(calls.clear)]


def _joined(calls: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([x_SH for x_SH, _ in calls]), torch.cat([y_SH for _, y_SH in calls])


def _observe(
    observer: Observer,
    site: Site,
    owner: Module,
    experts: Sequence[Module],
    heard: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    call: tuple[Any, Any, Any],
) -> None:
    """Tell the observer which expert got which token with which gate, and what it put out."""
    args, kwargs, output = call
    width = next((y_SH.shape[-1] for _, y_SH in heard.values()), 0)
    if not width:
        raise Foreign(_sentence(site, "does not call its experts one by one"))
    gate_TE, silent_TH = asked(lambda: _rows(owner.forward(*args, **kwargs)), experts, width)
    inputs = [v.flatten(0, -2) for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim() > 1]
    x_TH = next((x_TH for x_TH in inputs if len(x_TH) == len(gate_TE) and _holds(x_TH, heard)), None)
    if x_TH is None:
        raise Foreign(_sentence(site, "gives its experts something else than what it gets"))
    expert_S, token_S, y_SH = [], [], []
    for number, (got_SH, gave_SH) in heard.items():
        rows_S = tokens_of(got_SH, x_TH, gate_TE[:, number].nonzero().squeeze(-1))
        assert rows_S is not None
        used_S = gate_TE[rows_S, number] != 0
        expert_S.append(torch.full_like(rows_S[used_S], number))
        token_S.append(rows_S[used_S])
        y_SH.append(gave_SH[used_S])
    expert, token, y = torch.cat(expert_S), torch.cat(token_S), torch.cat(y_SH)
    gate_S = gate_TE[token, expert]
    _check(site, _rows(output).double() - silent_TH, token, gate_S, y)
    observer.begin(site, expert, token, gate_S, x_TH)
    observer.outputs(site, y)
    observer.every_expert(site, owner, x_TH, one_after_another(observer, site, experts))


def asked(
    forward: Callable[[], torch.Tensor], experts: Sequence[Module], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gates of all experts for all tokens, and what the block puts out without any expert; both float64."""

    def nothing(_number: int, x_SH: torch.Tensor) -> torch.Tensor:
        return x_SH.new_zeros((*x_SH.shape[:-1], width))

    with answering(experts, nothing):
        silent = forward()
    silent_TH, strength = silent.double(), SIGNAL_FLOAT16 if silent.dtype == torch.float16 else SIGNAL
    gates = []
    for first in range(0, len(experts), width):

        def signal(number: int, x_SH: torch.Tensor, first: int = first) -> torch.Tensor:
            answer_SH = nothing(number, x_SH)
            if first <= number < first + width:
                answer_SH[..., number - first] = strength
            return answer_SH

        with answering(experts, signal):
            gates.append((forward().double() - silent_TH)[:, : len(experts) - first] / strength)
    return torch.cat(gates, -1), silent_TH


@contextmanager
def answering(experts: Sequence[Module], answer: Answer) -> Iterator[None]:
    """Within this, experts compute nothing and answer this."""
    for number, expert in enumerate(experts):
        vars(expert)["forward"] = lambda x_SH, *_args, number=number, **_kwargs: answer(number, x_SH)
    try:
        yield
    finally:
        for expert in experts:
            del vars(expert)["forward"]


def _rows(output: Any) -> torch.Tensor:
    """The hidden states that a block puts out, one row a token."""
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states.flatten(0, -2)


def _holds(x_TH: torch.Tensor, heard: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> bool:
    got = [got_SH for got_SH, _ in heard.values()]
    return x_TH.shape[-1] == got[0].shape[-1] and all(tokens_of(got_SH, x_TH) is not None for got_SH in got)


def tokens_of(got_SH: torch.Tensor, x_TH: torch.Tensor, likely_S: torch.Tensor | None = None) -> torch.Tensor | None:
    """Which rows of the block's input an expert got: those likely, in their order, else found by content.

    Equal rows are the same to any router, so it does not matter which of them is found.
    """
    if likely_S is not None and len(likely_S) == len(got_SH) and torch.equal(x_TH[likely_S], got_SH):
        return likely_S
    direction_H = torch.arange(x_TH.shape[-1], dtype=torch.float64, device=x_TH.device).add(2).sqrt().frac().add(0.5)
    key_T, key_S = ((rows.double() * direction_H).sum(-1) for rows in (x_TH, got_SH))
    sorted_T, order_T = key_T.sort()
    right_S = torch.searchsorted(sorted_T, key_S).clamp(max=len(key_T) - 1)
    left_S = (right_S - 1).clamp(min=0)
    nearer = (sorted_T[left_S] - key_S).abs() < (sorted_T[right_S] - key_S).abs()
    found_S = order_T[torch.where(nearer, left_S, right_S)]
    return found_S if torch.equal(x_TH[found_S], got_SH) else None


def _check(site: Site, added_TH: torch.Tensor, token_S: torch.Tensor, gate_S: torch.Tensor, y_SH: torch.Tensor) -> None:
    """Gates times outputs must be what the experts added to the block's output."""
    sum_TH = torch.zeros_like(added_TH).index_add_(0, token_S, y_SH.double() * gate_S.unsqueeze(-1))
    off = (sum_TH - added_TH).norm() / added_TH.norm().clamp_min(1e-30)
    if not off < TOLERANCE.get(y_SH.dtype, TOLERANCE_16_BIT):
        raise Foreign(_sentence(site, "does not put out the sum of its experts' outputs times gates"))


def _sentence(site: Site, what: str) -> str:
    return f"{site.path.rpartition('.')[0]} {what}; this kind of model needs an adapter in moeprune/scoring/adapters.py"
