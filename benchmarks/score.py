#!/usr/bin/env python3
"""How much longer scoring takes than the plain forward of the model in memory, on the same tokens.

Medians of paired runs in one process. Scoring reads every weight from the disk (its cache, here) during each run; the
plain model has them in memory already. One JSON line on stdout, a table on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402

from moeprune.checkpoint.families import understand  # noqa: E402
from moeprune.checkpoint.folder import open_checkpoint  # noqa: E402
from moeprune.scoring.adapters import attached, find_sites  # noqa: E402
from moeprune.scoring.calibration.batching import Batch  # noqa: E402
from moeprune.scoring.observer import Observer  # noqa: E402
from moeprune.scoring.run import forward  # noqa: E402
from moeprune.scoring.streaming import LayerStream  # noqa: E402
from moeprune.settings import Settings  # noqa: E402

LIMIT = 1.10  # of the plain forward's time, in mode routed
DOMAINS = ("first", "second", "third", "fourth")


def make_model(folder: Path, layers: int, dtype: torch.dtype) -> None:
    """A model with the proportions of a real one, small enough for two cores."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).to(dtype).save_pretrained(folder)


def make_batches(count: int, rows: int, length: int) -> list[Batch]:
    """Random tokens of four domains."""
    made = []
    for index in range(count):
        ids_BT = torch.randint(0, 8192, (rows, length), generator=torch.Generator().manual_seed(index))
        domain_BT = (torch.arange(rows)[:, None] % len(DOMAINS)).expand(rows, length).to(torch.int16)
        slice_BT = torch.full((rows, length), index % 4, dtype=torch.int8)
        made.append(Batch({"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}, domain_BT, slice_BT))
    return made


def clock(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds that `work` takes: by the clock, and of processors. On a busy machine only the latter say much."""
    gc.collect()
    begun, processors = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, time.process_time() - processors


def over_plain(times: dict[str, list[tuple[float, float]]], which: int) -> dict[str, float]:
    """The median of each kind's ratios to the plain forward of the same round."""
    pairs = {kind: zip(values, times["plain"], strict=True) for kind, values in times.items() if kind != "plain"}
    return {kind: round(statistics.median(a[which] / b[which] for a, b in both), 4) for kind, both in pairs.items()}


def main() -> None:
    """Measure, print, and fail when mode routed is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, help="a checkpoint; default: a random one, made for this")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--modes", default="routed,router", help="routed, router, full; comma separated")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model_path or Path(scratch) / "model"
        if arguments.model_path is None:
            make_model(folder, arguments.layers, getattr(torch, arguments.dtype))
        result = measure(folder, Path(scratch), arguments)
    report(result)
    sys.exit(0 if result["ratios"].get("routed", 0) <= LIMIT else 1)


def measure(folder: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Paired times of the plain forward, of the bare stream, and of scoring in each mode."""
    data = make_batches(arguments.batches, arguments.rows, arguments.length)
    opened = open_checkpoint(folder)
    stream = LayerStream(opened, Settings(output_path=scratch, dtype=arguments.dtype))
    blocks = understand(opened).blocks
    model = type(stream.model).from_pretrained(folder, dtype=getattr(torch, arguments.dtype)).eval().to(stream.device)
    forwards = [forward(batch) for batch in data]

    def plain() -> None:
        with torch.no_grad():
            for batch in data:  # without the head, which scoring does not run either
                model.base_model(**{name: t.to(stream.device) for name, t in batch.inputs.items()}, use_cache=False)

    def scored(mode: str | None) -> None:
        observer = Observer(stream, data, DOMAINS, mode or "routed")
        find_sites(observer, blocks)
        last = max((site.layer for site in observer.sites), key=stream.order.__getitem__)
        with attached(observer) if mode else contextlib.nullcontext():
            stream.run(forwards, watchers=(observer,) if mode else (), until=last)

    kinds: dict[str, Callable[[], None]] = {"plain": plain, "stream": lambda: scored(None)}
    kinds |= {mode: (lambda mode=mode: scored(mode)) for mode in arguments.modes.split(",")}
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for work in kinds.values():
        work()  # to warm caches up
    for _ in range(arguments.runs):
        for kind, work in kinds.items():
            times[kind].append(clock(work, stream.device))
    return {
        "benchmark": "score",
        "device": str(stream.device),
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "tokens": sum(batch.domain_BT.numel() for batch in data),
        "model_bytes": opened.total_bytes,
        "runs": arguments.runs,
        "median_s": {kind: round(statistics.median(t for t, _ in values), 4) for kind, values in times.items()},
        "ratios": over_plain(times, 0),
        "processor_ratios": over_plain(times, 1),
        "limit": LIMIT,
    }


def report(result: dict[str, object]) -> None:
    """The table for a person, and the line for a program."""
    ratios: dict[str, float] = result["ratios"]  # type: ignore[assignment]
    processors: dict[str, float] = result["processor_ratios"]  # type: ignore[assignment]
    medians: dict[str, float] = result["median_s"]  # type: ignore[assignment]
    print(f"{result['tokens']} tokens, {result['dtype']} on {result['device']}", file=sys.stderr)
    print(f"{'':<10}{'median':>12}{'over plain':>14}{'processors':>14}", file=sys.stderr)
    for kind, seconds in medians.items():
        shown = f"{ratios[kind]:>14.3f}{processors[kind]:>14.3f}" if kind in ratios else ""
        print(f"{kind:<10}{seconds:>10.3f} s{shown}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
