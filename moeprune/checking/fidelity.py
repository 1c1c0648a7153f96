"""How far a model has moved from its parent, token by token, on text that neither chose.

With p the parent's and q the judged model's distribution of the next token x:
    loss = -log q(x)        KL = sum_v p(v) log(p(v) / q(v))        same top token: argmax p = argmax q
Sums are kept per sample; domains count alike in the overall numbers, whatever their size.

Legend: N judged positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moeprune.checking import statistics
from moeprune.checking.samples import Batch, Sample
from moeprune.checking.subject import Head

CHUNK_NUMBERS = 32_000_000  # logits held at once per model: 128 MB in float32
LEAST = 1e-9  # a divergence that nothing is divided by
NOT_A_NUMBER = 1e9  # JSON knows neither infinity nor NaN
MEASURES = ("parent_loss", "loss", "kl", "same_top")


@dataclass(frozen=True)
class Tokens:
    """The measures of every judged token, with the sample it belongs to."""

    sample_N: NDArray[np.int64]
    values_N: dict[str, NDArray[np.float64]]


def compare(parent: Head, child: Head, batches: Sequence[Batch], states: tuple[Any, Any], vocabulary: int) -> Tokens:
    """Measures at every judged token; `states` are the final hidden states of parent and child for the batches."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in MEASURES}
    owners: list[torch.Tensor] = []
    size = max(1, CHUNK_NUMBERS // vocabulary)
    for batch, parent_ND, child_ND in zip(batches, *states, strict=True):
        target_N, owner_N = targets(batch)
        owners.append(owner_N)
        for start in range(0, len(target_N), size):
            part = slice(start, start + size)
            measured = measure(parent(parent_ND[part]), child(child_ND[part]), target_N[part])
            for name, value_N in measured.items():
                parts[name].append(value_N.cpu())
    values = {name: torch.cat(parts[name]).double().numpy() for name in MEASURES}
    return Tokens(torch.cat(owners).numpy(), values)


def targets(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The token that follows each judged position, and the sample it belongs to."""
    next_BT = torch.roll(batch.ids_BT, -1, dims=1)
    owner_BT = torch.tensor(batch.sample_B)[:, None].expand_as(next_BT)
    return next_BT[batch.scored_BT], owner_BT[batch.scored_BT]


def measure(parent_NV: torch.Tensor, child_NV: torch.Tensor, target_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """The four measures from two models' logits; a padded vocabulary is cut to the common part."""
    width = min(parent_NV.shape[-1], child_NV.shape[-1])
    p_NV = torch.log_softmax(parent_NV[:, :width].float(), dim=-1)
    q_NV = torch.log_softmax(child_NV[:, :width].float().to(p_NV.device), dim=-1)
    target_N1 = target_N.to(p_NV.device)[:, None]
    return {
        "parent_loss": -p_NV.gather(1, target_N1)[:, 0],
        "loss": -q_NV.gather(1, target_N1)[:, 0],
        "kl": (p_NV.exp() * (p_NV - q_NV)).sum(-1).clamp(min=0),
        "same_top": (p_NV.argmax(-1) == q_NV.argmax(-1)).float(),
    }


def summary(tokens: Tokens, samples: Sequence[Sample], seed: int) -> dict[str, Any]:
    """Everything a reader needs: overall (every domain counts alike) and per domain, with 95% intervals."""
    domain_N = np.array([samples[index].domain for index in tokens.sample_N])
    names = list(dict.fromkeys(sample.domain for sample in samples))
    rows = {name: _select(tokens, domain_N == name) for name in names}
    rows = {name: row for name, row in rows.items() if len(row.sample_N)}
    return {
        "overall": _row(rows, seed),
        "domains": {name: _row({name: row}, seed) for name, row in rows.items()},
    }


def _select(tokens: Tokens, mask_N: NDArray[np.bool_]) -> Tokens:
    return Tokens(tokens.sample_N[mask_N], {name: value_N[mask_N] for name, value_N in tokens.values_N.items()})


def _row(rows: dict[str, Tokens], seed: int) -> dict[str, Any]:
    kl_N = np.concatenate([row.values_N["kl"] for row in rows.values()])
    entry: dict[str, Any] = {"tokens": len(kl_N), "samples": sum(len(np.unique(r.sample_N)) for r in rows.values())}
    for name in MEASURES:
        mean, interval = statistics.macro_interval({d: _per_sample(row, name) for d, row in rows.items()}, seed)
        entry[name] = _finite(mean)
        entry[f"{name}_interval"] = [_finite(bound) for bound in interval]
    entry["loss_increase"] = _finite(entry["loss"] - entry["parent_loss"])
    worse = {domain: _loss_increase(row) for domain, row in rows.items()}
    entry["loss_increase_interval"] = [_finite(bound) for bound in statistics.macro_interval(worse, seed)[1]]
    entry["perplexity"] = _finite(math.exp(min(entry["loss"], 700)))
    entry["parent_perplexity"] = _finite(math.exp(min(entry["parent_loss"], 700)))
    entry["kl_median"], entry["kl_p95"] = (_finite(q) for q in np.quantile(kl_N, (0.5, 0.95)))
    return entry


def _per_sample(row: Tokens, name: str) -> tuple[list[float], list[float]]:
    _, place_N = np.unique(row.sample_N, return_inverse=True)
    return np.bincount(place_N, row.values_N[name]).tolist(), np.bincount(place_N).astype(float).tolist()


def _loss_increase(row: Tokens) -> tuple[list[float], list[float]]:
    (after, weights), (before, _) = _per_sample(row, "loss"), _per_sample(row, "parent_loss")
    return [a - b for a, b in zip(after, before, strict=True)], weights


def share_of(own: Tokens, others: Sequence[Tokens], samples: Sequence[Sample], seed: int) -> dict[str, Any]:
    """The KL divergence of one model as a share of the mean of the others', each on the same draws of samples."""
    point, draws_R = statistics.macro_draws(_kl_by_domain(own, samples), seed)
    pairs = [statistics.macro_draws(_kl_by_domain(other, samples), seed) for other in others]
    base, base_R = float(np.mean([p for p, _ in pairs])), np.mean([draws for _, draws in pairs], axis=0)
    interval = statistics.interval_of(draws_R / np.maximum(base_R, LEAST))
    return {"share": _finite(point / max(base, LEAST)), "interval": [_finite(bound) for bound in interval]}


def _kl_by_domain(tokens: Tokens, samples: Sequence[Sample]) -> statistics.Sums:
    domain_N = np.array([samples[index].domain for index in tokens.sample_N])
    return {name: _per_sample(_select(tokens, domain_N == name), "kl") for name in dict.fromkeys(domain_N.tolist())}


def _finite(value: float) -> float:
    """A value that JSON can hold."""
    return float(value) if math.isfinite(value) else NOT_A_NUMBER
