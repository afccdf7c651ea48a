"""Reads a CSV of image, label and maybe task and split into rows, naming every bad line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evolora.errors import StreamError, suggest
from evolora.streams.sampling import read_text

_COLUMNS = ("image", "label", "task", "split")
_SHOWN = 5  # bad lines quoted in one message


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of a user's data set.

    Args:
        path: image file.
        label: class as the user spells it.
        task: task name.
        split: "train", "val", "test", or None where the user gives none.
        key: identifier within the data set.
    """

    path: Path
    label: str
    task: str
    split: str | None
    key: str


def read_rows(file: Path, splits: Mapping[str, str]) -> list[Row]:
    """Return the rows of a CSV file.

    Args:
        file: see `evolora.streams.own_data.load_csv`.
        splits: spelling of a split -> "train", "val" or "test".

    Raises:
        StreamError: no such file, not text, no header with ``image`` and ``label``, no rows, or bad
            rows: a missing value, an unknown split, an image that is not there.
    """
    lines = csv_lines(file)
    _, header = next(lines, (0, []))
    columns = [name.strip().lower() for name in header]
    _check_header(file, columns)
    rows: list[Row] = []
    bad: list[str] = []
    seen: dict[tuple[str, str], int] = {}  # (task, image) -> line
    for number, values in lines:
        if not any(value.strip() for value in values):
            continue
        if len(values) != len(columns):
            bad.append(f"line {number}: {len(values)} columns instead of {len(columns)}")
            continue
        cells = dict(zip(columns, (value.strip() for value in values), strict=True))
        fault = _fault(file, cells, splits)
        first = seen.setdefault((cells.get("task", ""), cells["image"]), number)
        if not fault and first != number:
            fault = f"same image as line {first}"
        if fault:
            bad.append(f"line {number}: {fault}")
            continue
        rows.append(_row(file, cells, splits))
    refuse_bad(file, bad)
    if not rows:
        raise StreamError(f"{file} has a header but no rows")
    return rows


def refuse_bad(file: Path, bad: Sequence[str]) -> None:
    """Raise one StreamError that quotes the first bad rows, if there are any."""
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise StreamError(f"{file} has bad rows: {'; '.join(bad[:_SHOWN])}{more}")


def csv_lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, values); the separator is the one that the header line uses."""
    text = read_text(file, StreamError)
    header = text.partition("\n")[0]
    delimiter = max(",;\t|", key=header.count)  # the first of them where there is none
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for values in reader:
            yield reader.line_num, values
    except csv.Error as error:
        raise StreamError(f"{file}, line {reader.line_num}: {error}") from error


def _check_header(file: Path, columns: list[str]) -> None:
    for needed in ("image", "label"):
        if needed not in columns:
            hint = suggest(needed, columns)
            raise StreamError(
                f"{file} needs the columns image,label (and maybe task,split); "
                f"its first line has: {', '.join(columns) or 'nothing'}{hint}"
            )
    twice = [name for name in _COLUMNS if columns.count(name) > 1]
    if twice:
        raise StreamError(f"{file} has two columns {twice[0]!r}")


def _fault(file: Path, cells: Mapping[str, str], splits: Mapping[str, str]) -> str:
    """Return what is wrong with a row, or an empty string."""
    if not cells["image"] or not cells["label"]:
        return f"no {'image' if not cells['image'] else 'label'}"
    return split_fault(cells, splits) or image_fault(file, cells["image"])


def split_fault(cells: Mapping[str, str], splits: Mapping[str, str]) -> str:
    """Return what is wrong with a row's split, or an empty string."""
    split = cells.get("split", "").lower()
    if split and split not in splits:
        return f"unknown split {split!r}{suggest(split, splits)} (known: {', '.join(splits)})"
    return ""


def image_fault(file: Path, image: str) -> str:
    """Return what is wrong with an image's path, relative to the file's folder, or nothing."""
    try:
        return "" if (file.parent / image).is_file() else f"no such image: {image}"
    except (OSError, ValueError) as error:  # a name that no file can have
        return f"no such image: {image!r} ({error})"


def _row(file: Path, cells: Mapping[str, str], splits: Mapping[str, str]) -> Row:
    split = cells.get("split", "").lower()
    return Row(
        path=file.parent / cells["image"],
        label=cells["label"],
        task=cells.get("task", "") or file.stem,
        split=splits[split] if split else None,
        key=cells["image"],
    )
