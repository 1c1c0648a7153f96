"""The parts of the report that come from the judge: verdicts, fidelity, rates, generations side by side."""

from __future__ import annotations

from typing import Any

from moeprune import console
from moeprune.checking.report.drawing import whisker
from moeprune.checking.report.markup import Html, chip, join, number, percent, section, table, tag

Json = dict[str, Any]
SEVERITY = ("fail", "warning", "not tested", "pass")
OPEN = 12  # pairs that are shown at once


def tiles(test: Json) -> Html | None:
    """The few numbers that matter, large."""
    if not test:
        return None
    made = [_size_tile(test)]
    row = (test.get("fidelity") or {}).get("overall")
    if row:
        low, high = row["kl_interval"]
        made += [
            _tile(
                "KL to the parent",
                number(row["kl"]),
                f"{number(low)} to {number(high)}; median {number(row['kl_median'])}",
            ),
            _tile(
                "loss",
                f"+{number(row['loss_increase'])}",
                f"{number(row['parent_loss'])} to {number(row['loss'])} nats",
            ),
            _tile("same top token", percent(row["same_top"]), f"of {row['tokens']:,} held-out tokens"),
        ]
    for name, title in (("correct", "right answers"), ("broken", "broken texts")):
        rates = (test.get("generation") or {}).get("rates", {}).get(name)
        if rates and rates["pruned"]["count"]:
            parent = rates["parent"]
            under = f"parent {percent(parent['rate'])}" if parent else "parent not asked"
            made.append(_tile(title, percent(rates["pruned"]["rate"]), f"{under}; {rates['pruned']['count']} prompts"))
    return tag("div", *[tile for tile in made if tile], class_="tiles")


def _size_tile(test: Json) -> Html | None:
    inputs = test["inputs"]
    now = inputs["pruned"]["bytes"]
    if not now:  # a server was judged
        return None
    before = (inputs.get("parent") or {}).get("bytes")
    under = f"from {console.size(before)}: {percent(1 - now / before, 0)} less" if before else "parent unknown"
    return _tile("size", console.size(now), under)


def _tile(title: str, value: str, under: str) -> Html:
    return tag(
        "div", tag("span", title, class_="name"), tag("b", value), tag("span", under, class_="under"), class_="tile"
    )


def checks(test: Json) -> Html | None:
    """Every verdict with its reason, the worst first."""
    if not test:
        return None
    found = [("warning" if c["warning"] and c["status"] == "pass" else c["status"], c) for c in test["checks"]]
    found.sort(key=lambda entry: SEVERITY.index(entry[0]))
    rows = [tag("li", chip(word), tag("span", tag("b", c["name"]), " ", c["reason"])) for word, c in found]
    return section("Checks", tag("ul", *rows, class_="checks"), anchor="checks")


def fidelity(test: Json) -> Html | None:
    """Loss, KL and top token by domain."""
    found = test.get("fidelity")
    if not found:
        return None
    answers = (test.get("generation") or {}).get("domains", {})
    head = ("domain", "tokens", "loss", "KL", "95% interval", "KL median", "KL p95", "same top token", "right answers")
    rows = [_row(name, row, answers.get(name, {})) for name, row in found["domains"].items()]
    rows.append(_row("all, each domain alike", found["overall"], {}))
    chance = test.get("random_cuts") or []
    note = "Teacher-forced on held-out text; 95% intervals from 1,000 bootstrap draws of whole samples."
    if chance:
        mean = sum(row["kl"] for row in chance) / len(chance)
        note += f" Cuts of the same size with drawn experts cost a KL of {number(mean)}."
    return section("Fidelity to the parent", table(head, rows), note=note, anchor="fidelity")


def _row(name: str, row: Json, answers: Json) -> list[Any]:
    right = answers.get("correct") or {}
    shares = [(right.get(who) or {}).get("rate") for who in ("parent", "pruned")]
    return [
        name,
        (f"{row['tokens']:,}", row["tokens"]),
        (f"{number(row['parent_loss'])} \u2192 {number(row['loss'])}", row["loss_increase"]),
        (number(row["kl"]), row["kl"]),
        (f"{number(row['kl_interval'][0])} to {number(row['kl_interval'][1])}", row["kl_interval"][1]),
        (number(row["kl_median"]), row["kl_median"]),
        (number(row["kl_p95"]), row["kl_p95"]),
        (percent(row["same_top"]), row["same_top"]),
        _change(*shares),
    ]


