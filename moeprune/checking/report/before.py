"""The parts of the report that come from scoring and preview: what was done, which experts stay, what it covers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from moeprune import console
from moeprune.arrays import Array
from moeprune.checking.report import numbers
from moeprune.checking.report.drawing import Chart, HeatMap, Line, bars, draw, heat_map
from moeprune.checking.report.markup import Html, chip, join, number, percent, section, table, tag
from moeprune.metadata import Sums

Json = dict[str, Any]
UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))


def model_name(recipe: Json, test: Json) -> str:
    """The parent's name."""
    facts = recipe.get("inputs", {}).get("model", {})
    parent = (test.get("inputs", {}).get("parent") or {}).get("path", "")
    path = str(facts.get("path") or parent).rstrip("/")
    hub = re.search(r"models--([^/]+)--([^/]+)/snapshots/", path)
    if hub:
        return f"{hub[1]}/{hub[2]}"
    return "/".join([part for part in path.split("/") if part][-2:]) or "a model"


def head(recipe: Json, test: Json) -> Html:
    """Title, one line of what was done, and the verdict."""
    plan, facts = recipe.get("plan", {}), recipe.get("inputs", {}).get("model", {})
    words = []
    if plan:
        words.append(
            f"{plan.get('kept')} of {plan.get('experts')} experts kept in each of {facts.get('blocks')} layers"
        )
        words.append(f"chosen by {plan.get('how', {}).get('metric', 'a plan')}")
    if facts.get("model_type"):
        words.append(str(facts["model_type"]))
    verdict = _verdict(test) if test else None
    return tag("header", tag("p", "Expert pruning report", class_="eyebrow"), tag("h1", model_name(recipe, test)),
               tag("p", " \u00b7 ".join(words), class_="lead"), verdict)  # fmt: skip


def _verdict(test: Json) -> Html:
    """A pass with losses does not look like one without."""
    word = str(test["verdict"])
    losses, _, counts = str(test["summary"]).rpartition("; ")
    if not losses:
        return tag("p", chip(word), f" {counts}", class_="verdict")
    lost = tag("b", losses.removeprefix("with losses: "))
    sign = chip(f"{word} with losses", "warning" if word == "pass" else word)
    return join((tag("p", sign, " ", lost, class_="verdict"), tag("p", counts, class_="note")))


def warnings(recipe: Json, preview: Json, test: Json) -> Html | None:
    """Everything to be warned of, failures first."""
    failed = [f"{check['name']}: {check['reason']}" for check in test.get("checks", []) if check["status"] == "fail"]
    others = [w for result in (test, recipe, preview) for w in result.get("warnings", [])]
    listed = {f"{check['name']}: {check['reason']}" for check in test.get("checks", [])}  # right below, worst first
    others = [text for text in dict.fromkeys(map(str, others)) if text not in listed]
    if not failed and not others:
        return None
    items = [tag("li", text, class_="fail") for text in failed] + [tag("li", text) for text in others]
    parts = [f"{len(failed)} failed"] if failed else []
    parts += [f"{len(others)} warning{'s' * (len(others) > 1)} to read first"] if others else []
    title = ", ".join(parts)
    return tag("section", tag("h2", title), tag("ul", *items), class_="warnings", id="warnings")


def _layers(recipe: Json) -> tuple[list[numbers.Layer], tuple[str, ...]]:
    if not recipe.get("scores"):
        return [], ()
    sums = Sums.from_json(recipe["scores"])
    return numbers.layers(sums, recipe.get("plan", {})), sums.domains


def _short(block: str) -> str:
    return next((part for part in reversed(block.split(".")) if part.isdigit()), block)


def experts(recipe: Json) -> Html | None:
    """The heat map with its controls."""
    layers, domains = _layers(recipe)
    if not layers:
        return None
    metric = recipe.get("plan", {}).get("how", {}).get("metric", "score")
    orders = [("id", "expert number"), ("score", f"{metric}, largest first"), ("load", "tokens, most first")]
    shown = [("", f"{metric} (all domains)"), ("load", "tokens routed"), *((d, f"score in {d}") for d in domains)]
    controls = tag(
        "div",
        tag("label", "colour ", tag("select", *(tag("option", name, value=key) for key, name in shown), id="domain")),
        tag("label", "order ", tag("select", *(tag("option", name, value=key) for key, name in orders), id="order")),
        class_="controls",
    )
    scale = join(tag("i", class_=f"h{step}") for step in range(10))
    legend = tag("p", "less ", tag("span", scale, class_="scale"), " more, within the layer (square root) \u00b7 "
                 "full cell: kept, small cell: removed", class_="note")  # fmt: skip
    titles = [f"{layer.block}: {len(layer.kept)} of {len(layer.score_E)} kept" for layer in layers]
    colours = [numbers.steps(layer.score_E) for layer in layers]
    cells = HeatMap([_short(layer.block) for layer in layers], colours, [layer.kept for layer in layers], titles,
                    [layer.for_images for layer in layers])  # fmt: skip
    return section("Experts", controls, heat_map(cells), legend, _for_images(layers), anchor="experts",
                   note="Rows are layers, columns are experts; wide models scroll sideways.")  # fmt: skip


