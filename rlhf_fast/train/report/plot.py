"""Small SVG charts for the report: no script, no image, colours from the page's style sheet (light and dark).

Every function returns one `<svg role="img">` whose `<title>` says in words what the chart shows. Coordinates are
finite whatever the data: values that are not numbers become gaps, marked at the foot of the chart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import pairwise

Point = tuple[float, float]

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 46, 26, 38  # room for tick labels, the last value, the unit, the axis name
MAX_POINTS = 500  # more than one point a pixel only makes the page heavy
SMOOTH_FROM = 20  # with fewer points the raw line is clear enough
LARGEST = 1e300  # beyond this, differences overflow


@dataclass(frozen=True)
class Series:
    """One line of a chart. `points` are (x, y) in order of x; y may be nan or inf. `colour` picks a CSS class s0..s3.

    kind: "noisy" (raw values faint, their moving average on top), "line", "marks" (line with a dot at each value)
    or "scatter" (dots only, the earlier the fainter; not in order of x).
    """

    label: str
    points: Sequence[Point]
    kind: str = "line"
    colour: int = 0

    @cached_property
    def finite(self) -> list[Point]:
        return [(x, max(-LARGEST, min(LARGEST, y))) for x, y in self.points if math.isfinite(y)]

    @property
    def broken(self) -> list[float]:
        """Where the value was nan or infinite."""
        return [x for x, y in self.points if not math.isfinite(y)]

    @property
    def run(self) -> int:
        """How many neighbouring values one drawn point is the mean of."""
        return max(1, math.ceil(len(self.finite) / MAX_POINTS))

    @cached_property
    def drawn(self) -> list[Point]:
        if self.run == 1:
            return self.finite
        runs = (self.finite[i : i + self.run] for i in range(0, len(self.finite), self.run))
        return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]

    @property
    def window(self) -> int:
        """How many drawn points the moving average takes; 1 means that none is drawn."""
        count = len(self.drawn)
        return 1 if self.kind != "noisy" or count < SMOOTH_FROM else max(5, count // 15 | 1)


@dataclass(frozen=True)
class Reference:
    """A dashed horizontal line at a value the reader should know."""

    value: float
    label: str


def moving_average(points: Sequence[Point], window: int) -> list[Point]:
    """Centred mean of `window` (odd) values, so without lag; at both ends the mean of the neighbours there are."""
    half = window // 2
    smoothed = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half) : i + half + 1]]
        smoothed.append((x, sum(near) / len(near)))
    return smoothed


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most `count` + 1 round numbers (1, 2 or 5 times a power of ten) inside [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float, *, percent: bool = False, decimals: int | None = None) -> str:
    """Short text for a value: thousands apart, no trailing zeros, a true minus sign.

    decimals: how many there are at most; None gives 3 significant digits, as a power of ten where that is shorter.
    """
    if percent:
        return f"{number(100 * value, decimals=decimals)}%"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{'−' if value < 0 else ''}∞"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e7 or (size < 1e-3 and decimals is None):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{_trim(mantissa)}e{int(exponent)}".replace("-", "−")
    text = _trim(f"{value:,.{_decimals(size / 100) if decimals is None else decimals}f}")
    return "0" if text == "-0" else text.replace("-", "−")


def _decimals(size: float) -> int:
    """How many decimals show differences of this size: 0.05 and 0.02 need two."""
    return max(0, -math.floor(math.log10(size) + 1e-9))


def _trim(digits: str) -> str:
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def alike(before: float, after: float) -> tuple[str, str]:
    """Both values with the same number of decimals: as many as give the larger one 3 significant digits."""
    size = max(abs(before), abs(after))
    if not 1e-3 <= size < 1e7:
        return number(before), number(after)
    before, after = (f"{value:,.{_decimals(size / 100)}f}".replace("-", "−") for value in (before, after))
    return before, after


def change(before: float, after: float) -> str:
    return " → ".join(alike(before, after))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 2)


def _tick_decimals(ticks: Sequence[float], factor: float = 1) -> int | None:
    """Decimals that tell neighbouring ticks apart; None where powers of ten do it better."""
    gap = factor * (ticks[1] - ticks[0]) if len(ticks) > 1 else 0.0
    return _decimals(gap) if gap >= 1e-4 else None


def _bounds(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Range of the values with some air; never empty, also for one value or values that differ by rounding."""
    low, high = min(values), max(values)
    least = max(abs(low), abs(high)) * 1e-6 or 1e-6
    if high - low < least:
        air = max(abs(low) * 0.1, 1e-3)
        return low - air, high + air
    return low - margin * (high - low), high + margin * (high - low)


