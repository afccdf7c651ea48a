"""CMML: image + text streams with missing modalities, UPMC-Food101 and MM-IMDb.

Benchmarks of RebQ (Zhao et al., arXiv 2403.11373), also used by DeLo (AAAI 2026, arXiv 2603.01632):
Food101 in 10 tasks of 10 dishes, one label per sample, judged by accuracy; MM-IMDb in 5 tasks of 4
genres, several labels per film, judged by macro-F1. Published layout, below ``root``:

    UPMC-Food101-CMML/UPMC-Food101-CMML.json    UPMC-Food101-CMML/images/...
    MM-IMDB-CMML/MM-IMDB-CMML.json              MM-IMDB-CMML/images/...

The JSON file is a list of objects with ``image`` (path below images/), ``text`` (a string, or
strings that are joined by ". "), ``label``, ``task_id`` (0 ...) and ``split`` (train, val, test). A
label of Food101 is a class number or name; a label of MM-IMDb is a list of 20 zeros and ones, of
which task t owns places 4t to 4t + 3. A film's labels of other tasks are not used: its label has a
place per class of its own task. Class names are given by ``classes``, else by the JSON's labels,
else by the folder that holds all images of a class, else they are numbers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from evolora.errors import DataError, StreamError, suggest
from evolora.registry import STREAMS
from evolora.streams.missing import SPLITS
from evolora.streams.missing_manifest import MissingOption, with_missing
from evolora.streams.pairs import MODALITIES, Pair, Pairs
from evolora.streams.sampling import make_task, read_text, unique_names, user_path
from evolora.streams.task import Label, LabelSpace, Stream, Task

_LOG = logging.getLogger(__name__)

DEFAULT_ROOT = Path("data")
_FIELDS = ("image", "text", "label", "task_id", "split")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is published of one benchmark.

    Args:
        name: of the stream.
        folder: below the root; its JSON file is named after it.
        tasks: number of tasks.
        classes: number of classes of each task.
        templates: prompts (ours: the published methods use no class names).
        multi_label: several labels per sample.
    """

    name: str
    folder: str
    tasks: int
    classes: int
    templates: tuple[str, ...]
    multi_label: bool = False


FOOD101 = Benchmark(
    name="upmc-food101-cmml",
    folder="UPMC-Food101-CMML",
    tasks=10,
    classes=10,
    templates=("a photo of {}, a type of food.",),
)
MM_IMDB = Benchmark(
    name="mm-imdb-cmml",
    folder="MM-IMDB-CMML",
    tasks=5,
    classes=4,
    templates=("a poster of a {} film.",),
    multi_label=True,
)


@dataclass(frozen=True, kw_only=True)
class _Item:
    """One entry of the JSON file, checked."""

    image: str
    text: str
    label: int | str | tuple[int, ...]
    task: int
    split: str


BENCHMARKS = {benchmark.name: benchmark for benchmark in (FOOD101, MM_IMDB)}


@STREAMS.register(
    FOOD101.name, summary="dishes by image and recipe text, 10 tasks x 10, modalities missing"
)
def load_food101(
    *,
    root: str | Path | None = None,
    missing: MissingOption = None,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] = FOOD101.templates,
    seed: int = 0,
    limit: int | None = None,
) -> Stream:
    """Return the stream; samples are listed now and images decoded on access.

    Args:
        root: folder that holds UPMC-Food101-CMML, or that folder; default ``data``.
        missing: what is missing, as in `with_missing`: settings (the published ones are kind
            "both", rate 0.7), a manifest file, or None.
        classes: the classes' names by number, where the file has numbers.
        templates: prompts with one "{}".
        seed: chooses what ``limit`` keeps.
        limit: at most so many samples per task and split, class-balanced.

    Raises:
        StreamError: files are missing, then it says which and where they were looked for; or the
            JSON file is not in the published layout.
    """
    return _load(FOOD101, root, missing, classes, templates, seed, limit)


