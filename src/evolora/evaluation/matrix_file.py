"""Reads an accuracy matrix that somebody wrote: a text table, an array, or a run's own JSON."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from evolora.errors import DataError, suggest, unknown_name
from evolora.evaluation.matrix import Matrix

READABLE = (".csv", ".tsv", ".txt", ".npy", ".json")
LARGEST_CIDER = 10.0
CIDER_HINT = "; CIDEr ends at 1000: say which tasks it judges (--cider NAME, or '# cider: NAME')"
_CIDER = re.compile(r"^\s*#\s*cider\s*:(.*)$", re.IGNORECASE)
_LARGEST_FILE = 64 * 2**20  # bytes; a matrix of 1,000 tasks needs less than a third of it
_NOT_EVALUATED = {"", "nan", "na", "n/a", "-", "--", "none", "null"}
_BASELINE_NAMES = {"baseline", "zero-shot", "zero shot", "zero_shot", "before", "before learning"}
_DECIMAL_COMMA = re.compile(r"^[+-]?\d+,\d+%?$")


def read_matrix(path: str | Path, cider: Sequence[str] = ()) -> Matrix:
    """Return the matrix in a text table, a ``.npy`` array or a run's ``matrix.json``.

    A table has one line per learned task and one column per tested task, both in learning order;
    the delimiter (comma, semicolon, tab, white space) is found by looking. A header of task names
    and a first column of names are optional; a first line named "zero-shot" (or "baseline",
    "before") holds the scores before any learning. Lines that start with "#" are comments.

    Units: if any value is above 1, or carries a percent sign, all are percent; else all are
    fractions. A percent table without a value above 1 must therefore be written as fractions.
    Cells may be empty (or "nan", "-") only above the diagonal: tasks not yet learned.

    CIDEr ends at 10, or 1000 percent. Which tasks are judged by it is said by a comment line
    ("# cider: textcaps, flickr30k") or by ``cider``; all others end at 1.

    Args:
        path: the file.
        cider: names of tasks judged by CIDEr, beside those that the file names; "task 1" is the
            first one's where the file has no names. A matrix.json knows them itself.

    Raises:
        DataError: the file is missing or no square matrix; names the row, column and text at fault.
        ConfigError: no such task.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        allowed = ", ".join(READABLE)
        raise DataError(f"{path}: a matrix is {allowed}; got {suffix!r}{suggest(suffix, READABLE)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size > _LARGEST_FILE:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes is too large for a matrix")
    if suffix == ".json":
        if cider:
            raise DataError(f"{path}: a matrix.json says itself which tasks are judged by CIDEr")
        return Matrix.load(path)
    try:
        table = _read_npy(path) if suffix == ".npy" else _read_text(path)
        return table.matrix(cider)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


@dataclass
class _Table:
    """Rows of numbers as found in a file, and how to name a cell of it in a message."""

    numbers: list[list[float]]
    texts: list[list[str]]
    lines: list[int]  # line of each row in the file, from 1; empty for a binary file
    tasks: list[str] | None = None
    baseline: list[float] | None = None
    percent: bool = False
    cider: list[str] = field(default_factory=list)

    def where(self, i: int, j: int) -> str:
        line = f" (line {self.lines[i]})" if self.lines else ""
        text = f": {self.texts[i][j]!r}" if j < len(self.texts[i]) else ""
        return f"row {i + 1}, column {j + 1}{line}{text}"

    def matrix(self, cider: Sequence[str]) -> Matrix:
        self._check_square()
        values = np.asarray(self.numbers, dtype=np.float64)
        names = self.tasks or [f"task {j + 1}" for j in range(len(values))]
        judged = [*cider, *self.cider]
        for name in judged:
            if name not in names:
                raise unknown_name("task judged by CIDEr", name, names)
        largest = np.array([LARGEST_CIDER if name in judged else 1.0 for name in names])
        first = None if self.baseline is None else np.asarray(self.baseline, dtype=np.float64)
        everything = values if first is None else np.vstack([values, first])
        percent = self.percent or bool(((everything > largest) & np.isfinite(everything)).any())
        scale, unit = (100.0, "percent") if percent else (1.0, "a fraction")
        for i, j in np.ndindex(values.shape):
            value, top = values[i, j], scale * largest[j]
            if math.isnan(value) and j <= i:
                raise DataError(
                    f"{self.where(i, j)} is not a score; cells may be empty only above the "
                    "diagonal (tasks not yet learned)"
                )
            if not math.isnan(value) and not 0 <= value <= top:
                hint = CIDER_HINT if 100 < value <= 100 * LARGEST_CIDER else ""
                raise DataError(f"{self.where(i, j)} is outside 0 to {top:g} ({unit}){hint}")
        if first is not None and not ((first >= 0) & (first <= scale * largest)).all():
            raise DataError(
                f"the baseline line has a cell outside 0 to {scale:g} (CIDEr: ten times that): "
                f"{self.baseline}"
            )
        return Matrix(
            tasks=tuple(names),
            values=values / scale,
            counts=np.zeros(len(values), dtype=np.int64),
            baseline=None if first is None else first / scale,
            largest=largest,
        )

    def _check_square(self) -> None:
        if not self.numbers:
            raise DataError("holds no numbers")
        width = len(self.tasks) if self.tasks else len(self.numbers[0])
        for i, row in enumerate(self.numbers):
            if len(row) == width:
                continue
            which = "is missing" if len(row) < width else "is one too many"
            raise DataError(
                f"{self.where(i, min(len(row), width))} {which}; "
                f"this row has {len(row)} cells, {width} are expected"
            )
        if len(self.numbers) != width:
            raise DataError(
                f"{len(self.numbers)} rows and {width} columns; a matrix is square: one row after "
                "each learned task, one column per tested task"
            )


