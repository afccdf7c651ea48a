"""The report's table of final scores by what is missing, with the task inferred and told."""

from __future__ import annotations

from html import escape

from evolora.report.parts import cell, heading
from evolora.report.tables import Column, Comparison, Group
from evolora.streams.missing import CODE_NAMES


def _column(key: str, title: str, about: str) -> Column:
    return Column(
        key=key,
        title=title,
        narrow=title,
        unit="percent",
        better="less" if key == "cmml_fg" else "more",
        about=about,
    )


COLUMNS = (
    _column("cmml_ap", "AP", "mean score over all tasks at the end"),
    _column("cmml_fg", "FG", "score when a task was just learned minus its final score; mean"),
    _column("cmml_last", "Last", "score on the last task alone, at the end"),
    _column("complete", "Complete", "AP over the samples that have both modalities"),
    _column("text_missing", "No text", "AP over the samples that lack the text"),
    _column("image_missing", "No image", "AP over the samples that lack the image"),
    _column(
        "selector_accuracy",
        "Task recognised",
        "test samples that their own task's experts answered",
    ),
)


TASK = {"task-free": "inferred", "oracle": "told", "none": "–"}
"""How a run knows the task, by its routing."""


def section(comparison: Comparison) -> list[str]:
    """Return the page's section on missing modalities; empty where nothing is missing."""
    groups = [g for g in comparison.groups if any(g.value(case) for case in CODE_NAMES[1:])]
    if not groups:
        return []
    rows = "".join(_row(group, told) for group in groups for told in (False, True))
    heads = "".join(heading(column) for column in COLUMNS)
    said = "; ".join(
        dict.fromkeys(run.missing_words for g in groups for run in g.runs if run.missing)
    )
    return [
        "<h2>With modalities missing</h2>",
        "<p>Final scores by what a test sample lacks, in %: accuracy, or macro-F1 where samples "
        "have several labels; the mean over tasks. "
        f"{escape(said[:1].upper() + said[1:])}{'.' if said else ''}</p>",
        '<div class="scroll"><table class="sortable"><thead><tr>'
        '<th data-first="ascending"><button type="button">Method</button></th>'
        '<th data-first="ascending"><button type="button">Task</button></th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>",
        '<p class="note">Task: inferred from the sample, told, or neither (one model for all '
        "tasks). Of a run that infers it, what telling it would give is measured by "
        "<code>evolora eval RUN --missing-rates 0,0.5,0.9</code>, of the final model alone: "
        "without FG.</p>",
    ]


def _row(group: Group, told: bool) -> str:
    """Return the line of a group; with the task told, none where that was not measured."""
    values = [group.value(f"told_{column.key}" if told else column.key) for column in COLUMNS]
    if not any(values):
        return ""
    routing = "oracle" if told else group.runs[0].run.protocol.routing
    names = "".join(
        f'<td data-value="{escape(name, quote=True)}">{escape(name)}</td>'
        for name in (group.label, TASK[routing])
    )
    cells = "".join(cell(v, column.unit) for v, column in zip(values, COLUMNS, strict=True))
    return f"<tr>{names}{cells}</tr>"
