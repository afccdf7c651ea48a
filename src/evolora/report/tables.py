"""The comparison table: one line per method, mean and spread over its seeds, in three forms."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from rich import box
from rich.table import Table

from evolora.errors import ConfigError
from evolora.report.records import RunRecord

Unit = Literal["percent", "count", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: which score, its heading, its unit, and whether more is better.

    ``narrow`` is the heading on lines of a terminal, which may have no more than 80 columns.
    """

    key: str
    title: str
    narrow: str
    unit: Unit
    better: Literal["more", "less"] | None
    about: str


COLUMNS: tuple[Column, ...] = (
    Column(
        key="transfer", title="Transfer", narrow="Transfer",
        unit="percent", better="more",
        about="mean score on tasks before they are learned, task by task",
    ),
    Column(
        key="avg", title="Avg", narrow="Avg",
        unit="percent", better="more",
        about="mean score over all tasks and all moments",
    ),
    Column(
        key="last", title="Last", narrow="Last",
        unit="percent", better="more",
        about="mean score over all tasks at the end",
    ),
    Column(
        key="forgetting", title="Forgetting", narrow="For-\ngetting",
        unit="percent", better="less",
        about="best score since a task was learned minus its final score; mean",
    ),
    Column(
        key="selector_accuracy", title="Seen routed right", narrow="Seen\nrouted\nright",
        unit="percent", better="more",
        about="test samples of learned tasks that the right task answered at the end",
    ),
    Column(
        key="unseen_to_base", title="Unseen to base", narrow="Unseen\nto base",
        unit="percent", better="more",
        about="test samples of tasks still to come that the untouched model answered",
    ),
    Column(
        key="following", title="Follows format", narrow="Fol-\nlows",
        unit="percent", better="more",
        about="answers at the end that have the form that was asked for; mean over tasks",
    ),
    Column(
        key="trainable_parameters", title="Trainable", narrow="Train-\nable",
        unit="count", better=None,
        about="parameters trained for one task, the largest of all tasks",
    ),
    Column(
        key="stored_parameters", title="Stored", narrow="Stored",
        unit="count", better=None,
        about="parameters kept at the end, beside the base model",
    ),
    Column(
        key="seconds", title="Seconds", narrow="Sec-\nonds",
        unit="seconds", better=None,
        about="the whole run, evaluation included",
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Value:
    """Mean over runs, and the sample standard deviation where there are several."""

    mean: float
    spread: float | None = None


def value_of(numbers: Sequence[float | None]) -> Value | None:
    """Return mean and spread of one number per run; None if any of the runs lacks it."""
    known = [number for number in numbers if number is not None]
    if not known or len(known) < len(numbers):
        return None
    return Value(mean=fmean(known), spread=stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one method that differ only by seed."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def task_free(self) -> bool:
        """Whether any of the runs found its routes itself; figures draw it stronger."""
        return any(run.task_free for run in self.runs)

    def value(self, key: str) -> Value | None:
        """Return mean and spread of a score; None if any of the runs lacks it."""
        return value_of([run.scores.get(key) for run in self.runs])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Groups that may be compared: one stream, one order of tasks, one label space."""

    stream: str
    tasks: tuple[str, ...]
    label_space: str
    groups: tuple[Group, ...]

    @property
    def runs(self) -> tuple[RunRecord, ...]:
        """Every run of every group."""
        return tuple(run for group in self.groups for run in group.runs)

    def seeds_note(self) -> str:
        """Return a warning if methods ran with different seeds, else an empty string."""
        seeds = {
            group.label: ", ".join(str(seed) for seed in sorted({r.run.seed for r in group.runs}))
            for group in self.groups
        }
        if len(set(seeds.values())) == 1:
            return ""
        listed = "; ".join(f"{label}: {numbers}" for label, numbers in seeds.items())
        return f"Methods ran with different seeds, so means compare roughly ({listed})."

    def best(self, column: Column) -> float | None:
        """Return the best mean of a column; None if nothing is to be marked."""
        means = [value.mean for group in self.groups if (value := group.value(column.key))]
        if column.better is None or len(means) < 2:
            return None
        return max(means) if column.better == "more" else min(means)

    def used_columns(self, columns: Sequence[Column] = COLUMNS) -> tuple[Column, ...]:
        """Return the columns in which at least one method has a value."""
        return tuple(c for c in columns if any(group.value(c.key) for group in self.groups))


def compare(runs: Sequence[RunRecord]) -> tuple[Comparison, ...]:
    """Sort runs into what may stand in one table, in the order in which they were given.

    Runs of one name whose settings differ are told apart by their configuration's hash.

    Raises:
        ConfigError: no run was given.
    """
    if not runs:
        raise ConfigError("a report needs at least one run; got none")
    tables: dict[tuple[object, ...], dict[tuple[str, str], list[RunRecord]]] = {}
    for record in runs:
        run = record.run
        table = tables.setdefault((run.stream, run.tasks, run.protocol.label_space), {})
        settings = json.dumps(
            [run.method, run.protocol.model_dump(), record.missing_words],
            sort_keys=True,
            default=str,
        )
        table.setdefault((run.name, settings), []).append(record)
    return tuple(_comparison(list(table.items())) for table in tables.values())


def _comparison(members: list[tuple[tuple[str, str], list[RunRecord]]]) -> Comparison:
    names = [name for (name, _), _ in members]
    groups = []
    for (name, _), records in members:
        label = name if names.count(name) == 1 else f"{name} ({_difference(records[0], members)})"
        groups.append(Group(label=label, runs=tuple(records)))
    run = members[0][1][0].run
    return Comparison(
        stream=run.stream,
        tasks=run.tasks,
        label_space=run.protocol.label_space,
        groups=tuple(groups),
    )


def _difference(record: RunRecord, members: list[tuple[tuple[str, str], list[RunRecord]]]) -> str:
    """The routing or what is missing if that tells runs of one name apart, else the hash."""
    rivals = [records[0] for (name, _), records in members if name == record.run.name]
    tells = [
        (record.run.protocol.routing, [rival.run.protocol.routing for rival in rivals]),
        (record.missing_words, [rival.missing_words for rival in rivals]),
    ]
    for mine, theirs in tells:
        if len(set(theirs)) == len(theirs):
            return mine or "complete"
    return record.run.config_hash


def text_of(value: Value | None, unit: Unit) -> str:
    """Return a value as a reader wants it: percent with one decimal, 1.2 M, 83 s; "-" for none."""
    if value is None:
        return "–"
    if unit == "percent":
        spread = "" if value.spread is None else f" ± {100 * value.spread:.1f}"
        return f"{100 * value.mean:.1f}{spread}"
    if unit == "seconds":
        spread = "" if value.spread is None else f" ± {value.spread:,.0f}"
        return f"{value.mean:,.0f}{spread}"
    return short_count(value.mean)


def short_count(number: float) -> str:
    """Return a count in at most four digits and a letter: 950, 12.3 k, 4.03 M, 1.2 G."""
    for factor, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= factor * 0.9995:
            digits = max(0, 2 - int(math.log10(abs(number) / factor * 1.0005)))
            return f"{number / factor:.{digits}f}{letter}"
    return f"{number:,.0f}"


def is_best(value: Value | None, best: float | None, unit: Unit) -> bool:
    """Whether a cell is to be marked: equal to the best one in what the table shows."""
    if value is None or best is None:
        return False
    return text_of(Value(mean=value.mean), unit) == text_of(Value(mean=best), unit)


def summary_table(runs: Sequence[RunRecord], columns: Sequence[Column] = COLUMNS) -> Table:
    """Return the comparison as a terminal table, best values bold; one block per comparison."""
    comparisons = compare(runs)
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
        header_style="bold",
    )
    table.add_column("method", no_wrap=True)
    keys = {column.key for one in comparisons for column in one.used_columns(columns)}
    shown = [column for column in columns if column.key in keys]
    for column in shown:
        widest = max(len(word) for word in column.narrow.split("\n"))
        table.add_column(column.narrow, justify="right", min_width=widest)
    for comparison in comparisons:
        if len(comparisons) > 1:
            table.add_section()
            table.add_row(f"[italic]{comparison.stream}, {len(comparison.tasks)} tasks[/italic]")
        for group in comparison.groups:
            cells = []
            for column in shown:
                value = group.value(column.key)
                text = (
                    text_of(value, column.unit)
                    .replace(" ± ", "\n± ")
                    .replace(" ", "\N{NO-BREAK SPACE}")
                )
                marked = is_best(value, comparison.best(column), column.unit)
                cells.append(f"[bold green]{text}[/bold green]" if marked else text)
            table.add_row(group.label.replace("[", r"\["), *cells)
    return table


def to_markdown(runs: Sequence[RunRecord]) -> str:
    """Return the comparison as Markdown tables, best values bold, a heading per comparison."""
    blocks = []
    for comparison in compare(runs):
        columns = comparison.used_columns()
        seeds = sorted({run.run.seed for run in comparison.runs})
        lines = [
            f"{comparison.stream}: {len(comparison.tasks)} tasks, seeds "
            f"{', '.join(map(str, seeds))}; scores in %.",
            "",
            "| method | " + " | ".join(column.title for column in columns) + " |",
            "|---|" + "---:|" * len(columns),
        ]
        for group in comparison.groups:
            cells = [group.label.replace("|", r"\|")]
            for column in columns:
                value = group.value(column.key)
                text = text_of(value, column.unit)
                marked = is_best(value, comparison.best(column), column.unit)
                cells.append(f"**{text}**" if marked else text)
            lines.append("| " + " | ".join(cells) + " |")
        if note := comparison.seeds_note():
            lines += ["", note]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
