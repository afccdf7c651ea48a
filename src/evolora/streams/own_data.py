"""A user's own images: a folder of folders, or a CSV of image and label.

Folder layouts (one stream has one layout; images at different depths are refused):

    root/<class>/*.jpg                              one task, named after the folder
    root/<task>/<class>/*.jpg                       several tasks
    root/<task>/{train,val,test}/<class>/*.jpg      several tasks with their own splits
    root/{train,val,test}/<class>/*.jpg             one task with its own splits

What is taken: files with an image suffix (`IMAGE_SUFFIXES`) directly inside a class folder. Other
files are skipped and counted in one log line; hidden files and folders and empty folders are
ignored; folders reached through links are followed, except back to a folder above them. A file
that has an image suffix but no image in it is an error when its sample is read, by name. Equal
file names in different folders are different images; an image that a CSV lists twice in one task is
refused, since its copies could fall into both training and test.

Splits that are not given are held out with a seed and per class: ``test_fraction`` of everything
for the test, then ``val_fraction`` of the rest for calibration. A class with one sample is trained
on but not tested. Class names are folder names or labels with underscores as spaces; tasks come in
alphabetical order (folder) or in order of appearance (CSV) unless ``order`` says otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from evolora.errors import StreamError
from evolora.registry import STREAMS
from evolora.streams.own_csv import Row, read_rows
from evolora.streams.sampling import (
    IMAGE_SUFFIXES,
    ImageFiles,
    Labelled,
    generator,
    hold_out,
    make_task,
    pick,
    unique_names,
    user_path,
)
from evolora.streams.task import LabelSpace, Stream, Task


class HasTask(Protocol):
    """A row of a user's data set."""

    @property
    def task(self) -> str: ...


AnyRow = TypeVar("AnyRow", bound=HasTask)

_LOG = logging.getLogger(__name__)

TEMPLATE = "a photo of a {}."

# Folder or column value -> split.
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@STREAMS.register("folder", summary="your own images: root/<task>/<class>/*, splits optional")
def load_folder(
    *,
    root: str | Path,
    order: Sequence[str] | None = None,
    templates: Sequence[str] = (TEMPLATE,),
    test_fraction: float = 0.2,
    val_fraction: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
) -> Stream:
    """Return the stream of a folder of folders; images are listed now and decoded on access.

    Args:
        root: folder in one of the layouts of this module's docstring.
        order: task names to learn, in order; None for all, alphabetically.
        templates: prompts with one "{}"; the first is used in training.
        test_fraction: share of each class held out for testing where there is no test split.
        val_fraction: share of each class's training samples held out for calibration where there
            is no val split; 0 for none.
        seed: chooses the held-out samples and what ``limit`` keeps.
        limit: at most so many samples per split, class-balanced.

    Raises:
        StreamError: the folder is missing, holds no images in such a layout, or mixes layouts; a
            task has no test sample; a test class is not among the training classes.
    """
    base = user_path(root)
    if not base.is_dir():
        raise StreamError(f"root {str(base)!r} is not a folder")
    rows, skipped = _walk(base)
    if skipped:
        _LOG.info("%s: skipped %d files that are no image in a class folder", base, skipped)
    if not rows:
        raise StreamError(
            f"no images in {str(base)!r}: expected <class>/*.jpg, <task>/<class>/*.jpg or "
            f"<task>/{{train,val,test}}/<class>/*.jpg ({skipped} other files skipped)"
        )
    fractions = (test_fraction, val_fraction)
    return _stream("folder", base, rows, order, templates, fractions, seed, limit)


@STREAMS.register("csv", summary="your own images: a CSV of image,label and maybe task,split")
def load_csv(
    *,
    path: str | Path,
    order: Sequence[str] | None = None,
    templates: Sequence[str] = (TEMPLATE,),
    test_fraction: float = 0.2,
    val_fraction: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
) -> Stream:
    """Return the stream of a CSV file.

    Args:
        path: file with a header; columns ``image`` and ``label``, optionally ``task`` and
            ``split`` (train, val, test; a row without one is trained on or held out). Comma,
            semicolon, tab or bar between columns; UTF-8 with or without a mark. Image paths are
            relative to the file's folder.
        order: task names to learn, in order; None for all, as they appear.
        templates: prompts with one "{}"; the first is used in training.
        test_fraction: share of each class held out for testing where there is no test split.
        val_fraction: share of each class's training samples held out for calibration where there
            is no val split; 0 for none.
        seed: chooses the held-out samples and what ``limit`` keeps.
        limit: at most so many samples per split, class-balanced.

    Raises:
        StreamError: the file is missing or malformed; every bad row is named by its line number.
    """
    file = user_path(path)
    rows = read_rows(file, SPLITS)
    fractions = (test_fraction, val_fraction)
    return _stream("csv", file, rows, order, templates, fractions, seed, limit)


def _stream(
    name: str,
    origin: Path,
    rows: Sequence[Row],
    order: Sequence[str] | None,
    templates: Sequence[str],
    fractions: tuple[float, float],
    seed: int,
    limit: int | None,
) -> Stream:
    by_task = in_order(rows, order, fractions)
    tasks = tuple(_task(task, part, templates, fractions, seed, limit) for task, part in by_task)
    return Stream(name=name, tasks=tasks, source=f"{origin} ({len(rows)} images)")


