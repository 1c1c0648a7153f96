"""Random routed tokens and their sums, so that a metric can be checked against the tokens themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeprune.metadata import BlockSums, Sums


@dataclass(frozen=True)
class Token:
    domain: int
    slice: int
    experts: tuple[int, ...]
    gates: tuple[float, ...]
    outputs: tuple[np.ndarray, ...]
    x_norm: float
    all_probabilities: np.ndarray
    all_norms: np.ndarray


def random_tokens(seed: int, count: int, *, domains: int = 1, experts: int = 6, top_k: int = 2, slices: int = 4):
    """Tokens of one block; each domain prefers its own experts, and the last expert is never chosen."""
    rng = np.random.default_rng(seed)
    taste = rng.dirichlet(np.full(experts - 1, 0.7), size=domains)
    made = []
    for i in range(count):
        domain = int(rng.integers(domains)) if i >= domains else i
        chosen = rng.choice(
            experts - 1, size=top_k, replace=False, p=(taste[domain] + 0.01) / (1 + 0.01 * (experts - 1))
        )
        made.append(
            Token(
                domain,
                int(rng.integers(slices)),
                tuple(int(j) for j in chosen),
                tuple(rng.random(top_k)),
                tuple(rng.standard_normal(5) * (1 + j) for j in chosen),
                float(rng.random() + 0.5),
                rng.dirichlet(np.ones(experts)),
                rng.random(experts),
            )
        )
    return made


def add_up(tokens, *, name="model.layers.0", domains=1, experts=6, slices=4) -> BlockSums:
    """The sums that scoring would store, in a plain loop."""
    names = ["count", "gate_sum", "gate_sq_sum", "norm_sum", "norm_sq_sum", "gate_norm_sum", "gate_norm_sq_sum"]
    names += ["max_abs", "full_sum", "router_sum"]
    values = {statistic: np.zeros((domains, experts)) for statistic in names}
    by_slice = {statistic: np.zeros((domains, slices, experts)) for statistic in ("count", "gate_norm_sum")}
    vectors = np.zeros((experts, domains, 5))
    for t in tokens:
        d = t.domain
        values["full_sum"][d] += t.all_probabilities * t.all_norms
        values["router_sum"][d] += t.all_probabilities * t.x_norm
        for j, g, f in zip(t.experts, t.gates, t.outputs, strict=True):
            norm = float(np.sqrt((f**2).sum()))
            for statistic, amount in {
                "count": 1.0,
                "gate_sum": g,
                "gate_sq_sum": g * g,
                "norm_sum": norm,
                "norm_sq_sum": norm * norm,
                "gate_norm_sum": g * norm,
                "gate_norm_sq_sum": (g * norm) ** 2,
            }.items():
                values[statistic][d, j] += amount
            values["max_abs"][d, j] = max(values["max_abs"][d, j], np.abs(f).max())
            by_slice["count"][d, t.slice, j] += 1
            by_slice["gate_norm_sum"][d, t.slice, j] += g * norm
            vectors[j, d] += f
    tokens_D = np.array([sum(t.domain == d for t in tokens) for d in range(domains)], dtype=float)
    return BlockSums(name, experts, tokens_D, values, by_slice, vectors @ vectors.transpose(0, 2, 1))


def random_sums(seed: int, *, domains=("code", "chat"), blocks=3, experts=8, top_k=2, count=200) -> Sums:
    """Sums of several blocks over random tokens."""
    made = [
        add_up(
            random_tokens(seed * 100 + b, count, domains=len(domains), experts=experts, top_k=top_k),
            name=f"model.layers.{b}",
            domains=len(domains),
            experts=experts,
        )
        for b in range(blocks)
    ]
    return Sums("routed", tuple(domains), tuple(made))
