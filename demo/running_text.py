"""Domains of running text: no answer, so what counts is how well the model predicts the text."""

from random import Random

from words import ADJECTIVES, CITIES, DAYS, NAMES, NOUNS, WORDS, Sample


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