@STREAMS.register(
    MM_IMDB.name, summary="film genres by poster and plot, 5 tasks x 4, modalities missing"
)
def load_mm_imdb(
    *,
    root: str | Path | None = None,
    missing: MissingOption = None,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] = MM_IMDB.templates,
    seed: int = 0,
    limit: int | None = None,
) -> Stream:
    """Return the stream; arguments and errors are those of `load_food101`.

    Args:
        root: folder that holds MM-IMDB-CMML, or that folder; default ``data``.
        missing: what is missing.
        classes: the 20 genres in the order of the labels' places; None for numbers.
        templates: prompts with one "{}".
        seed: chooses what ``limit`` keeps.
        limit: at most so many samples per task and split, class-balanced.
    """
    return _load(MM_IMDB, root, missing, classes, templates, seed, limit)


def _load(
    benchmark: Benchmark,
    root: str | Path | None,
    missing: MissingOption,
    classes: Sequence[str] | None,
    templates: Sequence[str],
    seed: int,
    limit: int | None,
) -> Stream:
    base = _find(benchmark, DEFAULT_ROOT if root is None else user_path(root))
    file = base / f"{benchmark.folder}.json"
    items = _read(file, benchmark)
    by_task: list[list[_Item]] = [[] for _ in range(benchmark.tasks)]
    for item in items:
        by_task[item.task].append(item)
    names = _class_names(benchmark, items, classes)
    owned = _owned(benchmark, by_task, file)
    tasks = tuple(
        _task(benchmark, number, base, part, owned[number], names, templates, limit, seed)
        for number, part in enumerate(by_task)
    )
    stream = Stream(
        name=benchmark.name,
        tasks=tasks,
        label_protocol="seen",
        source=f"{benchmark.folder}, {len(items)} samples",
    )
    return with_missing(stream, missing)


def _find(benchmark: Benchmark, root: Path) -> Path:
    places = (root, root / benchmark.folder)
    for place in places:
        if (place / f"{benchmark.folder}.json").is_file():
            return place
    raise StreamError(
        f"{benchmark.name}: {benchmark.folder}.json is not in {' or '.join(map(str, places))} "
        f"(expected there: {benchmark.folder}.json and images/, as published with RebQ)"
    )


def _read(file: Path, benchmark: Benchmark) -> list[_Item]:
    try:
        entries = json.loads(read_text(file, StreamError))
    except json.JSONDecodeError as error:
        raise StreamError(f"{file} is not valid JSON (line {error.lineno})") from error
    if not isinstance(entries, list) or not entries:
        raise StreamError(f"{file} must hold a list of samples with {', '.join(_FIELDS)}")
    items = []
    for row, entry in enumerate(entries):
        try:
            items.append(_item(entry, benchmark))
        except DataError as error:
            raise StreamError(f"{file}, sample {row}: {error}") from error
    return items


def _item(entry: Any, benchmark: Benchmark) -> _Item:
    if not isinstance(entry, Mapping):
        raise DataError(f"expected an object with {', '.join(_FIELDS)}; got {entry!r}")
    absent = [name for name in _FIELDS if name not in entry]
    if absent:
        raise DataError(f"no {absent[0]!r}{suggest(absent[0], map(str, entry))}")
    task, split, text = entry["task_id"], entry["split"], entry["text"]
    if not _is_count(task, benchmark.tasks):
        raise DataError(f"task_id must be 0 to {benchmark.tasks - 1}; got {task!r}")
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        text = ". ".join(text)
    if not isinstance(text, str):
        raise DataError(f"text must be a string or a list of strings; got {text!r}")
    if not isinstance(entry["image"], str) or not entry["image"]:
        raise DataError(f"image must be a path; got {entry['image']!r}")
    label = _label(entry["label"], benchmark)
    return _Item(image=entry["image"], text=text, label=label, task=task, split=split)


def _label(value: Any, benchmark: Benchmark) -> int | str | tuple[int, ...]:
    total = benchmark.tasks * benchmark.classes
    if benchmark.multi_label:
        if isinstance(value, list) and len(value) == total and all(v in (0, 1) for v in value):
            return tuple(int(v) for v in value)
        raise DataError(f"label must be a list of {total} zeros and ones; got {value!r}")
    if (isinstance(value, str) and value) or _is_count(value, total):
        return value  # type: ignore[no-any-return]
    raise DataError(f"label must be a class name or 0 to {total - 1}; got {value!r}")


