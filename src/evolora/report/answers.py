"""The report's table of generated answers: what was right, right whatever its form, and in form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from statistics import fmean

import numpy as np

from evolora.report.parts import cell
from evolora.report.records import RunRecord
from evolora.report.tables import Comparison, Group, value_of

Shares = Mapping[str, float]


def _scores(record: RunRecord) -> Shares:
    """Return task -> final score, of tasks that also have a normalised one."""
    last = record.matrix.values[-1]
    known = record.final("normalised")
    scores = zip(record.run.tasks, last.tolist(), strict=True)
    return {task: score for task, score in scores if task in known and not np.isnan(score)}


_CAPTIONS = "Captions, CIDEr-D × 100"
MEASURES: tuple[tuple[str, Callable[[RunRecord], Shares]], ...] = (
    ("Accuracy", _scores),
    ("Whatever the format", lambda record: record.final("normalised")),
    (_CAPTIONS, lambda record: record.final("captions")),
    ("In the format", lambda record: record.final("following")),
    ("… when just learned", lambda record: record.fresh("following")),
)


def section(comparison: Comparison) -> list[str]:
    """Return the page's section on instruction following; empty where no format was asked for."""
    groups = [group for group in comparison.groups if group.value("following")]
    if not groups:
        return []
    asked = {task for group in groups for run in group.runs for task in run.final("following")}
    tasks = [task for task in comparison.tasks if task in asked]
    heads = "".join(
        f'<th data-first="{"ascending" if number < 2 else "descending"}">'
        f'<button type="button">{escape(name)}</button></th>'
        for number, name in enumerate(("Method", "Share", *tasks, "Mean"))
    )
    rows = "".join(
        _row(group, name, of, tasks)
        for group in groups
        for name, of in MEASURES
        if name != _CAPTIONS or group.value("captions")
    )
    return [
        "<h2>Instruction following</h2>",
        "<p>Test answers after the last task, in %: right as they stand; right once letter case, "
        "punctuation and words around the answer are put aside (of tasks judged by exact match or "
        "by option); captions by CIDEr-D, which may pass 100; in the form that the question asked "
        "for, right or wrong.</p>",
        '<div class="scroll"><table class="sortable"><thead><tr>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>",
    ]


def _row(group: Group, name: str, of: Callable[[RunRecord], Shares], tasks: list[str]) -> str:
    """Return the line of one measure; the mean is over the tasks that have it."""
    found = [of(run) for run in group.runs]
    values = [value_of([shares.get(task) for shares in found]) for task in tasks]
    mean = value_of([fmean(shares.values()) if shares else None for shares in found])
    words = "".join(
        f'<td data-value="{escape(text, quote=True)}">{escape(text)}</td>'
        for text in (group.label, name)
    )
    return f"<tr>{words}{''.join(cell(value, 'percent') for value in (*values, mean))}</tr>"
