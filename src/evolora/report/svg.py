"""Small SVG drawings as strings: heat map, line chart, legend. No scripts, no outside references.

Text and axes take their color from the page (``currentColor`` and classes), so that one drawing
serves a light, a dark and a printed page. Sizes are CSS pixels at scale 1: a drawing is never
shrunk, because shrunk labels cannot be read on a phone; a wide one scrolls in its frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Cell = float | None

# cividis (Nunez, Anderton, Renslow 2018): even steps in lightness, the same to color-blind eyes
_PALETTE = (
    "00224e", "003170", "2a3f6d", "434e6c", "575d6d", "6a6c71", "7d7c78",
    "918b78", "a59c74", "bcae6c", "d2c060", "e9d34e", "fee838",
)  # fmt: skip
_LETTER = 6.1  # px: mean width of a letter at 11 px, for the room that labels take


def color(share: float) -> str:
    """Return the palette's color (#rrggbb) for a number in [0, 1]; outside it is clipped."""
    place = min(max(share, 0.0), 1.0) * (len(_PALETTE) - 1)
    low = min(int(place), len(_PALETTE) - 2)
    mixed = (
        round(a + (b - a) * (place - low))
        for a, b in zip(_rgb(_PALETTE[low]), _rgb(_PALETTE[low + 1]), strict=True)
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)


def ink(share: float) -> str:
    """Return the class of text that stands out on `color` of the same number."""
    return "on-dark" if share < 0.55 else "on-light"


