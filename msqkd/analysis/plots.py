"""The plots of the report, each returned as an inline SVG element.

Figures are built without pyplot, so neither the caller's backend nor its open figures are touched. Text stays text: it
can be searched, takes the font of the page, and is escaped by the SVG writer. Names are never read as TeX.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Optional, TypeVar

from msqkd.train.metric import ACCURACY, Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2933"
MUTED = "#64707d"
GRID = "#e3e8ee"
COLOURS = {"float": "#52606d", "int8": "#2f6db3", "exported": "#173f73", "control": "#c9a45c"}
HIGHLIGHT = "#c2410c"
RANGE = "#bcd3ec"
NARROW = "#7fa8d6"
LSB_COLOURS = (NARROW, COLOURS["control"], HIGHLIGHT)
"""Of differences of 1 step, of 2, and of more."""
BAD_COLOURS = ("#ffffff", "#fdf0e4", "#fbdfc5", "#f8cba1", "#f4b47b", "#ee9a55", "#e58038")
"""Of the cells of a heat map, the better first: each is darker than the one before it, in grey too."""
MUCH_COLOURS = ("#ffffff", "#eaf1f9", "#d6e4f3", "#c1d6ec", "#a9c6e4", "#91b5db", "#78a3d1")
"""Of cells that are neither good nor bad, the smaller first."""
MINUS = "\N{MINUS SIGN}"

_Row = TypeVar("_Row")
_ONE_CHART = 16
_ROWS_PER_CHART = 45
_MAX_POINTS = 300
_MAX_NAME = 34
_ROW_INCHES = 0.175
_WIDE, _HALF = 7.6, 5.4


@dataclass(frozen=True)
class Step:
    """One bar of the staircase: a value of the metric; `kind` is a key of `COLOURS`."""

    label: str
    value: float
    kind: str


@dataclass(frozen=True)
class RangeRow:
    """The range one layer can represent in int8, `lo`–`hi`, beside the range its values were seen in (where known).

    `narrow` is the reach ±narrow of the channel with the smallest scale.
    """

    name: str
    lo: float
    hi: float
    observed_min: Optional[float] = None
    observed_max: Optional[float] = None
    narrow: Optional[float] = None

    @property
    def reach(self) -> float:
        """The largest magnitude, representable or observed; 1 where all are 0."""
        ends = (self.lo, self.hi, self.observed_min or 0.0, self.observed_max or 0.0)
        return max(map(abs, ends)) or 1.0

    @property
    def left(self) -> float:
        """The lowest end as a part of `reach`, at most 0."""
        return min(self.lo, self.observed_min or 0.0, 0.0) / self.reach

    @property
    def clipped(self) -> tuple[bool, bool]:
        """Whether values were seen more than one quantisation step below `lo`, and above `hi`."""
        step = (self.hi - self.lo) / 255
        below = self.observed_min is not None and self.observed_min < self.lo - step
        above = self.observed_max is not None and self.observed_max > self.hi + step
        return below, above


@dataclass(frozen=True)
class Curve:
    """One panel of a training: (x, y) points; `axis` is ``step`` or ``epoch``, `percent` whether y is a percentage."""

    title: str
    axis: str
    points: Sequence[tuple[float, float]]
    percent: bool = False
    marked: Optional[float] = None


def signed(value: float, digits: int = 2) -> str:
    """`value` with an explicit sign: ``+0.19``, ``−0.19``, ``±0.00``."""
    rounded = round(value, digits)
    sign = "±" if rounded == 0 else "+" if rounded > 0 else MINUS
    return f"{sign}{abs(rounded):.{digits}f}"


def difference(value: float, base: float, digits: int = 2) -> str:
    """How far `value` is from `base`, as the two print with `digits` decimals: ``−0.19``."""
    return signed(round(value, digits) - round(base, digits), digits)


def number(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits and a typographic minus."""
    return f"{value:.{digits}g}".replace("-", MINUS)


def staircase_floor(values: Sequence[float], scale: Scale = ACCURACY.scale) -> float:
    """Where the axis of `staircase` begins: low enough for the differences to show, never below 0 in percent."""
    floor = min(values) - 0.8 * _span(values, scale)
    return max(0.0, floor) if scale.unit else floor


