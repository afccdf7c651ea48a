"""The report page: one HTML file that shows a comparison to a colleague, and asks nothing of a net.

Drawings are inline SVG, the style sheet and the small sorting script are inline, so the file can be
mailed, printed or kept for years. It is light or dark as the reader's system is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from evolora.evaluation.metrics import DEFINITIONS
from evolora.report import answers, figures, missing, modalities, robustness, svg
from evolora.report.parts import cell, framed, heading, legend, page
from evolora.report.records import RunRecord
from evolora.report.tables import (
    Column,
    Comparison,
    Group,
    compare,
    is_best,
)


def write_report(runs: Sequence[RunRecord], out: str | Path, title: str = "Evolora report") -> Path:
    """Write the page and return its path.

    Args:
        runs: in the order in which methods are to be shown; runs of one method that differ only by
            seed become one line with mean and standard deviation. Runs on different streams, task
            orders or label spaces get a section each: their numbers do not compare.
        out: the HTML file; an existing one is replaced at once, never left half-written.
        title: heading of the page.

    Raises:
        ConfigError: no run was given.
        StorageError: the file cannot be written.
    """
    from evolora.storage.files import write_bytes  # it knows tensors: torch only when writing

    comparisons = compare(runs)
    body = [_header(title, comparisons)]
    for comparison in comparisons:
        body.extend(_sections(comparison, alone=len(comparisons) == 1))
    body.append(_definitions())
    body.append(_runs(runs))
    target = Path(out)
    write_bytes(target, page(title, body).encode())
    return target


def _header(title: str, comparisons: Sequence[Comparison]) -> str:
    runs = [record.run for comparison in comparisons for record in comparison.runs]
    tasks = sorted({len(run.tasks) for run in runs})
    protocols = [
        "classes of the sample's own task"
        if run.protocol.label_space == "task"
        else "classes of every task seen so far"
        for run in runs
    ]
    groups = sorted({run.protocol.group_size for run in runs})
    days = sorted({run.started[:10] for run in runs})
    facts = {
        "Stream": _list(run.stream for run in runs),
        "Tasks": _list(map(str, tasks)),
        "Methods": str(sum(len(comparison.groups) for comparison in comparisons)),
        "Seeds": _list(map(str, sorted({run.seed for run in runs}))),
        "Classified among": _list(protocols),
        "Routing": _list(run.protocol.routing for run in runs)
        + (
            ", decided per sample" if groups == [1] else f", in groups of {_list(map(str, groups))}"
        ),
        "Device": _list(
            f"{run.device}, {run.processes} process{'es' if run.processes > 1 else ''}"
            for run in runs
        ),
        "Versions": _list(f"{k} {v}" for run in runs for k, v in sorted(run.versions.items())),
        "Date": days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
    }
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f'<header><h1>{escape(title)}</h1><dl class="facts">{cells}</dl></header>'


def _sections(comparison: Comparison, *, alone: bool) -> list[str]:
    several = any(len(group.runs) > 1 for group in comparison.groups)
    bands = " Bands span the lowest and highest seed." if several else ""
    where = "" if alone else f": {comparison.stream}, {comparison.tasks[0]} first"
    parts = [
        f"<h2>Results{escape(where)}</h2>",
        _table(comparison),
        *answers.section(comparison),
        *missing.section(comparison),
        *modalities.section(comparison),
        *robustness.section(comparison),
        "<h2>Accuracy after every task</h2>",
        "<p>Rows: after learning that task. Columns: tested on that task. Below the outlined "
        "diagonal are tasks learned before, above it tasks still to come. Values in %; "
        "dashed cells were not evaluated.</p>",
        svg.scale(),
        framed((group.label, figures.accuracy_map(group)) for group in comparison.groups),
        "<h2>Forgetting</h2>",
        "<p>Score (%) on each task over time; position 0 is before any learning, the vertical line "
        f"is the moment the task is learned.{bands}</p>",
        legend(comparison),
        framed(figures.task_curves(comparison), narrow=True),
        framed([("Mean over the tasks learned so far (%)", figures.seen_curve(comparison))]),
    ]
    parts.extend(_routing(comparison))
    parts.extend(_experts(comparison))
    parts.extend(_growth(comparison))
    return parts


def _table(comparison: Comparison) -> str:
    columns = comparison.used_columns()
    heads = "".join(heading(column) for column in columns)
    rows = "".join(_row(comparison, group, columns) for group in comparison.groups)
    several = any(len(group.runs) > 1 for group in comparison.groups)
    note = "Scores in %. Best value of a score in bold. "
    note += "Mean ± standard deviation over seeds. " if several else ""
    note += "Click a heading to sort. " + escape(comparison.seeds_note())
    about = "".join(
        f"<div><dt>{escape(column.title)}</dt><dd>{escape(column.about)}</dd></div>"
        for column in columns
    )
    return (
        '<div class="scroll"><table class="sortable"><thead><tr>'
        '<th data-first="ascending"><button type="button">Method</button></th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="note">{note}</p>'
        f"<details><summary>What the columns say</summary><dl>{about}</dl></details>"
    )


def _row(comparison: Comparison, group: Group, columns: Iterable[Column]) -> str:
    cells = [f'<td data-value="{escape(group.label, quote=True)}">{escape(group.label)}</td>']
    for column in columns:
        value = group.value(column.key)
        marked = is_best(value, comparison.best(column), column.unit)
        cells.append(cell(value, column.unit, best=marked))
    return f"<tr>{''.join(cells)}</tr>"


def _routing(comparison: Comparison) -> list[str]:
    final = [(g.label, figure) for g in comparison.groups if (figure := figures.route_map(g))]
    right = [(g.label, figure) for g in comparison.groups if (figure := figures.right_route_map(g))]
    if not final:
        return []
    parts = [
        "<h2>Which route answers which domain</h2>",
        "<p>Rows: test samples of a task, after the last task. Columns: who answered, a task's "
        "experts or the untouched base model; share in %. The outlined cell is the right one.</p>",
        framed(final),
    ]
    if right:
        parts += [
            "<p>Share of samples (%) routed right after each task: to their own experts once the "
            "task is learned (outlined and below), to the base before (above).</p>",
            framed(right),
        ]
    return parts


def _experts(comparison: Comparison) -> list[str]:
    parts = []
    for group in comparison.groups:
        record = group.runs[0]  # experts of different seeds have no common numbering
        seed = f", seed {record.run.seed}" if len(group.runs) > 1 else ""
        for tower, drawings in figures.expert_maps(record):
            if drawings:
                named = [(f"layer {i}", drawing) for i, drawing in enumerate(drawings)]
                parts.append(f"<h3>{escape(f'{group.label}, {tower} tower{seed}')}</h3>")
                parts.append(framed(named, narrow=True))
    if not parts:
        return []
    return [
        "<h2>Which experts each task uses</h2>",
        "<p>Share of a task's selections that each expert of a layer received; a bar below a "
        "column marks an expert that is frozen now. Hover for numbers.</p>",
        *parts,
    ]


def _growth(comparison: Comparison) -> list[str]:
    drawn = [
        (name, figure)
        for name, field in (
            ("Stored beside the base model", "stored_parameters"),
            ("Trained for the task", "trainable_parameters"),
        )
        if (figure := figures.growth(comparison, field, name))
    ]
    if not drawn:
        return []
    return [
        "<h2>Growth of parameters</h2>",
        "<p>Parameters after each task; the axis is logarithmic where methods differ much.</p>",
        legend(comparison),
        framed(drawn),
    ]


def _definitions() -> str:
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in DEFINITIONS.items()
    )
    return (
        "<h2>Definitions and runs</h2>"
        f"<details><summary>Metrics</summary><dl>{items}</dl></details>"
    )


def _runs(runs: Sequence[RunRecord]) -> str:
    heads = ("Run", "Method", "Seed", "Config", "Routing", "Started", "Seconds", "Last")
    rows = []
    for record in runs:
        run = record.run
        last = record.scores["last"]
        cells = (
            record.folder,
            run.name,
            str(run.seed),
            run.config_hash,
            run.protocol.routing,
            run.started[:19].replace("T", " "),
            f"{run.seconds:,.0f}",
            "–" if last is None else f"{100 * last:.1f}",
        )
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f"<details><summary>Runs ({len(runs)})</summary>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _list(values: Iterable[str]) -> str:
    """Each value once, in the order met."""
    return ", ".join(dict.fromkeys(values))
