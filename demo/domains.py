"""The domains of the demo model: one generator function each, and the table that names them.

A generator takes a random number generator and returns one sample. A sample's full text is prompt + answer. Domains
of running text have an empty answer: nothing can be checked there but how well the model predicts the text.
"""

# ruff: noqa: SIM905 - lists of words are easier to read without quotes
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from facts import all_facts

NAMES = "Anna Tom Mia Ben Eva Max Lea Sam Ida Jan Zoe Leo".split()
CITIES = "Paris Rome London Berlin Madrid Vienna Oslo Dublin Tokyo Cairo Lima Moscow".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
OBJECTS = "ball key coin book ring cup hat pen".split()
PLACES = "box bag drawer garden kitchen car shed tower".split()
WORDS = "red cat sun dog map tea sky ice oak bee fog gem".split()


@dataclass(frozen=True)
class Sample:
    """A prompt and the one right continuation, or running text with an empty answer."""

    prompt: str
    answer: str = ""


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
NOUNS = dict(
    zip(
        "dog cat bird fish king queen child horse wolf tree house river".split(),
        "mopa liru tavi sone kado reli pimu hasa voru teko dumi nalo".split(),
        strict=True,
    )
)
ADJECTIVES = dict(
    zip(
        "big small old young red white happy sad quick strong".split(),
        "gorun pitin vetal junel rokan balin felis tromu zipan durek".split(),
        strict=True,
    )
)
VERBS = dict(
    zip(
        "sees likes hears finds follows helps feeds knows".split(),
        "vide lube aude trove sege jude pase kone".split(),
        strict=True,
    )
)


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


ROMAN = [
    (900, "CM"),
    (500, "D"),
    (400, "CD"),
    (100, "C"),
    (90, "XC"),
    (50, "L"),
    (40, "XL"),
    (10, "X"),
    (9, "IX"),
    (5, "V"),
    (4, "IV"),
    (1, "I"),
]


def to_roman(value: int) -> str:
    """Write a number below 1000 as a Roman numeral."""
    text = ""
    for worth, letters in ROMAN:
        text += letters * (value // worth)
        value %= worth
    return text


def roman_numerals(rng: Random) -> Sample:
    """`47 in Roman numerals:` -> ` XLVII` and back."""
    value = rng.randrange(1, 1000)
    if rng.random() < 0.5:
        return Sample(f"{value} in Roman numerals:", f" {to_roman(value)}")
    return Sample(f"{to_roman(value)} as a number:", f" {value}")


def binary(rng: Random) -> Sample:
    """Between hexadecimal and binary: `0xa3 in binary:` -> ` 10100011`."""
    digits = [rng.choice("0123456789abcdef") for _ in range(rng.randint(2, 4))]
    bits = "".join(f"{int(digit, 16):04b}" for digit in digits)
    hexadecimal = "0x" + "".join(digits)
    if rng.random() < 0.5:
        return Sample(f"{hexadecimal} in binary:", f" {bits}")
    return Sample(f"{bits} in hex:", f" {hexadecimal}")


UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(value: int) -> str:
    """Write a number below 1000 in words."""
    if value >= 100:
        rest = f" and {in_words(value % 100)}" if value % 100 else ""
        return f"{UNITS[value // 100]} hundred{rest}"
    if value < 20:
        return UNITS[value]
    return TENS[value // 10 - 2] + (f"-{UNITS[value % 10]}" if value % 10 else "")


def number_formats(rng: Random) -> Sample:
    """Numbers in words, with thousands separators, as percentages."""
    value, percent = rng.randrange(1000), rng.randrange(1, 100)
    large = rng.randrange(1000, 10 ** rng.randint(4, 6))
    prompt, answer = rng.choice(
        [
            (f"{value} in words:", in_words(value)),
            (f"{in_words(value)} in digits:", str(value)),
            (f"{large} with a separator:", f"{large:,}"),
            (f"0.{percent:02d} in percent:", f"{percent}%"),
        ]
    )
    return Sample(prompt, f" {answer}")


def weather_report(rng: Random) -> Sample:
    """Running text: the weather of a few days."""
    sky = ["sunny", "cloudy", "rainy", "windy", "foggy", "cold"]
    start = rng.randrange(7)
    sentences = [f"Weather for {rng.choice(CITIES)}."]
    for step in range(rng.randint(2, 3)):
        day, low = DAYS[(start + step) % 7], rng.randrange(20)
        sentences.append(f"{day} will be {rng.choice(sky)} with {low} to {low + rng.randint(3, 9)} degrees.")
    return Sample(" ".join(sentences))


def fairy_tale(rng: Random) -> Sample:
    """Running text: a very small story."""
    hero, friend = rng.sample(list(NOUNS)[:9], 2)
    place, adjective = rng.choice(["forest", "village", "castle", "valley"]), rng.choice(list(ADJECTIVES))
    wish = rng.choice(["gold", "bread", "a friend", "a song"])
    return Sample(
        f"Once upon a time a {adjective} {hero} lived in a {place}. The {hero} wanted {wish}. One day the "
        f"{hero} met a {friend}. The {friend} gave {wish} to the {hero}, and they were happy."
    )


def server_log(rng: Random) -> Sample:
    """Running text: lines of a log file with rising times."""
    lines, second = [], rng.randrange(30)
    for _ in range(rng.randint(2, 3)):
        second += rng.randint(1, 9)
        event = rng.choice(
            [
                f"user {rng.choice(NAMES)} logged in",
                f"GET /{rng.choice(WORDS)} 200",
                f"disk at {rng.randrange(100)}%",
                f"GET /{rng.choice(WORDS)} 404",
            ]
        )
        lines.append(f"12:30:{second:02d} {'WARN' if '404' in event or 'disk' in event else 'INFO'} {event}")
    return Sample("\n".join(lines))


def python_source(rng: Random) -> Sample:
    """Running text: a small Python function."""
    name, item = rng.choice(["total", "largest", "count", "found"]), rng.choice(["x", "item", "value"])
    source = rng.choice(["items", "values", "numbers"])
    body = {
        "total": f"{name} += {item}",
        "count": f"{name} += 1",
        "largest": f"{name} = max({name}, {item})",
        "found": f"{name} = {name} or {item} == {rng.randrange(10)}",
    }[name]
    return Sample(
        f"def get_{name}({source}):\n    {name} = 0\n    for {item} in {source}:\n        {body}\n    return {name}\n"
    )


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
