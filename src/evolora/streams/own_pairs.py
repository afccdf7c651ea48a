"""Reads a CSV or JSON Lines file of image, text and labels into rows, naming every bad line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from evolora.errors import StreamError
from evolora.streams.own_csv import csv_lines, image_fault, refuse_bad, split_fault
from evolora.streams.sampling import read_text

COLUMNS = ("image", "text", "label", "labels", "task", "split")
JSON_LINES = (".jsonl", ".ndjson")
SEPARATOR = ";"
"""Stands between several labels of one sample."""

Cells = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """One sample of a user's data set; image or text is there, or both.

    Args:
        image: image file, or None.
        text: its text, or None.
        labels: classes as the user spells them; one unless the file has a column ``labels``.
        task: task name.
        split: "train", "val", "test", or None where the user gives none.
        key: file name and line.
    """

    image: Path | None
    text: str | None
    labels: tuple[str, ...]
    task: str
    split: str | None
    key: str


def read_pairs(file: Path, splits: Mapping[str, str]) -> tuple[list[PairRow], bool]:
    """Return the rows of a file, and whether a sample may have several labels.

    Args:
        file: see `evolora.streams.image_text.load`.
        splits: spelling of a split -> "train", "val" or "test".

    Raises:
        StreamError: no such file, not text, columns that are missing or both ``label`` and
            ``labels``, no rows, or bad rows: neither image nor text, no label, an unknown split, an
            image that is not there, a sample that could fall into both training and test.
    """
    lines = list(_json_lines(file) if file.suffix.lower() in JSON_LINES else _csv_lines(file))
    found = {name for _, cells, _ in lines for name in cells}
    if "label" in found and "labels" in found:
        raise StreamError(f"{file} has both label (one class) and labels (several); keep one")
    readable = any(not fault for _, _, fault in lines)
    if readable and (not found & {"label", "labels"} or not found & {"image", "text"}):
        raise StreamError(
            f"{file} needs the columns image and text (or one of them) and label or labels; "
            f"it has: {', '.join(name for name in COLUMNS if name in found) or 'none of them'}"
        )
    several = "labels" in found
    rows: list[PairRow] = []
    bad: list[str] = []
    seen: dict[tuple[str, str, str], tuple[int, str]] = {}
    for number, cells, fault in lines:
        fault = fault or _fault(file, cells, splits, several) or _repeated(cells, number, seen)
        if fault:
            bad.append(f"line {number}: {fault}")
        else:
            rows.append(_row(file, number, cells, splits, several))
    refuse_bad(file, bad)
    if not rows:
        raise StreamError(f"{file} has no rows")
    return rows, several


def _csv_lines(file: Path) -> Iterator[tuple[int, dict[str, str], str]]:
    """Yield (line number, cells, what is wrong with the line)."""
    lines = csv_lines(file)
    _, header = next(lines, (0, []))
    columns = [name.strip().lower() for name in header]
    twice = [name for name in COLUMNS if columns.count(name) > 1]
    if twice:
        raise StreamError(f"{file} has two columns {twice[0]!r}")
    for number, values in lines:
        if not any(value.strip() for value in values):
            continue
        wrong = len(values) != len(columns)
        fault = f"{len(values)} columns instead of {len(columns)}" if wrong else ""
        cells = zip(columns, (value.strip() for value in values), strict=False)
        yield number, {name: value for name, value in cells if name in COLUMNS}, fault


def _json_lines(file: Path) -> Iterator[tuple[int, dict[str, str], str]]:
    """Yield (line number, cells, what is wrong with the line)."""
    for number, line in enumerate(read_text(file, StreamError).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, {}, f"not valid JSON ({error.msg})"
            continue
        if not isinstance(value, dict):
            yield number, {}, "not a JSON object"
            continue
        cells: dict[str, str] = {}
        fault = ""
        for name in COLUMNS:
            if value.get(name) is not None:
                try:
                    cells[name] = _json_cell(name, value[name])
                except StreamError as error:
                    fault = str(error)
        yield number, cells, fault


def _json_cell(name: str, value: object) -> str:
    """Return a JSON value as a cell; a list of texts or of labels is joined."""
    joint = {"text": ". ", "labels": SEPARATOR}.get(name)
    if joint is not None and isinstance(value, list):
        return joint.join(_json_cell("", part) for part in value)
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool) and name != "image":
        return str(value)
    raise StreamError(f"{name or 'a list'} must hold text; got {value!r}")


def _fault(file: Path, cells: Cells, splits: Mapping[str, str], several: bool) -> str:
    """Return what is wrong with a row, or an empty string."""
    image = cells.get("image", "")
    if not image and not cells.get("text"):
        return "neither image nor text"
    labels = _labels(cells, several)
    if not labels:
        return "no label"
    if not several and SEPARATOR in labels[0]:
        return f"several labels ({labels[0]!r}); call the column labels"
    return split_fault(cells, splits) or (image_fault(file, image) if image else "")


def _repeated(cells: Cells, number: int, seen: dict[tuple[str, str, str], tuple[int, str]]) -> str:
    """Return a fault if the sample is there before, unless both are in one given split.

    A sample is known by its image; one without image by its text.
    """
    what = "image" if cells.get("image") else "text"
    split = cells.get("split", "").lower()
    first, before = seen.setdefault((cells.get("task", ""), what, cells[what]), (number, split))
    if first == number or (split and split == before):
        return ""
    return f"same {what} as line {first}"


def _labels(cells: Cells, several: bool) -> tuple[str, ...]:
    if not several:
        return tuple(filter(None, (cells.get("label", ""),)))
    parts = (part.strip() for part in cells.get("labels", "").split(SEPARATOR))
    return tuple(dict.fromkeys(part for part in parts if part))


def _row(
    file: Path, number: int, cells: Cells, splits: Mapping[str, str], several: bool
) -> PairRow:
    image, split = cells.get("image"), cells.get("split", "").lower()
    return PairRow(
        image=file.parent / image if image else None,
        text=cells.get("text") or None,
        labels=_labels(cells, several),
        task=cells.get("task", "") or file.stem,
        split=splits[split] if split else None,
        key=f"{file.name}:{number}",
    )
