#!/usr/bin/env python3
"""Tables and pictures of the measurements in docs/*.json.

    python benchmarks/show.py

Draws docs/*.svg, writes docs/measurements.md, and fills the short table of methods between its marks in README.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))

from benchmarks import forecast  # noqa: E402
from benchmarks.drawing import Column, dots, heat  # noqa: E402
from tests.contracts.documents import between  # noqa: E402

Result = Mapping[str, Any]
RATIOS = (0.25, 0.5, 0.75)
# What the README shows of the methods; all of them are in docs/measurements.md.
SHORT = {
    ("weighted_ean_sum", "shares"), ("weighted_ean_sum", "pooled"), ("reap", "pooled"), ("ean_sum", "pooled"),
    ("full", "pooled"), ("frequency", "pooled"), ("random", "pooled"), ("router", "pooled"),
}  # fmt: skip
BLEND_NAMES = {
    "pooled": "every token alike (`pooled`)",
    "weighted": "balanced (`weighted`)",
    "shares": "mean of shares (`shares`)",
    "maxmin": "best worst domain (`maxmin`)",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def kl_cell(row: Result, best: bool) -> str:
    """KL with its spread; the lowest of a column stands out."""
    text = f"{row['kl']['mean']:.3f} ± {row['kl']['sd']:.3f}"
    return f"**{text}**" if best else text


def exact_cell(row: Result) -> str:
    """Exactly right answers with their spread."""
    return f"{100 * row['exact']['mean']:.1f} ± {100 * row['exact']['sd']:.1f}"


def by_ratio(rows: Sequence[Result], *keys: str) -> dict[tuple[str, ...], dict[float, Result]]:
    """The rows of each method, by ratio."""
    found: dict[tuple[str, ...], dict[float, Result]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row["ratio"]] = row
    return found


def ranked(rows: Sequence[Result], *keys: str) -> dict[tuple[str, ...], dict[float, Result]]:
    """The methods, lowest KL at half of the experts first."""
    found = by_ratio(rows, *keys)
    return {name: found[name] for name in sorted(found, key=lambda name: found[name][0.5]["kl"]["mean"])}


def measured_cells(methods: Mapping[Any, Mapping[float, Result]]) -> dict[Any, list[str]]:
    """KL and exact at each ratio, for every method."""
    best = {ratio: min(cells[ratio]["kl"]["mean"] for cells in methods.values()) for ratio in RATIOS}
    return {
        name: [
            text
            for ratio in RATIOS
            for text in (kl_cell(cells[ratio], cells[ratio]["kl"]["mean"] == best[ratio]), exact_cell(cells[ratio]))
        ]
        for name, cells in methods.items()
    }


RATIO_HEAD = [f"{ratio:.0%} cut: {what}" for ratio in RATIOS for what in ("KL", "exact %")]


def methods_table(result: Result) -> str:
    """Method by ratio."""
    cells = measured_cells(ranked(result["rows"], "metric", "blend"))
    default = (result["default"]["metric"], result["default"]["blend"])
    notes = {default: " (the default)", ("reap", "pooled"): " (REAP as published)"}
    rows = [[f"`{name[0]}`, `{name[1]}`{notes.get(name, '')}", *texts] for name, texts in cells.items()]
    return table(["`--metric`, `--blend`", *RATIO_HEAD], rows)


def short_methods_table(result: Result) -> str:
    """The methods that most people choose between, and those that show how far down it goes."""
    rows = [row for row in result["rows"] if (row["metric"], row["blend"]) in SHORT]
    return methods_table({**result, "rows": rows})


def modes_table(result: Result) -> str:
    """What each scoring mode costs, and how good the plan is that it leads to at half of the experts."""
    half = {(row["metric"], row["blend"]): row for row in result["rows"] if row["ratio"] == 0.5}
    metrics = {"routed": "reap", "full": "full", "router": "router"}
    rows = [
        [f"`{mode}`", f"{cost['over_routed']:.2f}", kl_cell(half[metrics[mode], "pooled"], False),
         exact_cell(half[metrics[mode], "pooled"])]
        for mode, cost in result["modes"].items()
    ]  # fmt: skip
    return table(["`--scoring-mode`", "time, routed = 1", "50% cut: KL", "exact %"], rows)


def alone_table(result: Result) -> str:
    """A domain that calibrates alone, and the others."""
    rows = [
        [
            plain_name(row["calibrated_on"]),
            f"`{row['metric']}`",
            *(cell for part in ("own", "others") for cell in (kl_cell(row[part], False), exact_cell(row[part]))),
        ]
        for row in result["alone"]
    ]
    return table(["calibrated on", "metric", "its own: KL", "exact %", "the others: KL", "exact %"], rows)


def unequal_table(result: Result) -> str:
    """Every blend on domains of unequal size, and equal data beside them."""
    cells = measured_cells(by_ratio(result["unequal"], "data", "metric", "blend"))
    rows = [
        ["equal data" if data == "equal" else BLEND_NAMES[blend], f"`{metric}`", *texts]
        for (data, metric, blend), texts in cells.items()
    ]
    return table(["blend", "`--metric`", *RATIO_HEAD], rows)


def special_table(result: Result) -> str:
    """Special tokens counted or left out, and the experts kept that work mostly for them."""
    names = {
        ("count", "none"): "counted",
        ("skip", "none"): "left out",
        ("skip", "auto"): "left out, their experts kept (the default)",
    }
    rows = [
        [f"`{metric}`, `{blend}`", names[counted, protect], *texts]
        for (metric, blend, counted, protect), texts in measured_cells(
            by_ratio(result["rows"], "metric", "blend", "special_tokens", "protect")
        ).items()
    ]
    return table(["`--metric`, `--blend`", "special tokens", *RATIO_HEAD], rows)


def methods_chart(result: Result) -> str:
    """Exactly right answers by method, a dot for each ratio."""
    methods = ranked(result["rows"], "metric", "blend")
    order = sorted(methods, key=lambda name: -methods[name][0.5]["exact"]["mean"])
    default = (result["default"]["metric"], result["default"]["blend"])
    names = {default: " (default)", ("reap", "pooled"): " (published)"}
    rows = {}
    for name in order:
        label = name[0] + ("" if name[1] == "pooled" else f", {name[1]}") + names.get(name, "")
        rows[label] = [(methods[name][ratio]["exact"]["mean"], methods[name][ratio]["exact"]["sd"]) for ratio in RATIOS]
    return dots(
        title="Exactly right answers that are left",
        subtitle=f"demo model, {result['model']['experts']} experts a layer; mean and standard deviation of "
        f"{result['seeds']} calibration draws",
        rows=rows,
        series=[f"{ratio:.0%} of the experts cut" for ratio in RATIOS],
        reference=("uncut", result["parent"]["exact"]),
    )


def alone_chart(result: Result) -> str:
    """Exactly right answers by the domain that calibrated (rows) and the domain that is asked (columns)."""
    found = [row for row in result["alone"] if row["metric"] == "reap"]
    rest = result["evaluation"]["domains_with_answers"] - len(found) + 1
    columns = [
        Column(plain_name(group, rest), [row["exact_of"][group] for row in found]) for group in found[0]["exact_of"]
    ]
    return heat(
        title="What calibration does not show, the cut removes",
        subtitle=f"exactly right answers, {result['alone_ratio']:.0%} of the experts cut, by the data that chose them",
        rows=[plain_name(row["calibrated_on"]) for row in found],
        columns=columns,
    )


def plain_name(domain: str, rest: int = 0) -> str:
    """A domain as a person writes it; `rest` counts those without a name."""
    return {"all": "all domains", "rest": f"the other {rest}"}.get(domain, domain.replace("_", " "))


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "methods": ("methods.json", methods_table),
    "scoring_modes": ("methods.json", modes_table),
    "calibration_on_one_domain": ("calibration.json", alone_table),
    "calibration_on_unequal_domains": ("calibration.json", unequal_table),
    "special_tokens": ("special_tokens.json", special_table),
}
README_MARKS = ("<!-- methods -->", "<!-- end of methods -->")
PICTURES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "methods.svg": ("methods.json", methods_chart),
    "calibration.svg": ("calibration.json", alone_chart),
}


def made(entry: tuple[str, Callable[[Result], str]]) -> str:
    """A table or a picture from its measurements."""
    name, make = entry
    return make(json.loads((DOCS / name).read_text(encoding="utf-8")))


def measurements() -> str:
    """The page with everything that was measured."""
    numbers = {
        key: text for name in ("special_tokens", "methods", "calibration") for key, text in _numbers(name).items()
    }
    page = PAGE.format(
        **{name: made(entry) for name, entry in TABLES.items()}, **(numbers | _special_numbers()), limits=LIMITS
    )
    return page + "\n" + made(("forecast.json", forecast.section))


def _numbers(name: str) -> dict[str, str]:
    result = json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))
    return {
        f"{name}_seeds": str(result["seeds"]),
        f"{name}_tokens": f"{result['calibration_tokens']:,}",
        "samples": str(result["evaluation"]["samples"]),
        "domains": str(result["evaluation"]["domains"]),
        "answered": str(result["evaluation"]["domains_with_answers"]),
        "parent": f"{result['parent']['exact']:.1%}",
    }


def _special_numbers() -> dict[str, str]:
    result = json.loads((DOCS / "special_tokens.json").read_text(encoding="utf-8"))
    found = [seed["experts"] for seed in result["special"]]
    return {
        "special_share": f"{fmean(seed['tokens'] for seed in result['special']):.0%}",
        "special_experts": f"{min(found)} to {max(found)} of {result['model']['experts'] * result['model']['blocks']}",
        "special_steps": str(result["steps"]),
        "special_parent": f"{result['parent']['exact']:.1%}",
    }


PAGE = """\
# Measurements on the demo model

