"""What can be seen of a text alone: loops, emptiness, broken bytes, script, JSON. Pure functions."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

LONGEST_UNIT = 64  # tokens in the unit of a loop
LOOP_TOKENS = 24  # a loop covers at least this many tokens at the end ...
LOOP_TURNS = 4  # ... and this many turns of its unit
SAME_WORDS = 5  # "a a a a a"


def loops(ids: Sequence[Any]) -> bool:
    """Whether the end of a text is one unit of tokens (or words) again and again."""
    return any(turning(ids, unit) >= max(LOOP_TOKENS, LOOP_TURNS * unit) for unit in range(1, LONGEST_UNIT + 1))


def turning(ids: Sequence[Any], unit: int) -> int:
    """How many tokens at the end repeat with this period."""
    length = unit
    while length < len(ids) and ids[-length - 1] == ids[-length - 1 + unit]:
        length += 1
    return min(length, len(ids))


def same_word(text: str) -> bool:
    """The same word or sign five times in a row, at the end, over at least half of the text."""
    words = text.split()
    run = next((i for i, word in enumerate(reversed(words)) if word != words[-1]), len(words))
    one_sign = re.search(r"(\S)\1{19,}\s*$", text) is not None
    return one_sign or (run >= SAME_WORDS and run * 2 >= len(words))


def flaws(text: str, ids: Sequence[int]) -> list[str]:
    """The names of what is broken about a text; empty when nothing is."""
    found = {
        "empty": not text.strip(),
        "loop": loops(ids) or same_word(text),
        "broken characters": "\ufffd" in text.rstrip("\ufffd") or any(unicodedata.category(c) == "Cn" for c in text),
    }  # a replacement sign at the very end is a character that the token limit cut in half
    return [name for name, there in found.items() if there]


def script(text: str) -> str:
    """The script most letters belong to: LATIN, CYRILLIC, CJK ...; "" without letters."""
    letters = Counter(_script_of(letter) for letter in text if letter.isalpha())
    return letters.most_common(1)[0][0] if letters else ""


def _script_of(letter: str) -> str:
    word = unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
    return "JAPANESE" if word in {"HIRAGANA", "KATAKANA"} else word


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, fenced or not; None when it is none."""
    bare = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        value = json.loads(bare)
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def right(text: str, answer: str, exactly: bool) -> bool:
    """Whether a text gives the answer: is it, or (a model that talks on) has it as its first or a whole word."""
    text, answer = text.strip(), answer.strip()
    if text == answer or exactly:
        return text == answer
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text.split("\n\n")[0]) is not None
