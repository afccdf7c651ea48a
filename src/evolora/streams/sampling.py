"""Data sets that list first and decode on access, and the seeded choices made on their labels.

Every choice (limit, shots, hold-out) works on labels alone, so no image is opened for it, and
draws from a generator seeded with (seed, purpose): the same call gives the same rows on every
machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, TypeVar, runtime_checkable

from evolora.errors import DataError, StreamError
from evolora.streams.task import Example, Examples, Label, LabelSpace, Task

if TYPE_CHECKING:  # listing the streams' names must not import torch
    import torch

T = TypeVar("T")
IMAGE_SUFFIXES = frozenset(
    (
        *(".avif", ".bmp", ".dib", ".gif", ".ico", ".jfif", ".jpe", ".jpeg", ".jpg", ".jp2"),
        *(".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga"),
        *(".tif", ".tiff", ".webp"),
    )
)


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Images on disk with their labels; an image is read when its row is asked for.

    Args:
        paths: image files.
        labels: class index per file.
        keys: stable identifier per file (its path relative to the data set's folder).
    """

    paths: Sequence[Path] = ()
    labels: Sequence[int] = ()
    keys: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        from evolora.streams.images import read_image

        image = read_image(self.paths[index])
        return Example(inputs={"image": image}, label=self.labels[index], key=self.keys[index])


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of a data set in a given order, with their labels, maybe under new indices.

    Args:
        data: the whole data set.
        indices: rows of ``data``.
        labels: label per row as this view gives it.
    """

    data: Examples
    indices: Sequence[int] = field(default_factory=tuple)
    labels: Sequence[Label] = field(default_factory=tuple)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        example = self.data[self.indices[index]]
        return Example(inputs=example.inputs, label=self.labels[index], key=example.key)


@runtime_checkable
class Labelled(Examples, Protocol):
    """A data set whose labels are known without decoding any sample."""

    @property
    def labels(self) -> Sequence[Label]: ...


def generator(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator whose seed depends on the run's seed and on what it is for.

    Not `evolora.randomness.generator`, whose other seeds would make every stream pick other rows
    than those that its published results were measured on.
    """
    import torch

    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def shuffled_by_class(labels: Sequence[Label], rng: torch.Generator) -> dict[int, list[int]]:
    """Return class -> its row numbers in random order; classes come in ascending order."""
    import torch

    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        if not isinstance(label, int):
            raise StreamError(f"one class per sample is needed here; row {row} has {label}")
        by_class.setdefault(label, []).append(row)
    return {
        label: [by_class[label][i] for i in torch.randperm(len(by_class[label]), generator=rng)]
        for label in sorted(by_class)
    }


def few_per_class(labels: Sequence[Label], shots: int, rng: torch.Generator) -> list[int]:
    """Return at most ``shots`` random rows of each class, in their original order."""
    if shots < 1:
        raise StreamError(f"shots must be at least 1; got {shots}")
    by_class = shuffled_by_class(labels, rng)
    return sorted(row for rows in by_class.values() for row in rows[:shots])


def balanced(labels: Sequence[Label], limit: int, rng: torch.Generator) -> list[int]:
    """Return at most ``limit`` random rows, as equally many per class as there are.

    Below one per class, the classes that get a row are drawn at random. Rows keep their order.
    Samples with several labels: the rule of `evolora.streams.multi_label.balanced_rows`.
    """
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise StreamError(f"limit must be a whole number; got {limit!r}")
    if limit < 1:
        raise StreamError(f"limit must be at least 1; got {limit}")
    if limit >= len(labels):
        return list(range(len(labels)))
    if several(labels):
        from evolora.streams.multi_label import balanced_rows

        return balanced_rows(labels, limit, rng)
    import torch

    groups = list(shuffled_by_class(labels, rng).values())
    groups = [groups[i] for i in torch.randperm(len(groups), generator=rng)]
    chosen: list[int] = []
    for depth in range(max(map(len, groups))):
        chosen += [rows[depth] for rows in groups if depth < len(rows)]
        if len(chosen) >= limit:
            break
    return sorted(chosen[:limit])


def several(labels: Sequence[Label]) -> TypeGuard[Sequence[tuple[int, ...]]]:
    """Return whether a sample may have several labels."""
    return len(labels) > 0 and isinstance(labels[0], tuple)


def hold_out(
    labels: Sequence[Label], fraction: float, rng: torch.Generator
) -> tuple[list[int], list[int]]:
    """Return (kept, held) rows: about ``fraction`` of every class is held out.

    A class with at least two rows gives at least one and keeps at least one; a class with one row
    keeps it, so it is learned but not tested. Both lists keep the original order. Samples with
    several labels: the rule of `evolora.streams.multi_label.held_rows`.
    """
    if not 0 <= fraction < 1:
        raise StreamError(f"a hold-out fraction must be in [0, 1); got {fraction}")
    if several(labels):
        from evolora.streams.multi_label import held_rows

        out = held_rows(labels, fraction, rng) if fraction else set()
        return [row for row in range(len(labels)) if row not in out], sorted(out)
    kept: list[int] = []
    held: list[int] = []
    for rows in shuffled_by_class(labels, rng).values():
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1) if fraction else 0
        held += rows[:count]
        kept += rows[count:]
    return sorted(kept), sorted(held)


