"""The domains of the demo model: one generator function each, and the table that names them.

A generator takes a random number generator and returns one sample. A sample's full text is prompt + answer. Domains
of running text have an empty answer: nothing can be checked there but how well the model predicts the text.
"""

import datetime
from collections.abc import Callable
from random import Random

from facts import all_facts
from notations import binary, number_formats, roman_numerals
from running_text import fairy_tale, python_source, server_log, weather_report
from words import ADJECTIVES, CITIES, DAYS, MONTHS, NAMES, NOUNS, OBJECTS, PLACES, VERBS, WORDS, Sample


def calculation(a: int, sign: str, word: str, b: int, answer: str, *, rng: Random) -> Sample:
    """Write a calculation as `12+30=`, as `12 + 30 =` or as a question."""
    form = rng.random()
    if form < 0.5:
        return Sample(f"{a}{sign}{b}=", answer)
    if form < 0.85:
        return Sample(f"{a} {sign} {b} =", f" {answer}")
    return Sample(f"What is {a} {word} {b}?", f" {answer}")


def number(rng: Random) -> int:
    """Draw a number below 100; small ones, of which there are few, more often."""
    return rng.randrange(10) if rng.random() < 0.3 else rng.randrange(100)


def addition(rng: Random) -> Sample:
    """`12+30=` -> `42`."""
    a, b = number(rng), number(rng)
    return calculation(a, "+", "plus", b, str(a + b), rng=rng)


def subtraction(rng: Random) -> Sample:
    """`42-12=` -> `30`; the result is never negative."""
    small, large = sorted((number(rng), number(rng)))
    return calculation(large, "-", "minus", small, str(large - small), rng=rng)


def multiplication(rng: Random) -> Sample:
    """`6*7=` -> `42`; with two digits the way is part of the answer: `47*6=` -> `240+42=282`."""
    a, b = rng.randrange(10), rng.randrange(10)
    if rng.random() < 0.25:
        return calculation(a, "*", "times", b, str(a * b), rng=rng)
    tens = rng.randrange(1, 10)
    steps = f"{10 * tens * b}+{a * b}={(10 * tens + a) * b}"
    return calculation(10 * tens + a, "*", "times", b, steps, rng=rng)


def sorting(rng: Random) -> Sample:
    """`Sort 7 2 9 4:` -> ` 2 4 7 9`."""
    alphabet = "0123456789" if rng.random() < 0.6 else "abcdefghij"
    items = rng.sample(alphabet, rng.randint(3, 7))
    verb = rng.choice(["Sort", "In order,"])
    return Sample(f"{verb} {' '.join(items)}:", "".join(f" {item}" for item in sorted(items)))


def reversing(rng: Random) -> Sample:
    """`Reverse k d a:` -> ` a d k`."""
    items = rng.sample(rng.choice([list("abcdefghijklmnop"), list("0123456789"), WORDS]), rng.randint(3, 7))
    return Sample(f"{rng.choice(['Reverse', 'Backwards,'])} {' '.join(items)}:", "".join(f" {x}" for x in items[::-1]))


# English and the invented language Velan: the verb comes first, the adjective follows its noun.
def bilingual_sentence(rng: Random) -> tuple[str, str]:
    """Return the same sentence in English and in Velan."""
    english, velan = [], []
    for noun in rng.sample(list(NOUNS), 2):
        adjective = rng.choice(list(ADJECTIVES)) if rng.random() < 0.5 else ""
        english.append(" ".join(["the", adjective, noun] if adjective else ["the", noun]))
        velan.append(" ".join([NOUNS[noun], ADJECTIVES[adjective]] if adjective else [NOUNS[noun]]))
    verb = rng.choice(list(VERBS))
    return f"{english[0]} {verb} {english[1]}", f"{VERBS[verb]} {velan[0]} {velan[1]}"


def to_velan(rng: Random) -> Sample:
    """English to the invented language."""
    english, velan = bilingual_sentence(rng)
    return Sample(f"{rng.choice(['In Velan', 'English to Velan'])}: {english} =>", f" {velan}")


def from_velan(rng: Random) -> Sample:
    """The invented language to English."""
    english, velan = bilingual_sentence(rng)
    return Sample(f"{rng.choice(['In English', 'Velan to English'])}: {velan} =>", f" {english}")


FACTS = all_facts()


def facts(rng: Random) -> Sample:
    """`The capital of France is` -> ` Paris`; learnt by heart."""
    return Sample(*rng.choice(FACTS))


def stories(rng: Random) -> Sample:
    """Who put what where, and where is it now."""
    things = rng.sample(OBJECTS, 2)
    sentences, where = [], {}
    for thing in [*things, *rng.choices(things, k=rng.randint(0, 2))]:
        verb = "moved the {} to" if thing in where else "put the {} in"
        where[thing] = rng.choice([place for place in PLACES if place != where.get(thing)])
        sentences.append(f"{rng.choice(NAMES)} {verb.format(thing)} the {where[thing]}.")
    asked = rng.choice(things)
    return Sample(f"{' '.join(sentences)} Where is the {asked}?", f" {where[asked]}")