The model in `demo/model` has 4 layers of 32 experts, 2 for each token, and 3.5 million parameters. Read the order of
the methods, not the size of the losses: a model this small has hardly an expert to spare, and published cuts of models
with 100 billion parameters lose far less. Differences below the spread between draws of calibration data mean nothing.

KL is the mean divergence from the parent in nats per token, over {samples} held-out samples of {domains} domains.
Exact is the share of answers that are exactly right, over the {answered} domains that have answers; the parent has
{parent}. Every domain counts alike. Each number is mean ± standard deviation over draws of calibration data; the lowest
KL of a column is bold. Dropped experts are masked in the router, which computes what the cut model computes.

## Metrics and blends

![Exactly right answers by method](methods.svg)

`python benchmarks/methods.py --output docs/methods.json`: {methods_seeds} draws of {methods_tokens} tokens, the same
number of each domain.

{methods}
## Scoring modes

From the same run: processor time of scoring, and the cut of half of the experts by each mode's own metric.

{scoring_modes}
## Calibration on one domain

![Exactly right answers by calibration data](calibration.svg)

`python benchmarks/calibration.py --output docs/calibration.json`: {calibration_seeds} draws of {calibration_tokens}
tokens, half of the experts cut. In the last rows "its own" are the five domains above.

{calibration_on_one_domain}
## Calibration on domains of unequal size

