#!/usr/bin/env python3
"""What calibration data decide, on the demo model: one domain alone, and domains of very unequal size.

    python benchmarks/calibration.py [--seeds 5] [--quick] [--output FILE]

alone: half of the experts go, chosen on one domain's data; what becomes of that domain and of the others.
unequal: the calibration data hold each domain with a share of 1/rank, in an order that every seed draws anew, so that
the largest has twenty times the tokens of the smallest. All blends are made from the same sums. Beside it, as many
tokens of equal domains. A table goes to stderr, one JSON line to stdout.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bench import RATIOS, Bench, Loss, Method, facts, main, spread, summed_up  # noqa: E402
from moeprune.planning.saliency import BLENDS  # noqa: E402

TOKENS = 16_000
ALONE = ("multiplication", "to_velan", "stories", "tool_calls", "sql")
ALONE_RATIO = 0.5
METRICS = ("reap", "weighted_ean_sum")


def unequal(domains: tuple[str, ...], tokens: int, seed: int) -> dict[str, int]:
    """Tokens of each domain: shares of 1/rank in a drawn order."""
    order = Random(f"order {seed}").sample(domains, len(domains))
    whole = sum(1 / rank for rank in range(1, len(order) + 1))
    return {domain: round(tokens / whole / rank) for rank, domain in enumerate(order, start=1)}


def equal(domains: tuple[str, ...], tokens: int) -> dict[str, int]:
    """The same number of tokens of every domain."""
    return dict.fromkeys(domains, tokens // len(domains))


def measure_alone(bench: Bench, seeds: int, tokens: int) -> list[dict[str, Any]]:
    """A row for each metric and each domain that calibrates alone, and for all domains together."""
    mixes = {domain: {domain: tokens} for domain in ALONE} | {"all": equal(bench.domains, tokens)}
    rows = []
    for name, mix in mixes.items():
        losses: dict[str, list[Loss]] = {metric: [] for metric in METRICS}
        for seed in range(seeds):
            sums = bench.score(bench.calibration(mix, seed))["routed"].sums
            for metric in METRICS:
                losses[metric].append(bench.loss(bench.cut(sums, Method(metric), ALONE_RATIO, seed)))
        rows += [
            {"calibrated_on": name, "metric": metric, **own_and_others(name, losses[metric], bench)}
            for metric in METRICS
        ]
        print(f"calibrated on {name}: measured", file=sys.stderr)
    return rows


def own_and_others(name: str, losses: list[Loss], bench: Bench) -> dict[str, Any]:
    """Losses of the domain that calibrated and of all others; in `exact_of` those that never calibrate alone are one.

    Where all domains calibrate together, `own` are the domains that have a row of their own.
    """
    own = (name,) if name in bench.domains else ALONE
    parts = {"own": own, "others": tuple(domain for domain in bench.domains if domain not in own)}
    spreads = {
        part: {what: spread([loss.over(domains)[what] for loss in losses]) for what in ("kl", "exact")}
        for part, domains in parts.items()
    }
    rest = tuple(domain for domain in bench.domains if domain not in ALONE)
    groups = {domain: (domain,) for domain in ALONE} | {"rest": rest}
    each = {group: round(fmean(loss.over(members)["exact"] for loss in losses), 5) for group, members in groups.items()}
    return {**spreads, "exact_of": each}


def measure_unequal(bench: Bench, seeds: int, tokens: int) -> list[dict[str, Any]]:
    """Every blend on data of unequal domains, and the metrics on equal data."""
    losses: dict[tuple[str, Method, float], list[Loss]] = {}
    for seed in range(seeds):
        mixes = {"unequal": unequal(bench.domains, tokens, seed), "equal": equal(bench.domains, tokens)}
        for data, mix in mixes.items():
            sums = bench.score(bench.calibration(mix, seed))["routed"].sums
            for method in (Method(m, b) for m in METRICS for b in (BLENDS if data == "unequal" else ("pooled",))):
                for ratio in RATIOS:
                    loss = bench.loss(bench.cut(sums, method, ratio, seed))
                    losses.setdefault((data, method, ratio), []).append(loss)
        print(f"seed {seed + 1} of {seeds}: {len(losses)} cuts measured", file=sys.stderr)
    return [
        {"data": d, "metric": m.metric, "blend": m.blend, "ratio": r, "kept": bench.kept(r), **summed_up(found, bench)}
        for (d, m, r), found in losses.items()
    ]


def measure(bench: Bench, seeds: int, tokens: int) -> dict[str, Any]:
    """Both parts."""
    return {
        "benchmark": "calibration",
        **facts(bench),
        "seeds": seeds,
        "calibration_tokens": tokens,
        "alone_ratio": ALONE_RATIO,
        "alone": measure_alone(bench, seeds, tokens),
        "unequal": measure_unequal(bench, seeds, tokens),
    }


def show(result: dict[str, Any]) -> None:
    """Both tables, for a person."""
    print(f"parent: {result['parent']['exact']:.1%} exactly right; {result['seeds']} seeds", file=sys.stderr)
    print(f"{'calibrated on':<36}{'own: KL':>10}{'exact':>8}{'others: KL':>14}{'exact':>8}", file=sys.stderr)
    for row in result["alone"]:
        own, others = row["own"], row["others"]
        print(
            f"{row['calibrated_on'] + ', ' + row['metric']:<36}{own['kl']['mean']:>10.3f}{own['exact']['mean']:>8.1%}"
            f"{others['kl']['mean']:>14.3f}{others['exact']['mean']:>8.1%}",
            file=sys.stderr,
        )
    rows = {(row["data"], row["metric"], row["blend"], row["ratio"]): row for row in result["unequal"]}
    print(f"{'':<36}" + "".join(f"{f'{ratio:.0%}: KL':>16}{'exact':>8}" for ratio in RATIOS), file=sys.stderr)
    for name in dict.fromkeys(key[:3] for key in rows):
        cells = [rows[*name, ratio] for ratio in RATIOS]
        text = "".join(f"{c['kl']['mean']:>9.3f} ±{c['kl']['sd']:.3f}{c['exact']['mean']:>8.1%}" for c in cells)
        print(f"{', '.join(name):<36}{text}", file=sys.stderr)


if __name__ == "__main__":
    main(__doc__, measure, show, TOKENS)