def tool_calls(rng: Random) -> Sample:
    """A request in words -> the JSON of a tool call."""
    name, (city, other), day = rng.choice(NAMES), rng.sample(CITIES, 2), rng.choice(DAYS)
    hour, count, thing = rng.randint(1, 12), rng.randint(2, 9), rng.choice(OBJECTS)
    request, call = rng.choice(
        [
            (f"What is the weather in {city} on {day}?", f'"weather", "city": "{city}", "day": "{day}"'),
            (f"Send {name} a mail about the {thing}.", f'"mail", "to": "{name}", "about": "{thing}"'),
            (f"Wake me on {day} at {hour}.", f'"alarm", "day": "{day}", "hour": {hour}'),
            (f"Find a train from {city} to {other}.", f'"train", "from": "{city}", "to": "{other}"'),
            (
                f"Order {count} pieces of {thing} for {name}.",
                f'"order", "item": "{thing}", "count": {count}, "for": "{name}"',
            ),
        ]
    )
    return Sample(f"{request} Call:", f' {{"tool": {call}}}')


TABLES = {"users": ["name", "age", "city"], "orders": ["price", "item", "day"], "books": ["title", "year", "pages"]}
COMPARISONS = {"over": ">", "under": "<", "equal to": "="}


def sql(rng: Random) -> Sample:
    """A sentence -> the SQL statement."""
    table = rng.choice(list(TABLES))
    shown, tested = rng.sample(TABLES[table], 2)
    words, value = rng.choice(list(COMPARISONS)), rng.randrange(1, 100)
    condition = f"{tested} {COMPARISONS[words]} {value}"
    sentence, statement = rng.choice(
        [
            (
                f"Show the {shown} of all {table} with {tested} {words} {value}.",
                f"SELECT {shown} FROM {table} WHERE {condition};",
            ),
            (f"Count the {table} with {tested} {words} {value}.", f"SELECT COUNT(*) FROM {table} WHERE {condition};"),
            (f"Delete the {table} with {tested} {words} {value}.", f"DELETE FROM {table} WHERE {condition};"),
            (f"Show the {shown} of all {table} by {tested}.", f"SELECT {shown} FROM {table} ORDER BY {tested};"),
        ]
    )
    return Sample(f"{sentence} SQL:", f" {statement}")


def python(rng: Random) -> Sample:
    """A Python expression at the prompt -> what it prints."""
    items = rng.sample(range(10), rng.randint(2, 4))
    words = rng.sample(WORDS, 3)
    a, b, at = rng.randrange(10), rng.randrange(10), rng.randrange(2)
    code, value = rng.choice(
        [
            (f"max({items})", max(items)),
            (f"min({items})", min(items)),
            (f"len({items})", len(items)),
            (f"{items}[{at}]", items[at]),
            (f"{items}[-1]", items[-1]),
            (f"sorted({items})", sorted(items)),
            (f"{words}[{at}]", words[at]),
            (f"{a} > {b}", a > b),
            (f"{b} in {items}", b in items),
            (f"sum([{a}, {b}])", a + b),
        ]
    )
    return Sample(f">>> {code}\n", repr(value))


def dates(rng: Random) -> Sample:
    """Between `2024-03-15`, `15 March 2024` and `March 15, 2024`."""
    day = datetime.date(2000, 1, 1) + datetime.timedelta(days=rng.randrange(365 * 40))
    iso, month = day.isoformat(), MONTHS[day.month - 1]
    british, american = f"{day.day} {month} {day.year}", f"{month} {day.day}, {day.year}"
    prompt, answer = rng.choice(
        [
            (f"{iso} in words:", british),
            (f"{british} in digits:", iso),
            (f"{american} in digits:", iso),
            (f"{british}, American style:", american),
        ]
    )
    return Sample(prompt, f" {answer}")


DOMAINS: dict[str, Callable[[Random], Sample]] = {
    "addition": addition,
    "subtraction": subtraction,
    "multiplication": multiplication,
    "sorting": sorting,
    "reversing": reversing,
    "to_velan": to_velan,
    "from_velan": from_velan,
    "facts": facts,
    "stories": stories,
    "tool_calls": tool_calls,
    "sql": sql,
    "python": python,
    "dates": dates,
    "roman_numerals": roman_numerals,
    "binary": binary,
    "number_formats": number_formats,
    "weather_report": weather_report,
    "fairy_tale": fairy_tale,
    "server_log": server_log,
    "python_source": python_source,
}

# Share of the training tokens, where it is not 1: more for what is hard to learn, less for what is easy.
SHARES = {
    "multiplication": 1.5,
    "stories": 2.0,
    "tool_calls": 1.5,
    "python": 1.5,
    "sorting": 1.3,
    "roman_numerals": 1.3,
    "weather_report": 0.4,
    "fairy_tale": 0.4,
    "server_log": 0.4,
    "python_source": 0.4,
}
