"""What each stage will take of a machine, worked out from a model's headers (or from what is predicted of them).

Sizes follow from the bytes on disk. Memory repeats what the stages themselves demand before they begin. Times are work
divided by rates (see rates.py); starting a step, importing torch above all, takes some seconds more.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moeprune.checkpoint.families import Layout
from moeprune.checkpoint.folder import Checkpoint
from moeprune.errors import UsageError
from moeprune.planning import engines
from moeprune.planning.decision import choose_count
from moeprune.planning.plan import Limits
from moeprune.planning.rates import Rates
from moeprune.settings import Settings

TORCH_MEMORY = 700_000_000  # bytes; the interpreter with torch and transformers
JUDGED_PASSES = 5  # the parent as it is, with the plan masked, with two drawn plans masked; and the pruned model
JUDGE_MARGIN = 1.3  # of two loaded models: activations, caches and logits beside the weights
BATCH_WIDTHS = 12  # vectors of the hidden width that a token of the running batch takes; rough, measured on one model


@dataclass(frozen=True, slots=True)
class Weights:
    """The bytes of a model, by what a cut and a stream do with them."""

    total_bytes: int
    each_bytes: int  # one expert of every block together
    layer_bytes: int  # the largest layer
    outside_bytes: int  # what belongs to no layer with experts
    blocks: int
    experts: int
    top_k: int
    tensors: int
    hidden: int
    plain_bits: float  # of a weight that is not quantized
    expert_bits: float  # of an expert's weight, scales included
    compute_bytes: float  # of a weight while it computes

    def after_bytes(self, kept: int) -> int:
        """The size with this many experts in each block."""
        return self.total_bytes - (self.experts - kept) * self.each_bytes

    @property
    def active(self) -> float:
        """Weights that take part in one token."""
        always = (self.total_bytes - self.experts * self.each_bytes) * 8 / self.plain_bits
        return always + self.top_k * self.each_bytes * 8 / self.expert_bits

    @property
    def scored(self) -> float:
        """Those of them that scoring multiplies with: embeddings are looked up, and the head is not run."""
        return max(self.active - self.outside_bytes * 8 / self.plain_bits, 1.0)

    @property
    def quantized(self) -> bool:
        """Whether a layer has to be dequantized."""
        return self.expert_bits < self.plain_bits

    @property
    def layer_in_memory(self) -> int:
        """The largest layer as it computes."""
        experts = self.each_bytes * self.experts / max(self.blocks, 1)
        weights = max(self.layer_bytes - experts, 0) * 8 / self.plain_bits + experts * 8 / self.expert_bits
        return int(weights * self.compute_bytes)

    @property
    def outside_in_memory(self) -> int:
        """Embeddings, head and towers as they compute."""
        return int(self.outside_bytes * 8 / self.plain_bits * self.compute_bytes)


@dataclass(frozen=True, slots=True)
class Need:
    """What one stage takes; a time of a stage whose tokens are not counted yet is an upper bound."""

    memory_bytes: int
    disk_bytes: int
    time_s: float
    gpu_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Bits:
    """How wide weights are: on disk outside of experts, on disk within them (bits), and in memory (bytes)."""

    plain: float
    expert: float
    compute_bytes: float


def weigh(checkpoint: Checkpoint, layout: Layout, *, each_bytes: int, hidden: int, bits: Bits) -> Weights:
    """Sort the bytes of a checkpoint by layer."""
    stacks = {block.name[: match.start()] for block in layout.blocks if (match := re.search(r"\d+", block.name))}
    layers: Counter[str] = Counter()
    numbered = re.compile(r"(.*?)\d+(?=\.)")
    for tensor in checkpoint.tensors.values():
        match = numbered.match(tensor.name)
        layers[match[0] if match and match[1] in stacks else ""] += tensor.nbytes
    outside = layers.pop("", 0)
    return Weights(
        total_bytes=checkpoint.total_bytes,
        each_bytes=each_bytes,
        layer_bytes=max(layers.values(), default=0),
        outside_bytes=outside,
        blocks=len(layout.blocks),
        experts=layout.experts,
        top_k=layout.top_k,
        tensors=len(checkpoint.tensors),
        hidden=hidden,
        plain_bits=bits.plain,
        expert_bits=bits.expert,
        compute_bytes=bits.compute_bytes,
    )


@dataclass(frozen=True, slots=True)
class Room:
    """What a stream may take beside its weights."""

    hidden_memory: int
    batch_tokens: int


def room_of(settings: Settings) -> Room:
    """The room that the settings give."""
    return Room(settings.hidden_memory, settings.batch_size * settings.max_seq_len)


def scoring(weights: Weights, tokens: int, room: Room, rates: Rates) -> Need:
    """Stage 1: one layer computes, the next one is read, the hidden states of all tokens wait.

    On a CPU a layer lies in memory as stored and as it computes (twice while experts are stacked from dequantized
    ones). A saved state holds the hidden states once more, and the one before it until the new one is whole.
    """
    state = weights.hidden * weights.compute_bytes
    waiting, running = int(tokens * state), int(BATCH_WIDTHS * min(tokens, room.batch_tokens) * state)
    layer = weights.layer_in_memory * (2 if weights.quantized else 1)
    held = 2 * weights.layer_bytes + layer + weights.outside_in_memory + running
    return Need(
        memory_bytes=TORCH_MEMORY + held + min(waiting, room.hidden_memory),
        disk_bytes=max(0, waiting - room.hidden_memory) + 2 * waiting,
        time_s=2 * weights.scored * tokens / rates.compute.value + weights.total_bytes / rates.read.value,
        gpu_memory_bytes=weights.outside_in_memory + 2 * weights.layer_in_memory + running,
    )


def cutting(weights: Weights, kept: int, rates: Rates, *, base_bytes: int, bytes_per_tensor: int) -> Need:
    """Stage 2: buffers and the names of all tensors, and the result on the disk.

    The proof reads what was just read and written, which the system still has in memory.
    """
    after = weights.after_bytes(kept)
    memory = base_bytes + bytes_per_tensor * weights.tensors
    return Need(memory, after, after / rates.read.value + after / rates.write.value)


def judging(weights: Weights, kept: int, tokens: int, room: Room, rates: Rates) -> tuple[Need, Need]:
    """Stage 3 with both models loaded, and streamed where they do not fit. The time leaves generation out.

    Streamed, the last hidden states of the parent wait beside those of the pruned model.
    """
    both = weights.total_bytes + weights.after_bytes(kept)
    time_s = JUDGED_PASSES * 2 * weights.active * tokens / rates.compute.value + both / rates.read.value
    streamed = scoring(weights, 2 * tokens, room, rates)
    spilled = max(0, int(2 * tokens * weights.hidden * weights.compute_bytes) - room.hidden_memory)
    loaded = Need(TORCH_MEMORY + int(JUDGE_MARGIN * both), 0, time_s, int(JUDGE_MARGIN * both))
    return loaded, replace(streamed, disk_bytes=spilled, time_s=time_s)


def engine_verdicts(settings: Settings, limits: Limits, count: int, model_type: str) -> dict[str, list[dict[str, str]]]:
    """What each engine has against the count; hardest first; nothing is a yes without reservation."""
    case = engines.Case(count, limits, model_type, settings.expert_parallel, settings.tensor_parallel)
    named = engines.parse_engines(settings.engine) or tuple(engines.ENGINES)
    return {name: [asdict(objection) for objection in engines.objections(case, [name])] for name in named}


@dataclass(frozen=True, slots=True)
class Work:
    """The tokens that the settings ask for at most, and what the cut takes beside its buffers."""

    judged_tokens: int
    base_bytes: int
    bytes_per_tensor: int


def variant(settings: Settings, layout: Layout, weights: Weights, rates: Rates, work: Work) -> dict[str, Any]:
    """One cut: its size, who can serve it, and what stages 2 and 3 take; or why it is not possible."""
    limits = Limits.of(layout)
    fixed = weights.after_bytes(0)
    asked = {name: getattr(settings, name) for name in ("prune_ratio", "keep", "target_size")}
    try:
        choice = choose_count(
            settings, limits, layout.model_type, fixed_bytes=fixed, bytes_per_expert=weights.each_bytes
        )
    except UsageError as error:
        return {"asked": asked, "kept": None, "why_not": str(error)}
    cut = cutting(weights, choice.count, rates, base_bytes=work.base_bytes, bytes_per_tensor=work.bytes_per_tensor)
    loaded, streamed = judging(weights, choice.count, work.judged_tokens, room_of(settings), rates)
    return {
        "asked": asked,
        "kept": choice.count,
        "notes": list(choice.notes),
        "after_bytes": weights.after_bytes(choice.count),
        "engines": engine_verdicts(settings, limits, choice.count, layout.model_type),
        "prune": asdict(cut),
        "test": {"loaded": asdict(loaded), "streamed": asdict(streamed)},
    }


def wishes(settings: Settings, ratios: Sequence[float]) -> list[Settings]:
    """The settings of each cut to forecast: every ratio, and first what was asked for, where that is another."""
    by_ratio = [
        replace(settings, prune_ratio=share, keep=0, target_size=0, origin={**settings.origin, "prune_ratio": "--"})
        for share in ratios
    ]
    if settings.keep or settings.target_size or settings.prune_ratio not in ratios:
        return [settings, *by_ratio]
    return by_ratio
