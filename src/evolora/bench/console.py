"""Bench results on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as Grid

from evolora.bench.results import Result
from evolora.bench.runner import Report

_STYLES = {"met": "green", "missed": "bold red"}


def print_report(report: Report, console: Console, slack: float = 0.0) -> None:
    """Print every table, then the goals."""
    for result in report.results:
        _print_result(result, console)
    verdicts = report.verdicts(slack)
    if not verdicts:
        return
    goals = Grid("goal", "bound", "measured", "", title="goals")
    for verdict in verdicts:
        goal, word = verdict.goal, verdict.word
        style = _STYLES.get(word, "yellow")
        goals.add_row(goal.what, goal.bound, f"{verdict.value:.4g}", word, style=style)
    console.print(goals)


def _print_result(result: Result, console: Console) -> None:
    facts = result.environment
    load = facts.get("load_average") or ["?"]
    state = "" if result.complete else " (interrupted)"
    console.print(
        f"[bold]{result.bench}[/bold]{state}: {facts.get('processor')}, "
        f"{facts.get('torch_threads')} thread, {facts.get('clock')}, load {load[0]}, "
        f"{result.seconds:.0f} s"
    )
    for table in result.tables:
        if not table.cells:
            continue
        headings = ["", *(f"{table.axis} {c}".strip() for c in table.columns)]
        grid = Grid(*headings, title=table.title, caption=table.note or None)
        for column in grid.columns[1:]:
            column.justify = "right"
        for cells in table.texts():
            grid.add_row(*cells)
        console.print(grid)
