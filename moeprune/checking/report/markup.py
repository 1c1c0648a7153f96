"""Small pieces of HTML that cannot be escaped wrongly: text goes in as text and comes out as `Html`."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}  # control characters as their pictures


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: Any) -> Html:
    """Any value as harmless text; hidden characters and those that turn the writing direction are made visible."""
    if isinstance(value, Html):
        return value
    shown = "".join(_visible(letter) for letter in str(value).translate(VISIBLE))
    return Html(html.escape(shown, quote=True))


def _visible(letter: str) -> str:
    hidden = unicodedata.category(letter) in {"Cf", "Co", "Cs"} or letter == "\x7f"
    return f"\\u{ord(letter):04x}" if hidden else letter


def tag(name: str, *content: Any, **attributes: Any) -> Html:
    """<name attribute="...">content</name>. `class_` is class; an underscore inside is a hyphen; None is left out."""
    parts = [f' {_attribute(key)}="{text(value)}"' for key, value in attributes.items() if value is not None]
    return Html(f"<{name}{''.join(parts)}>{join(content)}</{name}>")


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def join(content: Iterable[Any], between: str = "") -> Html:
    """Pieces one behind the other; plain strings are escaped."""
    return Html(between.join(text(piece) for piece in content if piece is not None))


def section(title: str, *content: Any, note: str = "", anchor: str = "") -> Html:
    """A part of the page with its heading and one line that says how to read it."""
    heading = tag("h2", title)
    return tag("section", heading, tag("p", note, class_="note") if note else None, *content, id=anchor or None)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], sortable: bool = True) -> Html:
    """A table that scrolls in its own box. A cell may be (shown, sort key)."""
    top = tag("tr", *(tag("th", title, scope="col", tabindex=0 if sortable else None) for title in head))
    body = [tag("tr", *(_cell(cell) for cell in row)) for row in rows]
    made = tag("table", tag("thead", top), tag("tbody", *body), class_="sortable" if sortable else None)
    return tag("div", made, class_="scroll", tabindex=0, role="region", aria_label="table")


def _cell(cell: Any) -> Html:
    if isinstance(cell, tuple):
        shown, key = cell
        return tag("td", shown, data_key=key, class_="number" if isinstance(key, (int, float)) else None)
    return tag("td", cell)


def chip(word: str, like: str = "") -> Html:
    """A status: a coloured word with a sign, so that colour is not all; it may look like another."""
    kind = (like or word).replace(" ", "-")
    sign = {"pass": "\u2713", "fail": "\u2717", "warning": "!", "not-tested": "\u2013"}.get(kind, "\u00b7")
    return tag("span", tag("b", sign, aria_hidden="true"), f" {word}", class_=f"chip {kind}")


def percent(value: float | None, digits: int = 1) -> str:
    """0.123 as 12.3%."""
    return "\u2013" if value is None else f"{100 * value:.{digits}f}%"


def number(value: float | None, digits: int = 3) -> str:
    """A measured number, short."""
    if value is None:
        return "\u2013"
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.3g}"
