"""The report's figures: which numbers go into which drawing."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from evolora.report.records import BASE, RunRecord
from evolora.report.svg import Cell, HeatMap, Line, LineChart
from evolora.report.tables import Comparison, Group, short_count

Array = NDArray[np.float64]
_TRAILING_ZEROS = re.compile(r"\.0+(?= )")  # 10.0 M on an axis is 10 M


def stacked(group: Group, part: Callable[[RunRecord], Array]) -> Array:
    """Return one array per run of a group, stacked: (runs, ...)."""
    return np.stack([part(run) for run in group.runs])


def over_time(record: RunRecord) -> Array:
    """Return (T + 1, T) scores: the row before any learning (NaN if unknown), then the matrix."""
    matrix = record.matrix
    first = np.full(len(matrix.tasks), np.nan) if matrix.baseline is None else matrix.baseline
    return np.vstack([first, matrix.values])


def accuracy_map(group: Group) -> str:
    """Draw the matrix of a group: rows after learning, columns tested on, mean over its runs."""
    values = stacked(group, over_time).mean(axis=0)
    tasks = group.runs[0].run.tasks
    rows = ["(before)", *tasks]
    if np.isnan(values[0]).all():
        values, rows = values[1:], rows[1:]
    shift = len(rows) - len(tasks)

    def hover(i: int, j: int) -> str:
        when = "before learning" if i < shift else f"after {rows[i]}"
        return f"{tasks[j]}, {when}: {percent(values[i, j])}"

    return HeatMap(
        rows=rows,
        columns=tasks,
        cells=cells(values),
        label=f"{group.label}: score on each task after learning each task",
        hover=hover,
        outlined=lambda i, j: i - shift == j,
    ).draw()


def task_curves(comparison: Comparison) -> list[tuple[str, str]]:
    """Draw one panel per task: its score over time, one line per method; (task, drawing)."""
    tasks = comparison.tasks
    scores = [stacked(group, over_time) for group in comparison.groups]
    step = 1 + len(tasks) // 8  # about eight labels have room
    ticks = ["" if i % step else str(i) for i in range(len(tasks) + 1)]
    panels = []
    for j, task in enumerate(tasks):
        lines = [
            mean_line(group, style, runs[:, :, j])
            for style, (group, runs) in enumerate(zip(comparison.groups, scores, strict=True))
        ]
        panels.append(
            (
                task,
                LineChart(
                    lines=lines,
                    ticks=ticks,
                    label=f"score on {task} after each task",
                    top=1.0,
                    unit=lambda value: f"{100 * value:.0f}",
                    size=(176, 118),
                    event=j + 1,
                ).draw(),
            )
        )
    return panels


def seen_curve(comparison: Comparison) -> str:
    """Draw the mean score over the tasks learned so far, one line per method."""
    lines = [
        mean_line(group, style, stacked(group, seen_means))
        for style, group in enumerate(comparison.groups)
    ]
    return LineChart(
        lines=lines,
        ticks=[str(i + 1) for i in range(len(comparison.tasks))],
        label="mean score over the tasks learned so far",
        top=1.0,
        unit=lambda value: f"{100 * value:.0f}",
        size=(366, 230),
    ).draw()


def seen_means(record: RunRecord) -> Array:
    """Return (T,) mean scores over the tasks learned so far; NaN where one is missing."""
    values = record.matrix.values
    return np.array([values[i, : i + 1].mean() for i in range(len(values))])


def route_map(group: Group) -> str | None:
    """Draw which route answers which task's samples at the end; None if nothing was routed."""
    tables = [table for run in group.runs if run.task_free and (table := _final_routes(run))]
    if not tables:
        return None
    tasks = group.runs[0].run.tasks
    taken = {route for table in tables for counts in table.values() for route in counts}
    routes = [BASE, *tasks, *sorted(taken - {BASE, *tasks})]
    shares: list[list[Cell]] = []
    for task in tasks:
        rows = [table[task] for table in tables if sum(table.get(task, {}).values())]
        shares.append(
            [
                float(np.mean([row.get(route, 0) / sum(row.values()) for row in rows]))
                if rows
                else None
                for route in routes
            ]
        )
    return HeatMap(
        rows=tasks,
        columns=routes,
        cells=shares,
        label=f"{group.label}: share of each task's test samples by the route that answered",
        hover=lambda i, j: f"{tasks[i]} answered by {routes[j]}: {percent(shares[i][j])}",
        outlined=lambda i, j: i + 1 == j,
    ).draw()


