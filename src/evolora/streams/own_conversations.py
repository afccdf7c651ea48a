r"""Reads conversations about images in LLaVA's layout, naming every bad row by its line.

A JSON file (a list of rows) or JSON Lines (a row per line), each row:

    {"id": "17", "image": "a.jpg",
     "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                       {"from": "gpt", "value": "A dot."}]}

``image`` may be a list of files, or absent; "<image>" says where each stands, and may be left out
of all turns. Human and gpt take turns; gpt has the last word. Each turn of gpt is a sample, whose
prompt are the turns before it. A list in place of a gpt's value holds several accepted answers. Two
more fields are read where they are: ``task`` and ``split``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolora.errors import StreamError, suggest
from evolora.streams.own_csv import refuse_bad
from evolora.streams.sampling import read_text

MARKER = "<image>"
SPEAKERS = ("human", "gpt")
JSON_LINES = (".jsonl", ".ndjson")
_LOOKED_AT = 20  # rows whose images tell which folder the names are relative to


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One answer of a conversation, and all that was said before it.

    Args:
        images: files of its images, in the order of their markers.
        turns: of human and gpt in alternation, the human's first and last.
        answers: what counts as right.
        task: task name.
        split: "train", "val", "test", or None where the user gives none.
        key: file name and line (or place in the list), and which answer of several.
        group: samples of one group belong into one split: those about the same images.
    """

    images: tuple[Path, ...]
    turns: tuple[str, ...]
    answers: tuple[str, ...]
    task: str
    split: str | None
    key: str
    group: str


def read_conversations(
    file: Path, splits: Mapping[str, str], images: Path | Sequence[Path] | None = None
) -> list[Asked]:
    """Return the samples of a file.

    Args:
        file: JSON or JSON Lines.
        splits: spelling of a split -> "train", "val" or "test".
        images: folder that image names are relative to, or several, see `image_folder`; None is the
            file's own.

    Raises:
        StreamError: no such file, no JSON, no rows, or bad rows: not in the layout, an image that
            is not there, markers that are not as many as the images, an unknown split.
    """
    rows = json_rows(file)
    folders = images if isinstance(images, Sequence) else [images or file.parent]
    folder = image_folder([row for _, _, row in rows], folders)
    found: list[Asked] = []
    bad: list[str] = []
    for number, name, row in rows:
        fault = row if isinstance(row, str) else _fault(row, folder, splits)
        if fault:
            bad.append(f"line {number}: {fault}")
        else:
            found += _asked(name, row, folder, str(row.get("task") or "") or file.stem, splits)
    refuse_bad(file, bad)
    return found


def json_rows(file: Path) -> list[tuple[int, str, Any]]:
    """Return (line, name of the row, row) of a JSON list or of JSON Lines.

    A row that is no JSON object is a text that says why.

    Raises:
        StreamError: no such file, no JSON, or no rows.
    """
    by_line = file.suffix.lower() in JSON_LINES
    rows = enumerate(_lines(file) if by_line else _items(file))
    found = [
        (line, f"{file.name}:{line}" if by_line else f"{file.name}[{place}]", row)
        for place, (line, row) in rows
    ]
    if not found:
        raise StreamError(f"{file} has no rows")
    return found


def image_folder(rows: Sequence[Any], folders: Sequence[Path]) -> Path:
    """Return the first of the folders that holds an image of the first rows, else the first."""
    if len(folders) == 1:
        return folders[0]
    named = [image_names(row) or () for row in rows if isinstance(row, dict)]
    names = [name for names in named[:_LOOKED_AT] for name in names]
    held = (folder for folder in folders for name in names if not image_fault(folder, name))
    return next(held, folders[0])


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, row); a row that is no JSON object is a text that says why."""
    for number, line in enumerate(read_text(file, StreamError).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"not valid JSON ({error.msg})"
            continue
        yield number, row if isinstance(row, dict) else "not a JSON object"


def _items(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line on which it begins, row) of a JSON list."""
    text = read_text(file, StreamError)
    decoder = json.JSONDecoder()
    place = _skip(text, 0, "")
    if not text[place:].startswith("["):
        raise StreamError(f"{file} must hold a JSON list of rows, or a row per line as .jsonl")
    place = _skip(text, place + 1, "")
    line, counted = 1, 0
    while place < len(text) and text[place] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            row, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise StreamError(
                f"{file}, line {error.lineno}: not valid JSON ({error.msg})"
            ) from error
        yield line, row if isinstance(row, dict) else "not a JSON object"
        after = _skip(text, end, "")
        if after < len(text) and text[after] not in ",]":
            raise StreamError(f"{file}, line {line}: a comma is missing after this row")
        place = _skip(text, after, ",")
    if place >= len(text):
        raise StreamError(f"{file} breaks off: the list of rows has no end")


