#!/usr/bin/env python3
"""Stage 1: score the experts of a model on calibration data. model + calibration -> output/reap_metadata.json"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune import VERSION, console, errors
from moeprune.checking import report
from moeprune.checkpoint.families import Layout, understand
from moeprune.checkpoint.folder import Checkpoint, check_outside, locate_model, open_checkpoint
from moeprune.metadata import Sums, claimed, digest, header, is_current, plain, read_result, to_text, write_json
from moeprune.planning.decision import PLANNING, Model, check_wishes, check_words, proposal
from moeprune.planning.plan import Limits
from moeprune.results import FILES, SCORES
from moeprune.settings import FIELDS, Settings, resolve

if TYPE_CHECKING:
    from moeprune.scoring.calibration.load import Calibration

# Settings that do not change what is measured; all others of this stage are part of the fingerprint.
IRRELEVANT = {"model_path", "output_path", "device", "hidden_memory", "force", "hf_token"} | PLANNING
MEASURING = {f.name for f in FIELDS if "reap" in f.metadata["stages"]} - IRRELEVANT


def main(argv: list[str]) -> None:
    """Score, plan, and write both down."""
    settings = resolve("reap", argv)
    check_words(settings)
    begun = time.monotonic()
    checkpoint = open_checkpoint(locate_model(settings.model_path, settings.hf_token))
    layout = understand(checkpoint)
    check_outside(checkpoint.place, settings.output_path)
    result = settings.output_path / FILES[SCORES]
    made_from = inputs_fingerprint(settings, checkpoint)
    if not settings.force and is_current(result, SCORES, made_from):
        console.say(f"{result} is current: same model, calibration and settings; --force scores again")
        plan_again(result, settings, layout)
    else:
        with claimed(settings.output_path):
            write_json(result, score(settings, checkpoint, layout, made_from, begun))
        report.write(settings.output_path)
    print(result)


def inputs_fingerprint(settings: Settings, checkpoint: Checkpoint) -> str:
    """A digest of everything that the result depends on; cheap, and computed before torch is imported."""
    from moeprune.scoring.calibration.sources import request_digest

    values = {name: value for name, value in settings.public()["values"].items() if name in MEASURING}
    return digest(VERSION, checkpoint.fingerprint, request_digest(settings), to_text(values))


def score(settings: Settings, checkpoint: Checkpoint, layout: Layout, made_from: str, begun: float) -> dict[str, Any]:
    """The whole result as JSON. torch and transformers are imported from here on."""
    console.say(f"model: {describe(checkpoint, layout)}")
    check_wishes(settings, Model.of(layout))
    from moeprune.scoring.building import read_config
    from moeprune.scoring.calibration.load import load_calibration
    from moeprune.scoring.formats import mlx
    from moeprune.scoring.run import load_tokenizer, score_experts

    tokenizer = load_tokenizer(checkpoint.place, settings)
    calibration = load_calibration(settings, tokenizer, mlx.seen(read_config(checkpoint, settings), checkpoint))
    check_wishes(settings, Model.of(layout), calibration.domains)
    scoring_begun = time.monotonic()
    resumable = digest(made_from, calibration.fingerprint, settings.device)  # the same bits need the same device
    sums = score_experts(settings, checkpoint, layout, calibration, resumable)
    seconds = time.monotonic() - scoring_begun
    summarise(sums, calibration, seconds)
    plan = proposal(settings, sums, Model.of(layout), calibration.summary)
    return {
        **header(SCORES, ("torch", "transformers", "safetensors", "numpy")),
        "settings": settings.public(),
        "inputs": {
            "fingerprint": made_from,
            "model": model_facts(checkpoint, layout),
            "calibration": calibration.summary,
        },
        "scores": sums.to_json(),
        "plan": plan,
        "warnings": console.warnings(),
        "timing": {"scoring_s": round(seconds, 3), "total_s": round(time.monotonic() - begun, 3)},
    }


def describe(checkpoint: Checkpoint, layout: Layout) -> str:
    """The model in one line."""
    return (
        f"{layout.model_type} in {checkpoint.place.name}, {console.size(checkpoint.total_bytes)}; "
        f"{len(layout.blocks)} MoE layers of {layout.experts} experts, {layout.top_k} for each token"
    )


def model_facts(checkpoint: Checkpoint, layout: Layout) -> dict[str, Any]:
    """What the result says about the model it was made from."""
    return {
        "name": checkpoint.place.name,
        "path": str(checkpoint.place),
        "fingerprint": checkpoint.fingerprint,
        "model_type": layout.model_type,
        "total_bytes": checkpoint.total_bytes,
        "blocks": len(layout.blocks),
        **plain(Limits.of(layout)),
        "trunk": [block.name for block in layout.blocks if block.role == "trunk"],
    }


def plan_again(result: Path, settings: Settings, layout: Layout) -> None:
    """The plan from stored sums where the wishes for it have changed; nothing is scored."""
    data = read_result(result, SCORES)
    then, now = data["settings"]["values"], settings.public()["values"]
    if all(then.get(name) == now[name] for name in PLANNING):
        return
    console.say("the wishes for the plan have changed: planning again from the same scores")
    sums = Sums.from_json(data["scores"])
    model = Model.of(layout)
    check_wishes(replace(settings, scoring_mode=sums.mode), model, sums.domains)
    plan = proposal(settings, sums, model, data["inputs"]["calibration"])
    warnings = list(dict.fromkeys([*data["warnings"], *console.warnings()]))
    write_json(result, {**data, "settings": settings.public(), "plan": plan, "warnings": warnings})
    report.write(settings.output_path)


def summarise(sums: Sums, calibration: Calibration, seconds: float) -> None:
    """What a person should know, on stderr."""
    tokens = calibration.summary["tokens"]
    console.say(f"scored {len(sums.blocks)} MoE layers on {tokens:,} tokens in {console.duration(seconds)}")


if __name__ == "__main__":
    errors.run(main)