def right_route_map(group: Group) -> str | None:
    """Draw the share of samples routed right after each task; None if nothing was routed."""
    runs = [run for run in group.runs if run.task_free]
    if not runs:
        return None
    per_run = np.array([run.right_route_shares() for run in runs], dtype=np.float64)
    values = per_run.mean(axis=0)
    if np.isnan(values).all():
        return None
    tasks = group.runs[0].run.tasks
    return HeatMap(
        rows=tasks,
        columns=tasks,
        cells=cells(values),
        label=f"{group.label}: share of samples routed right after each task",
        hover=lambda i, j: (
            f"{tasks[j]} after {tasks[i]}, "
            f"{'own experts' if j <= i else 'base'} expected: {percent(values[i, j])}"
        ),
        outlined=lambda i, j: i == j,
    ).draw()


def expert_maps(record: RunRecord) -> list[tuple[str, list[str]]]:
    """Draw, per tower and layer, how often each task used each expert; (tower, drawings)."""
    towers = []
    for tower, experts in (record.routing.experts if record.routing else {}).items():
        # Joint training learns all tasks at once and reports them under one name of its own.
        names = sorted(experts.tasks, key=lambda name: _place(record, name))
        layers = len(experts.tasks[names[0]]) if names else 0
        drawings = []
        for layer in range(layers):
            counts = [experts.tasks[name][layer] for name in names]
            frozen = (
                frozenset(experts.frozen[layer]) if layer < len(experts.frozen) else frozenset()
            )
            drawings.append(_expert_map(tower, layer, names, counts, frozen))
        towers.append((tower, drawings))
    return towers


def _expert_map(
    tower: str, layer: int, names: Sequence[str], counts: list[list[int]], frozen: frozenset[int]
) -> str:
    number = max(len(row) for row in counts)  # a pool may have grown since the first task
    shares: list[list[Cell]] = [
        [*(count / sum(row) if sum(row) else None for count in row), *[None] * (number - len(row))]
        for row in counts
    ]

    def hover(i: int, j: int) -> str:
        state = " (frozen)" if j in frozen else ""
        return f"{names[i]}, expert {j}{state}: {percent(shares[i][j])} of selections"

    return HeatMap(
        rows=names,
        columns=[str(j) if _every(j, number - 1) else "" for j in range(number)],
        cells=shares,
        label=f"{tower} tower, layer {layer}: share of each task's selections by expert",
        hover=hover,
        cell=(13, 13),
        marks=frozenset(j for j in frozen if j < number),
        upright=True,
    ).draw()


def growth(comparison: Comparison, field: str, label: str) -> str | None:
    """Draw a parameter count after each task, one line per method; None without any count."""
    size = len(comparison.tasks)

    def counts(record: RunRecord) -> Array:
        line = np.full(size, np.nan)
        for step in record.run.history:
            line[min(_place(record, step.task), size - 1)] = getattr(step, field)
        return line

    lines = [
        mean_line(group, style, stacked(group, counts))
        for style, group in enumerate(comparison.groups)
    ]
    known = [value for line in lines for value in line.values if value is not None]
    positive = [value for value in known if value > 0]
    if not known:
        return None
    return LineChart(
        lines=lines,
        ticks=[str(i + 1) for i in range(size)],
        label=label,
        top=max(positive, default=1.0),
        unit=lambda value: _TRAILING_ZEROS.sub("", short_count(value)),
        size=(366, 230),
        log=bool(positive) and max(positive) > 20 * min(positive),
    ).draw()


def cells(values: Array) -> list[list[Cell]]:
    """Return an array as cells of a heat map: NaN becomes None."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]


def percent(value: float | None) -> str:
    """Return a share in words: "68.1 %", or "not evaluated"."""
    return "not evaluated" if value is None or np.isnan(value) else f"{100 * value:.1f} %"


def mean_line(group: Group, style: int, runs: Array) -> Line:
    """Return the mean over runs (axis 0), with the lowest and highest where there are several."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all-NaN columns are expected
        low, high = np.nanmin(runs, axis=0), np.nanmax(runs, axis=0)
    several = len(runs) > 1
    return Line(
        label=group.label,
        strong=group.task_free,
        style=style % 8,
        values=cells(runs.mean(axis=0)[None])[0],
        low=cells(low[None])[0] if several else (),
        high=cells(high[None])[0] if several else (),
    )


def _place(record: RunRecord, name: str) -> int:
    """Position of a task; after the last for a name that is none (all tasks at once)."""
    return record.position(name) if name in record.run.tasks else len(record.run.tasks)


def _final_routes(record: RunRecord) -> dict[str, dict[str, int]]:
    after = record.routing.after if record.routing else ()
    if not after:
        return {}
    return max(after, key=lambda one: record.position(one.task)).routes


def _every(i: int, last: int) -> bool:
    """Whether position i of 0..last is labelled when at most about ten labels have room."""
    return i % max(1, (last + 9) // 10) == 0
