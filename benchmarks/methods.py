#!/usr/bin/env python3
"""Which way to choose experts loses least: every metric at 25, 50 and 75%, on the demo model, with several seeds.

    python benchmarks/methods.py [--seeds 5] [--quick] [--output FILE]

Every seed draws fresh calibration data, with the same number of tokens of each of the demo's domains, and scores the
model on it in all three modes. KL is the mean divergence from the parent in nats per token, exact the share of answers
that are exactly right; every domain counts alike. A table goes to stderr, one JSON line to stdout.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bench import RATIOS, Bench, Loss, Method, Scored, facts, main, summed_up  # noqa: E402
from moeprune.planning.saliency import MEASURED, METRICS, resolve  # noqa: E402

TOKENS = 1200  # of each domain, as in demo/calibration.jsonl
MODES = ("routed", "full", "router")
BLENDED = tuple(Method(metric, blend) for metric in ("reap", "weighted_ean_sum") for blend in ("shares", "maxmin"))
METHODS = (*(Method(metric) for metric in METRICS), *BLENDED)


def mode_of(metric: str) -> str:
    """The cheapest scoring mode that measures what a metric needs."""
    needs = set(METRICS[metric].needs) - {"gram"}
    return next(mode for mode in MODES if needs <= MEASURED[mode])


def measure(bench: Bench, seeds: int, tokens: int) -> dict[str, Any]:
    """All methods at all ratios, seed by seed."""
    scored: list[dict[str, Scored]] = []
    losses: dict[tuple[Method, float], list[Loss]] = {(m, r): [] for m in METHODS for r in RATIOS}
    for seed in range(seeds):
        scored.append(bench.score(bench.calibration(dict.fromkeys(bench.domains, tokens), seed), MODES))
        for method, ratio in losses:
            sums = scored[-1][mode_of(method.metric)].sums
            losses[method, ratio].append(bench.loss(bench.cut(sums, method, ratio, seed)))
        print(f"seed {seed + 1} of {seeds}: {len(losses)} cuts measured", file=sys.stderr)
    chosen = resolve(scored[0]["routed"].sums)
    return {
        "benchmark": "methods",
        **facts(bench),
        "seeds": seeds,
        "calibration_tokens": tokens * len(bench.domains),
        "default": {"metric": chosen[0], "blend": chosen[1]},
        "rows": [
            {"metric": m.metric, "blend": m.blend, "ratio": r, "kept": bench.kept(r), **summed_up(losses[m, r], bench)}
            for m, r in losses
        ],
        "modes": {mode: mode_cost(scored, mode) for mode in MODES},
    }


def mode_cost(scored: list[dict[str, Scored]], mode: str) -> dict[str, float]:
    """Processor time of a mode: median seconds, and the median of its ratios to routed on the same data."""
    return {
        "cpu_s": round(median(seed[mode].cpu_s for seed in scored), 3),
        "over_routed": round(median(seed[mode].cpu_s / seed["routed"].cpu_s for seed in scored), 3),
    }


def show(result: dict[str, Any]) -> None:
    """The table for a person: one line for each method, best first at 50%."""
    rows = {(row["metric"], row["blend"], row["ratio"]): row for row in result["rows"]}
    names = sorted({key[:2] for key in rows}, key=lambda name: rows[*name, 0.5]["kl"]["mean"])
    print(f"parent: {result['parent']['exact']:.1%} exactly right; {result['seeds']} seeds", file=sys.stderr)
    print(f"{'':<32}" + "".join(f"{f'{ratio:.0%}: KL':>16}{'exact':>8}" for ratio in RATIOS), file=sys.stderr)
    for metric, blend in names:
        cells = [rows[metric, blend, ratio] for ratio in RATIOS]
        text = "".join(f"{c['kl']['mean']:>9.3f} ±{c['kl']['sd']:.3f}{c['exact']['mean']:>8.1%}" for c in cells)
        print(f"{metric + ', ' + blend:<32}{text}", file=sys.stderr)
    for mode, cost in result["modes"].items():
        print(f"mode {mode:<8} {cost['cpu_s']:>7.2f} s, {cost['over_routed']:.2f} times routed", file=sys.stderr)


if __name__ == "__main__":
    main(__doc__, measure, show, TOKENS)
