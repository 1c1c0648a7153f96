#!/usr/bin/env python3
"""Before stage 1: what each step would take and give, from headers, or from config.json and the index alone.

Nothing is kept or fetched: a model here and a temporary file are read for a moment, to know how fast this machine is.
stderr gets a table and stdout one JSON object, unless it is a terminal.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moeprune import console, errors, metadata
from moeprune.checkpoint import formats, gguf_layout, predicted
from moeprune.checkpoint.families import Layout, largest, scopes, understand
from moeprune.checkpoint.folder import Checkpoint
from moeprune.checkpoint.outline import Outline, open_outline
from moeprune.console import duration, say, size
from moeprune.errors import InputError, StageError
from moeprune.planning import forecast, rates
from moeprune.planning.decision import check_words
from moeprune.planning.forecast import Bits, Weights, Work
from moeprune.planning.rates import Rate, Rates
from moeprune.pruning.choice import bytes_per_expert
from moeprune.pruning.result import BASE_MEMORY, MEMORY_PER_TENSOR
from moeprune.results import FILES, SCORES
from moeprune.settings import Settings, resolve
from moeprune.values import listed, ratio

LIKE_SIZE = 0.1  # an earlier run's model has at least this share of the weights that take part in a token
COMPUTE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


def main(argv: list[str]) -> None:
    """Headers -> sizes -> what each stage takes -> a table and JSON."""
    settings = resolve("plan", argv)
    check_words(settings)
    outline = open_outline(settings.model_path, settings.hf_token)
    result = foretell(settings, outline)
    show(result)
    if not sys.stdout.isatty():  # for programs; a person has the table
        print(json.dumps(metadata.plain(result)))


def foretell(settings: Settings, outline: Outline) -> dict[str, Any]:
    """The whole forecast as JSON."""
    layout = layout_of(outline)
    weights = weights_of(settings, outline.checkpoint, layout)
    earlier = earlier_run(settings)
    measured = rates_of(settings, outline, weights, earlier)
    tokens, tokens_source = calibration_tokens(settings, earlier)
    judged = settings.evaluation_samples * settings.max_seq_len
    work = Work(judged, BASE_MEMORY, MEMORY_PER_TENSOR)
    room = forecast.room_of(settings)
    cuts = [
        forecast.variant(wish, layout, weights, measured, work)
        for wish in forecast.wishes(settings, [ratio(text) for text in listed(settings.ratios)])
    ]
    return metadata.header("plan") | {
        "settings": settings.public(),
        "model": {
            "path": settings.model_path,
            "model_type": layout.model_type,
            "measured": outline.measured,
            "source": outline.source,
            "active_weights": round(weights.active),
            **asdict(weights),
        },
        "calibration": {"tokens": tokens, "source": tokens_source},
        "rates": asdict(measured),
        "reap": asdict(forecast.scoring(weights, tokens, room, measured)),
        "cuts": cuts,
        "texts": {"judged": judged, "count": settings.generations, "tokens": settings.max_new_tokens},
        "warnings": console.warnings(),
    }


def layout_of(outline: Outline) -> Layout:
    """The blocks of experts; where sizes are predicted, a misunderstanding may be the prediction's fault."""
    try:
        return understand(outline.checkpoint)
    except InputError as error:
        hint = "" if outline.measured else " (from config and index only; give the hub id, whose headers can be read)"
        raise InputError(f"{error}{hint}") from None


def weights_of(settings: Settings, checkpoint: Checkpoint, layout: Layout) -> Weights:
    """The bytes of the model; experts' bits from the quantization settings, or counted where shapes tell."""
    if checkpoint.container == "gguf":
        width = gguf_layout.counts(checkpoint.config, "embedding_length")
        bits = Bits(*gguf_layout.bits(checkpoint.tensors, layout.blocks), COMPUTE_BYTES.get(settings.dtype, 2))
    else:
        plain = predicted.plain_bytes(checkpoint.config)
        width = max(largest(scope, predicted.HIDDEN_KEYS) for _, scope in scopes(checkpoint.config))
        packed = predicted.bits_per_weight(formats.quantization_of(checkpoint), plain * 8)
        bits = Bits(plain * 8, packed, COMPUTE_BYTES.get(settings.dtype, plain))
    return forecast.weigh(
        checkpoint,
        layout,
        each_bytes=sum(bytes_per_expert(checkpoint, block) for block in layout.blocks),
        hidden=width,
        bits=bits,
    )


def earlier_run(settings: Settings) -> dict[str, Any] | None:
    """The result of an earlier scoring in the output folder, if there is one."""
    path = settings.output_path / FILES[SCORES]
    return metadata.read_result(path, SCORES) if path.is_file() else None


def rates_of(settings: Settings, outline: Outline, weights: Weights, earlier: dict[str, Any] | None) -> Rates:
    """Rates that were given, else that of an earlier run on this machine, else measured now."""
    compute = earlier and rate_of_run(settings, earlier, weights)
    if settings.compute_rate:
        compute = Rate(settings.compute_rate * 1e12, settings.origin["compute_rate"])
    compute = compute or rates.computing(settings.device, int(weights.compute_bytes))
    if settings.read_rate:
        given = Rate(float(settings.read_rate), settings.origin["read_rate"])
        return Rates(compute, given, given)
    return Rates(compute, *rates.disk(outline.checkpoint.shards, settings.output_path))


