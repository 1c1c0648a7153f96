"""Generated maths and reasoning: every answer is worked out by the program that asks."""

from __future__ import annotations

import math
from fractions import Fraction
from random import Random
from typing import Any

from moeprune.scoring.calibration.builtin.words import CITIES, DAYS, GOODS, NAMES, pair


def equation(rng: Random) -> dict[str, Any]:
    """A linear equation, solved and checked."""
    a, x, b = rng.randint(2, 19), rng.randint(-15, 25), rng.randint(-60, 60)
    sign = "+" if b >= 0 else "-"
    return pair(
        f"Solve for x: {a}x {sign} {abs(b)} = {a * x + b}",
        f"Move the constant to the right: {a}x = {a * x + b} {'-' if b >= 0 else '+'} {abs(b)} = {a * x}. "
        f"Divide both sides by {a}: x = {x}.\n\nCheck: {a} * {x} {sign} {abs(b)} = {a * x + b}.",
    )


def percentage(rng: Random) -> dict[str, Any]:
    """A price with a discount and a tax."""
    price, off, tax = rng.randint(4, 90) * 10, rng.choice([5, 10, 15, 20, 25, 30, 40]), rng.choice([5, 7, 10, 20])
    reduced = Fraction(price * (100 - off), 100)
    total = reduced * (100 + tax) / 100
    return pair(
        f"A shop in {rng.choice(CITIES)} sells {rng.choice(GOODS)} for {price} euros apiece. "
        f"There is {off}% off, and then {tax}% tax is added. What does one cost?",
        f"1. The discount is {off}% of {price}, that is {float(price * off / 100):.2f} euros, so the price falls to "
        f"{float(reduced):.2f} euros.\n2. The tax is {tax}% of {float(reduced):.2f}, that is "
        f"{float(reduced * tax / 100):.2f} euros.\n3. Together: **{float(total):.2f} euros**.",
    )


def journey(rng: Random) -> dict[str, Any]:
    """Speed, distance and a clock."""
    speed, hours, pause = rng.randint(8, 24) * 5, rng.choice([1.5, 2, 2.5, 3, 3.5, 4]), rng.choice([10, 15, 20, 30, 45])
    start = rng.randint(6, 14) * 60 + rng.choice([0, 15, 30, 45])
    end = start + int(hours * 60) + pause
    there, name = rng.sample(CITIES, 2), rng.choice(NAMES)
    return pair(
        f"{name} drives from {there[0]} to a town {speed * hours:g} km away at an average of {speed} km/h, "
        f"with a break of {pause} minutes. {name} leaves at {start // 60}:{start % 60:02d}. When does {name} arrive?",
        f"Driving takes {speed * hours:g} / {speed} = {hours:g} hours, which is {int(hours * 60)} minutes. With the "
        f"break that makes {int(hours * 60) + pause} minutes. Counting from {start // 60}:{start % 60:02d}, {name} "
        f"arrives at {end // 60}:{end % 60:02d}.",
    )


def quadratic(rng: Random) -> dict[str, Any]:
    """Integer roots and the vertex."""
    p, q = rng.sample([n for n in range(-9, 10) if n], 2)
    b, c = -(p + q), p * q
    shown = f"x^2 {'+' if b >= 0 else '-'} {abs(b)}x {'+' if c >= 0 else '-'} {abs(c)}"
    root = math.isqrt(b * b - 4 * c)
    return pair(
        f"Find the roots of {shown} = 0 and say where the parabola has its vertex.",
        f"The discriminant is b^2 - 4ac = {b * b} - 4 * ({c}) = {b * b - 4 * c}, whose root is {root}. So "
        f"x = ({-b} ± {root}) / 2, which gives x = {min(p, q)} and x = {max(p, q)}. The vertex lies midway, at "
        f"x = {(p + q) / 2:g}, where the value is {-((p - q) ** 2) / 4:g}.",
    )


def fractions(rng: Random) -> dict[str, Any]:
    """A sum and a product in lowest terms."""
    first, second = Fraction(rng.randint(1, 9), rng.randint(2, 12)), Fraction(rng.randint(1, 9), rng.randint(2, 12))
    common = math.lcm(first.denominator, second.denominator)
    parts = [f * common for f in (first, second)]
    return pair(
        f"Work out {first} + {second} and {first} * {second} as fractions in lowest terms.",
        f"Sum: over the common denominator {common} this is {parts[0]}/{common} + {parts[1]}/{common} = "
        f"{sum(parts)}/{common}, in lowest terms {first + second}.\nProduct: multiply numerators and denominators, "
        f"{first.numerator * second.numerator}/{first.denominator * second.denominator} = {first * second}.",
    )


def derivative(rng: Random) -> dict[str, Any]:
    """A slope of a cubic."""
    a, b, c, x = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 30), rng.randint(-3, 5)
    return pair(
        f"Let f(x) = {a}x^3 - {b}x^2 + {c}x. Differentiate and evaluate the slope at x = {x}.",
        f"Term by term, f'(x) = {3 * a}x^2 - {2 * b}x + {c}. At x = {x}: {3 * a} * {x * x} - {2 * b} * ({x}) + {c} = "
        f"{3 * a * x * x - 2 * b * x + c}.",
    )


