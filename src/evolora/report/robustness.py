"""The report's curves of ``robustness.json``: AP over the share of incomplete test samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from evolora.report import svg
from evolora.report.figures import Array, mean_line
from evolora.report.files import TablePoint
from evolora.report.parts import cell, framed
from evolora.report.records import RunRecord
from evolora.report.svg import Line, LineChart
from evolora.report.tables import Comparison, Group, value_of

KINDS = {"text": "Text missing", "image": "Image missing", "both": "Text or image missing"}
WAYS: dict[str, Callable[[TablePoint], float | None]] = {
    "AP, task not told": lambda point: point.task_free.ap if point.task_free else None,
    "AP, task told": lambda point: point.oracle.ap if point.oracle else None,
    "task recognised": lambda point: point.task_identification,
}


@dataclass(frozen=True, kw_only=True)
class _Curves:
    """What is drawn: groups by their line style, and what was tested of them.

    Args:
        groups: with the runs whose robustness was measured.
        floors: methods that were trained and tested with one modality alone, by line style.
        kinds: that any of the runs was tested with.
        rates: the same.
    """

    groups: dict[int, Group]
    floors: dict[int, Group]
    kinds: tuple[str, ...]
    rates: tuple[float, ...]

    @property
    def alone(self) -> bool:
        """Whether one method is shown: its kinds share a drawing then."""
        return len(self.groups) == 1


def section(comparison: Comparison) -> list[str]:
    """Return the page's section on robustness; empty where none was measured."""
    curves = _collect(comparison)
    if not curves.groups:
        return []
    return [
        "<h2>Robustness to what is missing</h2>",
        f"<p>{escape(_caption(curves))}</p>",
        _legend(curves),
        framed(_drawings(curves)),
        _numbers(curves),
    ]


def _collect(comparison: Comparison) -> _Curves:
    groups, floors = {}, {}
    for style, group in enumerate(comparison.groups):
        measured = tuple(run for run in group.runs if run.robustness)
        if only_modality(group):
            floors[style] = group
        elif measured:
            some = f" ({len(measured)} of {len(group.runs)} runs)"
            label = group.label + (some if len(measured) < len(group.runs) else "")
            groups[style] = Group(label=label, runs=measured)
    tested = [point for group in groups.values() for run in group.runs for point in _points(run)]
    return _Curves(
        groups=groups,
        floors={style: group for style, group in floors.items() if group.value("cmml_ap")},
        kinds=tuple(kind for kind in KINDS if any(point.kind == kind for point in tested)),
        rates=tuple(sorted({point.rate for point in tested})),
    )


def only_modality(group: Group) -> str | None:
    """Return the one modality that a group was trained and tested with, None if there were two."""
    left = set()
    for run in group.runs:
        for split in ("train", "test"):
            lost = run.missing.of(split) if run.missing else None
            whole = lost is not None and lost.kind in ("text", "image") and lost.rate == 1
            left.add({"text": "image", "image": "text"}[lost.kind] if lost and whole else None)
    return left.pop() if len(left) == 1 else None


def _drawings(curves: _Curves) -> list[tuple[str, str]]:
    trained = {rate for _, rate in _trained(curves)}
    panels = _panels(curves)
    highest = [value for lines in panels.values() for line in lines for value in line.high]
    highest += [value for lines in panels.values() for line in lines for value in line.values]
    top = math.ceil(5 * max((value for value in highest if value is not None), default=1.0)) / 5
    return [
        (
            name,
            LineChart(
                lines=lines,
                ticks=[f"{100 * rate:g}" for rate in curves.rates],
                label=f"AP over the share of incomplete test samples: {name}",
                top=top or 1.0,
                unit=lambda value: f"{100 * value:.0f}",
                size=(366, 230),
                event=next(iter(trained)) if len(trained) == 1 else None,
                at=curves.rates,
            ).draw(),
        )
        for name, lines in panels.items()
    ]


def _panels(curves: _Curves) -> dict[str, list[Line]]:
    """Return the lines of each drawing: of all kinds for one method, else a drawing per kind."""
    drawn = {
        kind: [
            mean_line(group, style, np.stack([_values(run, kind, curves) for run in group.runs]))
            for style, group in curves.groups.items()
        ]
        for kind in curves.kinds
    }
    if not curves.alone:
        return {KINDS[kind]: [*lines, *_floors(curves, kind)] for kind, lines in drawn.items()}
    label = next(iter(curves.groups.values())).label
    lines = [
        replace(line, label=KINDS[kind], style=style, strong=False)
        for style, kind in enumerate(curves.kinds)
        for line in drawn[kind]
    ]
    return {label: [*lines, *_floors(curves, "both")]}