def _for_images(layers: list[numbers.Layer]) -> Html | None:
    """Which experts work mostly for images, and how many of them are lost."""
    seeing = [layer for layer in layers if layer.for_images]
    if not seeing:
        return None
    total = sum(len(layer.for_images) for layer in seeing)
    stay = sum(len(layer.for_images & layer.kept) for layer in seeing)
    rows = [
        (
            (_short(layer.block), number),
            ", ".join(map(str, sorted(layer.for_images & layer.kept))) or "\u2013",
            ", ".join(map(str, sorted(layer.for_images - layer.kept))) or "\u2013",
        )
        for number, layer in enumerate(layers)
        if layer.for_images
    ]
    said = f"{total} experts work mostly for images (framed above); {stay} of them are kept."
    return join((tag("p", said, class_="sentence"), table(("layer", "kept", "removed"), rows)))


def heat_data(recipe: Json) -> Json:
    """What the page's script needs to colour and order the heat map: digits by layer, orders by layer."""
    layers, domains = _layers(recipe)
    colours = {"": [_digits(layer.score_E) for layer in layers], "load": [_digits(layer.load_E) for layer in layers]}
    for index, domain in enumerate(domains):
        colours[domain] = [_digits(layer.saliency_DE[index]) for layer in layers]
    orders = {
        "score": [numbers.order(layer.score_E) for layer in layers],
        "load": [numbers.order(layer.load_E) for layer in layers],
    }
    return {"colours": colours, "orders": orders}


def _digits(values: Array) -> str:
    return "".join(map(str, numbers.steps(values)))


def curves(recipe: Json) -> Html | None:
    """What each domain keeps with fewer experts, and how unevenly the tokens are spread over them."""
    layers, domains = _layers(recipe)
    if not layers:
        return None
    kept = sum(len(layer.kept) for layer in layers) / sum(len(layer.score_E) for layer in layers)
    mark = (kept, f"{percent(kept, 0)} kept")
    charts = (_coverage(layers, domains, mark), _spread("tokens", [layer.load_E for layer in layers], mark))
    return section("Load and coverage", tag("div", *map(draw, charts), class_="two"),
                   note="Coverage: what the best experts by the plan's score hold of each domain's score, mean over "
                   "the layers; the band goes from the worst domain to the best. Load: what the busiest experts get "
                   "of all tokens; the band goes from the most even layer to the most uneven.")  # fmt: skip


def _coverage(layers: list[numbers.Layer], domains: tuple[str, ...], mark: tuple[float, str]) -> Chart:
    x_C, held_DC = numbers.coverage(layers)
    there = [d for d in range(len(domains)) if held_DC[d].any()]
    held_DC, names = held_DC[there], [domains[d] for d in there]
    at = int(np.abs(x_C - mark[0]).argmin())
    worst = int(held_DC[:, at].argmin())
    xs = x_C.tolist()
    lines = [Line("mean over domains", list(zip(xs, held_DC.mean(0).tolist(), strict=True)),
                  held_DC.min(0).tolist(), held_DC.max(0).tolist())]  # fmt: skip
    if len(names) > 1:
        lines.append(Line(f"worst at this cut: {names[worst]}", list(zip(xs, held_DC[worst].tolist(), strict=True))))
    lines.append(Line("all experts alike", [(0, 0), (1, 1)], dashed=True))
    return Chart("share of the experts, best score first", "Coverage: share of the score held", lines, x_percent=True,
                 y_percent=True, upright=mark, y_most=1.0)  # fmt: skip


def _spread(name: str, rows: list[Array], mark: tuple[float, str]) -> Chart:
    x_C, curves_LC = numbers.cumulative(rows)
    points = list(zip(x_C.tolist(), curves_LC.mean(0).tolist(), strict=True))
    band = Line(f"share of {name}", points, curves_LC.min(0).tolist(), curves_LC.max(0).tolist())
    even = Line("all experts alike", [(0, 0), (1, 1)], dashed=True)
    return Chart("share of the experts, busiest first", f"Load: share of {name} held", [band, even], x_percent=True,
                 y_percent=True, upright=mark, y_most=1.0)  # fmt: skip


def coverage(recipe: Json) -> Html | None:
    """What the kept experts hold of each domain, and whether the calibration was enough."""
    plan = recipe.get("plan", {})
    held = sorted(plan.get("coverage", {}).items(), key=lambda item: item[1])
    if not held:
        return None
    stability = plan.get("calibration", {})
    agree = list(stability.get("jaccard", {}).values())
    verdict = str(stability.get("verdict") or "")
    facts = [verdict[0].upper() + verdict[1:] + "."] if verdict else []
    if agree:
        halves = f"{number(float(np.mean(agree)), 2)} on average, {number(min(agree), 2)} in the worst layer"
        facts.append(f"Kept sets of two halves of the calibration agree (Jaccard) by {halves}.")
    if plan.get("never_routed"):
        facts.append(f"{plan['never_routed']} experts saw no calibration token at all.")
    title = tag("h3", "Share of the score that the kept experts hold, worst domain first")
    return section(
        "Is the calibration enough?", *(tag("p", fact) for fact in facts), title, bars(held), anchor="calibration"
    )


