"""Is the pruned model exactly its parent without the dropped experts? If not: which layer, which expert, and how.

Both run over the same held-out tokens, the parent with its dropped experts masked. The pruned model gets the parent's
input and output at every routed block, so that each layer is examined by itself and one damage does not hide the next.

Legend: T tokens, E experts of the parent, C experts of the child, K experts per token, H hidden.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from moeprune.checking import masking
from moeprune.checking.masking import Keep, Routed
from moeprune.checking.samples import Batch
from moeprune.checking.subject import judged_states
from moeprune.errors import InputError

TOKENS = 20_000  # enough for each of 256 experts to be chosen hundreds of times
TOLERANCE = {torch.float32: 1e-3}  # relative to the norm of the parent's vector
TOLERANCE_16_BIT = 0.05
MASKED_KL = 0.005  # two ways to round the same sums in bfloat16 stay below a tenth of it
OFF_SHARE = 0.2  # a part is called different when it is so for this share of its tokens: a near tie may flip a few


@dataclass
class Trace:
    """What one routed block saw and made, for one batch."""

    input_TH: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    index_TK: torch.Tensor | None = None
    gate_TK: torch.Tensor | None = None
    routed_TH: torch.Tensor | None = None
    output: Any = None


@dataclass
class Tally:
    """Tokens seen and tokens that differ, by part of a layer: ("router", 3) -> [seen, off]."""

    parts: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))

    def add(self, part: str, number: int, seen: float, off: float) -> None:
        """Count tokens."""
        entry = self.parts[part, number]
        entry[0] += seen
        entry[1] += off

    def off(self, part: str) -> list[int]:
        """The numbers of the parts of this kind that differ."""
        return [number for (name, number), (seen, off) in self.parts.items() if name == part and off > OFF_SHARE * seen]


@dataclass(frozen=True)
class Pair:
    """One layer in both models, and the parent's ids of the child's experts."""

    parent: Routed
    child: Routed
    keep: tuple[int, ...]


def examine(parent: Any, child: Any, keep: Keep | None, batches: Sequence[Batch]) -> dict[str, Any]:
    """Status and reason, with the differences by layer."""
    try:
        pairs = paired(masking.routed_blocks(parent), masking.routed_blocks(child), keep)
        return _examined((parent, child), pairs, batches)
    except InputError as error:
        return {"status": "not tested", "reason": str(error)}


def _examined(models: tuple[Any, Any], pairs: Sequence[Pair], batches: Sequence[Batch]) -> dict[str, Any]:
    tallies = [Tally() for _ in pairs]
    ending, tokens = Tally(), 0
    for batch in batches:
        if tokens < TOKENS:
            tokens += int(batch.attended_BT.sum())
            _compare_batch(models, pairs, batch, tallies, ending)
    found = [sentence for pair, tally in zip(pairs, tallies, strict=True) for sentence in _sentences(pair, tally)]
    if not found and ending.off("states"):
        found.append("the final states differ although every MoE layer agrees: look at the last layers' other weights")
    if ending.off("logits"):
        found.append("the output head differs")
    return _finding(found, pairs, tallies, tokens)


def from_masked(row: Mapping[str, Any] | None, why_not: str) -> dict[str, Any]:
    """The same question for streamed models, from the whole output alone: it cannot say where."""
    if row is None:
        return {"status": "not tested", "reason": why_not or "the pruned folder does not say which experts stayed"}
    bad = row["kl"] > MASKED_KL
    text = f"KL divergence to the parent without the dropped experts {row['kl']:.2g} (limit {MASKED_KL:g})"
    text += "; judge in memory to see where" if bad else "; one damaged expert of many could hide below that"
    return {"status": "fail" if bad else "pass", "reason": text}


def _finding(found: list[str], pairs: Sequence[Pair], tallies: Sequence[Tally], tokens: int) -> dict[str, Any]:
    unseen = sum(
        len(pair.keep) - sum(name == "expert" for name, _ in tally.parts)
        for pair, tally in zip(pairs, tallies, strict=True)
    )
    good = f"{tokens:,} tokens through {len(pairs)} layers: computes what the parent does without the dropped experts"
    if unseen:
        good += f"; {unseen} kept experts were never chosen here and were not compared"
    reason = "; ".join(found[:6]) + (f"; and {len(found) - 6} more" if len(found) > 6 else "") if found else good
    return {"status": "fail" if found else "pass", "reason": reason, "warning": bool(unseen), "findings": found,
            "tokens": tokens, "never_chosen": unseen}  # fmt: skip


def paired(parents: Sequence[Routed], children: Sequence[Routed], keep: Keep | None) -> list[Pair]:
    """The layers of both models side by side; InputError when they cannot be told apart without a plan."""
    if [p.name for p in parents] != [c.name for c in children]:
        raise InputError("parent and pruned model do not have the same routed layers")
    chosen_of = masking.assigned(keep, parents) if keep else {}
    pairs = []
    for one, other in zip(parents, children, strict=True):
        stays = chosen_of.get(one)
        if stays is None and one.count != other.count:
            raise InputError("the pruned folder does not say which experts stayed")
        chosen = tuple(range(one.count)) if stays is None else tuple(stays)
        if len(chosen) != other.count or max(chosen, default=0) >= one.count:
            raise InputError(f"{one.name}: the plan keeps {len(chosen)} experts, the model has {other.count}")
        pairs.append(Pair(one, other, chosen))
    return pairs


def _compare_batch(
    models: tuple[Any, Any], pairs: Sequence[Pair], batch: Batch, tallies: Sequence[Tally], ending: Tally
) -> None:
    parent, child = models
    plan = {pair.parent.name: pair.keep for pair in pairs}
    with watched([pair.parent for pair in pairs]) as before, masking.keeping(plan):
        expected_ND = judged_states(parent, batch)
    with watched([pair.child for pair in pairs], instead=before) as after, masking.keeping(None):
        states_ND = judged_states(child, batch)
    attended_T = batch.attended_BT.flatten().bool()
    for pair, tally, one, other in zip(pairs, tallies, before, after, strict=True):
        _compare_layer(pair, tally, one, other, attended_T)
    ending.add("states", 0, len(states_ND), float(_off(expected_ND, states_ND).sum()))
    _compare_head(models, expected_ND[:256], ending)


def _compare_head(models: tuple[Any, Any], states_ND: torch.Tensor, ending: Tally) -> None:
    from moeprune.checking.subject import head_logits

    one_NV, other_NV = (head_logits(model, states_ND).cpu() for model in models)
    width = min(one_NV.shape[-1], other_NV.shape[-1])
    ending.add("logits", 0, len(one_NV), float(_off(one_NV[:, :width], other_NV[:, :width]).sum()))


@contextmanager
def watched(blocks: Sequence[Routed], instead: Sequence[Trace] | None = None) -> Iterator[list[Trace]]:
    """Traces of one forward. With `instead`, the blocks get these inputs and hand on these outputs."""
    traces = [Trace() for _ in blocks]
    place = {id(routed): trace for routed, trace in zip(blocks, traces, strict=True)}
    with ExitStack() as stack:
        for position, (routed, trace) in enumerate(zip(blocks, traces, strict=True)):
            given = instead[position] if instead else None
            for handle in _hooks(routed, trace, given):
                stack.callback(handle.remove)
        stack.enter_context(masking.maskable(blocks, lambda routed, x: setattr(place[id(routed)], "logits", x)))
        yield traces


def _hooks(routed: Routed, trace: Trace, given: Trace | None) -> list[Any]:
    def enter(_module: Any, args: Any) -> Any:
        trace.input_TH = args[0]
        return None if given is None else (_tensor(given.input_TH).to(args[0].device).view_as(args[0]), *args[1:])

    def leave(_module: Any, _args: Any, output: Any) -> Any:
        trace.output = output
        return None if given is None else given.output

    def experts_enter(_module: Any, args: Any) -> None:
        chosen = len(args) == 3 and torch.is_tensor(args[1]) and not args[1].is_floating_point()
        if chosen and args[1].shape == args[2].shape:  # not a table of zeros and ones
            trace.index_TK, trace.gate_TK = args[1], args[2]

    def experts_leave(_module: Any, _args: Any, output: Any) -> None:
        trace.routed_TH = output if torch.is_tensor(output) else output[0]

    return [
        routed.block.register_forward_pre_hook(enter),
        routed.block.register_forward_hook(leave),
        routed.experts.register_forward_pre_hook(experts_enter),
        routed.experts.register_forward_hook(experts_leave),
    ]


def _compare_layer(pair: Pair, tally: Tally, one: Trace, other: Trace, attended_T: torch.Tensor) -> None:
    if one.input_TH is None and other.input_TH is None:  # a tower that text does not pass
        return
    if one.logits is None or other.logits is None:
        raise InputError(f"the router of {pair.parent.name} was not seen at work; it cannot be examined")
    keep = torch.tensor(pair.keep)
    named_C = torch.cat([keep, torch.arange(pair.parent.count, pair.parent.count + len(keep))])  # zero experts behind

    def flat(x: Any) -> torch.Tensor:
        rows = _tensor(x).flatten(0, -2).cpu()
        if len(rows) != len(attended_T):
            raise InputError(f"{pair.parent.name} does not take its tokens in their order; it cannot be examined")
        return rows[attended_T]

    tally.add("before", 0, int(attended_T.sum()), float(_off(flat(one.input_TH), flat(other.input_TH)).sum()))
    logits_TE, logits_TC = flat(one.logits).float(), flat(other.logits).float()
    expected_TC = logits_TE[:, keep]
    logits_TC = logits_TC[:, : len(keep)]
    size = expected_TC.abs().mean() + 1e-12
    off_TC = ~((expected_TC - logits_TC).abs() <= _tolerance(flat(one.input_TH)) * size)
    for expert, off in enumerate(off_TC.sum(0).tolist()):
        tally.add("router", expert, len(off_TC), off)
    if _in_order(one, len(attended_T)) and _in_order(other, len(attended_T)):
        routed_TH, other_TH = flat(one.routed_TH), flat(other.routed_TH)
        index = (flat(one.index_TK), flat(named_C[_tensor(other.index_TK).cpu()]))
        _compare_experts(pair, tally, [*index, flat(one.gate_TK), flat(other.gate_TK), routed_TH, other_TH])
        same_T = ~_off(routed_TH, other_TH)
        off_T = _off(flat(one.output), flat(other.output)) & same_T
        tally.add("beside", 0, float(same_T.sum()), float(off_T.sum()))
    else:
        tally.add("routed", 0, len(off_TC), float(_off(flat(one.output), flat(other.output)).sum()))


def _in_order(trace: Trace, tokens: int) -> bool:
    """Whether the experts got their tokens in order, with the choice and the gates beside them."""
    tensors = (trace.index_TK, trace.gate_TK, trace.routed_TH)
    return all(t is not None and _tensor(t).flatten(0, -2).shape[0] == tokens for t in tensors)


def _compare_experts(pair: Pair, tally: Tally, tensors: list[torch.Tensor]) -> None:
    """Choices, gate values, and (where both agree) each expert's part in what differs."""
    index_TK, other_TK, gate_TK, other_gate_TK, routed_TH, other_TH = tensors
    same_T = (index_TK.sort(-1).values == other_TK.sort(-1).values).all(-1)
    tally.add("choice", 0, len(same_T), float((~same_T).sum()))
    one_TK, two_TK = (g.gather(-1, i.argsort(-1)) for g, i in ((gate_TK, index_TK), (other_gate_TK, other_TK)))
    gates_off_T = _off(one_TK, two_TK) & same_T
    tally.add("gates", 0, float(same_T.sum()), float(gates_off_T.sum()))
    fair_T = same_T & ~gates_off_T
    off_T = _off(routed_TH, other_TH)
    for expert, original in enumerate(pair.keep):
        chosen_T = (index_TK == original).any(-1) & fair_T
        if chosen_T.any():
            tally.add("expert", expert, float(chosen_T.sum()), float((off_T & chosen_T).sum()))