def _svg(chart_id: str, title: str, body: list[str], *, width: float = WIDTH, height: float = HEIGHT, kind: str) -> str:
    chart_id = re.sub(r"[^A-Za-z0-9_-]", "-", chart_id)
    return (
        f'<svg class="plot {kind}" id="{chart_id}" role="img" aria-labelledby="{chart_id}-title" '
        f'viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{chart_id}-title">{escape(title)}</title>{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: str, css: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>'


class _Frame:
    """Axes of a chart: the two scales and the drawing of grid, ticks and names."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], *, percent: bool = False) -> None:
        self.percent = percent
        self.x_ticks, self.y_ticks = nice_ticks(*x_range), nice_ticks(*y_range)
        self.decimals = _tick_decimals(self.y_ticks, 100 if percent else 1)
        self.x = _scale(*x_range, LEFT, WIDTH - RIGHT)
        self.y = _scale(*y_range, HEIGHT - BOTTOM, TOP)

    def tick_text(self, value: float) -> str:
        return number(value, percent=self.percent, decimals=self.decimals)

    def value_text(self, value: float) -> str:
        """As precise as 3 significant digits, but no coarser than the ticks and little finer."""
        if self.decimals is None or value == 0:
            return number(value, percent=self.percent)
        wanted = _decimals(abs(value) * (100 if self.percent else 1) / 100)
        finest = self.decimals + (2 if self.decimals < 3 else 1)
        return number(value, percent=self.percent, decimals=min(max(wanted, self.decimals), finest))

    def draw(self, x_label: str, y_label: str, *, whole_x: bool) -> list[str]:
        out = [_text(0, 13, y_label, "unit")]
        for tick in self.y_ticks:
            y = self.y(tick)
            out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            out.append(_text(LEFT - 7, y + 4, self.tick_text(tick), "tick", "end"))
        foot = HEIGHT - BOTTOM
        out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{foot}" y2="{foot}"/>')
        for tick in self.x_ticks:
            if whole_x and tick != round(tick):
                continue
            x = self.x(tick)
            out.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{foot}" y2="{foot + 4}"/>')
            out.append(_text(x, foot + 17, number(tick, decimals=_tick_decimals(self.x_ticks)), "tick", "middle"))
        out.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, x_label, "unit", "middle"))
        return out

    def line(self, points: Sequence[Point], css: str) -> str:
        if len(points) == 1:
            return self.dots(points, css)
        path = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)
        return f'<polyline class="{css}" points="{path}"/>'

    def dots(self, points: Sequence[Point], css: str, *, faint: float = 1.0) -> str:
        """A dot at each point; the first as opaque as `faint`, the last fully."""
        shades = [1 - (1 - faint) * (1 - (i + 1) / len(points)) for i in range(len(points))]
        return "".join(
            f'<circle class="{css} dot" cx="{self.x(x)}" cy="{self.y(y)}" r="3" opacity="{shade:.2f}">'
            f"<title>{number(x)}: {self.value_text(y)}</title></circle>"
            for (x, y), shade in zip(points, shades, strict=True)
        )


def line_chart(
    chart_id: str,
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
    include: Sequence[float] = (),
    references: Sequence[Reference] = (),
    whole_x: bool = True,
) -> str:
    """Lines over x. `y_label` names the unit; `include` values are always inside the y range; `percent` shows y·100.

    The title is completed with each line's first and last value, so that the chart can be read aloud.
    At least one series must have a point.
    """
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.finite]
    y_range = _bounds([*ys, *include] or [0.0, 1.0], 0.06)
    x_range = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0] - 1, xs[0] + 1)
    frame = _Frame(x_range, y_range, percent=percent)

    body = frame.draw(x_label, y_label, whole_x=whole_x)
    for reference in references:
        if y_range[0] <= reference.value <= y_range[1]:
            y = frame.y(reference.value)
            body.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            body.append(_text(WIDTH - RIGHT, round(y - 5, 2), reference.label, "reference-label", "end"))
    for line in series:
        body += _draw_series(frame, line)
    body += _end_labels(frame, series)
    spoken = "; ".join(filter(None, (_spoken(line, percent) for line in series)))
    return _svg(chart_id, f"{title}. {spoken}", body, kind="chart")


def _draw_series(frame: _Frame, line: Series) -> list[str]:
    css, points = f"s{line.colour}", line.drawn
    out = []
    if line.kind == "scatter":
        out.append(frame.dots(points, css, faint=0.2))
    elif line.window > 1:
        out.append(frame.line(points, f"{css} raw"))
        out.append(frame.line(moving_average(points, line.window), css))
    elif points:
        out.append(frame.line(points, css))
        if line.kind == "marks" and len(points) > 1:
            out.append(frame.dots(points, css))
    for x in line.broken[:MAX_POINTS]:
        left, foot = frame.x(x), HEIGHT - BOTTOM
        out.append(
            f'<path class="broken" d="M{left - 4:.2f},{foot - 8} l8,8 m0,-8 l-8,8">'
            f"<title>{number(x)}: not a finite number</title></path>"
        )
    return out


def _end_labels(frame: _Frame, series: Sequence[Series]) -> list[str]:
    """The last value beside each line's end, pushed apart where two would overlap."""
    ends = []
    for line in series:
        if line.kind != "scatter" and line.finite:
            x, y = moving_average(line.drawn, line.window)[-1]
            ends.append([frame.y(y) + 4, frame.x(x) + 6, frame.value_text(y), f"last t{line.colour}"])
    ends.sort()
    for above, below in pairwise(ends):
        below[0] = max(below[0], above[0] + 13)
    return [_text(round(x, 2), round(y, 2), text, css) for y, x, text, css in ends]


def _spoken(line: Series, percent: bool) -> str:
    if not line.finite:
        return f"{line.label}: no finite value"
    (_, first), (_, last) = line.finite[0], line.finite[-1]
    if len(line.finite) == 1:
        return f"{line.label}: {number(first, percent=percent)}"
    return f"{line.label}: from {number(first, percent=percent)} to {number(last, percent=percent)}"


def histogram(chart_id: str, title: str, before: Sequence[float], after: Sequence[float], *, x_label: str) -> str:
    """Two distributions of finite values over the same bins, as shares of each side. Both sides need a value."""
    clip = [max(-LARGEST, min(LARGEST, value)) for value in (*before, *after)]
    low, high = _bounds(clip, 0.0)
    bins = max(8, min(30, round(math.sqrt(len(before)))))
    shares = []
    for values in (clip[: len(before)], clip[len(before) :]):
        counts = [0] * bins
        for value in values:
            counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
        shares.append([count / len(values) for count in counts])
    frame = _Frame((low, high), (0.0, max(map(max, shares)) * 1.06), percent=True)
    body = frame.draw(x_label, "share of replies", whole_x=False)
    for colour, side in enumerate(shares):
        edges = [low + (high - low) * i / bins for i in range(bins + 1)]
        path = [f"M{frame.x(low)},{frame.y(0)}"]
        for share, (left, right) in zip(side, pairwise(edges), strict=True):
            path.append(f"L{frame.x(left)},{frame.y(share)} L{frame.x(right)},{frame.y(share)}")
        path.append(f"L{frame.x(high)},{frame.y(0)}")
        body.append(f'<path class="s{colour} area" d="{" ".join(path)}"/>')
    return _svg(chart_id, title, body, kind="chart")


def interval_bar(chart_id: str, title: str, value: float, low: float, high: float, *, middle: str) -> str:
    """A share between 0 and 1 with its interval on a scale from 0 to 100 %; `middle` names the mark at 50 %."""
    width, height = 240, 44
    x = _scale(0, 1, 8, width - 8)
    body = [f'<line class="axis" x1="{x(0)}" x2="{x(1)}" y1="16" y2="16"/>']
    body.append(f'<line class="reference" x1="{x(0.5)}" x2="{x(0.5)}" y1="6" y2="26"/>')
    body.append(f'<line class="whisker" x1="{x(low)}" x2="{x(high)}" y1="16" y2="16"/>')
    body.append(f'<circle class="estimate" cx="{x(value)}" cy="16" r="5.5"/>')
    body += [
        _text(x(0), 40, "0%", "tick"),
        _text(x(0.5), 40, middle, "tick", "middle"),
        _text(x(1), 40, "100%", "tick", "end"),
    ]
    shown, least, most = (number(share, percent=True) for share in (value, low, high))
    spoken = f"{title}: {shown}, 95% interval {least} to {most}"
    return _svg(chart_id, spoken, body, width=width, height=height, kind="interval")