def sizes(preview: Json, test: Json) -> Html | None:
    """Quality against size, from the preview, with the cut that was really made."""
    rows = preview.get("variants", [])
    if not rows:
        return None
    unit, power = next((name, power) for name, power in UNITS if max(row["bytes"] for row in rows) >= power)
    lines = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        own = sorted((row for row in rows if row["metric"] == metric), key=lambda row: row["bytes"])
        overall = [row["fidelity"]["overall"] for row in own]
        points = [(row["bytes"] / power, o["kl"]) for row, o in zip(own, overall, strict=True)]
        low, high = ([o["kl_interval"][end] for o in overall] for end in (0, 1))
        lines.append(Line(metric, points, low, high, whiskers=True))
    dots = []
    if test.get("fidelity"):
        kl, size = test["fidelity"]["overall"]["kl"], test["inputs"]["pruned"]["bytes"]
        dots = [(size / power, kl, "the model that was cut")]
    bound = preview["bounds"]["max_kl"]
    chart = Chart(
        f"size in {unit}", "Mean KL divergence to the parent", lines, dots=dots, level=(bound, f"bound {bound:g}")
    )
    best = preview.get("smallest_within_bounds")
    found = f"Smallest within the bounds: {best['name']}, {console.size(best['bytes'])}." if best else (
        "No variant is within the bounds.")  # fmt: skip
    return section("Quality against size", tag("div", draw(chart), class_="one"), tag("p", found, class_="sentence"),
                   _variants(rows), anchor="sizes",
                   note="The parent with its dropped experts masked, which is what each cut computes.")  # fmt: skip


def _variants(rows: list[Json]) -> Html:
    head = ("variant", "size", "loss", "KL", "95% interval", "KL median", "KL p95", "same top token")
    return table(head, [_variant(row) for row in rows])


def _variant(row: Json) -> list[Any]:
    o = row["fidelity"]["overall"]
    return [
        row["name"],
        (console.size(row["bytes"]), row["bytes"]),
        (number(o["loss"]), o["loss"]),
        (number(o["kl"], 4), o["kl"]),
        (f"{number(o['kl_interval'][0], 4)} to {number(o['kl_interval'][1], 4)}", o["kl_interval"][1]),
        (number(o["kl_median"], 4), o["kl_median"]),
        (number(o["kl_p95"]), o["kl_p95"]),
        (percent(o["same_top"]), o["same_top"]),
    ]


def provenance(recipe: Json, test: Json) -> Html:
    """What was done, from what, with what."""
    inputs = recipe.get("inputs", {})
    facts, data = inputs.get("model", {}), inputs.get("calibration", {})
    held = test.get("inputs", {}).get("held_out", {})
    rows: list[tuple[str, Any]] = [
        (
            "model",
            f"{facts.get('path', '')} ({facts.get('model_type', '')}, {console.size(facts.get('total_bytes', 0))})",
        ),
        (
            "calibration",
            f"{data.get('source', '')}: {data.get('samples', 0):,} samples, {data.get('tokens', 0):,} tokens",
        ),
        (
            "calibration digest",
            "; ".join(str(f.get("sha256", "")) for f in data.get("files", []) if isinstance(f, dict)),
        ),
        ("fingerprint of the scores", inputs.get("fingerprint", "")),
        ("pruned model", test.get("inputs", {}).get("pruned", {}).get("path", "")),
        ("held-out data", f"{held.get('source')}: {held.get('samples')} samples" if held else ""),
    ]
    for result, what in ((recipe, "scored"), (test, "judged")):
        if result:
            tool, where = result.get("tool", {}), result.get("environment", {})
            made_by = f"{tool.get('name')} {tool.get('version')} ({tool.get('git_commit')})"
            rows.append((what, f"{result.get('created_at')} by {made_by}"))
            rows.append((f"{what} with", ", ".join(f"{name} {version}" for name, version in where.items())))
            rows.append((f"{what} in", console.duration(float(result.get("timing", {}).get("total_s", 0)))))
    listed = [(name, value) for name, value in rows if value]
    terms = join(join((tag("dt", name), tag("dd", value))) for name, value in listed)
    return section("What was done, and from what", tag("dl", terms), _settings(recipe, test), anchor="provenance")


def _settings(recipe: Json, test: Json) -> Html | None:
    """Settings that were chosen; the defaults are not listed."""
    chosen: dict[str, tuple[Any, str]] = {}
    for result in (recipe, test):
        settings = result.get("settings", {})
        for name, origin in settings.get("origin", {}).items():
            if origin != "default":
                chosen[name] = (settings["values"].get(name), origin)
    if not chosen:
        return None
    rows = [(name, str(value), origin) for name, (value, origin) in sorted(chosen.items())]
    return join((tag("h3", "Settings that were chosen"), table(("setting", "value", "from"), rows)))