def rate_of_run(settings: Settings, earlier: dict[str, Any], weights: Weights) -> Rate | None:
    """Operations per second of an earlier scoring, reading included, whose model is still known and of a like size.

    A model that is much smaller spends its time on other things than products of matrices.
    """
    seconds, tokens = earlier.get("timing", {}).get("scoring_s"), earlier["inputs"].get("calibration", {}).get("tokens")
    folder = earlier["inputs"].get("model", {}).get("path", "")
    device = earlier["settings"]["values"].get("device", settings.device)
    if not seconds or not tokens or not Path(folder).exists() or device != settings.device:
        return None
    try:
        outline = open_outline(folder)
        run = weights_of(settings, outline.checkpoint, understand(outline.checkpoint))
    except StageError:
        return None
    if run.scored < LIKE_SIZE * weights.scored:
        return None
    source = f"measured by an earlier run: {Path(folder).name}, {tokens} tokens in {duration(seconds)}"
    return Rate(2 * run.scored * tokens / seconds, source)


def calibration_tokens(settings: Settings, earlier: dict[str, Any] | None) -> tuple[int, str]:
    """Tokens that stage 1 will see: those of an earlier run on the same data, else the most there can be."""
    same = ("calibration_path", "max_samples", "max_seq_len")
    now = settings.public()["values"]
    if earlier and all(earlier["settings"]["values"].get(name) == now[name] for name in same):
        counted = earlier["inputs"].get("calibration", {}).get("tokens")
        if counted:
            return int(counted), "counted by an earlier run on the same data"
    return settings.max_samples * settings.max_seq_len, "at most: --max-samples x --max-seq-len"


def show(result: dict[str, Any]) -> None:
    """The table for a person."""
    model, reap, speed = result["model"], result["reap"], result["rates"]
    known = "exact" if model["measured"] else "only the total is exact"
    say(f"model    {model['model_type']}, {size(model['total_bytes'])}, {model['experts']} experts in each of "
        f"{model['blocks']} MoE layers, {model['top_k']} for each token")  # fmt: skip
    say(f"sizes    {known}: {model['source']}")
    say(f"compute  {speed['compute']['value'] / 1e12:.3g} TFLOP/s ({speed['compute']['source']})")
    for name in ("read", "write"):
        say(f"{name:<8} {size(speed[name]['value'])}/s ({speed[name]['source']})")
    if reap:
        say(f"reap     {result['calibration']['tokens']:,} tokens ({result['calibration']['source']})")
        memory = f"memory {size(reap['memory_bytes'])}, or on a GPU {size(reap['gpu_memory_bytes'])} and hidden states"
        say(f"         {memory}; disk {size(reap['disk_bytes'])} at most; about {duration(reap['time_s'])}")
    say()
    say(f"{'kept':>10}  {'size':>8}  {'prune: memory':>13} {'time':>11}  {'test: loaded':>12} {'streamed':>9}  engines")
    for cut in result["cuts"]:
        say(_row(cut, model["experts"]))
    for note in dict.fromkeys(note for cut in result["cuts"] for note in cut.get("notes", ())):
        say(note)
    say("prune needs its size on the disk; the start of a step, some seconds, is left out of all times")
    longest = max((cut["test"]["loaded"]["time_s"] for cut in result["cuts"] if cut.get("test")), default=0)
    if longest:
        texts = result["texts"]
        say(f"test     {texts['judged']:,} tokens at most, about {duration(longest)}; where both models fit into")
        say(
            f"         memory also {texts['count']} texts of up to {texts['tokens']} tokens, whose time is not foretold"
        )


def _row(cut: dict[str, Any], experts: int) -> str:
    if cut["kept"] is None:
        return f"{'ratio ' + format(cut['asked']['prune_ratio'], 'g'):>10}  not possible: {cut['why_not']}"
    prune, test = cut["prune"], cut["test"]
    memory = [size(test[how]["memory_bytes"]) for how in ("loaded", "streamed")] if test else ["", ""]
    kept = f"{cut['kept']} of {experts}"
    return (
        f"{kept:>10}  {size(cut['after_bytes']):>8}  {size(prune['memory_bytes']):>13} {duration(prune['time_s']):>11}"
        f"  {memory[0]:>12} {memory[1]:>9}  {_engines(cut['engines'])}"
    )


def _engines(verdicts: dict[str, list[dict[str, str]]]) -> str:
    """Engines by the hardest objection that they have."""
    words = {"": "runs", "slow": "slower", "old": "newer releases only", "fail": "not"}
    worst = {name: found[0]["severity"] if found else "" for name, found in verdicts.items()}
    groups = {word: [name for name, how in worst.items() if how == severity] for severity, word in words.items()}
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in groups.items() if names)


if __name__ == "__main__":
    gc.disable()  # nothing here makes cycles; among 100,000 tensors the search for them took a fifth of the time
    errors.run(main)
