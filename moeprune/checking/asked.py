"""The generated part of the built-in held-out set: questions with one right answer, and requests for longer texts.

Drawn with a fixed seed of its own, from words that the calibration set does not use in these forms; a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random

Entry = dict[str, str]
EACH = 60  # questions of each kind

PEOPLE = ("Anton", "Beatrix", "Cedric", "Dunja", "Edgar", "Frieda", "Gustav", "Helga", "Ignaz", "Jutta")
THINGS = ("apples", "stamps", "candles", "marbles", "buttons", "feathers", "coins", "shells", "ribbons", "pebbles")
TOWNS = ("Oslo", "Quito", "Riga", "Accra", "Perth", "Lyon", "Kyoto", "Tunis", "Porto", "Lima")
COLOURS = ("red", "blue", "green", "white", "black", "brown", "purple", "orange")
ZONES = ("UTC", "CET", "EST", "JST")
TOPICS = (
    "why the sky is blue", "how a bicycle stays upright", "what a library is for", "how bread rises",
    "why leaves change their colour", "how a lighthouse works", "what makes a good neighbour", "how rain forms",
    "why cats purr", "how glass is made", "what a budget is", "how bees find flowers", "why the sea is salty",
    "how a compass works", "what a vaccine does", "how to plan a walk in the mountains", "why we need sleep",
    "how a violin makes its sound", "what happens when water boils", "how to keep a diary", "why bridges have arches",
    "how a clock keeps time", "what a ship's captain does", "how to learn a poem by heart", "why volcanoes erupt",
    "how paper is recycled", "what an orchestra's conductor does", "how to water plants during a holiday",
    "why the moon has phases", "how a key opens a lock", "what makes a story sad", "how to choose ripe fruit",
)  # fmt: skip
FORMS = (
    "Explain in a few sentences {}.",
    "Write a short note for a village newspaper about {}.",
    "A child of six asks {}. Answer in plain words.",
    "Give a numbered list with five points on {}.",
    "Write a dialogue of six lines in which two friends talk about {}.",
    "Write the first paragraph of an essay about {}.",
    "Summarise in one sentence {}, then give an example.",
    "Write a letter to a friend who asked {}.",
)


def entries() -> list[Entry]:
    """Every generated entry, each question once, always the same."""
    found = [entry for domain, maker in MAKERS.items() for entry in _drawn(domain, maker)]
    found += [{"domain": "requests", "prompt": form.format(topic)} for topic in TOPICS for form in FORMS]
    return found


def _drawn(domain: str, maker: Callable[[Random], tuple[str, str]]) -> Iterator[Entry]:
    generator = Random(f"held out: {domain}")
    seen: set[str] = set()
    while len(seen) < EACH:
        prompt, answer = maker(generator)
        if prompt not in seen:
            seen.add(prompt)
            yield {"domain": domain, "prompt": prompt, "answer": answer}


def _sum(generator: Random) -> tuple[str, str]:
    a, b = generator.randint(2, 99), generator.randint(2, 99)
    sign, result = generator.choice([("+", a + b), ("-", a - b), ("*", a * b)])
    return f"{a} {sign} {b} =", f" {result}"


def _story(generator: Random) -> tuple[str, str]:
    who, other = generator.sample(PEOPLE, 2)
    what, has = generator.choice(THINGS), generator.randint(20, 90)
    gives, finds = generator.randint(2, 15), generator.randint(2, 15)
    text = f"{who} has {has} {what}, gives {gives} to {other} and finds {finds} more. How many {what} has {who} now?"
    return f"{text} Answer with the number alone:", f" {has - gives + finds}"


def _order(generator: Random) -> tuple[str, str]:
    numbers = generator.sample(range(10, 100), 5)
    return f"From smallest to largest, {', '.join(map(str, numbers))} are", f" {', '.join(map(str, sorted(numbers)))}"


def _following(generator: Random) -> tuple[str, str]:
    start, step = generator.randint(1, 20), generator.randint(2, 9)
    shown = [start + step * place for place in range(5)]
    return f"{', '.join(map(str, shown))},", f" {start + 5 * step}"


def _copy(generator: Random) -> tuple[str, str]:
    values = {"town": generator.choice(TOWNS), "colour": generator.choice(COLOURS), "count": generator.randint(1, 99)}
    keys = generator.sample(list(values), generator.randint(1, 3))
    text = json.dumps({key: values[key] for key in keys})
    return f"Write {text} once more, as JSON only:\n", text


def _call(generator: Random) -> tuple[str, str]:
    calls: list[tuple[str, dict[str, str | int]]] = [
        ("get_time", {"zone": generator.choice(ZONES), "town": generator.choice(TOWNS)}),
        ("paint", {"colour": generator.choice(COLOURS), "litres": generator.randint(1, 40)}),
        ("book_table", {"name": generator.choice(PEOPLE), "seats": generator.randint(1, 12)}),
    ]
    name, arguments = generator.choice(calls)
    said = " and ".join(f"{key} = {json.dumps(value)}" for key, value in arguments.items())
    answer = json.dumps({"name": name, "arguments": arguments})
    return f'Call the tool {name} with {said}, as JSON with "name" and "arguments":\n', answer


MAKERS: dict[str, Callable[[Random], tuple[str, str]]] = {
    "arithmetic": _sum, "stories": _story, "ordering": _order, "series": _following, "JSON": _copy, "tools": _call,
}  # fmt: skip
