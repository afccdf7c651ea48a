"""The report on continual learning of modalities: what each stage learned, lost and drew on."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import fmean

from rich import box
from rich.table import Table

from evolora.evaluation.metrics import forgetting_of_stages, new_modalities
from evolora.report.figures import percent
from evolora.report.parts import cell, framed
from evolora.report.records import RunRecord
from evolora.report.svg import HeatMap, scale
from evolora.report.tables import Comparison, Group, Value, compare, text_of, value_of

NOTE = (
    "T: the score on the stage's modality when it was just learned. F: the mean over the ones "
    "before it of the score when learned minus the score now; negative is gain. Exact: short "
    "answers that match; CIDEr-D: of captions, from 0 to 10; both on the stage's modality when it "
    "was just learned. Trained: parameters, and their share of Q-Former and projection tuned in "
    "full. The first task is what the base model knows. Formulas of T and F are ours, for "
    "PathWeave's two numbers. T, F and exact in %."
)
DRAWN = (
    "Mean weight (%) that the gates of a later modality give to the adapters of each modality "
    "before it and to its own (last column), over the test samples of the stage when it was just "
    "learned; rows: self- and cross-attention of each block of the Q-Former. A gate that has "
    "learned nothing gives all of them the same."
)
COLUMNS = ("T", "F", "exact", "CIDEr-D", "trained", "of full")


def plugs_modalities(record: RunRecord) -> bool:
    """Return whether a run is of a model that modalities are plugged into."""
    return record.run.backbone.get("type") == "qformer"


def section(comparison: Comparison) -> list[str]:
    """Return the page's sections on stages; empty where no run plugs modalities in."""
    groups = [group for group in comparison.groups if plugs_modalities(group.runs[0])]
    stages = comparison.tasks[1:]
    if not groups or not stages:
        return []
    heads = "".join(f"<th>{name}</th>" for name in ("Stage", *COLUMNS))
    rows = "".join(_rows(group, stages) for group in groups)
    return [
        "<h2>Modality after modality</h2>",
        f"<p>{NOTE}</p>",
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>",
        *_drawn(groups),
    ]


def stage_table(runs: Sequence[RunRecord]) -> Table | None:
    """Return the same table for a terminal; None where no run plugs modalities in."""
    chosen = [record for record in runs if plugs_modalities(record) and record.size > 1]
    if not chosen:
        return None
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for comparison in compare(chosen):
        for group in comparison.groups:
            table.add_section()
            if len(chosen) > 1:
                table.add_row(group.label.replace("[", r"\["), style="italic")
            for stage in range(1, len(comparison.tasks)):
                values = _values(group, stage)
                table.add_row(comparison.tasks[stage], *(_text(name, values) for name in COLUMNS))
    return table


def stages_json(record: RunRecord) -> list[dict[str, float | str | None]]:
    """Return a run's stages, one entry each, by the names of the columns; scores as fractions."""
    if not plugs_modalities(record):
        return []
    return [
        {"stage": record.run.tasks[stage], **_of_run(record, stage)}
        for stage in range(1, record.size)
    ]


def _rows(group: Group, stages: Sequence[str]) -> str:
    lines = [f'<tr><th colspan="{1 + len(COLUMNS)}">{escape(group.label)}</th></tr>']
    for stage, name in enumerate(stages, 1):
        values = _values(group, stage)
        cells = "".join(_cell(column, values[column]) for column in COLUMNS)
        lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return "".join(lines)


def _values(group: Group, stage: int) -> dict[str, Value | None]:
    found = [_of_run(record, stage) for record in group.runs]
    return {name: value_of([one[name] for one in found]) for name in COLUMNS}


