"""Greedy continuations of the same prompts by both models, side by side, and the rates at which texts are broken.

A parent loops too, so every rate stands beside the parent's own, with a 95% Wilson interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moeprune import console
from moeprune.checking import statistics, texts
from moeprune.checking.samples import Sample, prompt_ids

LOOP_RATE = 0.03  # a parent's usual loop rate; the sample must be able to show its doubling
SHOWN = 60  # pairs kept in the report in full


@dataclass(frozen=True, slots=True)
class Text:
    """What one model wrote for one prompt."""

    text: str
    tokens: int
    ended: bool  # it stopped by itself
    loop: bool


class Writer(Protocol):
    """Something that continues prompts."""

    def write(self, prompts: Sequence[Sample]) -> list[Text]:
        """One text for each prompt, greedily."""


SMOKE = (
    Sample("smoke", prompt="2 + 2 =", answer=" 4"),
    Sample("smoke", prompt="The capital of France is", answer=" Paris"),
    Sample("smoke", prompt="Once upon a time"),
)


def prompts(samples: Sequence[Sample], count: int) -> tuple[Sample, ...]:
    """What both models continue: the smoke prompts, prompts with answers, and beginnings of the running texts."""
    own = [s if s.prompt else Sample(s.domain, prompt=s.text[: max(8, len(s.text) // 3)]) for s in samples]
    return (*SMOKE, *own)[: max(count, len(SMOKE))]


class LoadedWriter:
    """Writes with a model in memory."""

    def __init__(self, model: Any, tokenizer: Any, label: str, rows: int, longest: int) -> None:
        self.model, self.tokenizer, self.label, self.rows, self.longest = model, tokenizer, label, rows, longest

    def write(self, prompts: Sequence[Sample]) -> list[Text]:
        """See `Writer`. Prompts of similar length share a batch, padded on the left."""
        encoded = [prompt_ids(self.tokenizer, sample.prompt) or [self._pad()] for sample in prompts]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        written: dict[int, Text] = {}
        progress = console.Progress(f"{self.label} writes", len(order))
        for start in range(0, len(order), self.rows):
            group = order[start : start + self.rows]
            written |= zip(group, self._batch([encoded[i] for i in group]), strict=True)
            progress.step(by=len(group))
        return [written[i] for i in range(len(encoded))]

    def _pad(self) -> int:
        token = self.tokenizer
        return next((i for i in (token.pad_token_id, token.eos_token_id, token.bos_token_id) if i is not None), 0)

    @torch.no_grad()
    def _batch(self, rows: Sequence[Sequence[int]]) -> list[Text]:
        width = max(map(len, rows))
        ids = torch.tensor([[self._pad()] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        device = self.model.get_output_embeddings().weight.device
        out = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=self.longest,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(self._ends()) or None,
            pad_token_id=self._pad(),
        )
        return [self._text(row.tolist()) for row in out[:, width:]]

    def _ends(self) -> set[int]:
        named = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
        return {end for end in ends if end is not None}

    def _text(self, ids: list[int]) -> Text:
        stop = next((i for i, token in enumerate(ids) if token in self._ends()), None)
        ids = ids if stop is None else ids[:stop]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Text(text, len(ids), stop is not None, texts.loops(ids))


def judge(
    prompts: Sequence[Sample], parent: Sequence[Text] | None, child: Sequence[Text], exact: bool
) -> dict[str, Any]:
    """Rates of everything that can be counted, for both models, and the pairs themselves."""
    entries = [_entry(prompt, text, exact) for prompt, text in zip(prompts, child, strict=True)]
    parents = None if parent is None else [_entry(p, t, exact) for p, t in zip(prompts, parent, strict=True)]
    needed = statistics.needed_to_see(LOOP_RATE, 2 * LOOP_RATE)
    return {
        "prompts": len(prompts),
        "needed_prompts": needed,
        "enough_prompts": len(prompts) >= needed,
        "rates": {name: _rates(rule, entries, parents) for name, rule in RATES.items()},
        "lengths": {"pruned": _lengths(child), "parent": None if parent is None else _lengths(parent)},
        "script_drift": _drift(entries, parents),
        "domains": _domains(prompts, entries, parents),
        "pairs": _pairs(prompts, parents, entries),
    }


def _entry(prompt: Sample, text: Text, exact: bool) -> dict[str, Any]:
    expected = texts.json_object(prompt.answer) if prompt.answer else None
    got = None if expected is None else texts.json_object(text.text)
    flaws = texts.flaws(text.text, ())
    return {
        "text": text.text,
        "tokens": text.tokens,
        "ended": text.ended,
        "flaws": ["loop", *(f for f in flaws if f != "loop")] if text.loop else flaws,
        "correct": texts.right(text.text, prompt.answer, exact) if prompt.answer else None,
        "valid_json": None if expected is None else got is not None,
        "valid_call": None if expected is None else got is not None and set(got) == set(expected),
    }


def _flawed(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda entry: name in entry["flaws"]


RATES: dict[str, Callable[[dict[str, Any]], bool | None]] = {
    "broken": lambda entry: bool(entry["flaws"]),
    "loop": _flawed("loop"),
    "empty": _flawed("empty"),
    "broken characters": _flawed("broken characters"),
    "not ended": lambda entry: not entry["ended"],
    "correct": lambda entry: entry["correct"],
    "valid JSON": lambda entry: entry["valid_json"],
    "right JSON keys": lambda entry: entry["valid_call"],
}


def _rates(
    rule: Callable[[dict[str, Any]], bool | None],
    child: Sequence[dict[str, Any]],
    parent: Sequence[dict[str, Any]] | None,
) -> dict[str, Any]:
    return {"pruned": _rate(rule, child), "parent": None if parent is None else _rate(rule, parent)}


def _rate(rule: Callable[[dict[str, Any]], bool | None], entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seen = [bool(value) for value in map(rule, entries) if value is not None]
    return {
        "hits": sum(seen),
        "count": len(seen),
        "rate": sum(seen) / len(seen) if seen else None,
        "interval": list(statistics.wilson(sum(seen), len(seen))),
    }


def _lengths(written: Sequence[Text]) -> dict[str, float]:
    counts = sorted(text.tokens for text in written)
    return {"mean": sum(counts) / len(counts), "median": counts[len(counts) // 2], "longest": counts[-1]}


def _drift(child: Sequence[dict[str, Any]], parent: Sequence[dict[str, Any]] | None) -> dict[str, Any] | None:
    """Pairs in which both wrote letters, but of another script."""
    if parent is None:
        return None
    scripts = [(texts.script(p["text"]), texts.script(c["text"])) for p, c in zip(parent, child, strict=True)]
    both = [(a, b) for a, b in scripts if a and b]
    moved = Counter(f"{a} -> {b}" for a, b in both if a != b)
    hits = sum(moved.values())
    return {
        "hits": hits,
        "count": len(both),
        "interval": list(statistics.wilson(hits, len(both))),
        "moves": dict(moved),
    }


def _domains(
    prompts: Sequence[Sample], child: Sequence[dict[str, Any]], parent: Sequence[dict[str, Any]] | None
) -> dict[str, Any]:
    """Share of right answers and of loops per domain."""
    found = {}
    for name in dict.fromkeys(prompt.domain for prompt in prompts):
        places = [i for i, prompt in enumerate(prompts) if prompt.domain == name]
        ours = [child[i] for i in places]
        theirs = None if parent is None else [parent[i] for i in places]
        found[name] = {rate: _rates(RATES[rate], ours, theirs) for rate in ("correct", "loop")}
    return found


def _pairs(
    prompts: Sequence[Sample], parent: Sequence[dict[str, Any]] | None, child: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The pairs to look at: the smoke prompts, then the worst first, a few of each domain."""
    worst = sorted(range(len(prompts)), key=lambda i: (i >= len(SMOKE), -_badness(i, parent, child), i))
    shown: Counter[str] = Counter()
    chosen: list[int] = []
    for i in worst:
        shown[prompts[i].domain] += 1
        if shown[prompts[i].domain] <= max(3, SHOWN // 15) and len(chosen) < SHOWN:
            chosen.append(i)
    return [
        {
            "domain": prompts[i].domain,
            "prompt": prompts[i].prompt,
            "answer": prompts[i].answer or None,
            "parent": None if parent is None else parent[i],
            "pruned": child[i],
        }
        for i in chosen
    ]


def _badness(i: int, parent: Sequence[dict[str, Any]] | None, child: Sequence[dict[str, Any]]) -> int:
    """A loss against the parent comes before what both get wrong."""
    lost = parent is not None and bool(parent[i]["correct"]) and not child[i]["correct"]
    newly = bool(child[i]["flaws"]) and not (parent is not None and parent[i]["flaws"])
    return 2 * newly + lost
