"""Plain SVG: line charts with bands and whiskers, and the heat map of experts. Colours are classes of the page's style.

Legend: L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from moeprune.checking.report.markup import Html, join, tag, text

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 26, 14, 44
COLOURS = 6  # of lines, in the page's style
LABELS = 32  # layers that are named at most
STEPS = 10  # colours of the heat map


@dataclass(frozen=True)
class Line:
    """One curve; `low` and `high` make a band or, with `whiskers`, an interval at each point."""

    name: str
    points: Sequence[tuple[float, float]]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    whiskers: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A line chart."""

    x_title: str
    y_title: str
    lines: Sequence[Line]
    x_percent: bool = False
    y_percent: bool = False
    upright: tuple[float, str] | None = None  # a marked x
    level: tuple[float, str] | None = None  # a marked y
    dots: Sequence[tuple[float, float, str]] = ()
    y_most: float | None = None
    labels: Sequence[str] = field(default=())


def draw(chart: Chart) -> Html:
    """The chart with its legend."""
    scale = _Scale(chart)
    parts: list[Html] = [*_grid(chart, scale)]
    for index, line in enumerate(chart.lines):
        parts += _line(line, scale, index % COLOURS)
    parts += [_dot(scale, x, y, name) for x, y, name in chart.dots]
    parts += _marks(chart, scale)
    picture = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
                  aria_label=f"{chart.y_title} by {chart.x_title}")  # fmt: skip
    return tag("figure", picture, _legend(chart), class_="chart")


