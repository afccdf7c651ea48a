"""The section of one stream: every score, differences from the reference, and the matrices."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from evolora.evaluation.matrix import Matrix
from evolora.report import strips, svg
from evolora.report.comparison_file import Cell, ComparisonFile, Difference, Result, Stream
from evolora.report.comparison_parts import anchor, best_of, named, table
from evolora.report.heat import matrix_table
from evolora.report.parts import cell, framed, heading
from evolora.report.tables import Column, Value, is_best

SHOWN = (
    "last", "avg", "transfer", "forgetting", "selector_accuracy", "unseen_to_base", "following",
    "complete", "text_missing", "image_missing", "trainable_parameters", "stored_parameters",
    "seconds_learn", "seconds",
)  # fmt: skip
"""Metrics of a stream's first table, where they are known; the rest is in a second one."""

_METHOD = '<th data-first="ascending"><button type="button">Method</button></th>'
_MINUS = "\N{MINUS SIGN}"


def section(found: ComparisonFile, stream: Stream, number: int) -> list[str]:
    """Return a stream's section of the page."""
    parts = [
        f'<h2 id="{anchor(number)}">{escape(stream.name)}</h2>',
        f"<p>{escape(_about(found, stream))}</p>",
    ]
    if not stream.results:
        return [*parts, "<p>No cell of this stream is finished.</p>"]
    known = [key for key in found.metrics if any(r.value(key) for r in stream.results)]
    main = found.protocol.metric
    shown = [main, *(key for key in SHOWN if key != main)]
    shown = [key for key in shown if key in known]
    rest = [key for key in known if key not in shown]
    parts += [
        _table(found, stream, [found.column(key) for key in shown], main),
        f'<p class="note">{_note(found, stream)}</p>',
    ]
    if rest:
        columns = [found.column(key) for key in rest]
        parts.append(
            f"<details><summary>Every other metric ({len(rest)})</summary>"
            f"{_table(found, stream, columns, main)}</details>"
        )
    return [*parts, *_differences(found, stream, shown, rest), *_matrices(found, stream)]


def _about(found: ComparisonFile, stream: Stream) -> str:
    """Return what the stream is, in a few sentences."""
    text = f"Stream {stream.stream}{f': {stream.source}' if stream.source else ''}. "
    if stream.tasks:
        text += f"{len(stream.tasks)} tasks: {', '.join(stream.tasks)}. "
    if stream.backbone:
        text += f"Backbone: {stream.backbone}. "
    spaces = {
        "task": "Answers are among the classes of the sample's own task.",
        "seen": "Answers are among the classes of every task seen so far.",
    }
    return text + spaces.get(stream.label_space, "")


def _note(found: ComparisonFile, stream: Stream) -> str:
    cells = len(found.protocol.seeds) * len(found.protocol.orders)
    text = "Scores in %. Best value of a score in bold. "
    if any(one.n > 1 for one in stream.results):
        text += f"Mean ± {found.protocol.spread or 'standard deviation'}. "
    fewer = [f"{one.method} {one.n}" for one in stream.results if one.n < cells]
    if fewer:
        text += f"Fewer cells than {cells}: {', '.join(fewer)}. "
    without = [one.method for one in stream.methods if not one.n]
    if without:
        text += f"Without a result here: {', '.join(without)}."
        return escape(text) + ' Reasons are <a href="#without">below</a>.'
    return escape(text)


def _table(found: ComparisonFile, stream: Stream, columns: Sequence[Column], main: str) -> str:
    best = {column.key: best_of(stream.results, column) for column in columns}
    rows = []
    for one in stream.results:
        more = ["reference"] if one.method == stream.reference else []
        cells = [named(found, one.method, one, more)]
        for column in columns:
            value = one.value(column.key)
            marked = is_best(value, best[column.key], column.unit)
            cells.append(cell(value, column.unit, best=marked))
        rows.append("".join(cells))
    if stream.majority is not None and any(column.key == main for column in columns):
        rows.append(_commonest(stream.majority.score, columns, main))
    return table(_METHOD + "".join(heading(column) for column in columns), rows)


def _commonest(score: float, columns: Sequence[Column], main: str) -> str:
    """Return the line of the commonest answers, which have a final score and nothing else."""
    cells = (
        cell(Value(mean=score) if column.key == main == "last" else None, column.unit)
        for column in columns
    )
    return (
        '<td data-value="commonest answer">commonest answer<span class="tag">blind</span></td>'
        + "".join(cells)
    )