def _span(values: Sequence[float], scale: Scale) -> float:
    """What the bars of `staircase` differ by, and enough to be seen where that is nothing."""
    least = 0.5 if scale.unit else 0.05 * max(map(abs, values)) or 1.0
    return max(max(values) - min(values), least)


def staircase(steps: Sequence[Step], controls: Sequence[Step] = (), scale: Scale = ACCURACY.scale) -> str:
    """The metric from the float network to the exported one, with the float controls apart on the right.

    Args:
        steps: in order; the dashed line is the first one of kind ``float``, and differences are to it.
        controls: trainings of the float network with the same budget.
        scale: of the values.
    """
    bars = [*steps, *controls]
    values = [bar.value for bar in bars]
    base = next((bar.value for bar in steps if bar.kind == "float"), None)
    places = [i + (0.45 if i >= len(steps) and steps else 0.0) for i in range(len(bars))]
    bottom, span = staircase_floor(values, scale), _span(values, scale)
    with _style():
        figure, axes = _figure(max(1.3 + 0.95 * len(bars), 3.4), 3.5)
        heights, colours = [value - bottom for value in values], [COLOURS[bar.kind] for bar in bars]
        axes.bar(places, heights, 0.62, bottom, color=colours, zorder=2)
        for bar, left, right in zip(steps, places, places[1 : len(steps)]):
            if bar.kind != "float":
                axes.plot([left + 0.31, right - 0.31], [bar.value] * 2, color=MUTED, linewidth=0.8, zorder=3)
        if base is not None:
            axes.axhline(base, color=COLOURS["float"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        for place, bar in zip(places, bars):
            lift = 3
            if base is not None and bar.kind != "float":
                gap = difference(bar.value, base, scale.digits)
                _note(axes, gap, (place, bar.value), (0, lift), size=8, color=MUTED)
                lift = 14
            _note(axes, scale.number(bar.value), (place, bar.value), (0, lift), size=10, weight="bold")
        if steps and controls:
            axes.axvline((places[len(steps) - 1] + places[len(steps)]) / 2, color=GRID, linewidth=1.2)
        axes.set_xticks(places, [bar.label for bar in bars])
        axes.set_xlim(places[0] - 0.6, places[-1] + 0.6)
        if scale.unit:
            _percent_axis(axes, bottom, max(values) + 0.35 * span)
        else:
            axes.set_ylim(bottom, max(values) + 0.35 * span)
        axes.set_title("test accuracy, %" if scale.unit else f"test {scale.name}")
        axes.grid(axis="y")
        axes.tick_params(axis="x", length=0)
        return _svg(figure, "staircase")


def sizes(rows: Sequence[tuple[str, str, float, str]]) -> str:
    """Horizontal bars of (label, text at the bar's end, bytes, key of `COLOURS`)."""
    largest = max(row[2] for row in rows)
    with _style():
        figure, axes = _figure(_WIDE, 0.2 + 0.36 * len(rows))
        places = range(len(rows))
        axes.barh(places, [row[2] for row in rows], 0.6, color=[COLOURS[row[3]] for row in rows], zorder=2)
        for place, row in zip(places, rows):
            _note(axes, row[1], (row[2], place), (5, 0), size=9, ha="left", va="center")
        _rows(axes, [row[0] for row in rows], size=9)
        axes.set_xlim(0, 1.3 * largest if largest > 0 else 1.0)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return _svg(figure, "sizes")


def latencies(rows: Sequence[tuple[str, float, float, float, str]]) -> str:
    """Horizontal bars of times in milliseconds, each on the scale of its own pair, with a line between the quartiles.

    Args:
        rows: label, lower quartile, median, upper quartile, key of `COLOURS`; a float row before its int8 one.
    """
    with _style():
        figure, axes = _figure(_WIDE, 0.2 + 0.34 * len(rows))
        for first in range(0, len(rows), 2):
            pair = rows[first : first + 2]
            longest = max(row[3] for row in pair) or 1.0
            for i, (_, lower, middle, upper, kind) in enumerate(pair, start=first):
                axes.barh(i, middle / longest, 0.6, color=COLOURS[kind], zorder=2)
                axes.plot([lower / longest, upper / longest], [i, i], color=INK, linewidth=1.6, zorder=3)
                text = f"{number(middle)} ms ({number(lower)} … {number(upper)})"
                _note(axes, text, (max(middle, upper) / longest, i), (5, 0), size=8.5, ha="left", va="center")
            if first:
                axes.axhline(first - 0.5, color=GRID, linewidth=0.8, zorder=1)
        _rows(axes, [row[0] for row in rows], size=9)
        axes.set_xlim(0, 1.5)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return _svg(figure, "latencies")


def worst(values: Sequence[float]) -> set[int]:
    """The positions of the lowest values: three, fewer where there are not ten."""
    count = 3 if len(values) >= 10 else 1
    return set(sorted(range(len(values)), key=lambda i: values[i])[:count])


def sqnr(layers: Sequence[tuple[str, float]]) -> list[str]:
    """Charts of (layer, signal-to-quantisation-noise ratio in dB), in the order given; the worst are highlighted."""
    if not layers:
        return []
    values = [value for _, value in layers]
    low = worst(values)
    right = max(max(values), 1.0)
    charts = []
    for first, part in _parts(layers):
        with _style():
            figure, axes = _figure(_HALF if len(layers) > _ONE_CHART else _WIDE, 0.55 + _ROW_INCHES * len(part))
            colours = [HIGHLIGHT if first + i in low else COLOURS["int8"] for i in range(len(part))]
            axes.barh(range(len(part)), [value for _, value in part], 0.7, color=colours, zorder=2)
            for i, (_, value) in enumerate(part):
                colour = HIGHLIGHT if first + i in low else INK
                text = f"{value:.1f}".replace("-", MINUS)
                _note(axes, text, (max(value, 0.0), i), (3, 0), size=7, ha="left", va="center", color=colour)
            _rows(axes, [name for name, _ in part], size=7.5)
            axes.set_xlim(min(0.0, 1.1 * min(values)), 1.14 * right)
            axes.grid(axis="x")
            axes.set_xlabel("dB", fontsize=8)
            charts.append(_svg(figure, f"sqnr{first}"))
    return charts


def lsb(rows: Sequence[tuple[str, Sequence[float], str]]) -> list[str]:
    """Charts of how many integers differ, a bar a layer in the colours of `LSB_COLOURS`.

    Args:
        rows: the layer, the shares in percent that differ by 1 step, by 2, and by more, and the text at the bar's end.
    """
    if not rows:
        return []
    charts = []
    widest = max(sum(shares) for _, shares, _ in rows)
    for first, part in _parts(rows):
        with _style():
            figure, axes = _figure(_HALF if len(rows) > _ONE_CHART else _WIDE, 0.55 + _ROW_INCHES * len(part))
            left = [0.0] * len(part)
            for step, colour in enumerate(LSB_COLOURS):
                widths = [shares[step] for _, shares, _ in part]
                axes.barh(range(len(part)), widths, 0.7, left, color=colour, zorder=2)
                left = [begin + width for begin, width in zip(left, widths)]
            for i, (_, _, text) in enumerate(part):
                _note(axes, text, (left[i], i), (3, 0), size=7, ha="left", va="center")
            _rows(axes, [name for name, _, _ in part], size=7.5)
            axes.set_xlim(0, 1.6 * widest if widest > 0 else 1.0)
            axes.grid(axis="x")
            axes.set_xlabel("integers that differ, %", fontsize=8)
            charts.append(_svg(figure, f"lsb{first}"))
    return charts


def noise_pairs(rows: Sequence[tuple[str, Optional[float], Optional[float]]]) -> list[str]:
    """Charts of two signal-to-noise ratios a layer, in dB: a ring for the first, a dot for the second.

    Args:
        rows: the layer and its two ratios, None where there is no noise.
    """
    values = [value for _, *pair in rows for value in pair if value is not None]
    if not values:
        return []
    low, high = min(values), max(values)
    margin = 0.06 * max(high - low, 5.0)
    charts = []
    for first, part in _parts(rows):
        with _style():
            figure, axes = _figure(_HALF if len(rows) > _ONE_CHART else _WIDE, 0.55 + _ROW_INCHES * len(part))
            for i, (_, one, other) in enumerate(part):
                if one is not None and other is not None:
                    axes.plot([one, other], [i, i], color=RANGE, linewidth=1.6, zorder=2)
                if one is not None:
                    axes.plot(one, i, "o", markersize=5.5, markerfacecolor="white", color=COLOURS["float"], zorder=3)
                if other is not None:
                    axes.plot(other, i, "o", markersize=3, color=COLOURS["int8"], zorder=4)
            _rows(axes, [name for name, _, _ in part], size=7.5)
            axes.set_xlim(low - margin, high + margin)
            axes.grid(axis="x")
            axes.xaxis.set_major_formatter(lambda value, _: number(value, 4))
            axes.set_xlabel("dB", fontsize=8)
            charts.append(_svg(figure, f"noise{first}"))
    return charts


def ranges(rows: Sequence[RangeRow], name: str) -> list[str]:
    """Charts of representable against observed ranges; every row has its own scale, its numbers stand at its end.

    Args:
        rows: one a layer.
        name: distinguishes the charts of one page.
    """
    if not rows:
        return []
    charts = []
    left = min(row.left for row in rows)
    for first, part in _parts(rows):
        with _style():
            figure, axes = _figure(_HALF if len(rows) > _ONE_CHART else _WIDE, 0.3 + _ROW_INCHES * len(part))
            axes.axvline(0, color=MUTED, linewidth=0.7, zorder=1)
            for i, row in enumerate(part):
                _range(axes, i, row)
            _rows(axes, [row.name for row in part], size=7.5)
            axes.set_xlim(left - 0.03, 1.03)
            axes.set_xticks([])
            axes.spines[["left", "bottom"]].set_visible(False)
            charts.append(_svg(figure, f"{name}{first}"))
    return charts


def _range(axes: Axes, place: int, row: RangeRow) -> None:
    def draw(left: float, right: float, height: float, colour: str, layer: int) -> None:
        axes.barh(place, (right - left) / row.reach, height, left / row.reach, color=colour, zorder=layer)

    draw(row.lo, row.hi, 0.74, RANGE, 2)
    if row.narrow is not None:
        draw(-row.narrow, row.narrow, 0.74, NARROW, 3)
    below, above = row.clipped
    if below and row.observed_min is not None:
        draw(row.observed_min, row.lo, 0.74, HIGHLIGHT, 2)
    if above and row.observed_max is not None:
        draw(row.hi, row.observed_max, 0.74, HIGHLIGHT, 2)
    if row.observed_min is not None and row.observed_max is not None:
        draw(row.observed_min, row.observed_max, 0.16, INK, 4)
    axes.text(
        1.02,
        place,
        f"{number(row.lo)} … {number(row.hi)}",
        transform=axes.get_yaxis_transform(),
        fontsize=7,
        va="center",
        color=HIGHLIGHT if below or above else INK,
    )


def training(curves: Sequence[Curve], name: str) -> str:
    """The curves of one training side by side; where `marked` is set, a vertical line stands at that x.

    Args:
        curves: at least one, each with at least one point; of more than 300 points the means and spreads of equal parts
            are drawn.
        name: distinguishes the charts of one page.
    """
    with _style():
        figure = _canvas(max(3.6 * len(curves), 4.4), 2.2)
        for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves):
            x, y, low, high = _thinned(curve.points)
            if low:
                axes.fill_between(x, low, high, color=RANGE, linewidth=0, zorder=2)
            marker = "o" if len(x) <= 12 else ""
            axes.plot(x, y, color=COLOURS["int8"], linewidth=1.4, marker=marker, markersize=3.5, zorder=3)
            if curve.marked is not None:
                axes.axvline(curve.marked, color=HIGHLIGHT, linewidth=1.1, linestyle=(0, (4, 2)), zorder=4)
            axes.set_title(curve.title)
            axes.set_xlabel(curve.axis, fontsize=8)
            axes.grid(axis="both")
            axes.margins(x=0.02)
            axes.yaxis.set_major_formatter(lambda value, _: number(value, 6))
            if curve.percent:
                pad = max(0.08 * (max(y) - min(y)), 0.5)
                _percent_axis(axes, max(min(y) - pad, 0.0), max(y) + pad)
            if curve.axis == "epoch":
                axes.xaxis.get_major_locator().set_params(integer=True)
        return _svg(figure, name)


def front(points: Sequence[tuple[float, float]], across: str, up: str, marked: float, name: str) -> str:
    """A Pareto front: (cost, value) points by rising cost, with a dashed line at the cost `marked`.

    Args:
        points: one at least.
        across, up: labels of the axes.
        marked: the cost chosen.
        name: distinguishes the charts of one page.
    """
    with _style():
        figure, axes = _figure(_HALF, 3.0)
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.axvline(marked, color=HIGHLIGHT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        many = len(points) > 40
        axes.plot(xs, ys, color=COLOURS["int8"], linewidth=1.2, marker="" if many else "o", markersize=4, zorder=2)
        axes.grid(axis="both")
        axes.set_xlabel(across, fontsize=8)
        axes.set_title(up)
        return _svg(figure, name)


def losses(rows: Sequence[tuple[str, float]], name: str, label: str) -> list[str]:
    """Charts of what each layer costs, a bar a layer in the order given; the largest are highlighted.

    Args:
        rows: the layer and its loss, 0 or more.
        name: distinguishes the charts of one page.
        label: of the axis.
    """
    if not rows:
        return []
    high = worst([-value for _, value in rows])
    right = max(value for _, value in rows) or 1.0
    charts = []
    for first, part in _parts(rows):
        with _style():
            figure, axes = _figure(_HALF if len(rows) > _ONE_CHART else _WIDE, 0.55 + _ROW_INCHES * len(part))
            colours = [HIGHLIGHT if first + i in high else COLOURS["int8"] for i in range(len(part))]
            axes.barh(range(len(part)), [value for _, value in part], 0.7, color=colours, zorder=2)
            for i, (_, value) in enumerate(part):
                colour = HIGHLIGHT if first + i in high else INK
                _note(axes, number(value, 2), (value, i), (3, 0), size=7, ha="left", va="center", color=colour)
            _rows(axes, [row for row, _ in part], size=7.5)
            axes.set_xlim(0, 1.18 * right)
            axes.grid(axis="x")
            axes.set_xlabel(label, fontsize=8)
            charts.append(_svg(figure, f"{name}{first}"))
    return charts


def distribution(
    edges: Sequence[float],
    counts: Sequence[Sequence[float]],
    name: str,
    title: str,
    span: Optional[tuple[float, float]] = None,
    marks: Sequence[float] = (),
) -> str:
    """One histogram with a logarithmic axis; what is outside `span` (what can be represented) is highlighted. A second
    histogram is drawn as a line. Dashed lines stand at `marks`.

    Args:
        edges: (B + 1,), rising.
        counts: one or two histograms (B,).
        name: distinguishes the charts of one page.
        title: what the values are.
        span: (lo, hi).
    """
    low, high = span or (edges[0], edges[-1])
    inside = [right > low and left < high for left, right in zip(edges, edges[1:])]
    with _style():
        figure, axes = _figure(_HALF, 1.9)
        if span is not None:
            axes.axvspan(low, high, color=RANGE, alpha=0.55, linewidth=0, zorder=1)
        for within, colour in ((True, COLOURS["float"]), (False, HIGHLIGHT)):
            shown = [count if here is within else 0 for count, here in zip(counts[0], inside)]
            if any(shown):
                axes.stairs(shown, edges, fill=True, color=colour, zorder=2)
        for other in counts[1:]:
            axes.stairs(other, edges, color=HIGHLIGHT, linewidth=1.3, zorder=3)
        for mark in marks:
            axes.axvline(mark, color=INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=4)
        axes.set_yscale("log")
        axes.set_ylim(0.7, 2.0 * max(max(max(one), 1) for one in counts))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_major_formatter(lambda value, _: number(value, 4))
        axes.set_title(title)
        return _svg(figure, name)


def channels(
    lows: Sequence[float], highs: Sequence[float], name: str, title: str, span: Optional[tuple[float, float]] = None
) -> str:
    """From the smallest to the largest value of every channel, the area in `span` (what can be represented) shaded.

    Args:
        lows, highs: (C,).
        name: distinguishes the charts of one page.
        title: what the values are.
        span: (lo, hi).
    """
    with _style():
        figure, axes = _figure(_HALF, 1.9)
        if span is not None:
            axes.axhspan(*span, color=RANGE, alpha=0.55, linewidth=0, zorder=1)
        places = [i - 0.5 for i in range(len(lows) + 1)]
        axes.stairs(highs, places, baseline=lows, fill=True, color=COLOURS["int8"], zorder=2)
        axes.set_xlim(-0.5, len(lows) - 0.5)
        axes.set_xlabel("channel", fontsize=8)
        locator: Any = axes.xaxis.get_major_locator()
        locator.set_params(integer=True)
        axes.yaxis.set_major_formatter(lambda value, _: number(value, 4))
        axes.set_title(title)
        return _svg(figure, name)


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float], list[float], list[float]]:
    """x and y of at most 300 points, with the lowest and highest y each stands for (empty where all are kept)."""
    if len(points) <= _MAX_POINTS:
        return [x for x, _ in points], [y for _, y in points], [], []
    size = ceil(len(points) / _MAX_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    x = [sum(p[0] for p in part) / len(part) for part in parts]
    y = [sum(p[1] for p in part) / len(part) for part in parts]
    return x, y, [min(p[1] for p in part) for part in parts], [max(p[1] for p in part) for part in parts]


def _parts(rows: Sequence[_Row]) -> list[tuple[int, Sequence[_Row]]]:
    """`rows` cut into charts of about equal height (one, or an even number), each with the place of its first row."""
    count = 1 if len(rows) <= _ONE_CHART else 2 * ceil(len(rows) / (2 * _ROWS_PER_CHART))
    size = ceil(len(rows) / count)
    return [(i, rows[i : i + size]) for i in range(0, len(rows), size)]


# -- matplotlib --------------------------------------------------------------------------------------------------------
@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "msqkd",  # the same data give the same bytes
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "text.color": INK,
        "text.parse_math": False,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.titlecolor": MUTED,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": MUTED,
        "xtick.labelcolor": INK,
        "xtick.labelsize": 8.5,
        "ytick.color": MUTED,
        "ytick.labelcolor": INK,
        "ytick.labelsize": 8.5,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has a font for it
        yield


def _canvas(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _canvas(width, height)
    return figure, figure.add_subplot()


def _percent_axis(axes: Axes, bottom: float, top: float) -> None:
    """The y axis from `bottom` to `top`, which may leave room above 100 but has no tick there."""
    axes.set_ylim(bottom, top)
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= min(top, 100)])


def _rows(axes: Axes, names: Sequence[str], size: float) -> None:
    axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=size)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _short(name: str) -> str:
    """`name` on one line; where it is long, its first parts are cut to a letter, then its middle is left out."""
    parts = " ".join(name.split()).split(".")
    for i, part in enumerate(parts[:-1]):
        if len(".".join(parts)) > _MAX_NAME and not part.isdigit():
            parts[i] = part[:1]
    line, half = ".".join(parts), _MAX_NAME // 2
    return line if len(line) <= _MAX_NAME else f"{line[: half - 1]}…{line[-half:]}"


def _note(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    *,
    size: float,
    ha: str = "center",
    va: str = "bottom",
    color: str = INK,
    weight: str = "normal",
) -> None:
    axes.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        ha=ha,
        va=va,
        fontsize=size,
        color=color,
        fontweight=weight,
        annotation_clip=False,
    )


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    # Several SVGs share the page: their ids must differ.
    return re.sub(r'(<\w+ id="|href="#|url\(#)', rf"\1{name}-", text[text.index("<svg") :])