def _floor_styles(curves: _Curves) -> list[tuple[int, Group]]:
    """Return the floors with their line styles, which follow the kinds' where those are drawn."""
    if not curves.alone:
        return [(style % 8, group) for style, group in curves.floors.items()]
    first = len(curves.kinds)
    return [((first + i) % 8, group) for i, group in enumerate(curves.floors.values())]


def _floors(curves: _Curves, kind: str) -> list[Line]:
    """Return the levels of models with one modality alone: those that the kind leaves a sample."""
    left = {"text": ("image",), "image": ("text",), "both": ("text", "image")}[kind]
    return [
        Line(
            label=_floor_label(group),
            style=style,
            values=[value.mean] * len(curves.rates),
            floor=True,
        )
        for style, group in _floor_styles(curves)
        if only_modality(group) in left and (value := group.value("cmml_ap"))
    ]


def _floor_label(group: Group) -> str:
    return f"{group.label}, {only_modality(group)} alone"


def _points(run: RunRecord) -> Sequence[TablePoint]:
    return run.robustness.points if run.robustness else ()


def _values(run: RunRecord, kind: str, curves: _Curves) -> Array:
    """Return the AP at each rate, without a word about the task where the run does without."""
    known = {point.rate: point for point in _points(run) if point.kind == kind}
    values = [known[rate].shown if rate in known else None for rate in curves.rates]
    return np.array([np.nan if value is None else value.ap for value in values])


def _trained(curves: _Curves) -> list[tuple[str, float]]:
    """Return the kinds and rates that the methods were trained under, each once."""
    found = [
        run.missing.of("train") for g in curves.groups.values() for run in g.runs if run.missing
    ]
    pairs = [(one.kind, 0.0 if one.kind == "none" else float(one.rate)) for one in found]
    return list(dict.fromkeys(pairs))


def _caption(curves: _Curves) -> str:
    trained = _trained(curves)
    text = (
        "AP (%), the mean final score over all tasks, of one trained model over the share (%) of "
        "test samples that are incomplete"
    )
    text += ", the task inferred where the method does so. "
    if trained:
        words = ", ".join(f"{kind} {100 * rate:g} %" for kind, rate in trained)
        line = " (vertical line)" if len({rate for _, rate in trained}) == 1 else ""
        text += f"Missing in training{line}: {words}. "
    if curves.floors:
        text += "Dotted: models trained and tested with one modality alone, a floor. "
    seeds = {
        run.robustness.seeds for g in curves.groups.values() for run in g.runs if run.robustness
    }
    count = max(map(len, seeds), default=1)
    return text + (f"Each point is the mean over {count} tables. " if count > 1 else "")


def _legend(curves: _Curves) -> str:
    if curves.alone:
        items = [(svg.swatch(i), KINDS[kind]) for i, kind in enumerate(curves.kinds)]
    else:
        items = [
            (svg.swatch(style % 8, strong=group.task_free), group.label)
            for style, group in curves.groups.items()
        ]
    items += [
        (svg.swatch(style, floor=True), _floor_label(group))
        for style, group in _floor_styles(curves)
    ]
    return (
        '<ul class="legend">'
        + "".join(f"<li>{swatch}{escape(label)}</li>" for swatch, label in items)
        + "</ul>"
    )


def _numbers(curves: _Curves) -> str:
    heads = "".join(f"<th>{100 * rate:g} %</th>" for rate in curves.rates)
    rows = []
    for group in curves.groups.values():
        for kind in curves.kinds:
            for way, read in WAYS.items():
                values = [value_of(_read(group, kind, rate, read)) for rate in curves.rates]
                if not any(values):
                    continue
                cells = "".join(cell(value, "percent") for value in values)
                names = (group.label, KINDS[kind].lower(), way)
                labels = "".join(f"<td>{escape(name)}</td>" for name in names)
                rows.append(f"<tr>{labels}{cells}</tr>")
    return (
        "<details><summary>The curves in numbers</summary>"
        '<div class="scroll"><table><thead><tr><th>Method</th>'
        "<th>Incomplete</th><th>Score</th>"
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _read(
    group: Group, kind: str, rate: float, read: Callable[[TablePoint], float | None]
) -> list[float | None]:
    """Return one number per run; None where it was not measured."""
    found: list[float | None] = []
    for run in group.runs:
        points = [point for point in _points(run) if (point.kind, point.rate) == (kind, rate)]
        found.append(read(points[0]) if points else None)
    return found
