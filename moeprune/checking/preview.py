"""What each cut would lose, before anything is written: the parent with masked experts, all variants in one pass.

Masking is exactly what the cut model computes, for softmax, sigmoid and biased routers alike; where routing groups lose
unequal numbers of experts no cut is possible, and such plans are refused by the planning.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune import VERSION, console, metadata
from moeprune.checking import fidelity, report, samples
from moeprune.checking.streamed import Streamed
from moeprune.checkpoint.families import Layout, understand
from moeprune.checkpoint.folder import Checkpoint, check_outside, locate_model, open_checkpoint
from moeprune.errors import InputError
from moeprune.planning import decision
from moeprune.pruning.choice import bytes_per_expert, check, read_plan
from moeprune.results import FILES, PREVIEW, SCORES
from moeprune.scoring.run import load_tokenizer
from moeprune.settings import Settings
from moeprune.values import listed, ratio

SHAPING = ("dtype", "seed", "max_seq_len", "evaluation_samples", "ratios", "metrics", "metric", "blend", "weights",
           "protect", "max_kl", "max_loss_increase", "device", "other_scores")  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One model that could be cut."""

    name: str
    metric: str
    kept: int
    bytes: int
    keep: dict[str, tuple[int, ...]]


def main(settings: Settings) -> None:
    """Preview and write output/preview.json; stdout gets its path."""
    checkpoint = open_checkpoint(locate_model(settings.model_path, settings.hf_token))
    check_outside(checkpoint.place, settings.output_path)
    layout = understand(checkpoint)
    target = settings.output_path / FILES[PREVIEW]
    scores = settings.output_path / FILES[SCORES]
    named = [settings.evaluation_path, *listed(settings.plans), str(scores)]
    files = [Path(name) for name in named if Path(name).is_file()]
    values = [str(getattr(settings, name)) for name in SHAPING]
    key = metadata.digest(VERSION, checkpoint.fingerprint, *values, *files)
    if not settings.force and metadata.is_current(target, PREVIEW, key):
        console.say(f"{target} is current; --force previews again")
    else:
        found = variants(settings, checkpoint, layout)
        with metadata.claimed(settings.output_path):
            metadata.write_json(target, measure(settings, checkpoint, found, layout, key))
        report.write(settings.output_path)
    show(metadata.read_result(target, PREVIEW))
    print(target)


def variants(settings: Settings, checkpoint: Checkpoint, layout: Layout) -> list[Variant]:
    """Every metric at every ratio, and every plan from a file; equal ones once."""
    each = sum(bytes_per_expert(checkpoint, block) for block in layout.blocks)
    size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    made = [*_from_scores(settings, checkpoint, layout), *_from_files(settings, layout)]
    sized = [dataclasses.replace(v, bytes=size - each * (layout.experts - v.kept)) for v in made]
    unique: dict[Any, Variant] = {}
    for variant in sized:
        unique.setdefault((variant.metric, tuple(sorted(variant.keep.items()))), variant)
    return list(unique.values())


def _from_scores(settings: Settings, checkpoint: Checkpoint, layout: Layout) -> list[Variant]:
    path = settings.output_path / FILES[SCORES]
    if not path.exists():
        return []
    data = metadata.read_result(path, SCORES)
    scored = data["inputs"]["model"].get("fingerprint")
    if not settings.other_scores and scored != checkpoint.fingerprint:
        raise InputError(
            f"the scores in {path} were made on another model; run ./run.sh reap on it, or pass --other-scores"
        )
    sums = metadata.Sums.from_json(data.get("scores", {}))
    model, calibration = decision.Model.of(layout), data["inputs"].get("calibration", {})
    made = []
    for metric in listed(settings.metrics) or [settings.metric]:
        for share in map(ratio, listed(settings.ratios)):
            chosen = dataclasses.replace(settings, metric=metric, prune_ratio=share, keep=0, target_size=0)
            decided = decision.decide(chosen, sums, model, calibration)
            metric_used, plan = decided.how.metric, decided.plan
            keep = {name: ids for name, ids in plan.keep.items() if name not in plan.unscored}
            made.append(Variant(f"{metric_used}, {plan.count} of {plan.experts}", metric_used, plan.count, 0, keep))
    return made


