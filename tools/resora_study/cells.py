"""The study's cells, one after another: each is kept as a line of JSON and never run twice."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from resora_study.conditions import NONE, RATES, conditions_of
from resora_study.training import Cell

TUNING_SEEDS, SEEDS = (0, 1), (0, 1, 2, 3, 4)
Line = Mapping[str, Any]


def read(path: Path) -> list[Line]:
    """Returns the finished cells; a line that a kill cut short is none."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


class Book:
    """Finished cells, in memory and in a file.

    Args:
        path: of the file; a line each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = {_cell_of(line): line for line in read(path)}

    def get(self, cell: Cell) -> Line | None:
        """Returns a finished cell."""
        return self._known.get(cell)

    def put(self, cell: Cell, line: Line) -> None:
        """Keeps a finished cell, on the disk before anything else is done."""
        cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut else "") + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._known[cell] = line

    def score(self, cells: Sequence[Cell]) -> float | None:
        """Returns the mean score of cells, once all are finished."""
        lines = [self._known.get(cell) for cell in cells]
        if any(line is None for line in lines):
            return None
        return statistics.fmean(line["score"] for line in lines if line is not None)


def plan(task: str, host: str, book: Book) -> Iterator[Cell]:
    """Yields the cells of a task and host that are next: what is chosen needs those before it.

    First the learning rate without a regulariser, then each condition's strength, both on the
    validation split and the tuning seeds; then every condition is tested, at its own choice, once.
    """
    rates = {
        rate: [
            Cell(stage="rate", task=task, host=host, condition=NONE, rate=rate, strength=0.0,
                 seed=seed)
            for seed in TUNING_SEEDS
        ]
        for rate in RATES
    }  # fmt: skip
    yield from (cell for cells in rates.values() for cell in cells)
    rate = best(rates, book)
    for name, condition in conditions_of(host).items():
        common = {"task": task, "host": host, "condition": name, "rate": rate}
        strengths = {
            strength: [
                Cell(stage="strength", strength=strength, seed=seed, **common)
                for seed in TUNING_SEEDS
            ]
            for strength in condition.strengths
        }
        yield from (cell for cells in strengths.values() for cell in cells)
        chosen = best(strengths, book)
        yield from (Cell(stage="test", strength=chosen, seed=seed, **common) for seed in SEEDS)


def best(tries: Mapping[float, Sequence[Cell]], book: Book) -> float:
    """Returns the value with the best score; of equal ones the first, which is the weakest."""
    scores = {value: book.score(cells) for value, cells in tries.items()}
    known = {value: score for value, score in scores.items() if score is not None}
    if len(known) < len(scores):
        raise RuntimeError("the cells that this choice rests on are not finished")
    return max(known, key=lambda value: known[value])


def _cell_of(line: Line) -> Cell:
    return Cell(**{field.name: line[field.name] for field in fields(Cell)})
