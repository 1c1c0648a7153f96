"""Calibration data, from the setting to token batches: sources -> samples -> token ids -> batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeprune import console
from moeprune.errors import UsageError
from moeprune.scoring.calibration.batching import Batch, can_pack, fill_rows, packed, unpacked
from moeprune.scoring.calibration.documents import (
    Document,
    Encoder,
    check_vocabulary,
    domains_of,
    fingerprint,
    per_domain,
    sample_digests,
)
from moeprune.scoring.calibration.images import Reader
from moeprune.scoring.calibration.presets import Plan, plan_for
from moeprune.scoring.calibration.samples import parse_columns
from moeprune.scoring.calibration.selection import Choice, announce, balanced, choose, shares
from moeprune.scoring.calibration.sources import Source, describe, parse_sources
from moeprune.scoring.calibration.templates import Rules
from moeprune.settings import Settings

CHARACTERS_PER_TOKEN = 32  # far above what any tokenizer joins on average; bounds the text kept of a document
DOCUMENTS_PER_SEQUENCE = (8, 64, 512)  # drawn for each packed sequence; more if the first do not fill them
BUILTIN_NOTE = (
    "calibration: the built-in set, which is small and general: good for a first look; "
    "for a model that you will use, give data of your own kind with --calibration-path"
)


@dataclass(frozen=True)
class Calibration:
    """Everything that scoring runs through the model."""

    batches: list[Batch]
    domains: tuple[str, ...]
    fingerprint: str  # of the tokens themselves: equal means the same calibration
    summary: dict[str, Any]  # for the result's JSON


def load_calibration(settings: Settings, tokenizer: Any, config: Any) -> Calibration:
    """Read, choose, render, tokenise and batch the calibration samples.

    `tokenizer` may be the model's processor; for samples with images it is otherwise loaded from the same folder.
    """
    plan = _packing_checked(plan_for(settings), settings, config)
    sources = parse_sources(plan.spec, settings.seed, settings.hf_token)
    if not plan.spec:
        console.say(BUILTIN_NOTE)
    encoder, documents = _documents(sources, plan, settings, tokenizer, config)
    rows: list[list[Document]] = []
    if plan.packing:
        rows = _filled(plan, encoder, documents)
        documents = [document for row in rows for document in row]
    domains, pad = domains_of(documents), _padding(tokenizer)
    if plan.packing:
        batches = packed(rows, domains, plan.max_seq_len, settings.batch_size, pad)
    else:
        batches = unpacked(documents, domains, settings.batch_size, pad)
    summary = _summary(settings, plan, sources, documents, encoder)
    _report(summary)
    return Calibration(batches, domains, summary["fingerprint"], summary)


def _documents(
    sources: Sequence[Source], plan: Plan, settings: Settings, tokenizer: Any, config: Any
) -> tuple[Encoder, list[Document]]:
    """The documents of the chosen samples. To fill packed sequences, more are drawn until there are enough tokens."""
    rules = Rules(plan.max_seq_len, settings.thinking, settings.system_prompt)
    special = settings.special_tokens == "count"
    for factor in DOCUMENTS_PER_SEQUENCE if plan.packing else (1,):
        reader = Reader(settings.image_pixels, settings.bad_images)
        encoder = Encoder(tokenizer, config, rules, reader, settings.trust_remote_code, special)
        choices = _choices(sources, plan, settings, plan.max_samples * factor)
        encoder.skipped["empty"] = sum(choice.empty for choice in choices)
        in_turn = {f"{number:06}": choice.samples for number, choice in enumerate(choices)}
        documents = encoder.documents(balanced(in_turn, sum(map(len, in_turn.values()))))
        tokens = sum(len(document.ids) for document in documents)
        if tokens >= plan.max_samples * plan.max_seq_len or len(documents) < plan.max_samples * factor // 2:
            break
    for source, choice in zip(sources, choices, strict=True):
        announce(source, choice)
    check_vocabulary(documents, config)
    return encoder, documents


def _choices(sources: Sequence[Source], plan: Plan, settings: Settings, drawn: int) -> list[Choice]:
    named = parse_columns(settings.columns)
    counts = shares(sources, drawn, plan.capped)
    longest = plan.max_seq_len * CHARACTERS_PER_TOKEN
    return [choose(source, n, settings.seed, named, longest) for source, n in zip(sources, counts, strict=True)]


def _filled(plan: Plan, encoder: Encoder, documents: Sequence[Document]) -> list[list[Document]]:
    """Packed rows, as many as were asked for if the documents suffice."""
    rows = fill_rows(documents, plan.max_seq_len)[: plan.max_samples]
    encoder.skipped["not needed to fill the sequences"] = len(documents) - sum(map(len, rows))
    if len(rows) < plan.max_samples:
        console.warn(f"the calibration data fills only {len(rows)} of {plan.max_samples} packed sequences")
    return rows


def _packing_checked(plan: Plan, settings: Settings, config: Any) -> Plan:
    """Packing only where it is known to be right: refused when asked for by name, left out of a preset otherwise."""
    if not plan.packing or can_pack(config):
        return plan
    why = f"packed documents are not known to stay apart in {getattr(config, 'model_type', 'this model')}"
    if settings.packing == "on":
        raise UsageError(f"{why}; leave packing off: batches are sorted by length, so little is lost")
    console.warn(f"{why}, so the preset runs unpacked: one document a row, up to {plan.max_samples} documents")
    return replace(plan, packing=False)


def _summary(
    settings: Settings, plan: Plan, sources: Sequence[Source], documents: Sequence[Document], encoder: Encoder
) -> dict[str, Any]:
    return {
        "source": settings.calibration_path or "built-in",
        "entries": plan.spec,
        "files": describe(sources),
        "seed": settings.seed,
        "max_seq_len": plan.max_seq_len,
        "packing": plan.packing,
        "samples": len(documents),
        "tokens": sum(document.read + document.seen for document in documents),
        "special_tokens_left_out": sum(len(document.ids) - document.read - document.seen for document in documents),
        "domains": per_domain(documents),
        "skipped": {reason: count for reason, count in sorted(encoder.skipped.items()) if count},
        "bad_images": encoder.reader.bad,
        "cut_to_max_seq_len": encoder.cut,
        "fingerprint": fingerprint(documents),
        "sample_digests": sample_digests(documents),
    }


def _padding(tokenizer: Any) -> int:
    """Any real token will do: padding is masked and not counted."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)


def _report(summary: Mapping[str, Any]) -> None:
    domains = ", ".join(f"{name} {counts['samples']}" for name, counts in summary["domains"].items())
    console.say(
        f"calibration: {summary['samples']} samples, {summary['tokens']:,} tokens; samples by domain: {domains}"
    )
    for reason, count in summary["skipped"].items():
        console.say(f"calibration: skipped {count} samples: {reason}")
    if summary["cut_to_max_seq_len"]:
        console.say(f"calibration: {summary['cut_to_max_seq_len']} samples were cut to the longest length")
