"""The accuracy matrix of a run: the score on every task after learning every task."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evolora.errors import DataError, StorageError, unknown_name

Scores = NDArray[np.float64]
FORMAT_VERSION = 1


@dataclass(eq=False)
class Matrix:
    """Scores of one run, filled row by row.

    Args:
        tasks: task names in learning order; T of them.
        values: (T, T); ``values[i, j]`` is the score on task j's test set after learning task i,
            from 0 to ``largest[j]``, NaN where that was not evaluated.
        counts: (T,) test samples of each task; 0 where unknown.
        baseline: (T,) scores before any learning (zero-shot), or None.
        largest: (T,) best score of each task's metric: 1, but 10 of CIDEr-D. Empty: 1 throughout.
    """

    tasks: tuple[str, ...]
    values: Scores
    counts: NDArray[np.int64]
    baseline: Scores | None = None
    largest: Scores = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        self.tasks = tuple(self.tasks)
        size = len(self.tasks)
        if size == 0 or len(set(self.tasks)) != size:
            raise DataError(f"a matrix needs unique task names, at least one; got {self.tasks}")
        best = np.array(self.largest, dtype=np.float64)
        self.largest = best if best.size else np.ones(size)
        if self.largest.shape != (size,) or not (self.largest > 0).all():
            raise DataError(f"largest must be {size} numbers > 0; got {best.tolist()}")
        self.values = self._as_scores("values", self.values, (size, size))
        self.counts = np.asarray(self.counts, dtype=np.int64)
        if self.counts.shape != (size,) or (self.counts < 0).any():
            raise DataError(f"counts must be {size} numbers >= 0; got {self.counts.tolist()}")
        if self.baseline is not None:
            self.baseline = self._as_scores("baseline", self.baseline, (size,))

    @classmethod
    def empty(
        cls,
        tasks: Sequence[str],
        counts: Sequence[int] | None = None,
        largest: Sequence[float] = (),
    ) -> Matrix:
        """Return a matrix of these tasks with nothing evaluated yet."""
        size = len(tasks)
        return cls(
            tasks=tuple(tasks),
            values=np.full((size, size), np.nan),
            counts=np.asarray(counts if counts is not None else [0] * size, dtype=np.int64),
            largest=np.asarray(largest, dtype=np.float64),
        )

    @property
    def rows_done(self) -> int:
        """How many leading rows hold at least one score: the tasks learned and evaluated so far."""
        filled = ~np.isnan(self.values).all(axis=1)
        return len(self.tasks) if filled.all() else int(np.argmin(filled))

    def set_row(
        self,
        i: int,
        scores: Mapping[str, float] | Sequence[float],
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Fill the row "after learning task i".

        Args:
            i: index of the task that was just learned.
            scores: task name -> score (a task left out was not evaluated), or one score per task
                with NaN where not evaluated.
            counts: task name -> test samples; updates ``counts``.

        Raises:
            DataError: a score below 0 or above the task's largest, a wrong length, or an unknown
                task or row.
        """
        if not 0 <= i < len(self.tasks):
            raise DataError(f"row {i} is outside this matrix of {len(self.tasks)} tasks")
        self.values[i] = self._line(f"scores after {self.tasks[i]!r}", scores)
        for name, count in (counts or {}).items():
            self.counts[self._index(name)] = count

    def set_baseline(self, scores: Mapping[str, float] | Sequence[float]) -> None:
        """Set the scores before any learning; the same forms as `set_row`."""
        self.baseline = self._line("baseline", scores)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a cell that was not evaluated is null."""
        return {
            "format_version": FORMAT_VERSION,
            "tasks": list(self.tasks),
            "values": [_nulls(row) for row in self.values],
            "counts": self.counts.tolist(),
            "baseline": None if self.baseline is None else _nulls(self.baseline),
            "largest": self.largest.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Matrix:
        """Return the matrix that `to_json` described.

        Raises:
            StorageError: a newer format, a missing field or values that are no matrix.
        """
        if not isinstance(data, Mapping):
            raise StorageError(f"a matrix is a JSON object; got {type(data).__name__}")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise StorageError(f"matrix format {version!r} is not readable; known: 1")
        try:
            baseline = data.get("baseline")
            return cls(
                tasks=tuple(str(name) for name in data["tasks"]),
                values=np.asarray(data["values"], dtype=np.float64),
                counts=np.asarray(data["counts"], dtype=np.int64),
                baseline=None if baseline is None else np.asarray(baseline, dtype=np.float64),
                largest=np.asarray(data.get("largest", ()), dtype=np.float64),
            )
        except KeyError as error:
            raise StorageError(f"matrix lacks the field {error.args[0]!r}") from error
        except (TypeError, ValueError) as error:  # DataError is a ValueError
            raise StorageError(f"not a matrix: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the matrix as JSON; the file is whole or unchanged, else StorageError."""
        from evolora.storage.files import write_json  # it knows tensors: torch only when writing

        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Matrix:
        """Return the matrix in a JSON file; StorageError names a missing or corrupt file."""
        try:
            return cls.from_json(json.loads(Path(path).read_bytes()))
        except StorageError as error:
            raise StorageError(f"{path}: {error}") from error
        except (OSError, ValueError) as error:
            raise StorageError(f"{path}: cannot be read as a matrix ({error})") from error

    def _index(self, name: str) -> int:
        if name not in self.tasks:
            raise unknown_name("task", name, self.tasks)
        return self.tasks.index(name)

    def _line(self, what: str, scores: Mapping[str, float] | Sequence[float]) -> Scores:
        if not isinstance(scores, Mapping):
            return self._as_scores(what, scores, (len(self.tasks),))
        line = np.full(len(self.tasks), np.nan)
        for name, score in scores.items():
            line[self._index(name)] = score
        return self._as_scores(what, line, line.shape)

    def _as_scores(self, what: str, values: Any, shape: tuple[int, ...]) -> Scores:
        scores = np.array(values, dtype=np.float64)  # a copy: rows are written in place
        if scores.shape != shape:
            raise DataError(
                f"{what} must have shape {shape} for {len(self.tasks)} tasks; got {scores.shape}"
            )
        wrong = np.argwhere(~np.isnan(scores) & ~((scores >= 0) & (scores <= self.largest)))
        if len(wrong):
            cell = tuple(int(x) for x in wrong[0])
            raise DataError(
                f"{what} at {tuple(self.tasks[x] for x in cell)} is {scores[cell]:g}; a score is "
                f"in [0, {self.largest[cell[-1]]:g}]"
            )
        return scores


def read_matrix(path: str | Path, cider: Sequence[str] = ()) -> Matrix:
    """Return the matrix in a .csv, .npy or .json file; rules: `matrix_file.read_matrix`."""
    from evolora.evaluation import matrix_file  # it needs Matrix: imported when both are complete

    return matrix_file.read_matrix(path, cider)


def _nulls(row: Scores) -> list[float | None]:
    return [None if math.isnan(x) else float(x) for x in row]
