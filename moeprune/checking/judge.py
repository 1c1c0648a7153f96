"""Stage 3 in order: compare, generate, check, write the report.

A model that does not fit into memory is streamed; what was then not tested is said in the report.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from moeprune import console, metadata
from moeprune.checking import checks, comparison, endpoint, generation, samples, structure, subject
from moeprune.checking.case import Case, weight_bytes
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import InputError, MachineError, StageError
from moeprune.results import VERDICT
from moeprune.scoring.memory import available
from moeprune.scoring.run import load_tokenizer
from moeprune.settings import Settings

GENERATING_TOKENS = 16_384  # prompt and new tokens in one batch of greedy generation
MARGIN = 1.3  # activations, caches and logits beside the weights
Data = tuple[Sequence[samples.Sample], Sequence[samples.Sample]]  # to compare on, to generate from


def judge(case: Case | None, settings: Settings, key: str) -> dict[str, Any]:
    """The whole report. Without a case, servers are asked."""
    start = time.monotonic()
    held_out = samples.load_held_out(settings.evaluation_path, settings.evaluation_samples, settings.seed)
    written = samples.load_samples(settings.evaluation_path, settings.generations, settings.seed)
    found = endpoint.compare(settings, written) if case is None else _compare(case, settings, (held_out, written))
    report = metadata.header(VERDICT, ("torch", "transformers")) | {
        "settings": settings.public(),
        "inputs": _inputs(case, settings, key, held_out),
        "not_tested": {},
        **found,
    }
    verdicts = checks.run(report, settings)
    report["checks"] = [metadata.plain(check) for check in verdicts]
    report["verdict"] = checks.FAIL if any(c.status == checks.FAIL for c in verdicts) else checks.PASS
    report["summary"] = checks.closing(verdicts)
    report["warnings"] = [f"{c.name}: {c.reason}" for c in verdicts if c.warning] + console.warnings()
    report["timing"] = {"total_s": round(time.monotonic() - start, 3)}
    return report


def _inputs(case: Case | None, settings: Settings, key: str, held_out: Sequence[samples.Sample]) -> dict[str, Any]:
    if case is None:
        parent = {"path": settings.parent_endpoint, "bytes": 0} if settings.parent_endpoint else None
        models: dict[str, Any] = {"pruned": {"path": settings.endpoint, "bytes": 0}, "parent": parent}
    else:
        models = {
            "pruned": {"path": str(case.pruned), "bytes": weight_bytes(case.pruned)},
            "parent": case.parent and {"path": str(case.parent), "bytes": weight_bytes(case.parent)},
        }
    return {
        "fingerprint": key,
        **models,
        "held_out": {
            "source": settings.evaluation_path or "built-in",
            "samples": len(held_out),
            "domains": list(dict.fromkeys(sample.domain for sample in held_out)),
        },
    }


def _compare(case: Case, settings: Settings, data: Data) -> dict[str, Any]:
    """Everything that compares: in memory when both models fit, else streamed, without generation."""
    tokenizer = load_tokenizer(open_checkpoint(case.pruned).place, settings)
    failure: type[StageError] = MachineError
    free = settings.judge_memory or _free(settings)
    try:
        needed = sum(subject.loaded_bytes(folder, settings) for folder in (case.pruned, case.parent) if folder)
        if needed * MARGIN <= free:
            return _loaded(case, settings, data, tokenizer)
        why = f"loaded weights take {console.size(needed)}, {console.size(free)} are free: streamed, without generation"
    except subject.CannotLoad as error:
        why, failure = f"{error}: streamed, without generation", InputError
    console.warn(why)
    if case.parent is None:
        raise failure(f"{why}; and {case.why_no_parent}, so nothing is left to test")
    return _streamed(case, settings, data, tokenizer) | {"not_tested": {"generation": why}}


def _free(settings: Settings) -> int:
    """Bytes that loaded models may take where they compute."""
    if subject.device(settings) == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return available()


def _streamed(case: Case, settings: Settings, data: Data, tokenizer: Any) -> dict[str, Any]:
    from moeprune.checking.streamed import Streamed

    assert case.parent is not None
    parent, child = Streamed(case.parent, settings), Streamed(case.pruned, settings)
    batches = samples.batches(data[0], tokenizer, settings.max_seq_len, settings.batch_size)
    found = comparison.compare(parent, child, case.keep, (data[0], batches), settings)
    return found | {"structure": structure.from_masked(found["masked"], found["not_masked"])}


def _loaded(case: Case, settings: Settings, data: Data, tokenizer: Any) -> dict[str, Any]:
    held_out, written = data
    child = subject.Loaded(case.pruned, settings)
    asked = generation.prompts(written, settings.generations)
    texts = _writer(child, tokenizer, "pruned model", settings).write(asked)
    exact = bool(settings.evaluation_path)
    if case.parent is None:
        return {
            "generation": generation.judge(asked, None, texts, exact),
            "not_tested": {"fidelity": case.why_no_parent},
        }
    parent = subject.Loaded(case.parent, settings)
    parent_texts = _writer(parent, tokenizer, "parent", settings).write(asked)
    batches = samples.batches(held_out, tokenizer, settings.max_seq_len, settings.batch_size)
    return {
        **comparison.compare(parent, child, case.keep, (held_out, batches), settings),
        "structure": structure.examine(parent.model, child.model, case.keep, batches),
        "generation": generation.judge(asked, parent_texts, texts, exact),
    }


def _writer(who: subject.Loaded, tokenizer: Any, label: str, settings: Settings) -> generation.LoadedWriter:
    rows = max(settings.batch_size, min(64, GENERATING_TOKENS // (2 * settings.max_new_tokens)))
    return generation.LoadedWriter(who.model, tokenizer, label, rows, settings.max_new_tokens)