def pick(data: Labelled, rows: Sequence[int]) -> Rows:
    """Return those rows of a labelled data set."""
    labels = data.labels  # once: a data set may compute them
    return Rows(data=data, indices=tuple(rows), labels=tuple(labels[row] for row in rows))


def limited(data: Labelled, limit: int | None, seed: int, purpose: str) -> Labelled:
    """Return the data set, or at most ``limit`` class-balanced rows of it."""
    if limit is None or len(data) == 0:
        return data
    return pick(data, balanced(data.labels, limit, generator(seed, f"{purpose}/limit")))


def make_task(
    name: str,
    splits: Mapping[str, Labelled],
    labels: LabelSpace,
    limit: int | None,
    seed: int,
    *,
    modalities: tuple[str, ...] = ("image",),
) -> Task:
    """Return the task of a classification data set, judged by the metric that its labels need.

    Args:
        name: task name.
        splits: "train" and "test", optionally "val".
        labels: its classes and prompts.
        limit: at most so many samples in each split; None for all.
        seed: chooses the samples that a limit keeps.
        modalities: what its samples may have.
    """
    empty = ImageFiles()
    train, val, test = (
        limited(splits.get(split, empty), limit, seed, f"{name}/{split}")
        for split in ("train", "val", "test")
    )
    return Task(
        name=name,
        train=train,
        val=val,
        test=test,
        labels=labels,
        modalities=modalities,
        metric="macro-f1" if labels.multi_label else "accuracy",
    )


def readable_name(name: str) -> str:
    """Return a class name in words: underscores become spaces, runs of blanks one blank."""
    return " ".join(name.replace("_", " ").split())


def unique_names(raw: Sequence[str], rename: Callable[[str], str] = readable_name) -> list[str]:
    """Return one distinct readable name per raw name, in order.

    Where two raw names read alike ("a_b" and "a b"), all of them keep their raw spelling.
    """
    names = [rename(name) for name in raw]
    return [raw[i] if names.count(name) > 1 else name for i, name in enumerate(names)]


def image_folder(root: str | Path) -> ImageFiles:
    """Return every image at any depth of a folder, by path, unlabelled (label 0).

    Raises:
        StreamError: there is no such folder, or no image in it.
    """
    base = user_path(root)
    if not base.is_dir():
        raise StreamError(f"no folder of images at {str(base)!r}")
    found = [path for path in base.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    paths = sorted(path for path in found if path.is_file())
    if not paths:
        raise StreamError(f"no images in {str(base)!r} ({', '.join(sorted(IMAGE_SUFFIXES))})")
    keys = tuple(path.relative_to(base).as_posix() for path in paths)
    return ImageFiles(paths=tuple(paths), labels=(0,) * len(paths), keys=keys)


def row_index(index: int, rows: int) -> int:
    """Return the index counted from the front; IndexError ends a loop over the data set."""
    if not -rows <= index < rows:
        raise IndexError(index)
    return index % rows


def read_text(path: Path, error: type[DataError] = DataError) -> str:
    """Return the text of a UTF-8 file, with or without a byte-order mark.

    Raises:
        error: the file is missing, not UTF-8 or unreadable.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as reason:
        raise error(f"no such file: {path}") from reason
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not UTF-8 text; save it as UTF-8") from reason
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror}") from reason


def read_all(names: Sequence[str], read: Callable[[str], T], what: str) -> dict[str, T]:
    """Return what is read for every name, or one error with what is wrong with each that fails.

    Args:
        names: of data sets or tasks.
        read: reads one; raises a DataError or OSError where it cannot.
        what: they are, in the plural ("MTIL data sets").

    Raises:
        StreamError: some cannot be read.
    """
    found: dict[str, T] = {}
    failures: list[str] = []
    for name in names:
        try:
            found[name] = read(name)
        except (DataError, OSError) as error:  # OSError: a folder that cannot be listed
            failures.append(f"{name}: {error}")
    if failures:
        raise StreamError(
            f"{len(failures)} of {len(names)} {what} cannot be read: " + "; ".join(failures)
        )
    return found


def user_path(value: str | Path) -> Path:
    """Return the path with a leading "~" replaced by the home folder, where there is one."""
    try:
        return Path(value).expanduser()
    except RuntimeError:  # "~name" of an unknown user is an ordinary name
        return Path(value)


def check_choice(argument: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise StreamError if a value is not one of a closed list."""
    if value not in allowed:
        from evolora.errors import suggest

        known = ", ".join(repr(item) for item in allowed)
        hint = suggest(str(value), [str(item) for item in allowed])
        raise StreamError(f"{argument} must be one of {known}; got {value!r}{hint}")
