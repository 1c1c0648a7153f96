"""Watch what each routed expert does while the model runs: REAP's sums, from outputs that the forward computes anyway.

The model routes; the observer only looks. It sees the indices and gate values that the model itself multiplies with,
whatever its router does (softmax, sigmoid, bias, groups, scaling), and the experts' outputs before that product. How
it gets at them in a given family of models is in adapters.py.

Modes: `routed` sums over the tokens routed to an expert. `full` adds, for every expert on every token, the router's
probability times the output norm: E/k times the experts' work, in chunks of bounded memory. `router` looks at no
output: the router's probability times the norm of the layer's input. The probability is the router's score of an
expert divided by that token's scores of all experts: for a softmax router the softmax, for a sigmoid router the
normalised sigmoid.

Legend of the array suffixes: B rows of a batch, T tokens, K experts per token, S = T * K slots sorted by expert, E
experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moeprune.checkpoint.families import Block
from moeprune.errors import InputError, MachineError
from moeprune.metadata import BlockSums, Sums
from moeprune.scoring.calibration.batching import NOT_COUNTED, SLICES, SPECIAL, Batch
from moeprune.scoring.streaming import LayerStream
from moeprune.scoring.tally import Tally, row_sizes, sums_from_tensors, sums_to_tensors

FULL_BYTES = 256_000_000  # for the outputs of all experts on a chunk of tokens, in mode full
# Scores from the output of a router. The first that explains the gate values is taken.
SCORING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt of softplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
    "identity": lambda scores: scores.clamp_min(0),
}
RunAll = Callable[[torch.Tensor, slice], Any]  # runs all experts on these tokens, which are those rows of the batch


@dataclass(frozen=True, slots=True)
class Slots:
    """Which expert got which token with which gate value, sorted by expert."""

    expert_S: torch.Tensor
    token_S: torch.Tensor
    bucket_S: torch.Tensor
    gate_S: torch.Tensor


@dataclass
class Site:
    """One block's experts in the model, and what the current batch sent there."""

    block: Block
    path: str  # of the module that runs the experts
    layer: str
    factor: float = 1.0  # what the block multiplies with behind the experts
    rows: torch.Tensor | None = None  # which tokens of the batch come here; None: all
    slots: Slots | None = None
    scores_TE: torch.Tensor | None = None  # what the router put out, in modes full and router
    scoring: str = ""  # how scores become probabilities, found on the first batch
    all_tokens: torch.Tensor | None = None  # mode full: buckets of the tokens that every expert is being run on,
    probability_TE: torch.Tensor | None = None  # and their probabilities