def _of_run(record: RunRecord, stage: int) -> dict[str, float | None]:
    """Return a stage's numbers of one run."""
    task = record.run.tasks[stage]
    values = record.matrix.values
    step = next((one for one in record.run.history if one.task == task), None)
    trained = None if step is None else float(step.trainable_parameters)
    full = step.full_tuning if step is not None else 0
    return {
        "T": new_modalities(values)[stage - 1],
        "F": forgetting_of_stages(values)[stage - 1],
        "exact": record.fresh("questions").get(task),
        "CIDEr-D": record.fresh("captions").get(task),
        "trained": trained,
        "of full": trained / full if trained is not None and full else None,
    }


def _cell(column: str, value: Value | None) -> str:
    if column == "CIDEr-D":
        number = "" if value is None else str(value.mean)
        return f'<td data-value="{number}">{escape(_cider(value))}</td>'
    return cell(value, "count" if column == "trained" else "percent")


def _text(column: str, values: dict[str, Value | None]) -> str:
    value = values[column]
    if column == "CIDEr-D":
        return _cider(value)
    return text_of(value, "count" if column == "trained" else "percent")


def _cider(value: Value | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.2f}" + ("" if value.spread is None else f" ± {value.spread:.2f}")


# -- what a path draws on --------------------------------------------------------------------


def _drawn(groups: Sequence[Group]) -> list[str]:
    figures, lines = [], []
    for group in groups:
        for stage in group.runs[0].run.tasks[1:]:
            found = _shares(group, stage)
            if found is None:
                continue
            paths, blocks = found
            figures.append((f"{group.label}: {stage}", _map(group.label, stage, paths, blocks)))
            means = [fmean(row[place] for row in blocks.values()) for place in range(len(paths))]
            said = ", ".join(
                f"{escape(name)} {percent(mean)}" for name, mean in zip(paths, means, strict=True)
            )
            lines.append(
                f"<tr><td>{escape(group.label)}: {escape(stage)}</td><td>{said}</td>"
                f"<td>{100 / len(paths):.1f}</td></tr>"
            )
    if not figures:
        return []
    return [
        "<h2>Which modality each layer draws on</h2>",
        f"<p>{DRAWN}</p>",
        scale(),
        framed(figures),
        '<div class="scroll"><table><thead><tr><th>Stage</th>'
        "<th>Mean over layers</th><th>Each, if nothing was learned (%)</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>",
    ]


def _shares(group: Group, stage: str) -> tuple[tuple[str, ...], dict[str, list[float]]] | None:
    """Return (paths, block -> share of each), mean over a block's sites and the group's runs."""
    found = [
        after.sources
        for record in group.runs
        for after in (record.routing.after if record.routing else ())
        if after.task == stage and after.sources is not None
    ]
    if not found:
        return None
    paths = found[0].paths
    blocks: dict[str, list[tuple[float, ...]]] = {}
    for one in found:
        for site, shares in one.sites.items():
            blocks.setdefault(_block(site), []).append(shares)
    means = {
        name: [fmean(one[place] for one in rows) for place in range(len(paths))]
        for name, rows in blocks.items()
    }
    return paths, means


def _block(site: str) -> str:
    """Return the row of a site: "qformer/0/crossattention/key" -> "0 cross"."""
    parts = site.split("/")
    kind = {"attention": "self", "crossattention": "cross"}.get(parts[2], parts[2])
    return f"{parts[1]} {kind}"


def _map(label: str, stage: str, paths: Sequence[str], blocks: dict[str, list[float]]) -> str:
    rows = list(blocks)

    def hover(i: int, j: int) -> str:
        own = " (its own)" if j == len(paths) - 1 else ""
        return f"{stage}, block {rows[i]}: {paths[j]}{own} {percent(blocks[rows[i]][j])}"

    return HeatMap(
        rows=rows,
        columns=list(paths),
        cells=[blocks[row] for row in rows],
        label=f"{label}: share of each modality's adapters in the path of {stage}, by layer",
        hover=hover,
        outlined=lambda i, j: j == len(paths) - 1,
        cell=(44, 22),
    ).draw()
