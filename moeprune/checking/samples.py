"""Held-out data: what the models are judged on, and how it becomes token batches.

Legend: B rows of a batch, T tokens.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeprune.checking.builtin import BUILTIN
from moeprune.errors import InputError

EVERY = sys.maxsize


@dataclass(frozen=True, slots=True)
class Sample:
    """Either running text, or a prompt with the answer that is expected ("" when there is no one right answer)."""

    domain: str
    text: str = ""
    prompt: str = ""
    answer: str = ""

    @property
    def has_known_tokens(self) -> bool:
        """Whether two models can be compared on it token by token; an open request only asks for texts."""
        return bool(self.text or self.answer)


@dataclass(frozen=True)
class Batch:
    """Rows of equal kind, padded on the right; `scored_BT` marks the positions whose next token is judged."""

    ids_BT: torch.Tensor
    attended_BT: torch.Tensor
    scored_BT: torch.Tensor
    sample_B: tuple[int, ...]  # index of each row's sample


def load_held_out(path: str, count: int, seed: int) -> tuple[Sample, ...]:
    """At most `count` samples on which two models can be compared token by token."""
    known = [sample for sample in load_samples(path, EVERY, seed) if sample.has_known_tokens]
    if not known:
        raise InputError(f"{path} holds open requests only; add lines with 'text', or with 'prompt' and 'answer'")
    return tuple(known[:count])


def load_samples(path: str, count: int, seed: int) -> tuple[Sample, ...]:
    """At most `count` samples, spread evenly over the domains, in an order that the seed decides."""
    samples = [_sample(entry, f"{path}:{number}") for number, entry in _lines(path)] if path else list(BUILTIN_SAMPLES)
    if not samples:
        raise InputError(f"{path} holds no samples; write lines with 'text', or with 'prompt' and 'answer'")
    return _spread(samples, count, seed)


BUILTIN_SAMPLES = tuple(Sample(**entry) for entry in BUILTIN)


def _lines(path: str) -> list[tuple[int, Any]]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"held-out data not found at {path}; give a .jsonl file in REAP_EVALUATION_PATH") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise InputError(f"held-out data at {path} is not a UTF-8 text file: {error}") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                entries.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number}: not JSON: {error}") from None
    return entries


def _sample(entry: Any, where: str) -> Sample:
    keys = ("domain", "text", "prompt", "answer")
    fields = {key: entry.get(key, "") for key in keys} if isinstance(entry, dict) else {}
    if not (fields.get("text") or fields.get("prompt")) or not all(isinstance(v, str) for v in fields.values()):
        raise InputError(f"{where}: write an object with 'text', or with 'prompt' and 'answer', all of them strings")
    return Sample(**{**fields, "domain": fields["domain"] or "all"})


def _spread(samples: Sequence[Sample], count: int, seed: int) -> tuple[Sample, ...]:
    """One sample of every domain in turn, so that a small count still sees each domain."""
    piles: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        piles[sample.domain].append(sample)
    generator = random.Random(seed)
    for domain in piles:
        generator.shuffle(piles[domain])
    rounds = max(len(pile) for pile in piles.values())
    turns = [pile[turn] for turn in range(rounds) for pile in piles.values() if turn < len(pile)]
    return tuple(turns[:count])


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens a model gets for a prompt: through its chat template when it has one."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


def batches(samples: Sequence[Sample], tokenizer: Any, longest: int, rows: int) -> list[Batch]:
    """Teacher-forced batches of similar length. Of a prompt with an answer only the answer (and its end) is judged."""
    encoded = [(index, *_encode(sample, tokenizer, longest)) for index, sample in enumerate(samples)]
    usable = sorted((e for e in encoded if len(e[1]) > 1 and e[2] < len(e[1])), key=lambda e: (len(e[1]), e[0]))
    return [_batch(usable[start : start + rows]) for start in range(0, len(usable), rows)]


def _encode(sample: Sample, tokenizer: Any, longest: int) -> tuple[list[int], int]:
    """Token ids and the first position that is judged (as a target)."""
    if sample.text:
        return list(tokenizer(sample.text)["input_ids"])[:longest], 1
    before = prompt_ids(tokenizer, sample.prompt)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    while before and end and before[-1] == end[0]:  # some tokenizers close every text
        before.pop()
    answer = list(tokenizer(sample.answer, add_special_tokens=False)["input_ids"]) + end if sample.answer else []
    ids = (before + answer)[-longest:]
    return ids, max(1, len(ids) - len(answer))


def _batch(rows: Sequence[tuple[int, list[int], int]]) -> Batch:
    length = max(len(ids) for _, ids, _ in rows)
    ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    attended_BT, scored_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, (_, ids, first) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        attended_BT[row, : len(ids)] = 1
        scored_BT[row, first - 1 : len(ids) - 1] = True
    return Batch(ids_BT, attended_BT, scored_BT, tuple(index for index, _, _ in rows))