@dataclass
class Observer:
    """Collects the sums of every block; a watcher of the stream."""

    stream: LayerStream
    batches: Sequence[Batch]
    domains: tuple[str, ...]
    mode: str = "routed"
    done: dict[str, BlockSums] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tallies: dict[str, Tally] = {}
        self._bucket_T = torch.empty(0, dtype=torch.int64)

    def batch_begins(self, batch: int) -> None:
        """Remember to which domain and slice each token of this batch belongs."""
        self._bucket_T = self._buckets(self.batches[batch])

    def _buckets(self, batch: Batch) -> torch.Tensor:
        domain_BT, slice_BT = batch.domain_BT.long(), batch.slice_BT.long()
        special = len(self.domains) * SLICES  # the first bucket behind those that count; the last is for padding
        special_BT = torch.where(domain_BT == NOT_COUNTED, special + len(self.domains), special + SPECIAL - domain_BT)
        bucket_BT = torch.where(domain_BT < 0, special_BT, domain_BT * SLICES + slice_BT)
        return bucket_BT.reshape(-1).to(self.stream.device)

    def layer_begins(self, layer: str) -> None:
        """Start empty sums for the blocks of this layer."""
        for site in self.sites:
            if site.layer == layer:
                if site.block.name in self.done:  # summing anew would forget what went before
                    name = type(self.stream.model).__name__
                    raise InputError(f"{name} comes to {layer} a second time; it cannot be scored layer by layer")
                self._tallies[site.path] = Tally(site.block.experts, len(self.domains), self.stream.device)

    def layer_ends(self, layer: str) -> None:
        """The sums of this layer's blocks are complete."""
        for site in self.sites:
            if site.layer == layer:
                tally = self._tallies.pop(site.path)
                if tally.sums:  # a block that no token reached has no scores
                    self.done[site.block.name] = _finite(tally.result(site.block.name), self.stream.model.dtype)

    def begin(
        self, site: Site, expert_S: torch.Tensor, token_S: torch.Tensor, gate_S: torch.Tensor, x_TH: torch.Tensor
    ) -> None:
        """A batch's tokens reach the experts: the slots in the order in which the outputs will come, by expert."""
        if site.all_tokens is not None and site.probability_TE is not None:  # the probability stands in for the gate
            site.slots = Slots(expert_S, token_S, site.all_tokens[token_S], site.probability_TE[token_S, expert_S])
            return
        bucket_T = self._buckets_of(site)
        if len(x_TH) != len(bucket_T):
            raise InputError(
                f"layer {site.block.name} gets {len(x_TH):,} tokens of a batch of {len(bucket_T):,}; this kind of "
                "model needs an adapter of its own in moeprune/scoring/adapters.py"
            )
        tally = self._tallies[site.path]
        # An expert times nothing is none that the router chose: so a token skips them all in Zaya.
        bucket_S = torch.where(gate_S == 0, tally.buckets - 1, bucket_T[token_S])
        site.slots = Slots(expert_S, token_S, bucket_S, gate_S.double() * site.factor)
        tally.add_tokens(bucket_T)
        tally.add_gates(site.slots.expert_S, site.slots.bucket_S, site.slots.gate_S)
        if self.mode == "router":
            norm_T = torch.linalg.vector_norm(x_TH, dim=-1, dtype=torch.float32)
            tally.add_all("router_sum", self._probabilities(site) * norm_T.double().unsqueeze(-1), bucket_T)

    def _buckets_of(self, site: Site) -> torch.Tensor:
        return self._bucket_T if site.rows is None else self._bucket_T[site.rows]

    def router_gave(self, site: Site, scores: torch.Tensor) -> None:
        """A module of the router has an output; the last one that has a column for every expert is the right one."""
        if scores.shape[-1] >= site.block.experts and scores.numel() // scores.shape[-1] == len(self._buckets_of(site)):
            site.scores_TE = scores.reshape(-1, scores.shape[-1])

    def _probabilities(self, site: Site) -> torch.Tensor:
        """Each token's router probabilities, float64, over all that the router can choose."""
        assert site.slots is not None
        if site.scores_TE is None:
            raise InputError(f"{site.path}: found no output of its router; use --scoring-mode routed")
        if not site.scoring:
            site.scoring = scoring_function(site.scores_TE, site.slots)
        score_TE = SCORING[site.scoring](site.scores_TE.double())
        return (score_TE / score_TE.sum(-1, keepdim=True))[:, : site.block.experts]

    def every_expert(self, site: Site, module: torch.nn.Module, x_TH: torch.Tensor, run: RunAll, step: int = 0) -> None:
        """Mode full: run all experts on all tokens, in chunks (or `step` tokens at a time), and add p |f| for each."""
        if self.mode != "full" or site.all_tokens is not None:
            return
        bucket_T, probability_TE = self._buckets_of(site), self._probabilities(site)
        width = max(x_TH.shape[-1], _inner_size(module))
        chunk = step or max(1, FULL_BYTES // (2 * site.block.experts * width * x_TH.element_size()))
        for start in range(0, len(x_TH), chunk):
            rows = slice(start, start + chunk)
            site.all_tokens, site.probability_TE = bucket_T[rows], probability_TE[rows]
            run(x_TH[rows], rows)
        site.all_tokens = site.probability_TE = None

    def outputs(self, site: Site, y_SH: torch.Tensor) -> torch.Tensor:
        """The experts' outputs, one row a slot, before the gate multiplies them; they are handed back as they are."""
        assert site.slots is not None
        slots, tally = site.slots, self._tallies[site.path]
        if site.all_tokens is not None:
            norm_S, _ = row_sizes(y_SH)
            tally.add("full_sum", slots.expert_S, slots.bucket_S, slots.gate_S * norm_S.double())
        elif self.mode != "router":
            tally.add_outputs(slots.expert_S, slots.bucket_S, slots.gate_S, y_SH)
        return y_SH

    def state(self) -> dict[str, Any]:
        """The sums of the blocks that are complete, as tensors."""
        return {name: sums_to_tensors(sums) for name, sums in self.done.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.done = {name: sums_from_tensors(name, saved) for name, saved in state.items()}

    def result(self) -> Sums:
        """Everything, in the order of the blocks."""
        return Sums(
            self.mode,
            self.domains,
            tuple(self.done[site.block.name] for site in self.sites if site.block.name in self.done),
        )


def _finite(sums: BlockSums, dtype: torch.dtype) -> BlockSums:
    """Refuse sums that are not numbers, at the first layer that has them."""
    arrays = [*sums.values.values(), *([] if sums.gram_EDD is None else [sums.gram_EDD])]
    if all(bool(torch.isfinite(torch.from_numpy(array.copy())).all()) for array in arrays):
        return sums
    raise MachineError(
        f"the outputs of layer {sums.block} are not finite in {dtype}; compute in a wider type: REAP_DTYPE=bfloat16"
    )


def scoring_function(scores_TE: torch.Tensor, slots: Slots) -> str:
    """How this router turns its output into scores: the function that its gate values are proportional to.

    A router may put out logits or scores. Among the experts chosen for a token, gate / score is the same for the right
    function, renormalised and scaled or not. Of one expert for each token the gates of all tokens are compared.
    """
    chosen_S = slots.gate_S != 0
    token_S, expert_S, gate_S = slots.token_S[chosen_S], slots.expert_S[chosen_S], slots.gate_S[chosen_S]
    alone = len(token_S.unique()) == len(token_S)
    if bool((scores_TE >= 0).all()) and torch.allclose(scores_TE.double().sum(-1), torch.ones(()).double(), atol=1e-2):
        return "identity"
    if alone and bool((gate_S == gate_S[:1]).all()):  # they tell nothing
        return "softmax"
    group_S = torch.zeros_like(token_S) if alone else token_S
    spreads = {}
    for name, function in SCORING.items():
        ratio_S = gate_S / function(scores_TE.double())[token_S, expert_S].clamp_min(1e-30)
        top_T = torch.zeros(len(scores_TE), dtype=torch.float64, device=ratio_S.device)
        sum_T, square_T, count_T = top_T, top_T.clone(), top_T.clone()
        sum_T.index_add_(0, group_S, ratio_S)
        square_T.index_add_(0, group_S, ratio_S.square())
        count_T.index_add_(0, group_S, torch.ones_like(ratio_S))
        mean_T = sum_T / count_T.clamp_min(1)
        variance_T = (square_T / count_T.clamp_min(1) - mean_T.square()).clamp_min(0)
        spreads[name] = float(variance_T.sum() / mean_T.square().sum())
    return min(spreads, key=lambda name: (spreads[name] > 1e-6, spreads[name] if spreads[name] > 1e-6 else 0))


def _inner_size(module: torch.nn.Module) -> int:
    """The widest inner size of the experts, for the memory that a chunk takes."""
    return max((size for weight in module.parameters() for size in weight.shape[1:]), default=1)