def _differences(
    found: ComparisonFile, stream: Stream, shown: Sequence[str], rest: Sequence[str]
) -> list[str]:
    """Return the intervals of paired differences: of the main metric, and folded of the others."""
    drawn = []
    for key in (*shown, *rest):
        column = found.column(key)
        if column.better is None or column.unit != "percent":
            continue
        pairs = [(one, pair) for one in stream.results if (pair := one.paired.get(key))]
        if pairs:
            drawn.append((key, column, _forest(found, column, pairs)))
    if not drawn:
        return []
    level = f"{100 * found.protocol.interval.level:g}"
    intro = (
        f"<h3>Differences from {escape(stream.reference or 'the reference')}, in points of %</h3>"
        "<p>Each method minus the reference in the same order and with the same seed: mean and "
        f"{level} % interval ({escape(found.protocol.interval.kind)}). Filled dots: the interval "
        "has no zero in it. Green is better than the reference, orange worse. An arrow: the "
        "interval goes on.</p>"
    )
    parts, folded = [], ""
    for key, column, forest in drawn:
        if key == found.protocol.metric:
            parts.append(f'<div class="keep">{intro}{forest}</div>')
        elif key in SHOWN:
            title = f"<h3>{escape(column.title)}</h3>"
            folded += f'<div class="keep">{title}{forest}</div>'
    if folded:
        parts.append(f"<details><summary>Differences in other scores</summary>{folded}</details>")
    return parts


def _forest(
    found: ComparisonFile, column: Column, pairs: Sequence[tuple[Result, Difference]]
) -> str:
    """Return a table with a dot and an interval per method, best first."""
    better = 1 if column.better == "more" else -1
    pairs = sorted(pairs, key=lambda pair: -better * pair[1].mean)
    axis = _axis([pair for _, pair in pairs])
    rows = []
    for one, pair in pairs:
        ends = None if pair.low is None or pair.high is None else (pair.low, pair.high)
        gain = better * pair.mean
        sure = ends is not None and ends[0] * ends[1] > 0
        kind = "even" if not sure else "up" if gain > 0 else "down"
        said = f" <small>[{_signed(ends[0])}, {_signed(ends[1])}]</small>" if ends else ""
        rows.append(
            f"{named(found, one.method, one)}"
            f'<td class="plot">{strips.interval(axis, pair.mean, ends, kind)}</td>'
            f'<td class="number {kind}" data-value="{pair.mean}">{_signed(pair.mean)}{said}</td>'
            f'<td data-value="{pair.n}">{pair.n}</td>'
        )
    order = "descending" if better > 0 else "ascending"
    toward = "more is better" if better > 0 else "less is better"
    heads = (
        f"{_METHOD}{axis.head(f'{column.title}: {toward}', _tick)}"
        f'<th data-first="{order}" aria-sort="{order}"><button type="button">Difference</button>'
        '</th><th data-first="descending"><button type="button">Pairs</button></th>'
    )
    return table(heads, rows, style=f"--zero:{axis.share(0):.4f}")


def _axis(pairs: Sequence[Difference]) -> strips.Axis:
    """Return an axis with every mean and zero; intervals of few pairs may go on beyond it."""
    means = [0.0, *(pair.mean for pair in pairs)]
    room = max(max(means) - min(means), 0.02)
    lows = [max(pair.low, min(means) - room) for pair in pairs if pair.low is not None]
    highs = [min(pair.high, max(means) + room) for pair in pairs if pair.high is not None]
    return strips.round_axis([*means, *lows, *highs])


def _signed(share: float) -> str:
    """Return a difference of shares in points of %, with its sign."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", _MINUS)


def _tick(share: float) -> str:
    """Return a place on the axis of differences, in points of %."""
    return f"{100 * share:+.3g}".replace("+0", "0").replace("-", _MINUS)


def _matrices(found: ComparisonFile, stream: Stream) -> list[str]:
    """Return the mean matrix of every method, folded."""
    cells = [one for one in found.cells if one.stream == stream.name and one.matrix]
    drawn = []
    for method in dict.fromkeys(one.method for one in cells):
        for order in found.protocol.orders:
            own = [one for one in cells if (one.method, one.order) == (method, order)]
            if own:
                where = f", order {order}" if len(found.protocol.orders) > 1 else ""
                drawn.append((f"{method}{where}", _mean_matrix(own, method)))
    if not drawn:
        return []
    return [
        f"<details><summary>Score on every task after every task ({len(drawn)})</summary>"
        "<p>Rows: after learning that task. Columns: tested on that task, outlined where it was "
        "just learned; below are tasks learned before, above tasks still to come. In %, means over "
        f"seeds; dashed cells were not evaluated.</p>{svg.scale()}{framed(drawn)}</details>"
    ]


def _mean_matrix(cells: Sequence[Cell], method: str) -> str:
    """Return the mean matrix of cells with one order of tasks."""
    matrices = [Matrix.from_json(one.matrix or {}) for one in cells]
    first = matrices[0]
    blank = np.full(len(first.tasks), np.nan)
    values = np.mean(
        [
            np.vstack([blank if one.baseline is None else one.baseline, one.values])
            for one in matrices
        ],
        axis=0,
    )
    label = f"{method}: score on each task after learning each task, mean over seeds"
    return matrix_table(first.tasks, values, first.largest, label)