def _is_count(value: Any, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _class_names(
    benchmark: Benchmark, items: Sequence[_Item], given: Sequence[str] | None
) -> dict[int | str, str]:
    """Return label -> readable name; labels are ordered as their tasks number them."""
    total = benchmark.tasks * benchmark.classes
    found = {item.label for item in items if not isinstance(item.label, tuple)}
    labels = list(range(total)) if benchmark.multi_label else _ordered(found)
    if given is not None:
        if len(given) != total:
            raise StreamError(f"{benchmark.name} has {total} classes; got {len(given)} names")
        wordy = [label for label in labels if isinstance(label, str)]
        if wordy:
            raise StreamError(f"{benchmark.name}: the file names its classes ({wordy[0]!r} ...)")
        return {label: unique_names(given)[int(label)] for label in labels}
    raw = [label if isinstance(label, str) else "" for label in labels]
    if not any(raw) and not benchmark.multi_label:
        raw = _folders(items, labels)
    filled = [name or f"class {label}" for name, label in zip(raw, labels, strict=True)]
    return dict(zip(labels, unique_names(filled), strict=True))


def _folders(items: Sequence[_Item], labels: Sequence[int | str]) -> list[str]:
    """Return the folder that holds all images of each class, if each class has one of its own."""
    found: dict[Any, set[str]] = {}
    for item in items:
        found.setdefault(item.label, set()).add(PurePosixPath(item.image).parent.name)
    names = [folders.pop() if len(folders := found[label]) == 1 else "" for label in labels]
    own = all(names) and len(set(names)) == len(names)
    return names if own else [""] * len(labels)


def _owned(
    benchmark: Benchmark, by_task: Sequence[Sequence[_Item]], file: Path
) -> list[list[int | str]]:
    """Return each task's own labels."""
    if benchmark.multi_label:
        size = benchmark.classes
        return [list(range(size * task, size * (task + 1))) for task in range(benchmark.tasks)]
    owned: list[list[int | str]] = []
    owner: dict[Any, int] = {}
    for task, items in enumerate(by_task):
        labels = {item.label for item in items if not isinstance(item.label, tuple)}
        for label in labels:
            if owner.setdefault(label, task) != task:
                raise StreamError(f"{file}: class {label!r} is in tasks {owner[label]} and {task}")
        owned.append(_ordered(labels))
        if len(labels) != benchmark.classes:
            _LOG.warning(
                "%s: task %d has %d classes, the published one %d: complete the data before "
                "comparing",
                *(benchmark.name, task, len(labels), benchmark.classes),
            )
    return owned


def _ordered(labels: set[int | str]) -> list[int | str]:
    """Return numbers in order, then names in order."""
    return sorted(labels, key=lambda label: (isinstance(label, str), label))


def _task(
    benchmark: Benchmark,
    number: int,
    base: Path,
    items: Sequence[_Item],
    owned: Sequence[int | str],
    names: Mapping[int | str, str],
    templates: Sequence[str],
    limit: int | None,
    seed: int,
) -> Task:
    if not items:
        raise StreamError(f"{benchmark.name}: task {number} has no samples in the file")
    place = {label: position for position, label in enumerate(owned)}
    rows: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for item in items:
        label: Label = (
            tuple(item.label[int(own)] for own in owned)
            if isinstance(item.label, tuple)
            else place[item.label]
        )
        path = base / "images" / item.image
        rows[item.split].append(Pair(image=path, text=item.text, label=label, key=item.image))
    for split, pairs in rows.items():
        first = pairs[0].image if pairs else None
        if first is not None and not first.is_file():
            raise StreamError(
                f"{benchmark.name}: task {number}, {split}: {first} is missing, but it is listed"
            )
    labels = LabelSpace(
        classes=tuple(names[label] for label in owned),
        templates=tuple(templates),
        multi_label=benchmark.multi_label,
    )
    splits = {split: Pairs(rows=tuple(pairs)) for split, pairs in rows.items()}
    return make_task(f"task{number:02d}", splits, labels, limit, seed, modalities=MODALITIES)