class _Scale:
    """From values to places."""

    def __init__(self, chart: Chart) -> None:
        xs = [x for line in chart.lines for x, _ in line.points] + [x for x, _, _ in chart.dots]
        ys = [y for line in chart.lines for _, y in line.points] + [y for _, y, _ in chart.dots]
        ys += [high for line in chart.lines for high in line.high]
        ys += [chart.level[0]] if chart.level and chart.level[0] < 1.5 * max(ys, default=1) else []
        self.x_ticks = ticks(min(xs, default=0) if not chart.x_percent else 0, max(xs, default=1))
        self.y_ticks = ticks(0, chart.y_most or max(ys, default=1))
        self.x_from, self.x_to = self.x_ticks[0], self.x_ticks[-1]
        self.y_to = self.y_ticks[-1]

    def x(self, value: float) -> float:
        """Place from the left."""
        share = (value - self.x_from) / ((self.x_to - self.x_from) or 1)
        return round(LEFT + min(max(share, 0), 1) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Place from the top."""
        share = value / (self.y_to or 1)
        return round(HEIGHT - BOTTOM - min(max(share, 0), 1) * (HEIGHT - TOP - BOTTOM), 1)


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers around a range."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span))
    step = next(s * power for s in (0.2, 0.25, 0.5, 1, 2, 2.5, 5) if span / (s * power) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _grid(chart: Chart, scale: _Scale) -> list[Html]:
    parts = []
    for value in scale.y_ticks:
        y = scale.y(value)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", _tick(value, chart.y_percent), x=LEFT - 8, y=y + 4, class_="tick end"))
    for value in scale.x_ticks:
        parts.append(
            tag("text", _tick(value, chart.x_percent), x=scale.x(value), y=HEIGHT - BOTTOM + 18, class_="tick")
        )
    parts.append(tag("text", chart.x_title, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, class_="axis"))
    return parts


def _tick(value: float, percent: bool) -> str:
    return f"{100 * value:g}%" if percent else f"{value:g}"


def _line(line: Line, scale: _Scale, index: int) -> list[Html]:
    places = [(scale.x(x), scale.y(y)) for x, y in line.points]
    parts = []
    if line.low and not line.whiskers:
        upper = [f"{x},{scale.y(high)}" for (x, _), high in zip(places, line.high, strict=True)]
        lower = [f"{x},{scale.y(low)}" for (x, _), low in zip(places, line.low, strict=True)]
        parts.append(tag("polygon", points=" ".join(upper + lower[::-1]), class_=f"band s{index}"))
    path = " ".join(f"{x},{y}" for x, y in places)
    parts.append(tag("polyline", points=path, class_=f"line s{index}" + (" dashed" if line.dashed else "")))
    if line.whiskers:
        for (x, y), (low, high), (value_x, value_y) in zip(
            places, zip(line.low, line.high, strict=True), line.points, strict=True
        ):
            parts.append(tag("line", x1=x, x2=x, y1=scale.y(low), y2=scale.y(high), class_=f"whisker s{index}"))
            title = tag("title", f"{line.name}: {value_x:.3g}, {value_y:.3g} ({low:.3g} to {high:.3g})")
            parts.append(tag("circle", title, cx=x, cy=y, r=3.5, class_=f"point s{index}"))
    return parts


def _dot(scale: _Scale, x: float, y: float, name: str) -> Html:
    return tag("circle", tag("title", name), cx=scale.x(x), cy=scale.y(y), r=6, class_="dot")


def _marks(chart: Chart, scale: _Scale) -> list[Html]:
    parts = []
    if chart.upright:
        x = scale.x(chart.upright[0])
        end = x > WIDTH * 0.6
        parts.append(tag("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_="mark"))
        parts.append(tag("text", chart.upright[1], x=x - 6 if end else x + 6, y=HEIGHT - BOTTOM - 8,
                         class_="marked end" if end else "marked"))  # fmt: skip
    if chart.level and chart.level[0] <= scale.y_to:
        y = scale.y(chart.level[0])
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="mark"))
        parts.append(tag("text", chart.level[1], x=WIDTH - RIGHT - 4, y=y - 6, class_="marked end"))
    return parts


def _legend(chart: Chart) -> Html:
    items = [
        tag("span", tag("i", class_="key dash" if line.dashed else f"key s{index % COLOURS}"), line.name)
        for index, line in enumerate(chart.lines)
    ]
    items += [tag("span", tag("i", class_="key dotted"), name) for name in dict.fromkeys(n for _, _, n in chart.dots)]
    return tag("figcaption", tag("b", chart.y_title), *items)


@dataclass(frozen=True)
class HeatMap:
    """Rows of cells: by layer its name, each expert's colour, those that are kept, a title, and those to be framed."""

    names: Sequence[str]
    colours: Sequence[Sequence[int]]
    kept: Sequence[frozenset[int]]
    titles: Sequence[str]
    framed: Sequence[frozenset[int]]


def heat_map(chart: HeatMap) -> Html:
    """One row per layer, one cell per expert: full when kept, small when removed. The page's script orders it."""
    names, count = chart.names, max(map(len, chart.colours), default=0)
    rows = []
    for row, (steps_E, stays) in enumerate(zip(chart.colours, chart.kept, strict=True)):
        framed = chart.framed[row]
        cells = [_heat_cell(expert, step, expert in stays, expert in framed) for expert, step in enumerate(steps_E)]
        rows.append(tag("g", tag("title", chart.titles[row]), *cells, transform=f"translate(0 {row})", class_="row"))
    picture = tag("svg", *rows, viewBox=f"0 0 {count} {len(chart.colours)}", id="heat", role="img",
                  preserveAspectRatio="none", aria_label="layers by experts",
                  style=f"--columns:{count}")  # fmt: skip
    every = math.ceil(len(names) / LABELS)
    labels = join(tag("span", name if row % every == 0 else "") for row, name in enumerate(names))
    box = tag("div", picture, class_="scroll", tabindex=0, role="region", aria_label="heat map")
    return tag("div", tag("div", labels, class_="rows"), box, class_="heat", style=f"--rows:{len(chart.colours)}")


def _heat_cell(expert: int, step: int, stays: bool, framed: bool) -> Html:
    size, inset = (0.92, 0.04) if stays else (0.4, 0.3)
    frame = " framed" if framed else ""
    return Html(f'<rect class="h{step}{frame}" x="{expert + inset:g}" y="{inset}" width="{size}" height="{size}"/>')


def bars(rows: Sequence[tuple[str, float]], most: float = 1.0) -> Html:
    """Named shares as horizontal bars."""
    items = []
    for name, value in rows:
        track = tag("span", tag("i", style=f"width:{100 * value / most:.1f}%"), class_="track")
        share = tag("span", f"{100 * value:.1f}%", class_="value")
        items.append(tag("li", tag("span", name, class_="name", title=name), track, share))
    return tag("ul", *items, class_="bars")


def whisker(low: float, value: float, high: float, other: float | None = None) -> Html:
    """A rate with its interval on a line from 0 to 1; `other` is the parent's."""
    parts = [
        tag("line", x1=1, x2=119, y1=8, y2=8, class_="grid"),
        tag("line", x1=1 + 118 * low, x2=1 + 118 * high, y1=8, y2=8, class_="whisker s0"),
        tag("circle", cx=1 + 118 * value, cy=8, r=4, class_="point s0"),
    ]
    if other is not None:
        x = round(1 + 118 * other, 1)
        parts.append(tag("line", tag("title", text("the parent")), x1=x, x2=x, y1=2, y2=14, class_="parent"))
    return tag("svg", *parts, viewBox="0 0 120 16", class_="rate", aria_hidden="true")
