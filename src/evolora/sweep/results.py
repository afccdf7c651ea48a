"""What a comparison found: cells, their statistics, and ``comparison.json`` that keeps both."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from evolora.config import load_stream
from evolora.errors import EvoloraError
from evolora.registry import METHODS
from evolora.report.comparison import write_comparison_page
from evolora.report.missing import COLUMNS as MISSING_COLUMNS
from evolora.report.records import RunRecord
from evolora.report.tables import COLUMNS, Column
from evolora.storage.files import write_json
from evolora.sweep.cells import OUTPUT
from evolora.sweep.grid import BEST, DEFAULT_ORDER, Cell, Grid
from evolora.sweep.statistics import LEVEL, paired_difference, stream_ranks, summarize

FILE, PAGE = "comparison.json", "comparison.html"
FORMAT = 1
State = Literal["finished", "failed", "not applicable", "waiting"]
Key = tuple[str, int]
"""(order, seed): what cells of two methods share."""
TRAINING = Column(
    key="seconds_learn", title="Training", narrow="Train-\ning s",
    unit="seconds", better=None,
    about="learning alone, all tasks",
)  # fmt: skip
LESS_IS_BETTER = ("forgetting", "cmml_fg", "mcl_f", "mcl_f_relative")


@dataclass(frozen=True, kw_only=True, eq=False)
class CellResult:
    """What became of a cell.

    Args:
        cell: which.
        state: "waiting" was not run, or broke off.
        error: why it failed, or why its method cannot run there; one line.
        record: files of the run, if it is finished.
    """

    cell: Cell
    state: State
    error: str | None = None
    record: RunRecord | None = None

    @property
    def key(self) -> Key:
        """What this cell is paired by."""
        return self.cell.order, self.cell.seed

    @property
    def is_bound(self) -> bool:
        """Whether the run saw all tasks at once, or was told the task of a test sample."""
        told = self.record is not None and self.record.run.protocol.routing == "oracle"
        return told or METHODS.get(self.cell.config.method.type).joint

    @cached_property
    def scores(self) -> dict[str, float]:
        """Metrics, routing quality and cost by name, as far as known; nothing unless finished."""
        if self.record is None:
            return {}
        learning = sum(step.seconds_learn for step in self.record.run.history)
        found = {**self.record.scores, TRAINING.key: round(learning, 3)}
        columns = all_columns()
        return {k: value for k, value in found.items() if value is not None and k in columns}


def write_comparison(grid: Grid, results: Sequence[CellResult], out: Path) -> dict[str, Any]:
    """Write ``comparison.json`` and its page; return the content."""
    value = comparison_of(grid, results)
    write_json(out / FILE, value)
    write_comparison_page(value, out / PAGE)
    return value


def comparison_of(grid: Grid, results: Sequence[CellResult]) -> dict[str, Any]:
    """Return the content of ``comparison.json``: JSON values, described in docs/compare.md."""
    import torch

    from evolora import __version__

    seen = {key for result in results for key in result.scores}
    columns = [column for column in all_columns().values() if column.key in seen]
    return {
        "format_version": FORMAT,
        "title": grid.title,
        "command": grid.command,
        "finished": all(result.state in ("finished", "not applicable") for result in results),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(sum(result.scores.get("seconds", 0.0) for result in results), 3),
        "versions": {
            "evolora": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "protocol": {
            "seeds": list(grid.seeds),
            "orders": list(grid.orders),
            "metric": grid.metric,
            "reference": grid.reference,
            "spread": "sample standard deviation over cells (n - 1)",
            "interval": {"kind": "t", "level": LEVEL},
        },
        "metrics": {
            column.key: {
                name: part
                for name, part in asdict(column).items()
                if name in ("title", "unit", "better", "about")
            }
            for column in columns
        },
        "methods": [
            {"name": name, "type": kind, "joint": METHODS.get(kind).joint}
            for name, kind in grid.methods.items()
        ],
        "streams": [
            _stream(grid, name, [result for result in results if result.cell.stream == name])
            for name in grid.streams
        ],
        "ranks": _ranks(grid, results),
        "cells": [_cell(result) for result in results],
    }


@cache
def all_columns() -> Mapping[str, Column]:
    """Return every number a cell may have by name, those of the comparison table first."""
    from evolora.evaluation.metrics import DEFINITIONS

    others = (
        Column(
            key=key,
            title=key.replace("_", " "),
            narrow=key,
            unit="percent",
            better="less" if key in LESS_IS_BETTER else "more",
            about=about,
        )
        for key, about in DEFINITIONS.items()
    )
    found: dict[str, Column] = {}
    for column in (*COLUMNS, TRAINING, *others, *MISSING_COLUMNS):
        found.setdefault(column.key, column)
    return found


def _cell(result: CellResult) -> dict[str, Any]:
    cell, record = result.cell, result.record
    return {
        "stream": cell.stream,
        "method": cell.method,
        "order": cell.order,
        "seed": cell.seed,
        "config_hash": cell.config_hash,
        "folder": str(cell.folder),
        "state": result.state,
        "error": result.error,
        "log": str(cell.folder / OUTPUT) if result.state == "failed" else None,
        "tasks": list(record.run.tasks) if record else [],
        "matrix": record.matrix.to_json() if record else None,
        "metrics": dict(result.scores),
        "seconds": result.scores.get("seconds"),
    }


def _stream(grid: Grid, name: str, results: Sequence[CellResult]) -> dict[str, Any]:
    scores = _scores(results)
    reference = _reference(grid, results, scores)
    by_method = {
        method: [result for result in results if result.cell.method == method]
        for method in grid.methods
    }
    shown = next((r.record for r in results if r.record and r.cell.order == DEFAULT_ORDER), None)
    shown = shown or next((result.record for result in results if result.record), None)
    return {
        "name": name,
        "stream": grid.streams[name],
        "backbone": results[0].cell.config.backbone.name_or_path if results else "",
        "tasks": list(shown.run.tasks) if shown else [],
        "source": shown.run.source if shown else "",
        "label_space": shown.run.protocol.label_space if shown else "",
        "reference": reference,
        "majority": _majority(results[0].cell) if results else None,
        "methods": [
            _method(method, of_method, scores, reference)
            for method, of_method in by_method.items()
            if of_method
        ],
    }


def _method(
    name: str,
    results: Sequence[CellResult],
    scores: Mapping[str, Mapping[str, Mapping[Key, float]]],
    reference: str | None,
) -> dict[str, Any]:
    """Return the entry of a method on one stream.

    Args:
        name: of the method.
        results: its cells.
        scores: metric -> method -> (order, seed) -> value.
        reference: method that differences are taken from.
    """
    own = {metric: by_method[name] for metric, by_method in scores.items() if name in by_method}
    finished = [result.record for result in results if result.record is not None]
    paired = {}
    if reference is not None and name != reference:
        for metric, values in own.items():
            difference = paired_difference(values, scores[metric].get(reference, {}))
            if difference is not None:
                paired[metric] = difference.to_json()
    return {
        "method": name,
        "routing": next((record.run.protocol.routing for record in finished), None),
        "state": _state(results),
        "reason": next((result.error for result in results if result.error), None),
        "n": len(finished),
        "metrics": {
            metric: found.to_json()
            for metric, values in own.items()
            if (found := summarize(list(values.values())))
        },
        "paired": paired,
    }


def _state(results: Sequence[CellResult]) -> str:
    states = {result.state for result in results}
    if len(states) == 1:
        return states.pop()
    if "finished" in states:
        return "partial"
    return next(state for state in ("failed", "not applicable", "waiting") if state in states)


def _scores(results: Sequence[CellResult]) -> dict[str, dict[str, dict[Key, float]]]:
    """Return metric -> method -> (order, seed) -> value of the finished cells of one stream."""
    found: dict[str, dict[str, dict[Key, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        for metric, value in result.scores.items():
            found[metric][result.cell.method][result.key] = value
    return found


def _reference(
    grid: Grid,
    results: Sequence[CellResult],
    scores: Mapping[str, Mapping[str, Mapping[Key, float]]],
) -> str | None:
    """Return the named reference if it has a finished cell, else the best by the main metric.

    What saw all tasks at once or was told the task is a bound, not a rival: it is the best only
    where there is nothing else.
    """
    by_method = scores.get(grid.metric, {})
    if grid.reference != BEST:
        return grid.reference if grid.reference in by_method else None
    bounds = {result.cell.method for result in results if result.is_bound}
    rivals = [name for name in by_method if name not in bounds] or list(by_method)
    sign = 1 if all_columns()[grid.metric].better == "more" else -1
    return max(rivals, key=lambda name: sign * fmean(by_method[name].values()), default=None)


def _ranks(grid: Grid, results: Sequence[CellResult]) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for stream in grid.streams:
        scores = _scores([result for result in results if result.cell.stream == stream])
        placed = stream_ranks(
            scores.get(grid.metric, {}),
            more_is_better=all_columns()[grid.metric].better == "more",
        )
        for method, rank in placed.items():
            found[method][stream] = asdict(rank)
    rows = [
        {
            "method": method,
            "mean": sum(rank["rank"] for rank in streams.values()) / len(streams),
            "streams": streams,
        }
        for method, streams in found.items()
    ]
    return {"metric": grid.metric, "methods": sorted(rows, key=lambda row: float(row["mean"]))}


def _majority(cell: Cell) -> dict[str, Any] | None:
    """Return what the commonest answers score on a stream of text answers; None of others."""
    from evolora.evaluation.answers.majority import majority_baseline

    options = {
        key: value for key, value in cell.config.stream.items() if key not in ("name", "order")
    }
    try:
        tasks = load_stream(str(cell.config.stream["name"]), **options).tasks
    except EvoloraError:  # its cells have said so
        return None
    if not all(task.labels.text for task in tasks):
        return None
    scores = {task.name: majority_baseline(task).score for task in tasks}
    return {"score": sum(scores.values()) / len(scores), "tasks": scores}