def _read_npy(path: Path) -> _Table:
    try:
        array = np.load(path, allow_pickle=False)  # a pickle runs code when it is opened
    except (ValueError, EOFError) as error:
        raise DataError("not a plain numeric .npy array (pickled objects are refused)") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise DataError(f"holds {getattr(array, 'dtype', type(array))}; numbers are needed")
    if array.ndim != 2:
        raise DataError(f"has shape {array.shape}; a matrix has two axes of equal length")
    numbers = array.astype(np.float64).tolist()
    return _Table(numbers=numbers, texts=[[f"{x:g}" for x in row] for row in numbers], lines=[])


def _read_text(path: Path) -> _Table:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text (byte {error.start})") from error
    numbered = [
        (number, line)
        for number, line in enumerate(content.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not numbered:
        raise DataError("is empty")
    said = [found.group(1) for line in content.splitlines() if (found := _CIDER.match(line))]
    lines = [number for number, _ in numbered]
    cells = _split([line for _, line in numbered])
    header = cells.pop(0) if _is_header(cells[0]) else None
    if header is not None:
        lines.pop(0)
    names = _take_names(header, cells)
    table = _Table(
        numbers=[],
        texts=cells,
        lines=lines,
        percent=any(cell.endswith("%") for row in cells for cell in row),
        cider=[name.strip() for names in said for name in names.split(",") if name.strip()],
    )
    table.numbers = [
        [_number(table, i, j) for j in range(len(row))] for i, row in enumerate(table.texts)
    ]
    if names and names[0].strip().lower() in _BASELINE_NAMES:
        table.baseline = table.numbers.pop(0)
        del table.texts[0], table.lines[0], names[0]
        if table.numbers and len(table.baseline) != len(table.numbers[0]):
            raise DataError(f"the baseline line has {len(table.baseline)} cells")
    table.tasks = _tasks(header, names)
    return table


def _split(lines: list[str]) -> list[list[str]]:
    """Cells of each line, by the first of tab, semicolon, comma that the file uses, or spaces."""
    everything = "\n".join(lines)
    for delimiter in "\t;,":
        if delimiter in everything:
            rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
            return [[cell.strip() for cell in row] for row in rows]
    return [line.split() for line in lines]


def _is_number(cell: str) -> bool:
    try:
        float(cell.rstrip("%"))
    except ValueError:
        return bool(_DECIMAL_COMMA.match(cell))
    return True


def _is_header(cells: list[str]) -> bool:
    """Names throughout; or an empty corner (a table written with its index) and anything after."""
    rest = cells[1:] if len(cells) > 1 else cells
    if cells[0] == "" and len(cells) > 1:
        return True
    if _is_number(cells[0]) and cells[0].lower() not in _NOT_EVALUATED:
        return False
    return all(not _is_number(cell) and cell.lower() not in _NOT_EVALUATED for cell in rest)


def _take_names(header: list[str] | None, rows: list[list[str]]) -> list[str]:
    """Cut the first column off ``rows`` if it holds names; return the names."""
    if not rows:
        return []
    worded = all(
        row and not _is_number(row[0]) and row[0].lower() not in _NOT_EVALUATED for row in rows
    )
    indexed = header is not None and len(header) > 1 and header[0] == ""
    wider = header is not None and all(len(row) == len(header) + 1 for row in rows)
    numbered = header is not None and len(header) == len(rows) + 1 and _counts_up(rows)
    # A lone worded column is a column of faulty numbers, to be refused cell by cell.
    if not (worded and max(len(row) for row in rows) > 1) and not (indexed or wider or numbered):
        return []
    names = [row.pop(0) for row in rows]
    if header is not None and not wider:
        header.pop(0)  # the corner
    return names


def _counts_up(rows: list[list[str]]) -> bool:
    """Whether the first column is 0, 1, 2 ... or 1, 2, 3 ...: an index, not scores."""
    first = [row[0] for row in rows if row]
    return any(first == [str(start + i) for i in range(len(rows))] for start in (0, 1))


def _number(table: _Table, i: int, j: int) -> float:
    text = table.texts[i][j]
    if text.lower() in _NOT_EVALUATED:
        return math.nan
    plain = text.replace(",", ".") if _DECIMAL_COMMA.match(text) else text
    try:
        return float(plain.rstrip("%"))
    except ValueError:
        raise DataError(f"{table.where(i, j)} is not a number") from None


def _tasks(header: list[str] | None, names: list[str]) -> list[str] | None:
    tasks = header if header is not None else (names or None)
    if tasks is None:
        return None
    if len(set(tasks)) != len(tasks):
        raise DataError(f"task names must be unique; got {', '.join(tasks)}")
    if names and names != tasks and set(names) == set(tasks):
        raise DataError(
            f"rows are in the order {', '.join(names)} but columns in {', '.join(tasks)}; "
            "both must be in learning order"
        )
    return list(tasks)
