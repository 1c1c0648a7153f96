"""Calibration data, from the setting to token batches: sources -> samples -> token ids -> batches."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeprune import console
from moeprune.errors import InputError
from moeprune.scoring.batching import SLICES, Batch, Document, unpacked
from moeprune.scoring.samples import Sample, parse_columns
from moeprune.scoring.sources import announce, choose, files_digest, parse_sources
from moeprune.scoring.templates import Refused, Rules, encode, render
from moeprune.settings import Settings

CHARACTERS_PER_TOKEN = 32  # far above what any tokenizer joins on average; bounds the text kept of a document


@dataclass(frozen=True)
class Calibration:
    """Everything that scoring runs through the model."""

    batches: list[Batch]
    domains: tuple[str, ...]
    fingerprint: str  # of the tokens themselves: equal means the same calibration
    summary: dict[str, Any]  # for the result's JSON


def load_calibration(settings: Settings, tokenizer: Any, config: Any) -> Calibration:
    """Read, choose, render, tokenise and batch the calibration samples."""
    sources = parse_sources(settings.calibration_path)
    columns = parse_columns(settings.columns)
    skipped: Counter[str] = Counter()
    samples: list[Sample] = []
    for source in sources:
        limit = source.limit or settings.max_samples
        choice = choose(source, limit, settings.seed, columns, settings.max_seq_len * CHARACTERS_PER_TOKEN)
        announce(choice)
        samples += choice.samples
        skipped["empty"] += choice.empty
    rules = Rules(settings.max_seq_len, settings.thinking, settings.system_prompt)
    domains, documents, cut = _tokenised(samples, tokenizer, rules, skipped)
    _check_vocabulary(documents, config)
    batches = unpacked(documents, settings.batch_size, _padding(tokenizer))
    fingerprint = _fingerprint(domains, documents)
    summary = {
        "source": settings.calibration_path or "built-in",
        "files": files_digest(sources),
        "samples": len(documents),
        "tokens": sum(len(document.ids) for document in documents),
        "domains": _per_domain(domains, documents),
        "skipped": {reason: count for reason, count in sorted(skipped.items()) if count},
        "cut_to_max_seq_len": cut,
        "fingerprint": fingerprint,
    }
    _report(summary)
    return Calibration(batches, domains, fingerprint, summary)


def _tokenised(
    samples: Sequence[Sample], tokenizer: Any, rules: Rules, skipped: Counter[str]
) -> tuple[tuple[str, ...], list[Document], int]:
    """Documents in the order of the samples; the samples of a domain go round its slices."""
    domains = tuple(sorted({sample.domain for sample in samples}))
    turn: Counter[str] = Counter()
    documents: list[Document] = []
    cut = 0
    refusal = ""
    for sample in samples:
        try:
            ids = encode(*render(sample, tokenizer, rules), tokenizer)
        except Refused as error:
            refusal = f"{sample.origin}: {error}"
            skipped["refused by the chat template"] += 1
            continue
        if len(ids) < 2:
            skipped["shorter than 2 tokens"] += 1
            continue
        cut += len(ids) > rules.max_seq_len
        slice_ = turn[sample.domain] % SLICES
        turn[sample.domain] += 1
        documents.append(Document(ids[: rules.max_seq_len], domains.index(sample.domain), slice_))
    if refusal:
        console.warn(f"the chat template refused {skipped['refused by the chat template']} samples, such as {refusal}")
    if not documents:
        raise InputError(f"none of {len(samples)} calibration samples can be used: {dict(skipped)}")
    return domains, documents, cut


def _check_vocabulary(documents: Sequence[Document], config: Any) -> None:
    """A tokenizer of another model would index past the embedding, which on a GPU ends in an unreadable error."""
    size = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "vocab_size", None)
    largest = max(max(document.ids) for document in documents)
    if size is not None and largest >= size:
        raise InputError(
            f"the tokenizer makes token {largest}, the model knows {size}: the tokenizer is another model's"
        )


def _padding(tokenizer: Any) -> int:
    """Any real token will do: padding is masked and not counted."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)


def _fingerprint(domains: Sequence[str], documents: Sequence[Document]) -> str:
    total = hashlib.sha256("\0".join(domains).encode())
    for document in documents:
        total.update(
            struct.pack(f"<{len(document.ids) + 3}q", len(document.ids), document.domain, document.slice, *document.ids)
        )
    return total.hexdigest()


def _per_domain(domains: Sequence[str], documents: Sequence[Document]) -> dict[str, dict[str, int]]:
    counted = {name: {"samples": 0, "tokens": 0} for name in domains}
    for document in documents:
        counted[domains[document.domain]]["samples"] += 1
        counted[domains[document.domain]]["tokens"] += len(document.ids)
    return counted


def _report(summary: Mapping[str, Any]) -> None:
    domains = ", ".join(f"{name} {counts['samples']}" for name, counts in summary["domains"].items())
    console.say(
        f"calibration: {summary['samples']} samples, {summary['tokens']:,} tokens; samples by domain: {domains}"
    )
    for reason, count in summary["skipped"].items():
        console.say(f"calibration: skipped {count} samples: {reason}")
    if summary["cut_to_max_seq_len"]:
        console.say(f"calibration: {summary['cut_to_max_seq_len']} samples were cut to the longest length")