From the same run: the largest domain has twenty times the tokens of the smallest. "Equal data" has as many tokens, of
each domain the same number.

{calibration_on_unequal_domains}
## Special tokens

The demo model's own texts have none, so it was trained on for {special_steps} steps in chats: `<s>` in front of each
text, `<|user|>` and `<|assistant|>` before the turns, `<|endoftext|>` behind an answer. That is {special_share} of the
tokens; {special_experts} experts do more than half of their work for them. This parent has {special_parent} right.
`python benchmarks/special_tokens.py --output docs/special_tokens.json`: {special_tokens_seeds} draws.

{special_tokens}
Left out of the sums, special tokens take no places from experts that the text needs; but without the few experts
that they need themselves, one domain (facts) fell to half of its right answers at 25%. So `--protect auto` keeps those.
The largest activations, by which `--protect super` finds super experts, are taken over all tokens but padding.

{limits}"""

LIMITS = """\
## Calibration data of any size

`python benchmarks/reading.py --size 2GB`: resident memory of a process that reads a file and draws 512 samples of it
(22 to 35 MB before it began), and its processor time. The line of 10 GB was seen on data of the same kind.

| file | rows | peak memory | processor time |
| --- | --- | --- | --- |
| jsonl, 10.0 GB | 5,466,858 | 40 MB | 69 s |
| jsonl, 2.0 GB | 930,494 | 41 MB | 12 s |
| csv, 2.0 GB | 930,494 | 28 MB | 16 s |
| parquet, 2.0 GB, groups of 20,000 rows | 930,494 | 174 MB, of which 90 MB are pyarrow | 9 s |

A whole run, `python reap.py --model-path demo/model --calibration-path FILE --max-samples 128`, took 1.29 GB at most
with the 10 GB (113,028 tokens drawn) and 1.34 GB with their first 100,000 lines (114,447 tokens).

Pixels of images exist only while the model computes with them, and what a vision tower made of them counts as hidden
states: beyond `--hidden-memory` it goes to the disk. Until the tower is done, one copy of its own hidden states stays
in memory for each image: the patches of the image x the tower's width x 2 bytes in bfloat16.
"""


def readme_table() -> str:
    """The rows of the README's table."""
    return made(("methods.json", short_methods_table))


def main() -> None:
    """Draw, and write."""
    for name, entry in PICTURES.items():
        (DOCS / name).write_text(made(entry), encoding="utf-8")
    (DOCS / "measurements.md").write_text(measurements(), encoding="utf-8")
    readme = ROOT / "README.md"
    head, _, tail = between(readme.read_text(encoding="utf-8"), *README_MARKS)
    readme.write_text(head + readme_table() + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