def _change(parent: float | None, pruned: float | None) -> tuple[str, float]:
    if pruned is None:
        return "\u2013", 1.0
    return f"{percent(parent, 0)} \u2192 {percent(pruned, 0)}", pruned - (parent or 0)


def rates(test: Json) -> Html | None:
    """How often texts are broken, unended, right or valid, beside the parent's own rate."""
    found = test.get("generation")
    if not found:
        return None
    rows = [_rate_row(name, entry) for name, entry in found["rates"].items() if entry["pruned"]["count"]]
    note = f"{found['prompts']} prompts, greedy; 95% Wilson intervals; the upright line is the parent."
    if not found["enough_prompts"]:
        note += f" A doubling of a 3% loop rate needs {found['needed_prompts']} prompts: this sample cannot show it."
    made = table(("what", "pruned", "", "95% interval", "parent", "prompts"), rows)
    return section("Generated text", made, _drift(found), note=note, anchor="rates")


def _rate_row(name: str, entry: Json) -> list[Any]:
    own, parent = entry["pruned"], entry["parent"]
    low, high = own["interval"]
    theirs = parent["rate"] if parent else None
    return [
        name,
        (percent(own["rate"]), own["rate"]),
        whisker(low, own["rate"], high, theirs),
        (f"{percent(low)} to {percent(high)}", high),
        (percent(theirs), -1 if theirs is None else theirs),
        (f"{own['count']:,}", own["count"]),
    ]


def _drift(found: Json) -> Html | None:
    drift, lengths = found.get("script_drift"), found["lengths"]
    words = [f"Length in tokens, mean: pruned {lengths['pruned']['mean']:.1f}"]
    if lengths["parent"]:
        words[0] += f", parent {lengths['parent']['mean']:.1f}"
    if drift:
        moves = ", ".join(f"{move} ({count})" for move, count in drift["moves"].items())
        words.append(
            f"{drift['hits']} of {drift['count']} texts are in another script than the parent's"
            + (f": {moves}" if moves else "")
        )
    return tag("p", ". ".join(words) + ".")


def generations(test: Json) -> Html | None:
    """Pairs of texts: the smoke prompts, then what was lost, domain by domain."""
    found = test.get("generation")
    if not found:
        return None
    domains = list(dict.fromkeys(pair["domain"] for pair in found["pairs"]))
    options = [tag("option", "all domains", value=""), *(tag("option", name, value=name) for name in domains)]
    controls = tag("div", tag("label", "show ", tag("select", *options, id="pairs")), class_="controls")
    cards = [_pair(pair) for pair in found["pairs"]]
    more = tag("details", tag("summary", f"{len(cards) - OPEN} more"), *cards[OPEN:]) if len(cards) > OPEN else None
    note = f"{len(cards)} of {found['prompts']}: what the pruned model lost comes first."
    return section("Side by side", controls, *cards[:OPEN], more, note=note, anchor="generations")


def _pair(pair: Json) -> Html:
    head = tag("header", tag("span", pair["domain"], class_="domain"), tag("pre", pair["prompt"]))
    wanted = tag("p", "expected ", tag("code", pair["answer"].strip()), class_="wanted") if pair["answer"] else None
    texts = [_text("parent", pair["parent"]), _text("pruned", pair["pruned"])]
    return tag(
        "article", head, wanted, tag("div", *[t for t in texts if t], class_="texts"), data_domain=pair["domain"]
    )


def _text(who: str, entry: Json | None) -> Html | None:
    if entry is None:
        return None
    marks = [tag("span", flaw, class_="chip fail") for flaw in entry["flaws"]]
    if entry["correct"] is not None:
        marks.append(
            tag(
                "span",
                "right" if entry["correct"] else "wrong",
                class_="chip pass" if entry["correct"] else "chip warning",
            )
        )
    if not entry["ended"]:
        marks.append(tag("span", "not ended", class_="chip not-tested"))
    return tag(
        "div",
        tag("p", tag("b", who), f" {entry['tokens']} tokens ", join(marks, " "), class_="who"),
        tag("pre", entry["text"] or " "),
    )