def _from_files(settings: Settings, layout: Layout) -> list[Variant]:
    made = []
    for name in listed(settings.plans):
        keep = read_plan(Path(name))
        check(keep, [block for block in layout.blocks if block.role == "trunk" or block.name in keep], layout)
        made.append(Variant(Path(name).stem, "plan", len(next(iter(keep.values()))), 0, keep))
    return made


def measure(
    settings: Settings, checkpoint: Checkpoint, found: Sequence[Variant], layout: Layout, key: str
) -> dict[str, Any]:
    """Stream the parent with every variant's mask and compare each with the parent itself."""
    start = time.monotonic()
    tokenizer = load_tokenizer(checkpoint.place, settings)
    held_out = samples.load_held_out(settings.evaluation_path, settings.evaluation_samples, settings.seed)
    batches = samples.batches(held_out, tokenizer, settings.max_seq_len, settings.batch_size)
    parent = Streamed(checkpoint.place, settings)
    rows: list[dict[str, Any]] = []
    for part in _parts(found, batches, parent, settings):
        whole, *states = parent.variants(batches, [None, *(variant.keep for variant in part)])
        with parent.head() as head:
            for variant, own in zip(part, states, strict=True):
                tokens = fidelity.compare(head, head, batches, (whole, own), parent.vocabulary)
                rows.append(_row(variant, layout, fidelity.summary(tokens, held_out, settings.seed)))
    rows.sort(key=lambda row: (row["metric"], row["bytes"]))
    return {
        **metadata.header(PREVIEW, ("torch", "transformers")),
        "settings": settings.public(),
        "inputs": {
            "fingerprint": key,
            "model": {"path": str(checkpoint.place), "bytes": checkpoint.total_bytes, "experts": layout.experts},
            "held_out": {"source": settings.evaluation_path or "built-in", "samples": len(held_out)},
        },
        "variants": rows,
        "bounds": {"max_kl": settings.max_kl, "max_loss_increase": settings.max_loss_increase},
        "smallest_within_bounds": _smallest(rows, settings),
        "warnings": console.warnings(),
        "timing": {"total_s": round(time.monotonic() - start, 3)},
    }


def _parts(
    found: Sequence[Variant], batches: Sequence[samples.Batch], parent: Streamed, settings: Settings
) -> list[Sequence[Variant]]:
    """As many variants at once as their final hidden states fit the budget."""
    judged = sum(int(batch.scored_BT.sum()) for batch in batches)
    one = judged * int(parent.model.config.get_text_config().hidden_size) * 4
    size = max(1, settings.hidden_memory // max(one, 1) - 1)
    return [found[start : start + size] for start in range(0, len(found), size)]


def _row(variant: Variant, layout: Layout, summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": variant.name,
        "metric": variant.metric,
        "kept": variant.kept,
        "experts": layout.experts,
        "bytes": variant.bytes,
        "fidelity": summary,
    }


def _smallest(rows: Sequence[dict[str, Any]], settings: Settings) -> dict[str, Any] | None:
    """The smallest variant whose upper interval ends stay within the bounds."""
    good = [
        row
        for row in rows
        if row["fidelity"]["overall"]["kl_interval"][1] <= settings.max_kl
        and row["fidelity"]["overall"]["loss_increase"] <= settings.max_loss_increase
    ]
    best = min(good, key=lambda row: (row["bytes"], row["fidelity"]["overall"]["kl"]), default=None)
    return best and {name: best[name] for name in ("name", "metric", "kept", "bytes")}


def show(result: dict[str, Any]) -> None:
    """The table a person reads."""
    console.say(
        f"{'variant':<28} {'size':>9} {'loss':>7} {'KL mean':>8} {'95% interval':>16} {'median':>7} {'same top':>9}"
    )
    for row in result["variants"]:
        overall = row["fidelity"]["overall"]
        low, high = overall["kl_interval"]
        console.say(
            f"{row['name']:<28} {console.size(row['bytes']):>9} {overall['loss']:>7.3f} {overall['kl']:>8.4f} "
            f"{f'{low:.4f} to {high:.4f}':>16} {overall['kl_median']:>7.4f} {overall['same_top']:>9.1%}"
        )
    best, bounds = result["smallest_within_bounds"], result["bounds"]
    within = f"mean KL {bounds['max_kl']:g} and loss +{bounds['max_loss_increase']:g}"
    console.say(f"smallest within {within}: {best['name'] + ', ' + console.size(best['bytes']) if best else 'none'}")
