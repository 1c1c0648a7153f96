"""What the experts of one block did, as float64 sums.

Legend of the array suffixes: T tokens, S routed slots (one expert for one token) sorted by expert, E experts, H hidden,
D domains, G buckets: D * SLICES that count, D for the special tokens of each domain where these are left out, and a
last one for padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from moeprune.arrays import Array
from moeprune.metadata import BlockSums
from moeprune.scoring.calibration.batching import SLICES

WEIGHTS = ("count", "gate_sum", "gate_sq_sum")  # known from the router alone
NORMS = ("norm_sum", "norm_sq_sum", "gate_norm_sum", "gate_norm_sq_sum")
PIECE = 2**19  # elements that are widened at once: 2 MB, which stay in the cache
SLICED = ("count", "gate_norm_sum", "full_sum", "router_sum")


def bucket_sums(bucket_S: torch.Tensor, value_S: torch.Tensor, buckets: int) -> torch.Tensor:
    """The sum of the values of each bucket, in float64 and in a fixed order: a second run gives the same bits."""
    value_S = value_S.double()
    if value_S.device.type == "cpu":
        return torch.bincount(bucket_S, weights=value_S, minlength=buckets)
    empty = torch.zeros(buckets, dtype=torch.float64, device=value_S.device)
    return empty.index_put_((bucket_S,), value_S, accumulate=True)  # sorts first; index_add_ would race


def row_sizes(y_SH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The Euclidean norm of each row and its largest absolute component, both computed in float32.

    On a CPU, rows of a half type are widened piece by piece within the cache, which is seven times faster than to let
    the norm convert each element.
    """
    if y_SH.dtype == torch.float32 or y_SH.device.type != "cpu":
        norm_S = torch.linalg.vector_norm(y_SH, dim=-1, dtype=torch.float32)
        # Two plain reductions; an infinity norm is slower.
        return norm_S, torch.maximum(y_SH.amax(-1), -y_SH.amin(-1)).float()
    norm_S, largest_S = torch.empty(len(y_SH)), torch.empty(len(y_SH))
    step = max(1, PIECE // y_SH.shape[-1])
    piece_SH = torch.empty(min(step, len(y_SH)), y_SH.shape[-1])
    for start in range(0, len(y_SH), step):
        rows = slice(start, start + step)
        part_SH = piece_SH[: len(y_SH[rows])]
        part_SH.copy_(y_SH[rows])
        torch.linalg.vector_norm(part_SH, dim=-1, out=norm_S[rows])
        torch.maximum(part_SH.amax(-1), -part_SH.amin(-1), out=largest_S[rows])
    return norm_S, largest_S


class Tally:
    """The sums of one block while the batches pass it."""

    def __init__(self, experts: int, domains: int, device: torch.device) -> None:
        self.experts, self.domains, self.device = experts, domains, device
        self.counted = domains * SLICES
        self.buckets = self.counted + domains + 1
        self.sums: dict[str, torch.Tensor] = {}  # statistic -> [E * G]
        self.tokens_G = self._zeros(self.buckets)
        self.vector_EDH: torch.Tensor | None = (
            None  # sums of output vectors; the extra domain is for what does not count
        )

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def add(self, statistic: str, expert_S: torch.Tensor, bucket_S: torch.Tensor, value_S: torch.Tensor) -> None:
        """A sum of one value a slot."""
        self._add(statistic, expert_S * self.buckets + bucket_S, value_S)

    def _add(self, statistic: str, key_S: torch.Tensor, value_S: torch.Tensor) -> None:
        size = self.experts * self.buckets
        if statistic not in self.sums:
            self.sums[statistic] = self._zeros(size)
        self.sums[statistic] += bucket_sums(key_S, value_S, size)

    def add_tokens(self, bucket_T: torch.Tensor) -> None:
        """Tokens that pass the block, whichever experts they go to."""
        self.tokens_G += bucket_sums(bucket_T, torch.ones_like(bucket_T), self.buckets)

    def add_gates(self, expert_S: torch.Tensor, bucket_S: torch.Tensor, gate_S: torch.Tensor) -> None:
        """What the router alone decides."""
        key_S, gate_S = expert_S * self.buckets + bucket_S, gate_S.double()
        for name, value_S in zip(WEIGHTS, (torch.ones_like(gate_S), gate_S, gate_S.square()), strict=True):
            self._add(name, key_S, value_S)

    def add_outputs(
        self, expert_S: torch.Tensor, bucket_S: torch.Tensor, gate_S: torch.Tensor, y_SH: torch.Tensor
    ) -> None:
        """The experts' outputs before the gate multiplies them."""
        key_S, gate_S = expert_S * self.buckets + bucket_S, gate_S.double()
        norm_S, largest_S = row_sizes(y_SH)
        norm_S = norm_S.double()
        product_S = gate_S * norm_S
        values = (norm_S, norm_S.square(), product_S, product_S.square())
        for name, value_S in zip(NORMS, values, strict=True):
            self._add(name, key_S, value_S)
        if "max_abs" not in self.sums:
            self.sums["max_abs"] = self._zeros(self.experts * self.buckets)
        self.sums["max_abs"].scatter_reduce_(0, key_S, largest_S.double(), "amax")
        self._add_vectors(expert_S, bucket_S, y_SH)

    def _add_vectors(self, expert_S: torch.Tensor, bucket_S: torch.Tensor, y_SH: torch.Tensor) -> None:
        """Sum the rows of each expert and domain. A bag of rows is far faster than index_add_, and never races."""
        domains = self.domains + 1
        key_S = expert_S * domains + (bucket_S // SLICES).clamp_max(self.domains)
        sorted_S, order_S = torch.sort(key_S, stable=True)
        starts = torch.searchsorted(sorted_S, torch.arange(self.experts * domains, device=self.device))
        if y_SH.dtype == torch.float16:  # whose sums would end at 65504
            y_SH = y_SH.float()
        sums = torch.nn.functional.embedding_bag(order_S, y_SH, starts, mode="sum")
        if self.vector_EDH is None:
            self.vector_EDH = self._zeros(self.experts, domains, y_SH.shape[-1])
        self.vector_EDH += sums.view_as(self.vector_EDH)

    def add_all(self, statistic: str, weight_TE: torch.Tensor, bucket_T: torch.Tensor) -> None:
        """A sum over all tokens, routed or not, of a weight that each token has for each expert."""
        expert_E = torch.arange(self.experts, device=self.device)
        key_TE = expert_E * self.buckets + bucket_T.unsqueeze(-1)
        self._add(statistic, key_TE.reshape(-1), weight_TE.reshape(-1))

    def result(self, block: str) -> BlockSums:
        """The block's sums as the metadata keeps them."""
        shape = (self.experts, self.buckets)
        arrays = {name: value.view(shape).cpu().numpy().T for name, value in self.sums.items()}
        by_slice = {n: array[: self.counted].reshape(self.domains, SLICES, -1) for n, array in arrays.items()}
        special = {name: array[self.counted : -1] for name, array in arrays.items()}
        values = {name: array.sum(1) for name, array in by_slice.items()}
        if "max_abs" in values:
            values["max_abs"] = np.maximum(by_slice["max_abs"].max(1), special["max_abs"])
            values["special_sum"] = np.ascontiguousarray(special["gate_norm_sum"])
        return BlockSums(
            block=block,
            experts=self.experts,
            tokens_D=_by_domain(self.tokens_G.cpu().numpy()[: self.counted]),
            values=values,
            slices={name: np.ascontiguousarray(by_slice[name]) for name in SLICED if name in by_slice},
            gram_EDD=self._gram(),
        )

    def _gram(self) -> Array | None:
        """Inner products between the domains' sums of vectors."""
        if self.vector_EDH is None:
            return None
        v_EDH = self.vector_EDH[:, : self.domains]
        return (v_EDH @ v_EDH.transpose(1, 2)).cpu().numpy()


def _by_domain(tokens_G: Array) -> Array:
    tokens_D: Array = tokens_G.reshape(-1, SLICES).sum(1)
    return tokens_D


def sums_to_tensors(sums: BlockSums) -> dict[str, Any]:
    """A block's sums as nested dictionaries of tensors, for the saved state."""
    return {
        "experts": sums.experts,
        "tokens_D": torch.from_numpy(sums.tokens_D),
        "values": {name: torch.from_numpy(array) for name, array in sums.values.items()},
        "slices": {name: torch.from_numpy(array) for name, array in sums.slices.items()},
        "gram_EDD": None if sums.gram_EDD is None else torch.from_numpy(sums.gram_EDD),
    }


def sums_from_tensors(block: str, saved: Mapping[str, Any]) -> BlockSums:
    """The inverse of `sums_to_tensors`."""
    gram = saved["gram_EDD"]
    return BlockSums(
        block=block,
        experts=saved["experts"],
        tokens_D=saved["tokens_D"].numpy(),
        values={name: tensor.numpy() for name, tensor in saved["values"].items()},
        slices={name: tensor.numpy() for name, tensor in saved["slices"].items()},
        gram_EDD=None if gram is None else gram.numpy(),
    )