def _tensor(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value if torch.is_tensor(value) else value[0]
    return tensor if tensor.ndim > 1 else tensor[None]


def _tolerance(x: torch.Tensor) -> float:
    return TOLERANCE.get(x.dtype, TOLERANCE_16_BIT)


def _off(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """Rows that differ by more than the tolerance (or are not numbers)."""
    distance_T = torch.linalg.vector_norm(expected.float() - got.float(), dim=-1)
    allowed_T = _tolerance(expected) * torch.linalg.vector_norm(expected.float(), dim=-1) + 1e-12
    return torch.logical_not(distance_T <= allowed_T)


def _sentences(pair: Pair, tally: Tally) -> list[str]:
    """What differs in a layer, most telling first."""
    layer, found = f"layer {pair.parent.layer}", []
    rows, experts = tally.off("router"), _culprits(tally)
    if tally.off("before"):
        found.append(f"{layer}: what reaches the experts differs (attention, norms or embedding)")
    if len(rows) > max(2, len(pair.keep) // 2):
        found.append(
            f"{layer}: {len(rows)} of {len(pair.keep)} router rows differ: not the experts that the plan names"
        )
    else:
        found += [f"{layer}: router row of {_name(pair, row)} {_router_hint(pair, row)}" for row in rows]
    if not rows and tally.off("choice"):
        found.append(
            f"{layer}: other experts are chosen although the router's rows agree (correction bias, groups, top-k)"
        )
    if not rows and tally.off("gates"):
        found.append(f"{layer}: gate values differ although the same experts are chosen (scaling or normalisation)")
    found += [f"{layer}: {_name(pair, expert)} {_expert_hint(pair, expert)}" for expert in experts]
    if tally.off("routed") and not rows:
        found.append(f"{layer}: the output of the experts differs")
    if tally.off("beside"):
        found.append(f"{layer}: the shared expert or what else stands beside the routed ones differs")
    return found


def _culprits(tally: Tally) -> list[int]:
    """Experts all of whose tokens differ; a guiltless one only shares some tokens with a damaged one."""
    share = {n: off / seen for (name, n), (seen, off) in tally.parts.items() if name == "expert" and seen}
    return [expert for expert, value in share.items() if value > 0.95]


def _name(pair: Pair, expert: int) -> str:
    original = pair.keep[expert]
    return f"expert {expert}" if original == expert else f"expert {expert} (the parent's {original})"


def _router_hint(pair: Pair, row: int) -> str:
    mine, theirs = _router_rows(pair.child), _router_rows(pair.parent)
    if mine is None or theirs is None:
        return "differs"
    ratio = _ratio(mine[row], theirs[pair.keep[row]])
    distance_E = (theirs.float() - mine[row].float()).norm(dim=-1) / (mine[row].float().norm() + 1e-12)
    nearest = int(distance_E.argmin())
    if distance_E[nearest] < 0.01 and nearest != pair.keep[row]:
        return f"is the row of the parent's expert {nearest}: rows were swapped"
    return f"is {ratio}"


def _router_rows(routed: Routed) -> torch.Tensor | None:
    own = (p for p in routed.matrix.parameters(recurse=False) if p.ndim == 2 and p.shape[0] == routed.rows)
    return next((p.detach() for p in own if not p.is_meta), None)


def _expert_hint(pair: Pair, expert: int) -> str:
    """How its tensors relate to the parent's."""
    theirs: Mapping[str, torch.Tensor] = dict(pair.parent.experts.named_parameters())
    for name, mine in pair.child.experts.named_parameters():
        source = theirs.get(name)
        if source is None or mine.is_meta or source.is_meta or mine.shape[0] != pair.child.count:
            continue
        one, other = mine.data[expert], source.data[pair.keep[expert]]
        if not torch.equal(one, other):
            return f"computes something else: its {name} is {_ratio(one, other)}"
    return "computes something else"


def _ratio(mine: torch.Tensor, theirs: torch.Tensor) -> str:
    """In words: zero, scaled by a factor, or other numbers."""
    one, other = mine.float().flatten(), theirs.float().flatten()
    if not one.isfinite().all():
        return "not all numbers (NaN or infinite)"
    if not one.any():
        return "all zeros"
    factor = float(one @ other / (other @ other + 1e-30))
    if (one - factor * other).norm() < 0.01 * one.norm():
        return f"scaled by {factor:.3g}"
    return "other numbers than the parent's"