def _skip(text: str, place: int, more: str) -> int:
    """Return the next place that holds neither blanks nor the characters of ``more``."""
    while place < len(text) and (text[place].isspace() or text[place] in more):
        place += 1
    return place


def _fault(row: Mapping[str, Any], folder: Path, splits: Mapping[str, str]) -> str:
    """Return what is wrong with a row, or an empty string."""
    if "conversations" not in row:
        return f"no conversations; it has {', '.join(row) or 'nothing'}"
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        return "conversations must be a list of turns"
    for index, turn in enumerate(turns):
        fault = _turn_fault(index, turn)
        if fault:
            return fault
    if len(turns) % 2:
        return "the last turn is a human's; it needs an answer"
    images = image_names(row)
    if not isinstance(images, tuple):
        return f"image must be a file name or a list of them; got {row['image']!r}"
    marked = sum(turn["value"].count(MARKER) for turn in turns[::2])
    if images and marked not in (0, len(images)):
        return f"{len(images)} images and {marked} {MARKER} markers"
    for name in images:
        fault = image_fault(folder, name)
        if fault:
            return fault
    split = str(row.get("split") or "").lower()
    if split and split not in splits:
        return f"unknown split {split!r}{suggest(split, splits)} (known: {', '.join(splits)})"
    return ""


def _turn_fault(index: int, turn: Any) -> str:
    speaker = SPEAKERS[index % 2]
    if not isinstance(turn, dict) or turn.get("from") != speaker:
        came = turn.get("from") if isinstance(turn, dict) else turn
        return f"turn {index + 1} must be from {speaker!r}; got {came!r}"
    value: Any = turn.get("value")
    if isinstance(value, str):
        return "" if value.strip() else f"turn {index + 1} is empty"
    several = speaker == "gpt" and isinstance(value, list) and value
    if several and all(isinstance(text, str) and text.strip() for text in value):
        return ""
    return f"the value of turn {index + 1} must be a text; got {value!r}"


def image_names(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the image files of a row; None where they are no names."""
    given: Any = row.get("image")
    names = [given] if isinstance(given, str) else [] if given is None else given
    if isinstance(names, list) and all(isinstance(name, str) and name for name in names):
        return tuple(names)
    return None


def image_fault(folder: Path, name: str) -> str:
    """Return what is wrong with an image's name, relative to a folder, or an empty string."""
    try:
        return "" if (folder / name).is_file() else f"no such image: {folder / name}"
    except (OSError, ValueError) as error:  # a name that no file can have
        return f"no such image: {name!r} ({error})"


def _asked(
    name: str, row: Mapping[str, Any], folder: Path, task: str, splits: Mapping[str, str]
) -> Iterator[Asked]:
    """Yield the samples of a good row, which is called ``name``."""
    values: Sequence[Any] = [turn["value"] for turn in row["conversations"]]
    firsts = [value if isinstance(value, str) else value[0] for value in values]
    names = image_names(row) or ()
    split = str(row.get("split") or "").lower()
    for place in range(1, len(values), 2):
        answers = values[place]
        which = f"/{place // 2 + 1}" if len(values) > 2 else ""
        yield Asked(
            images=tuple(folder / image for image in names),
            turns=tuple(firsts[:place]),
            answers=(answers,) if isinstance(answers, str) else tuple(answers),
            task=task,
            split=splits[split] if split else None,
            key=f"{name}{which}",
            group="|".join(names) or name,
        )
