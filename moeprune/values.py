"""What the text of a setting may be, one parser for each kind; a ValueError says what to write instead."""

from __future__ import annotations

import math
import re
from collections.abc import Callable


def ratio(text: str) -> float:
    """A share of at least 0 and below 1."""
    value = number(text)
    if not 0 <= value < 1:
        raise ValueError("must be at least 0 and below 1")
    return value


def listed(text: str) -> list[str]:
    """Words between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def ratios(text: str) -> str:
    """Ratios between commas, as they were written; `listed` and `ratio` take them apart."""
    for part in listed(text):
        ratio(part)
    return text


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise ValueError("write a whole number") from None


def natural(text: str) -> int:
    """A whole number of at least 0."""
    value = whole(text)
    if value < 0:
        raise ValueError("must be 0 or more")
    return value


def number(text: str) -> float:
    """A number; nan is none, for no limit would ever fail against it."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError("write a number") from None
    if math.isnan(value):
        raise ValueError("write a number")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = whole(text)
    if value < 1:
        raise ValueError("must be 1 or more")
    return value


def amount(text: str) -> int:
    """A number of bytes: 24GB, 500MB, 16GiB, 1000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", text.strip())
    if match is None:
        raise ValueError("write a size such as 24GB or 16GiB")
    power = " kMGT".index(match[2] or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def switch(text: str) -> bool:
    """true or false, also as 1/0, yes/no, on/off."""
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in known:
        raise ValueError("write true or false")
    return known[text.lower()]


def one_of(*names: str) -> Callable[[str], str]:
    """One of the given words."""

    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return text

    parse.__doc__ = " | ".join(names)
    return parse
