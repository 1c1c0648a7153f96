"""Small charts as plain SVG. They bring their own ground, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760
ROW = 24
LETTER = 7.5  # width of a letter of a bold name, on average
SERIES = ("a", "b", "c")
# Colours of Okabe and Ito's set, which colour-blind readers tell apart; the shapes differ too.
STYLE = """
  .ground { fill: #ffffff; stroke: #d0d7de } .text { fill: #1f2328 } .quiet { fill: #59636e }
  .line { stroke: #d8dee4 } .strong { stroke: #59636e } .band { fill: #f3f5f7 }
  .a { fill: #0072b2; stroke: #0072b2 } .b { fill: #d55e00; stroke: #d55e00 } .c { fill: #7d6bb8; stroke: #7d6bb8 }
  .heat { fill: #0072b2 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117; stroke: #3d444d } .text { fill: #f0f6fc } .quiet { fill: #9198a1 }
    .line { stroke: #2a313a } .strong { stroke: #9198a1 } .band { fill: #161b22 }
    .a { fill: #56b4e9; stroke: #56b4e9 } .b { fill: #f0883e; stroke: #f0883e } .c { fill: #b8a6f0; stroke: #b8a6f0 }
    .heat { fill: #2f81c7 }
  }
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
  .title { font-size: 16px; font-weight: 600 } .bold { font-weight: 600 } .small { font-size: 12px }
"""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a heat map: shares between 0 and 1."""

    name: str
    values: Sequence[float]


def text(x: float, y: float, words: str, style: str = "text", anchor: str = "start") -> str:
    """A piece of text at its base line."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str, width: float = 1) -> str:
    """A straight line."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} class="{style}" stroke-width="{width}"/>'


def mark(series: int, x: float, y: float) -> str:
    """A dot, a square or a diamond."""
    style = SERIES[series]
    if series == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{style}"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if series == 2 else ""
    return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" rx="1" class="{style}"{turn}/>'


def page(title: str, subtitle: str, height: float, parts: Sequence[str]) -> str:
    """A whole SVG with its ground, style and headings."""
    ground = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:.1f}" rx="8" class="ground"/>'
    heading = [text(24, 32, title, "text title"), text(24, 52, subtitle, "quiet")]
    body = "\n".join([f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", ground, *heading, *parts])
    box = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img">\n{body}\n</svg>\n'


def dots(
    *,
    title: str,
    subtitle: str,
    rows: Mapping[str, Sequence[tuple[float, float]]],
    series: Sequence[str],
    reference: tuple[str, float],
) -> str:
    """A row for each name, in it a mark at every (mean, standard deviation) on one axis from 0 to 100%."""
    left, right, top = LETTER * max(map(len, rows)) + 36, WIDTH - 36, 104
    bottom = top + ROW * len(rows)

    def at(share: float) -> float:
        return left + (right - left) * min(max(share, 0.0), 1.0)

    parts = []
    for i in range(0, len(rows), 2):
        parts.append(f'<rect x="12" y="{top + ROW * i}" width="{WIDTH - 24}" height="{ROW}" rx="3" class="band"/>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(line(at(share), top, at(share), bottom, "line"))
        parts.append(text(at(share), bottom + 20, f"{share:.0%}", "quiet small", "middle"))
    parts.append(line(at(reference[1]), top, at(reference[1]), bottom, "strong", 1.5))
    parts.append(text(at(reference[1]), top - 6, f"{reference[0]} {reference[1]:.1%}", "quiet small", "end"))
    for i, (name, values) in enumerate(rows.items()):
        middle = top + ROW * (i + 0.5)
        parts.append(text(left - 14, middle + 4.5, name, "text bold" if "(" in name else "text", "end"))
        for s, (mean, deviation) in enumerate(values):
            parts.append(line(at(mean - deviation), middle, at(mean + deviation), middle, SERIES[s], 2))
            parts.append(mark(s, at(mean), middle))
    for s, name in enumerate(series):
        parts += [mark(s, 29 + 170 * s, 76), text(41 + 170 * s, 80.5, name, "text small")]
    return page(title, subtitle, bottom + 36, parts)


def heat(*, title: str, subtitle: str, rows: Sequence[str], columns: Sequence[Column]) -> str:
    """A grid of shares: the number in every cell, and the fuller the colour the larger it is."""
    left, top, high = 132, 92, 34
    wide = (WIDTH - 24 - left) / len(columns)
    parts = [text(left - 14, top - 10, "calibrated on", "quiet small", "end")]
    for c, column in enumerate(columns):
        x = left + wide * c
        parts.append(text(x + wide / 2, top - 10, column.name, "quiet small", "middle"))
        for r, value in enumerate(column.values):
            y = top + high * r
            box = f'x="{x + 2:.1f}" y="{y + 2:.1f}" width="{wide - 4:.1f}" height="{high - 4}" rx="4"'
            parts.append(f'<rect {box} class="heat" fill-opacity="{0.04 + 0.5 * value:.3f}"/>')
            own = "text bold" if column.name == rows[r] else "text"
            parts.append(text(x + wide / 2, y + high / 2 + 4.5, f"{value:.0%}", own, "middle"))
    for r, name in enumerate(rows):
        parts.append(text(left - 14, top + high * (r + 0.5) + 4.5, name, "text", "end"))
    return page(title, subtitle, top + high * len(rows) + 20, parts)
