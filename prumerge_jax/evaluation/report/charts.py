"""Charts as inline SVG: readable at the width of a phone, coloured by the page's CSS variables.

Every function takes a `description`, the text that replaces the chart where it cannot be seen.
The page must hold `STYLE` and define the variables named there.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

STYLE = """
svg text { font: 12px system-ui, sans-serif; fill: var(--muted); }
svg text.label { fill: var(--ink); stroke: var(--page); stroke-width: 3px; paint-order: stroke; }
svg .grid { stroke: var(--grid); }
svg .axis, svg .leader { stroke: var(--muted); }
svg .reference { stroke: var(--muted); stroke-dasharray: 5 4; }
svg .error { stroke: var(--accent); stroke-width: 1.5; }
svg .mark { fill: var(--accent); }
svg .series { fill: none; stroke-width: 2; }
svg .colour-0 { color: var(--series-0); }
svg .colour-1 { color: var(--series-1); }
svg .colour-2 { color: var(--series-2); }
svg .colour-3 { color: var(--series-3); }
svg .colour-4 { color: var(--series-4); }
svg .colour-5 { color: var(--series-5); }
"""
_COLOURS = 6
_DASHES = ("none", "7 3", "2 3", "9 3 2 3")

# In units of the view box, which are CSS pixels on a phone 360 pixels wide, margins of 12 off.
_WIDTH, _HEIGHT = 336.0, 250.0
_SCATTER_HEIGHT = 336.0  # room for one label above another
_LEFT, _RIGHT, _TOP, _BOTTOM = 42.0, 12.0, 26.0, 40.0
_CHARACTER = 6.4
"""Width of a character at 12 px, on the wide side."""
_LINE = 13.0
_SEARCH = 240
"""Search radius for label placement, above and below the points, in px."""
_MAX_BINS = 24
_TICKS = 5

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A labelled point; `error` is the half length of its vertical error bar."""

    label: str
    x: float
    y: float
    error: float = 0.0


@dataclasses.dataclass(frozen=True)
class Series:
    """A labelled line through points in the order of x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The plot area and its scales: the chart's height, and the margin on the right."""

    x_domain: tuple[float, float]
    y_domain: tuple[float, float]
    height: float = _HEIGHT
    right: float = _RIGHT

    @property
    def area(self) -> Box:
        return (_LEFT, _TOP, _WIDTH - self.right, self.height - _BOTTOM)

    def x(self, value: float) -> float:
        low, high = self.x_domain
        left, _, right, _ = self.area
        return left + (value - low) / (high - low) * (right - left)

    def y(self, value: float) -> float:
        low, high = self.y_domain
        _, top, _, bottom = self.area
        return bottom - (value - low) / (high - low) * (bottom - top)

    def axes(self, x_label: str, y_label: str) -> str:
        """Grid lines, tick labels, base line and axis names; the upper name reads horizontally."""
        left, top, right, bottom = self.area
        parts = []
        for value, text in _ticks(*self.y_domain):
            y = self.y(value)
            parts.append(_line("grid", left, y, right, y))
            parts.append(_text(text, left - 6, y + 4, "end"))
        for value, text in _ticks(*self.x_domain):
            x = self.x(value)
            parts.append(_line("axis", x, bottom, x, bottom + 4))
            parts.append(_text(text, x, bottom + 16, "middle"))
        parts.append(_line("axis", left, bottom, right, bottom))
        parts.append(_text(x_label, (left + right) / 2, self.height - 6, "middle"))
        parts.append(_text(y_label, 2, top - 13, "start"))
        return "".join(parts)