def short(name: str, letters: int = 13) -> str:
    """Return a name cut to so many letters, with an ellipsis if it was longer."""
    return name if len(name) <= letters else name[: letters - 1] + "…"


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A table drawn as colored cells.

    Args:
        rows, columns: labels; long ones are cut and shown whole on hover.
        cells: row by row, shares in [0, 1]; None is drawn hatched ("not evaluated").
        label: what the drawing shows, for screen readers.
        hover: text for cell (i, j).
        outlined: whether cell (i, j) has a frame.
        cell: (width, height) in px; numbers in % are written from 24 px width on.
        marks: columns with a bar beneath (frozen experts).
    """

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Cell]]
    label: str
    hover: Callable[[int, int], str]
    outlined: Callable[[int, int], bool] = lambda i, j: False
    cell: tuple[int, int] = (28, 22)
    marks: frozenset[int] = frozenset()
    upright: bool = False  # short column labels (numbers) stay horizontal
    letters: int = 13  # of a row's label

    def draw(self) -> str:
        """Return the SVG element."""
        wide, high = self.cell
        labels = (len(short(name, self.letters)) for name in self.rows)
        left = 12 + _LETTER * max(labels, default=0)
        longest = max((len(short(name)) for name in self.columns), default=0)
        top = 14.0 if self.upright else 13 + 0.87 * _LETTER * longest
        overhang = 0.0 if self.upright else max(0.0, 0.5 * _LETTER * longest - wide / 2)
        width = left + wide * len(self.columns) + overhang + 2
        height = top + high * len(self.rows) + (7 if self.marks else 2)
        parts = [_open(width, height, self.label)]
        for j, name in enumerate(self.columns):
            x = left + wide * (j + 0.5)
            turn = "" if self.upright else f' transform="rotate(-60 {x:.1f} {top - 5:.1f})"'
            anchor = "middle" if self.upright else "start"
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{top - 5:.1f}" text-anchor="{anchor}"{turn}>'
                f"{_titled(name)}</text>"
            )
        for i, name in enumerate(self.rows):
            y = top + high * (i + 0.5) + 4
            parts.append(
                f'<text class="tick" x="{left - 5:.1f}" y="{y:.1f}" text-anchor="end">'
                f"{_titled(name, self.letters)}</text>"
            )
            parts.extend(self._cell(i, j, left + wide * j, top + high * i) for j in self._range())
        for j in sorted(self.marks):
            y = top + high * len(self.rows) + 2
            parts.append(
                f'<rect class="mark" x="{left + wide * j + 2:.1f}" y="{y:.1f}" '
                f'width="{wide - 4}" height="3"/>'
            )
        return "".join(parts) + "</svg>"

    def _range(self) -> range:
        return range(len(self.columns))

    def _cell(self, i: int, j: int, x: float, y: float) -> str:
        wide, high = self.cell
        value = self.cells[i][j]
        box = f'x="{x:.1f}" y="{y:.1f}" width="{wide - 1}" height="{high - 1}"'
        hover = f"<title>{escape(self.hover(i, j))}</title>"
        if value is None:
            return f'<rect class="none" {box}>{hover}</rect>'
        frame = ' class="just"' if self.outlined(i, j) else ""
        drawn = f'<rect{frame} {box} fill="{color(value)}">{hover}</rect>'
        if wide < 24:
            return drawn
        number = f"{100 * value:.0f}" if value >= 0.9995 or value == 0 else f"{100 * value:.1f}"
        return drawn + (
            f'<text class="cell {ink(value)}" x="{x + (wide - 1) / 2:.1f}" '
            f'y="{y + high / 2 + 3:.1f}">{number}</text>'
        )


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series: a value per x position, None where there is none, and its spread."""

    label: str
    style: int  # which of the page's line styles; the same method has the same everywhere
    values: Sequence[Cell]
    strong: bool = False  # drawn thicker
    floor: bool = False  # a level to compare with: dotted, without points
    low: Sequence[Cell] = ()
    high: Sequence[Cell] = ()


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Lines over equally spaced positions.

    Args:
        lines: series of equal length.
        ticks: label of each position, "" for none.
        label: what the drawing shows, for screen readers.
        top: end of the y axis (it starts at 0); for ``log`` the axis spans the data's decades.
        unit: text of a y value.
        event: position of a vertical line (the moment a task is learned).
        at: place of each position on the x axis, in [0, 1], and then of ``event`` too; empty for
            equal steps.
    """

    lines: Sequence[Line]
    ticks: Sequence[str]
    label: str
    top: float
    unit: Callable[[float], str]
    size: tuple[int, int] = (230, 130)
    event: float | None = None
    log: bool = False
    at: Sequence[float] = ()

    def draw(self) -> str:
        """Return the SVG element."""
        width, height = self.size
        levels = self._levels()
        left = 8 + _LETTER * max(len(self.unit(level)) for level in levels)
        box = (left, 8.0, width - 10.0, height - 20.0)
        parts = [_open(width, height, self.label)]
        for level in levels:
            y = self._y(level, box)
            parts.append(
                f'<path class="grid" d="M{left:.1f} {y:.1f}H{box[2]:.1f}"/>'
                f'<text class="tick" x="{left - 4:.1f}" y="{y + 3.5:.1f}" text-anchor="end">'
                f"{escape(self.unit(level))}</text>"
            )
        for i, tick in enumerate(self.ticks):
            if tick:
                parts.append(
                    f'<text class="tick" x="{self._x(i, box):.1f}" y="{height - 6}" '
                    f'text-anchor="middle">{escape(tick)}</text>'
                )
        if self.event is not None:
            x = self._across(self.event, box)
            parts.append(f'<path class="event" d="M{x:.1f} {box[1]:.1f}V{box[3]:.1f}"/>')
        # Thick ones first: a thin line on top of a thick one leaves both to be seen.
        ordered = sorted(self.lines, key=lambda line: not line.strong)
        parts.extend(self._band(line, box) for line in ordered)
        parts.extend(self._line(line, box) for line in ordered)
        return "".join(parts) + "</svg>"

    def _levels(self) -> list[float]:
        if not self.log:
            return [self.top * share for share in (0, 0.5, 1)]
        known = [v for line in self.lines for v in line.values if v]
        low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
        step = max(1, math.ceil((high - low) / 4))
        return [0.0, *(10.0**power for power in range(low, max(high, low + 1) + 1, step))]

    def _x(self, i: int, box: tuple[float, float, float, float]) -> float:
        return self._across(self.at[i] if self.at else i, box)

    def _across(self, place: float, box: tuple[float, float, float, float]) -> float:
        """Return the x of a place: of ``at``, or a number of equal steps."""
        steps = len(self.ticks) - 1
        share = place if self.at else place / steps if steps else 0.5
        return box[0] + 5 + (box[2] - box[0] - 10) * share

    def _y(self, value: float, box: tuple[float, float, float, float]) -> float:
        share = value / self.top if self.top else 0.0
        if self.log:
            # The lowest tenth of the axis is for zero, which has no logarithm.
            first, last = (math.log10(level) for level in (self._levels()[1], self._levels()[-1]))
            place = (math.log10(value) - first) / max(last - first, 1) if value > 0 else -1
            share = 0.0 if value <= 0 else 0.12 + 0.88 * place
        return box[3] - (box[3] - box[1]) * share

    def _line(self, line: Line, box: tuple[float, float, float, float]) -> str:
        points = [
            (self._x(i, box), self._y(value, box))
            for i, value in enumerate(line.values)
            if value is not None
        ]
        if not points:
            return ""
        path = ""
        for i, value in enumerate(line.values):
            if value is None:
                continue
            start = i == 0 or line.values[i - 1] is None  # a gap: not evaluated there
            path += f"{'M' if start else 'L'}{self._x(i, box):.1f} {self._y(value, box):.1f}"
        radius = 3.4 if len(points) == 1 else 1.9  # a lone point has no line to be seen by
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' for x, y in points)
        said = ", ".join(
            f"{tick or i}: {self.unit(value)}"
            for i, (tick, value) in enumerate(zip(self.ticks, line.values, strict=True))
            if value is not None
        )
        title = f"<title>{escape(f'{line.label} ({said})')}</title>"
        kind = " floor" if line.floor else " strong" if line.strong else ""
        dots = "" if line.floor else dots
        return f'<g class="line s{line.style}{kind}">{title}<path d="{path}"/>{dots}</g>'

    def _band(self, line: Line, box: tuple[float, float, float, float]) -> str:
        pieces: list[list[tuple[int, float, float]]] = [[]]
        for i, (low, high) in enumerate(zip(line.low, line.high, strict=True)):
            if low is None or high is None:
                pieces.append([])  # a gap: nothing was evaluated there
            else:
                pieces[-1].append((i, low, high))
        return "".join(self._polygon(line.style, piece, box) for piece in pieces if len(piece) > 1)

    def _polygon(
        self,
        style: int,
        piece: list[tuple[int, float, float]],
        box: tuple[float, float, float, float],
    ) -> str:
        upper = [f"{self._x(i, box):.1f},{self._y(high, box):.1f}" for i, _, high in piece]
        lower = [f"{self._x(i, box):.1f},{self._y(low, box):.1f}" for i, low, _ in piece]
        corners = " ".join(upper + lower[::-1])
        return f'<polygon class="band s{style}" points="{corners}"/>'


def swatch(style: int, *, strong: bool = False, floor: bool = False) -> str:
    """Return a short piece of a line style, for a legend."""
    kind = " floor" if floor else " strong" if strong else ""
    dot = "" if floor else '<circle cx="15" cy="6" r="2.2"/>'
    return (
        '<svg class="swatch" width="30" height="12" aria-hidden="true">'
        f'<g class="line s{style}{kind}"><path d="M2 6H28"/>{dot}</g></svg>'
    )


def scale() -> str:
    """Return the palette from 0 to 100 % as a key to the heat maps."""
    steps = 24
    boxes = "".join(
        f'<rect x="{26 + 6 * i}" y="2" width="6.5" height="11" fill="{color(i / (steps - 1))}"/>'
        for i in range(steps)
    )
    return (
        _open(230, 16, "color scale from 0 to 100 percent")
        + f'<text class="tick" x="0" y="11">0 %</text>{boxes}'
        + '<text class="tick" x="176" y="11">100 %</text></svg>'
    )


def _open(width: float, height: float, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'aria-label="{escape(label, quote=True)}">'
    )


def _titled(name: str, letters: int = 13) -> str:
    return f"{escape(short(name, letters))}<title>{escape(name)}</title>"


def _rgb(value: str) -> tuple[int, int, int]:
    return int(value[:2], 16), int(value[2:4], 16), int(value[4:], 16)
