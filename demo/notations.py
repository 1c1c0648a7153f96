"""Domains of the demo model that write the same thing in another way: Roman, binary, in words."""

# ruff: noqa: SIM905 - lists of words are easier to read without quotes
from random import Random

from words import Sample

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
