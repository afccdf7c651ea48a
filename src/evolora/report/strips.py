"""Drawings in table rows that all share one axis, as wide as their column: intervals and dots.

Places are percentages of the column's width, so that a drawing fits a phone, a screen and a sheet
of paper without being scaled: lines and letters keep their size. Colors come from the page's style
(:data:`STYLE`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from evolora.report.style import LINES

# Told apart by shape as well as by color: in print, and by eyes that see fewer colors.
_SHAPES = (
    '<circle r="4.2"/>',
    '<path d="M-3.8 -3.8H3.8V3.8H-3.8Z"/>',
    '<path d="M0 -5.4L5.4 0L0 5.4L-5.4 0Z"/>',
    '<path d="M0 -5L5 4H-5Z"/>',
    '<path d="M0 5L5 -4H-5Z"/>',
    '<path d="M-1.6 -5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5V-1.6H-1.6Z"/>',
)
_HIGH = 24  # px: height of a row's drawing

STYLE = """
.fit th.plot, .fit td.plot { width: 40%; min-width: 150px; padding: 0 14px; }
td.plot { background: linear-gradient(var(--none), var(--none)) no-repeat
  calc(14px + var(--zero, -1) * (100% - 28px)) 0 / 1px 100%; }
.plot svg { width: 100%; overflow: visible; }
.plot .tick { font-weight: 400; }
.strip line { stroke: currentColor; stroke-width: 2; }
.strip circle { stroke: currentColor; stroke-width: 2; fill: var(--page); }
.strip.sure circle { fill: currentColor; }
.strip path { fill: currentColor; }
.strip .span { stroke: var(--rule); stroke-width: 6; stroke-linecap: round; }
.strip .mean { stroke: var(--ink); stroke-width: 3; }
.up { color: var(--best); } .down { color: var(--just); } .even { color: var(--soft); }
""" + "".join(f".k{i} {{ fill: {color}; }}\n" for i, (color, _) in enumerate(LINES))


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The range that a column of drawings shows, and its labelled places."""

    low: float
    high: float
    ticks: Sequence[float]

    def at(self, value: float) -> str:
        """Return the place of a value, "43.1%"; one beyond an end is put there."""
        return f"{100 * self.share(value):.1f}%"

    def share(self, value: float) -> float:
        """Return the place of a value in [0, 1]."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def head(self, label: str, words: Callable[[float], str]) -> str:
        """Return the column's heading: what is drawn, and the ticks."""
        texts = "".join(
            f'<text class="tick" x="{self.at(tick)}" y="11" text-anchor="middle">'
            f"{escape(words(tick))}</text>"
            for tick in self.ticks
        )
        return (
            f'<th class="plot">{escape(label)}<svg height="14" role="img" '
            f'aria-label="{escape(f"axis: {label}", quote=True)}">{texts}</svg></th>'
        )


def round_axis(values: Iterable[float]) -> Axis:
    """Return an axis over the values with at most five round ticks."""
    known = list(values)
    low, high = min(known), max(known)
    if high == low:
        low, high = low - 0.01, high + 0.01
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * n for n in (1, 2, 5, 10) if (high - low) / (power * n) <= 4)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low=low, high=high, ticks=[step * n for n in range(first, last + 1)])


def interval(axis: Axis, mean: float, ends: tuple[float, float] | None, kind: str) -> str:
    """Draw a mean with its interval; an arrow where that goes on beyond the axis.

    Args:
        axis: of the column.
        mean: where the dot is; filled when the interval has no zero in it.
        ends: of the interval; None where it is not known.
        kind: "up", "down" or "even": the color, by whether the difference is a gain.
    """
    drawn = ""
    if ends is not None:
        drawn = f'<line x1="{axis.at(ends[0])}" x2="{axis.at(ends[1])}" y1="12" y2="12"/>'
        for beyond, end, point in (
            (ends[0] < axis.low, axis.low, "M-7 12L0 7V17Z"),
            (ends[1] > axis.high, axis.high, "M7 12L0 7V17Z"),
        ):
            if beyond:
                drawn += f'<svg x="{axis.at(end)}" overflow="visible"><path d="{point}"/></svg>'
    sure = " sure" if ends is not None and ends[0] * ends[1] > 0 else ""
    return (
        f'<svg class="strip {kind}{sure}" height="{_HIGH}" aria-hidden="true">{drawn}'
        f'<circle cx="{axis.at(mean)}" cy="12" r="4"/></svg>'
    )


def dots(axis: Axis, mean: float, values: Sequence[tuple[int, float, str]]) -> str:
    """Draw a mean as a bar and what it is the mean of as dots, (style, value, hover) each."""
    places = [value for _, value, _ in values]
    step = min(5.0, 15 / max(len(values) - 1, 1))
    top = 12 - step * (len(values) - 1) / 2
    marks = "".join(
        f'<use href="#mark{style % len(_SHAPES)}" class="k{style % len(LINES)}" '
        f'x="{axis.at(value)}" y="{top + step * i:.1f}"><title>{escape(hover)}</title></use>'
        for i, (style, value, hover) in enumerate(values)
    )
    return (
        f'<svg class="strip" height="{_HIGH}" aria-hidden="true">'
        f'<line class="span" x1="{axis.at(min(places))}" x2="{axis.at(max(places))}" '
        f'y1="12" y2="12"/><line class="mean" x1="{axis.at(mean)}" x2="{axis.at(mean)}" '
        f'y1="1" y2="23"/>{marks}</svg>'
    )


def shapes() -> str:
    """Return the dots' shapes, which a page holds once."""
    drawn = "".join(f'<g id="mark{i}">{shape}</g>' for i, shape in enumerate(_SHAPES))
    return f'<svg class="shapes" width="1" height="1" aria-hidden="true"><defs>{drawn}</defs></svg>'


def key(names: Iterable[str]) -> str:
    """Return which dots are whose."""
    items = "".join(
        f'<li><svg width="14" height="14" aria-hidden="true"><use href="#mark{i % len(_SHAPES)}" '
        f'class="k{i % len(LINES)}" x="7" y="7"/></svg>{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'
