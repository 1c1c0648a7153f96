"""Generated structured data: formats to convert, tables and logs to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from moeprune.scoring.calibration.builtin.words import CITIES, NAMES, pair


def records(rng: Random) -> list[dict[str, Any]]:
    """A few rows about people."""
    return [
        {
            "id": rng.randint(100, 999),
            "name": rng.choice(NAMES),
            "city": rng.choice(CITIES),
            "score": rng.randint(0, 100) / 4,
        }
        for _ in range(rng.randint(3, 5))
    ]


def _table(rows: list[dict[str, Any]], line: Callable[[list[Any]], str], head: str = "") -> str:
    return head + "\n".join(line(list(row.values())) for row in rows)


def _bar(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _xml(row: dict[str, Any]) -> str:
    return "  <row>" + "".join(f"<{key}>{value}</{key}>" for key, value in row.items()) + "</row>"


def _insert(cells: list[Any]) -> str:
    return "INSERT INTO people (id, name, city, score) VALUES ({}, '{}', '{}', {});".format(*cells)


FORMATS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "JSON": lambda rows: json.dumps(rows, indent=2),
    "CSV": lambda rows: _table(rows, lambda cells: ",".join(map(str, cells)), "id,name,city,score\n"),
    "YAML": lambda rows: "\n".join("- " + "\n  ".join(f"{k}: {v}" for k, v in row.items()) for row in rows),
    "XML": lambda rows: "<rows>\n" + "\n".join(map(_xml, rows)) + "\n</rows>",
    "a Markdown table": lambda rows: _table(rows, _bar, _bar(list(rows[0])) + "\n|" + " --- |" * 4 + "\n"),
    "SQL": lambda rows: _table(rows, _insert),
    "TOML": lambda rows: "\n\n".join(
        "[[row]]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in row.items()) for row in rows
    ),
}


def conversion(rng: Random) -> dict[str, Any]:
    """The same rows in another format."""
    rows = records(rng)
    source, target = rng.sample(sorted(FORMATS), 2)
    return pair(f"Rewrite this as {target}:\n\n{FORMATS[source](rows)}", FORMATS[target](rows))


def question(rng: Random) -> dict[str, Any]:
    """A question about rows."""
    rows = records(rng)
    best = max(rows, key=lambda row: row["score"])
    mean = sum(row["score"] for row in rows) / len(rows)
    return pair(
        f"{FORMATS[rng.choice(sorted(FORMATS))](rows)}\n\nWho has the highest score, and what is the mean?",
        f"{best['name']} from {best['city']} has the highest score, {best['score']}. The mean of the {len(rows)} "
        f"scores is {mean:.2f}.",
    )


EVENTS = (
    ("INFO", "request served"),
    ("INFO", "cache filled"),
    ("INFO", "user logged in"),
    ("WARN", "disk nearly full"),
    ("ERROR", "timeout of upstream"),
)


def log(rng: Random) -> dict[str, Any]:
    """A question about a log file."""
    lines, second, day = [], rng.randint(0, 3000), rng.randint(1, 28)
    for _ in range(rng.randint(6, 10)):
        second += rng.randint(1, 40)
        stamp = f"2026-03-{day:02d}T08:{second // 60 % 60:02d}:{second % 60:02d}Z"
        level, what = rng.choice(EVENTS)
        lines.append(f"{stamp} {level} worker-{rng.randint(1, 4)} {what} in {rng.randint(2, 900)} ms")
    errors = sum(" ERROR " in line for line in lines)
    slow = max(lines, key=lambda line: int(line.split()[-2]))
    return pair(
        "How many errors are in this log, and which line took longest?\n\n" + "\n".join(lines),
        f"{errors or 'No'} error{'s' * (errors != 1)}. The slowest entry is the one at {slow.split()[0]}: "
        f"{' '.join(slow.split()[3:])}.",
    )
