"""Stage 3 in order: find both models, compare, generate, check, write the report, leave with the verdict.

A model that does not fit into memory is streamed; what was then not tested is said in the report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune import console, metadata
from moeprune.checking import checks, comparison, generation, memory, samples, structure, subject
from moeprune.checkpoint import folder as checkpoints
from moeprune.errors import InputError, MachineError, ResultError
from moeprune.settings import Settings

KIND = "test_report"
GENERATING_TOKENS = 16_384  # prompt and new tokens in one batch of greedy generation


@dataclass(frozen=True)
class Case:
    """What is judged, against what."""

    pruned: Path
    parent: Path | None
    keep: dict[str, list[int]] | None  # from the reap_metadata.json in the pruned folder
    why_no_parent: str = ""


def main(settings: Settings) -> None:
    """Judge the pruned model; stdout gets the path of the report, a failed check ends in exit code 5."""
    case = find(settings)
    target = settings.output_path / f"{KIND}.json"
    key = fingerprint(case, settings)
    if not settings.force and metadata.is_current(target, KIND, key):
        console.say(f"{target} is current; --force judges again")
        report = metadata.read_result(target, KIND)
    else:
        report = judge(case, settings, key)
        metadata.write_json(target, report)
    print(target)
    failed = [check for check in report["checks"] if check["status"] == checks.FAIL]
    if failed:
        raise ResultError(f"{case.pruned} failed: " + "; ".join(f"{c['name']}: {c['reason']}" for c in failed))


def find(settings: Settings) -> Case:
    """The pruned folder (named, or the newest in the output folder), its parent and its plan."""
    pruned = Path(settings.pruned_output_path) if settings.pruned_output_path else _newest(settings.output_path)
    if not (pruned / "config.json").is_file():
        raise InputError(f"no pruned model at {pruned}; run the prune stage or pass --pruned-output-path")
    recipe = _recipe(pruned)
    keep = recipe.get("plan", {}).get("keep")
    named = settings.model_path or recipe.get("inputs", {}).get("model", {}).get("path", "")
    if not named:
        return Case(pruned, None, keep, "no parent is known; pass --model-path")
    try:
        return Case(pruned, checkpoints.locate_model(named, settings.hf_token), keep)
    except InputError as error:
        if settings.model_path:
            raise
        return Case(pruned, None, keep, str(error))


def _newest(output: Path) -> Path:
    made = [path.parent for path in output.glob("*/reap_metadata.json") if path.parent.suffix != ".partial"]
    if not made:
        raise InputError(f"no pruned model in {output}; run the prune stage or pass --pruned-output-path")
    return max(made, key=lambda folder: (folder / "reap_metadata.json").stat().st_mtime)


def _recipe(pruned: Path) -> dict[str, Any]:
    path = pruned / "reap_metadata.json"
    return metadata.read_json(path, "the recipe of the pruned model") if path.is_file() else {}


SHAPING = ("seed", "dtype", "max_seq_len", "evaluation_samples", "generations", "max_new_tokens", "max_kl",
           "max_loss_increase", "min_same_top", "max_broken", "judge_memory", "device")  # fmt: skip


def fingerprint(case: Case, settings: Settings) -> str:
    """Over both models, the held-out data and every setting that can change a number or a verdict."""
    parts: list[str | Path] = [str(getattr(settings, name)) for name in SHAPING]
    parts += [checkpoints.fingerprint(checkpoints.open_checkpoint(f)) for f in (case.pruned, case.parent) if f]
    parts.append(json.dumps(case.keep))
    parts += [Path(settings.evaluation_path)] if settings.evaluation_path else ["built-in"]
    return metadata.digest(*parts)


def judge(case: Case, settings: Settings, key: str) -> dict[str, Any]:
    """The whole report."""
    start = time.monotonic()
    held_out = samples.load_samples(settings.evaluation_path, settings.evaluation_samples, settings.seed)
    written = samples.load_samples(settings.evaluation_path, settings.generations, settings.seed)
    report = metadata.header(KIND, ("torch", "transformers")) | {
        "settings": settings.public(),
        "inputs": _inputs(case, settings, key, held_out),
        "not_tested": {},
    }
    report |= _compare(case, settings, held_out, written)
    verdicts = checks.run(report, settings)
    report["checks"] = [metadata.plain(check) for check in verdicts]
    report["verdict"] = checks.FAIL if any(c.status == checks.FAIL for c in verdicts) else checks.PASS
    report["warnings"] = [f"{c.name}: {c.reason}" for c in verdicts if c.warning] + console.warnings()
    report["timing"] = {"total_s": round(time.monotonic() - start, 3)}
    _show(verdicts)
    return report


def _inputs(case: Case, settings: Settings, key: str, held_out: Sequence[samples.Sample]) -> dict[str, Any]:
    return {
        "fingerprint": key,
        "pruned": {"path": str(case.pruned), "bytes": _weight_bytes(case.pruned)},
        "parent": case.parent and {"path": str(case.parent), "bytes": _weight_bytes(case.parent)},
        "held_out": {
            "source": settings.evaluation_path or "built-in",
            "samples": len(held_out),
            "domains": list(dict.fromkeys(sample.domain for sample in held_out)),
        },
    }


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _compare(
    case: Case, settings: Settings, held_out: Sequence[samples.Sample], written: Sequence[samples.Sample]
) -> dict[str, Any]:
    """Everything that compares: in memory when both models fit, else streamed, without generation."""
    tokenizer = subject.load_tokenizer(case.pruned, settings)
    needed = sum(_weight_bytes(folder) for folder in (case.pruned, case.parent) if folder)
    free = settings.judge_memory or memory.free(settings)
    if needed * memory.MARGIN > free:
        why = f"the weights take {console.size(needed)}, {console.size(free)} are free: streamed, without generation"
        console.warn(why)
        if case.parent is None:
            raise MachineError(f"{why}; and {case.why_no_parent}, so nothing is left to test")
        return _streamed(case, settings, held_out, tokenizer) | {"not_tested": {"generation": why}}
    return _loaded(case, settings, (held_out, written), tokenizer)


def _streamed(case: Case, settings: Settings, held_out: Sequence[samples.Sample], tokenizer: Any) -> dict[str, Any]:
    from moeprune.checking.streamed import Streamed

    assert case.parent is not None
    parent, child = Streamed(case.parent, settings), Streamed(case.pruned, settings)
    batches = samples.batches(held_out, tokenizer, settings.max_seq_len, settings.batch_size)
    found = comparison.compare(parent, child, case.keep, (held_out, batches), settings)
    return found | {"structure": structure.from_masked(found["masked"])}


def _loaded(case: Case, settings: Settings, data: tuple[Any, Any], tokenizer: Any) -> dict[str, Any]:
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


def _show(verdicts: Sequence[checks.Check]) -> None:
    for check in verdicts:
        mark = "warning" if check.warning and check.status == checks.PASS else check.status
        console.say(f"{mark:>10}  {check.name}: {check.reason}")