def scatter(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    reference: float | None,
    description: str,
) -> str:
    """Labelled points with error bars, x from 0; a dashed line at y = `reference`.

    Args:
      points: one or more, finite.
      x_label: name of the x axis.
      y_label: name of the y axis.
      reference: y of the dashed line, None for no line.
      description: see above.
    """
    lows = [point.y - point.error for point in points]
    highs = [point.y + point.error for point in points]
    padding = max(0.08 * (max(highs) - min(lows)), 0.5)
    frame = _Frame(
        (0.0, max(1.08 * max(point.x for point in points), 1.0)),
        (min(lows) - padding, max(highs) + padding),
        height=_SCATTER_HEIGHT,
    )
    left, _, right, _ = frame.area
    parts = [frame.axes(x_label, y_label)]
    if reference is not None:
        y = frame.y(reference)
        parts.append(_line("reference", left, y, right, y))
    for point in points:
        x, y = frame.x(point.x), frame.y(point.y)
        low, high = frame.y(point.y - point.error), frame.y(point.y + point.error)
        parts.append(_line("error", x, low, x, high))
        parts.append(f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    parts.append(_point_labels(points, frame))
    return _svg(parts, frame.height, description)


def histogram(values: np.ndarray, *, x_label: str, y_label: str, description: str) -> str:
    """How often each count occurs, in at most 24 bins of equal integer width.

    Args:
      values: int [n], at least two different ones.
      x_label: name of the x axis.
      y_label: name of the y axis.
      description: see above.
    """
    low, high = int(values.min()), int(values.max())
    width = math.ceil((high - low + 1) / _MAX_BINS)
    starts = np.arange(low, high + 1, width)
    counts, _ = np.histogram(values, bins=[*starts, starts[-1] + width])
    # A bin covers integers, so its bar reaches half a unit beyond the first and the last.
    frame = _Frame((low - 0.5, starts[-1] + width - 0.5), (0.0, 1.05 * counts.max()))
    parts = [frame.axes(x_label, y_label)]
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        last = start + width - 1
        span = str(start) if start == last else f"{start} to {last}"
        x, y = frame.x(start - 0.5), frame.y(count)
        bar_width, height = frame.x(last + 0.5) - x - 1, frame.y(0) - y
        parts.append(
            f'<rect class="mark" x="{x:.1f}" y="{y:.1f}" width="{bar_width:.1f}" '
            f'height="{height:.1f}">{_tooltip(f"{span}: {count}")}</rect>'
        )
    return _svg(parts, frame.height, description)


def lines(series: Sequence[Series], *, x_label: str, y_label: str, description: str) -> str:
    """Lines with a mark at every point, named at their right end; y from 0, integers as x.

    Args:
      series: one or more, none without points, finite.
      x_label: name of the x axis.
      y_label: name of the y axis.
      description: see above.
    """
    xs = [x for line in series for x in line.x]
    longest = max(len(line.label) for line in series) * _CHARACTER + 14
    frame = _Frame(
        (min(xs) - 0.3, max(xs) + 0.3),
        (0.0, max(1.05 * max(y for line in series for y in line.y), 1.0)),
        right=min(longest, _WIDTH / 3),
    )
    parts = [frame.axes(x_label, y_label)]
    for number, line in enumerate(series):
        places = [(frame.x(x), frame.y(y)) for x, y in zip(line.x, line.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashes = _DASHES[number % len(_DASHES)]
        parts.append(
            f'<g class="colour-{number % _COLOURS}"><polyline class="series" points="{path}" '
            f'stroke="currentColor" stroke-dasharray="{dashes}"/>'
        )
        for (x, y), group, value in zip(places, line.x, line.y, strict=True):
            tooltip = _tooltip(f"{line.label}, {group:g}: {value:.1f}")
            parts.append(
                f'<circle fill="currentColor" cx="{x:.1f}" cy="{y:.1f}" r="3">{tooltip}</circle>'
            )
        parts.append("</g>")
    parts.append(_end_labels(series, frame))
    return _svg(parts, frame.height, description)


def _point_labels(points: Sequence[Point], frame: _Frame) -> str:
    """A label next to every point; labels of close points form a column, in order."""
    taken: list[Box] = []
    for point in points:
        x, y = frame.x(point.x), frame.y(point.y)
        low, high = frame.y(point.y - point.error), frame.y(point.y + point.error)
        taken += [(x - 4, y - 4, x + 4, y + 4), (x - 1, high, x + 1, low)]
    parts = []
    for cluster in _clusters(points, frame):
        places = [(frame.x(point.x), frame.y(point.y)) for point in cluster]
        width = max(_text_width(point.label) for point in cluster)
        box = _free_box(places, width, taken, frame.area)
        taken.append(box)
        left, top, right, _ = box
        for i, (point, (x, y)) in enumerate(zip(cluster, places, strict=True)):
            start = max(left, right - _text_width(point.label)) if right < x else left
            middle = top + (i + 0.5) * _LINE
            if len(cluster) > 1 or abs(middle - y) > _LINE / 2:
                end = min(max(x, left - 1), right + 1)
                parts.append(_line("leader", x, y, end, middle))
            parts.append(_label(point.label, start, middle))
    return "".join(parts)


def _clusters(points: Sequence[Point], frame: _Frame) -> list[list[Point]]:
    """Points whose columns of labels, each level with its points, would overlap share one.

    Clusters, and the points of each, from top to bottom.
    """
    clusters: list[list[Point]] = []
    for point in points:
        cluster = [point]
        while near := [other for other in clusters if _columns_meet(cluster, other, frame)]:
            clusters = [other for other in clusters if other not in near]
            cluster = [*cluster, *(member for other in near for member in other)]
        clusters.append(sorted(cluster, key=lambda member: -member.y))
    return sorted(clusters, key=lambda cluster: -cluster[0].y)


def _columns_meet(a: Sequence[Point], b: Sequence[Point], frame: _Frame) -> bool:
    (a_left, a_right, a_level), (b_left, b_right, b_level) = (
        (
            frame.x(min(point.x for point in cluster)),
            frame.x(max(point.x for point in cluster)),
            frame.y((min(p.y for p in cluster) + max(p.y for p in cluster)) / 2),
        )
        for cluster in (a, b)
    )
    is_beside = max(a_left, b_left) - min(a_right, b_right) < 2 * _LINE
    return is_beside and abs(a_level - b_level) < (len(a) + len(b)) / 2 * _LINE


def _free_box(
    places: Sequence[tuple[float, float]], width: float, taken: Sequence[Box], area: Box
) -> Box:
    """Box of a column of labels: next to its points, as little below or above them as possible.

    A column too wide for either side goes below or above them; without any free place it overlaps
    them.
    """
    xs, ys = zip(*places, strict=True)
    area_left, area_top, _, area_bottom = area
    height = _LINE * len(places)
    level = (min(ys) + max(ys) - height) / 2
    width = min(width, _WIDTH - 2 - area_left)  # `_label` compresses what is longer
    clamped = min(max(area_left, xs[0]), _WIDTH - 2 - width)
    gap = 8.0 if len(places) == 1 else 16.0
    for shift in sorted(range(-_SEARCH, _SEARCH, 4), key=abs):
        top = level + shift
        for left in (max(xs) + gap, min(xs) - gap - width, clamped):
            box = (left, top, left + width, top + height)
            is_wide_enough = area_left <= left and left + width <= _WIDTH - 2
            is_high_enough = area_top - _LINE / 2 <= top and top + height <= area_bottom
            if (
                is_wide_enough
                and is_high_enough
                and not any(_overlap(box, other) for other in taken)
            ):
                return box
    top = max(area_top, min(level, area_bottom - height))
    return (clamped, top, clamped + width, top + height)


def _end_labels(series: Sequence[Series], frame: _Frame) -> str:
    """The series' names in the right margin, level with the last points as far as there is room."""
    _, _, right, bottom = frame.area
    order = sorted(series, key=lambda line: -line.y[-1])
    heights = [frame.y(line.y[-1]) for line in order]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + _LINE)
    heights[-1] = min(heights[-1], bottom)
    for i in reversed(range(len(heights) - 1)):
        heights[i] = min(heights[i], heights[i + 1] - _LINE)
    parts = []
    for line, height in zip(order, heights, strict=True):
        parts.append(_line("leader", frame.x(line.x[-1]), frame.y(line.y[-1]), right + 6, height))
        parts.append(_label(line.label, right + 9, height))
    return "".join(parts)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About five round values between low and high, with their texts."""
    exponent = math.floor(math.log10((high - low) / _TICKS))
    steps = (factor * 10.0**exponent for factor in (1, 2, 5, 10, 20))
    step = next(step for step in steps if (high - low) / step <= _TICKS + 1)
    values = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    decimals = max(0, -math.floor(math.log10(step)))
    return [(value, f"{value:.{decimals}f}") for value in values.tolist()]


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _label(text: str, left: float, middle: float) -> str:
    """A label from `left` on, compressed where it would not fit into the chart."""
    room = _WIDTH - left - 1
    fit = f' textLength="{room:.1f}" lengthAdjust="spacingAndGlyphs"'
    compressed = fit if _text_width(text) > room else ""
    return (
        f'<text class="label" x="{left:.1f}" y="{middle + 4:.1f}"{compressed}>'
        f"{html.escape(text)}</text>"
    )


def _text_width(text: str) -> float:
    return _CHARACTER * len(text)


def _tooltip(text: str) -> str:
    return f"<title>{html.escape(text)}</title>"


def _svg(parts: Sequence[str], height: float, description: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {height:g}" role="img" '
        f'aria-label="{html.escape(description)}">{"".join(parts)}</svg>\n'
    )
