"""A comparison as terminal tables: one per stream, then mean ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evolora.report.tables import Unit, Value, text_of
from evolora.sweep.results import all_columns

SHOWN = (
    *("transfer", "avg", "last", "forgetting", "selector_accuracy"),
    *("trainable_parameters", "seconds_learn"),
)
"""Metrics of the terminal's table; ``comparison.json`` and the page have all."""
STATES = {"not applicable": "n/a", "waiting": "not run", "failed": "failed", "partial": ""}


def print_comparison(value: Mapping[str, Any], console: Console) -> None:
    """Print the content of ``comparison.json``."""
    for stream in value["streams"]:
        console.print(_stream_table(value, stream))
        for line in _notes(stream):
            console.print(f"  {escape(line)}", style="dim", soft_wrap=True, highlight=False)
        console.print()
    if len(value["streams"]) > 1 and value["ranks"]["methods"]:
        console.print(_rank_table(value))


def _stream_table(value: Mapping[str, Any], stream: Mapping[str, Any]) -> Table:
    main, columns = value["protocol"]["metric"], all_columns()
    there = {key for entry in stream["methods"] for key in entry["metrics"]}
    shown = [key for key in dict.fromkeys((*SHOWN, main)) if key in there]
    seeds, orders = len(value["protocol"]["seeds"]), len(value["protocol"]["orders"])
    table = Table(
        title=f"{stream['name']}: {stream['stream']}, {len(stream['tasks'])} tasks, "
        f"{_counted(seeds, 'seed')}, {_counted(orders, 'order')}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", no_wrap=True)
    for key in shown:
        table.add_column(columns[key].narrow, justify="right")
    table.add_column(
        f"{value['metrics'][main]['title']} − reference" if there else "", justify="right"
    )
    table.add_column("n" if there else "", justify="right")
    for entry in stream["methods"]:
        if not there:
            table.add_row(escape(entry["method"]), STATES[entry["state"]])
            continue
        cells = [_text(entry["metrics"].get(key), value["metrics"][key]["unit"]) for key in shown]
        if not entry["metrics"]:
            cells = [STATES[entry["state"]], *[""] * (len(shown) - 1)]
        table.add_row(
            escape(entry["method"]), *cells, _difference(entry, stream, main), str(entry["n"])
        )
    return table


def _difference(entry: Mapping[str, Any], stream: Mapping[str, Any], metric: str) -> str:
    if entry["method"] == stream["reference"]:
        return "reference"
    found = entry["paired"].get(metric)
    if found is None:
        return ""
    if found["low"] is None:
        return f"{100 * found['mean']:+.1f}"
    low, mean, high = (f"{100 * found[key]:+.1f}" for key in ("low", "mean", "high"))
    return f"{mean}\n{low} … {high}"


def _notes(stream: Mapping[str, Any]) -> list[str]:
    notes = []
    if stream["majority"] is not None:
        notes.append(f"commonest answers, without looking: {100 * stream['majority']['score']:.1f}")
    reasons: dict[str, list[str]] = {}
    for entry in stream["methods"]:
        if entry["reason"]:
            reasons.setdefault(f"{entry['state']}: {entry['reason']}", []).append(entry["method"])
    return notes + [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _rank_table(value: Mapping[str, Any]) -> Table:
    ranks = value["ranks"]
    names = [stream["name"] for stream in value["streams"]]
    table = Table(
        title=f"Rank by {value['metrics'][ranks['metric']]['title']}, 1 is best",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for name in ("mean", *names):
        table.add_column(name, justify="right")
    for row in ranks["methods"]:
        places = [row["streams"].get(name) for name in names]
        cells = [f"{place['rank']:.1f} of {place['of']}" if place else "–" for place in places]
        table.add_row(escape(row["method"]), f"{row['mean']:.2f}", *cells)
    return table


def _text(found: Mapping[str, Any] | None, unit: Unit) -> str:
    value = Value(mean=found["mean"], spread=found["std"]) if found else None
    return text_of(value, unit).replace(" ± ", "\n± ")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