def in_order(
    rows: Sequence[AnyRow], order: Sequence[str] | None, fractions: tuple[float, float]
) -> list[tuple[str, list[AnyRow]]]:
    """Return (task, its rows) in the order asked for; None for the order of the rows.

    Raises:
        StreamError: a task that no row has, or shares to hold out that are none.
    """
    if not 0 < fractions[0] < 1 or not 0 <= fractions[1] < 1:
        raise StreamError(
            f"test_fraction must be in (0, 1) and val_fraction in [0, 1); got {fractions}"
        )
    by_task: dict[str, list[AnyRow]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    wanted = list(by_task) if order is None else list(order)
    unknown = [task for task in wanted if task not in by_task]
    if unknown or not wanted:
        from evolora.errors import suggest

        what = f"unknown task {unknown[0]!r}{suggest(unknown[0], by_task)}" if unknown else "empty"
        raise StreamError(f"order: {what} (known: {', '.join(by_task)})")
    return [(task, by_task[task]) for task in wanted]


def _task(
    name: str,
    rows: Sequence[Row],
    templates: Sequence[str],
    fractions: tuple[float, float],
    seed: int,
    limit: int | None,
) -> Task:
    given: dict[str, list[Row]] = {"train": [], "val": [], "test": []}
    for row in rows:
        given[row.split or "train"].append(row)
    raw = sorted({row.label for row in given["train"]})
    if not raw:
        raise StreamError(f"task {name!r} has no training images")
    unseen = sorted({row.label for split in ("val", "test") for row in given[split]} - set(raw))
    if unseen:
        raise StreamError(f"task {name!r}: class {unseen[0]!r} has no training image")
    splits = held_out(
        name, {split: _files(part, raw) for split, part in given.items()}, fractions, seed
    )
    labels = LabelSpace(classes=tuple(unique_names(raw)), templates=tuple(templates))
    if len(splits["test"]) == 0:
        raise StreamError(
            f"task {name!r} has nothing to test on: every class has a single image; "
            "add images or a test split"
        )
    return make_task(name, splits, labels, limit, seed)


def _files(rows: Sequence[Row], raw: Sequence[str]) -> ImageFiles:
    index = {label: position for position, label in enumerate(raw)}
    return ImageFiles(
        paths=tuple(row.path for row in rows),
        labels=tuple(index[row.label] for row in rows),
        keys=tuple(row.key for row in rows),
    )


def held_out(
    name: str, splits: Mapping[str, Labelled], fractions: tuple[float, float], seed: int
) -> dict[str, Labelled]:
    """Fill an absent test split, then an absent val split, from the training samples."""
    full = dict(splits)
    for split, fraction in zip(("test", "val"), fractions, strict=True):
        if len(full[split]) or not fraction:
            continue
        train = full["train"]
        kept, held = hold_out(train.labels, fraction, generator(seed, f"{name}/{split}"))
        full["train"], full[split] = pick(train, kept), pick(train, held)
    return full


def _walk(base: Path) -> tuple[list[Row], int]:
    """Return a row per image below the root in one of the layouts, and how many files were not."""
    found: list[tuple[str, ...]] = []
    skipped = _collect(base, (), frozenset((base.resolve(),)), found)
    if not found:
        return [], skipped
    depths = {len(parts) for parts in found}
    if len(depths) > 1:
        by_depth = {len(parts): "/".join(parts) for parts in reversed(found)}
        examples = " and ".join(repr(by_depth[depth]) for depth in sorted(depths))
        raise StreamError(f"{str(base)!r} mixes layouts: images at different depths, {examples}")
    if depths == {3}:
        tops = sorted({parts[0] for parts in found})
        splits = [top for top in tops if top.lower() in SPLITS]
        if splits and len(splits) < len(tops):
            other = next(top for top in tops if top not in splits)
            raise StreamError(
                f"{str(base)!r} mixes layouts: {splits[0]!r} is a split, {other!r} is not"
            )
    return [_row(base, parts) for parts in found], skipped


def _collect(
    folder: Path,
    parts: tuple[str, ...],
    above: frozenset[Path],
    found: list[tuple[str, ...]],
) -> int:
    """Add (folder names ..., file name) of each image below; return how many files were skipped."""
    skipped = 0
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise StreamError(f"cannot list {str(folder)!r}: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            # A link to nothing counts as a file: reading it names it.
            if entry.suffix.lower() in IMAGE_SUFFIXES and parts:
                found.append((*parts, entry.name))
            else:
                skipped += 1
            continue
        target = entry.resolve()
        if target not in above:
            skipped += _collect(entry, (*parts, entry.name), above | {target}, found)
    return skipped


def _row(base: Path, parts: tuple[str, ...]) -> Row:
    """Read task, split and class off the folders between the root and an image."""
    *folders, _ = parts
    label = folders.pop()
    split = SPLITS.get(folders[-1].lower()) if folders else None
    if split is not None:
        folders.pop()
    if len(folders) > 1:
        raise StreamError(
            f"{'/'.join(parts)!r} in {str(base)!r} fits no layout: {folders[-1]!r} is not a split "
            f"(known: {', '.join(SPLITS)})"
        )
    task = folders[0] if folders else base.resolve().name
    key = "/".join(parts)
    return Row(path=base.joinpath(*parts), label=label, task=task, split=split, key=key)