def draws(rng: Random) -> dict[str, Any]:
    """Drawing without putting back."""
    red, blue = rng.randint(2, 9), rng.randint(2, 9)
    both = Fraction(red, red + blue) * Fraction(red - 1, red + blue - 1)
    return pair(
        f"A bag holds {red} red and {blue} blue marbles. Two are drawn without putting the first back. "
        "How likely is it that both are red? And that at least one is blue?",
        f"The first is red with probability {red}/{red + blue}; then {red - 1} of {red + blue - 1} are red. The "
        f"product is {both}, about {float(both):.3f}. At least one blue is the opposite event: 1 - {both} = "
        f"{1 - both}, about {float(1 - both):.3f}.",
    )


def order(rng: Random) -> dict[str, Any]:
    """Three comparisons that form a chain."""
    people = rng.sample(NAMES, 4)
    what, least = rng.choice([("taller than", "shortest"), ("older than", "youngest"), ("faster than", "slowest")])
    clues = [f"{people[i]} is {what} {people[i + 1]}." for i in range(3)]
    shuffled = rng.sample(clues, 3)
    return pair(
        f"{' '.join(shuffled)} Who is the {least}, and where does {people[1]} stand?",
        f"<think>\nEach clue gives one step. {' '.join(clues)} Put end to end they form one chain: "
        f"{' > '.join(people)}. Nobody comes after {people[3]}, and only {people[0]} comes before {people[1]}."
        f"\n</think>\n\n{people[3]} is the {least}. {people[1]} stands second: the order is {', '.join(people)}.",
    )


def liars(rng: Random) -> dict[str, Any]:
    """A knight and a knave."""
    a, b = rng.sample(NAMES, 2)
    island = "On an island, knights always tell the truth and knaves always lie."
    if rng.random() < 0.5:
        return pair(
            f'{island} {a} says: "We are both knaves." What are {a} and {b}?',
            f"<think>\nSuppose {a} is a knight. Then the statement is true and {a} is a knave: a contradiction. So {a} "
            f"is a knave and the statement is false, which means that they are not both knaves. Since {a} is one, {b} "
            f"is not.\n</think>\n\n{a} is a knave and {b} is a knight.",
        )
    return pair(
        f'{island} {a} says: "At least one of the two of us, {b} or me, is a knave." Which is which?',
        f"<think>\nIf {a} were a knave, the statement would be true, since there would be a knave among them; but "
        f"knaves do not say what is true. So {a} is a knight, the statement holds, and the knave can only be {b}."
        f"\n</think>\n\n{a} is a knight and {b} is a knave.",
    )


def calendar(rng: Random) -> dict[str, Any]:
    """Days of the week."""
    start, days, name = rng.randrange(7), rng.randint(9, 200), rng.choice(NAMES)
    return pair(
        f"Today is {DAYS[start]}. {name} has an appointment in {days} days. On what day of the week is it?",
        f"<think>\nWeeks repeat every 7 days, so only the remainder matters: {days} = {days // 7} * 7 + {days % 7}. "
        f"Counting {days % 7} days on from {DAYS[start]} gives {DAYS[(start + days) % 7]}.\n</think>\n\n"
        f"It is a {DAYS[(start + days) % 7]}: {days // 7} whole weeks change nothing, and {days % 7} days remain.",
    )


def assignment(rng: Random) -> dict[str, Any]:
    """Who bought what, by exclusion."""
    people, things = rng.sample(NAMES, 3), rng.sample(GOODS, 3)
    return pair(
        f"{people[0]}, {people[1]} and {people[2]} each bought something different: {', '.join(sorted(things))}. "
        f"{people[0]} did not buy {things[1]} or {things[2]}. {people[1]} did not buy {things[2]}. Who bought what?",
        f"<think>\n{people[0]} can only have {things[0]}, since the other two are excluded. For {people[1]} that "
        f"leaves {things[1]} and {things[2]}, and the second is excluded too. {people[2]} gets what is left."
        "\n</think>\n\n" + "\n".join(f"- {person}: {thing}" for person, thing in zip(people, things, strict=True)),
    )


def meeting(rng: Random) -> dict[str, Any]:
    """One hour that suits three people."""
    people = rng.sample(NAMES, 3)
    free = sorted(rng.sample(range(9, 17), 3))
    hour = rng.choice(free)
    others = [sorted({hour, *rng.sample([h for h in range(9, 17) if h not in free], 2)}) for _ in range(2)]
    lines = [
        f"{p} is free at {', '.join(f'{h}:00' for h in hs)}." for p, hs in zip(people, [free, *others], strict=True)
    ]
    return pair(
        f"{' '.join(lines)} Find an hour for a meeting of all three.",
        f"<think>\nTake the hours of {people[0]} one by one. "
        + " ".join(
            f"{h}:00 " + ("works for all." if h == hour else f"fails, as {people[1]} has no time.") for h in free
        )
        + f"\n</think>\n\nThey can meet at {hour}:00, and at no other hour.",
    )


MATHS = (equation, percentage, journey, quadratic, fractions, derivative, draws)
REASONING = (order, liars, calendar, assignment, meeting)
