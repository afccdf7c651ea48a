"""Class-incremental streams: one data set, its classes split into steps.

Each step is a task with its own classes; a test sample is classified among the classes of every
step learned so far (``label_protocol="seen"``). Published settings: CIFAR100 in 10, 20 or 50 equal
steps; TinyImageNet as 100 base classes and then 5, 10 or 20 steps (the base is one task more).

Class numbers are those of the data set's files: CIFAR100's fine labels, TinyImageNet's WordNet ids
in alphabetical order. TinyImageNet is tested on its validation images, the only labelled ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from evolora.errors import DataError, StreamError
from evolora.registry import STREAMS
from evolora.streams.mtil_layouts import LAYOUTS
from evolora.streams.mtil_readers import Listing, image_files, read_lines
from evolora.streams.sampling import (
    IMAGE_SUFFIXES,
    Labelled,
    Rows,
    check_choice,
    generator,
    make_task,
    readable_name,
    user_path,
)
from evolora.streams.task import Examples, LabelSpace, Stream, Task

DATASETS = ("cifar100", "tiny-imagenet", "mosaic-digits", "mosaic-fashion")
TEMPLATE = "a bad photo of a {}."  # MoE-Adapters' only template for these streams


@STREAMS.register(
    "class-incremental",
    summary="one data set's classes in steps: CIFAR100, TinyImageNet, embedded digits or fashion",
)
def load(
    *,
    dataset: str,
    root: str | Path | None = None,
    steps: int,
    base_classes: int | None = None,
    seed: int = 0,
    class_order: Sequence[int] | Literal["published"] | None = None,
    templates: Sequence[str] = (TEMPLATE,),
    limit: int | None = None,
) -> Stream:
    """Return a stream whose tasks are the steps of one data set.

    Args:
        dataset: "cifar100" (binary version), "tiny-imagenet", "mosaic-digits" or "mosaic-fashion"
            (embedded, need no files).
        root: folder that holds the data set's folder, or that folder; default ``data``.
        steps: number of equal steps that the classes after the base are split into.
        base_classes: classes of the first task; None for none, then the stream has ``steps`` tasks,
            otherwise ``steps + 1``. TinyImageNet's published value is 100.
        seed: chooses the class order and what ``limit`` keeps.
        class_order: class numbers in learning order; "published" for MoE-Adapters' fixed order;
            None for a random order drawn with ``seed``.
        templates: prompts of every step.
        limit: at most so many samples per step and split, class-balanced.

    Raises:
        StreamError: unknown data set, classes that do not divide into the steps, an order that is
            no permutation, or missing files.
    """
    check_choice("dataset", dataset, DATASETS)
    listing = _read(dataset, root)
    order = _class_order(class_order, dataset, len(listing.classes), seed)
    groups = _groups(order, steps, base_classes or 0)
    tasks = tuple(
        _task(f"step{number:02d}", listing, group, templates, limit, seed)
        for number, group in enumerate(groups, start=1)
    )
    return Stream(
        name="class-incremental",
        tasks=tasks,
        label_protocol="seen",
        source=f"{dataset}, {len(order)} classes in {len(tasks)} steps",
    )


def _class_order(
    given: Sequence[int] | str | None, dataset: str, classes: int, seed: int
) -> list[int]:
    if given is None:
        import torch

        rng = generator(seed, f"{dataset}/class-order")
        return torch.randperm(classes, generator=rng).tolist()
    if isinstance(given, str):
        given = _published_order(given, dataset)
    order = list(given)
    if sorted(order) != list(range(classes)):
        raise StreamError(
            f"class_order must be a permutation of 0 to {classes - 1}; got {len(order)} numbers, "
            f"{len(set(order))} different"
        )
    return order


def _published_order(given: str, dataset: str) -> list[int]:
    check_choice("class_order", given, ("published",))
    table: dict[str, Any] = json.loads(
        files("evolora.streams").joinpath("class_orders.json").read_text(encoding="utf-8")
    )
    if dataset not in table:
        raise StreamError(f"{dataset!r} has no published class order; give one, or leave it out")
    return [int(number) for number in table[dataset]]


def _groups(order: list[int], steps: int, base: int) -> list[list[int]]:
    rest = len(order) - base
    if steps < 1 or base < 0 or rest < steps or rest % steps:
        raise StreamError(
            f"{len(order)} classes less {base} base classes do not split into {steps} equal steps"
        )
    size = rest // steps
    groups = [order[start : start + size] for start in range(base, len(order), size)]
    return [order[:base], *groups] if base else groups


def _task(
    name: str,
    listing: Listing,
    group: list[int],
    templates: Sequence[str],
    limit: int | None,
    seed: int,
) -> Task:
    """Return the task of one step; class ``group[i]`` of the data set gets label i."""
    splits = {
        split: _of_classes(data, group)
        for split, data in (
            ("train", listing.train),
            ("val", listing.val),
            ("test", listing.test),
        )
    }
    names = tuple(listing.classes[number] for number in group)
    labels = LabelSpace(classes=names, templates=tuple(templates))
    return make_task(name, splits, labels, limit, seed)


def _of_classes(data: Labelled, group: Sequence[int]) -> Rows:
    new = {number: label for label, number in enumerate(group)}
    found = [(row, new[label]) for row, label in enumerate(data.labels) if label in new]
    return Rows(data=data, indices=[row for row, _ in found], labels=[label for _, label in found])


def _read(dataset: str, root: str | Path | None) -> Listing:
    if dataset.startswith("mosaic-"):
        return _embedded(dataset.removeprefix("mosaic-"))
    base = Path("data") if root is None else user_path(root)
    try:
        return _cifar100(base) if dataset == "cifar100" else _tiny_imagenet(base)
    except (DataError, OSError) as error:
        raise StreamError(f"{dataset} cannot be read: {error}") from error


def _cifar100(root: Path) -> Listing:
    layout = LAYOUTS["cifar100"]
    folder = root if (root / "train.bin").exists() else layout.find(root)
    if folder is None:
        places = ", ".join(str(root / place) for place in (".", *layout.folders))
        raise DataError(f"not in {places} (expected there: {layout.expected})")
    return layout.read(folder)


def _tiny_imagenet(root: Path) -> Listing:
    places = (root, root / "tiny-imagenet-200", root / "tiny-imagenet")
    base = next((place for place in places if (place / "wnids.txt").is_file()), None)
    if base is None:
        raise DataError(
            f"not in {', '.join(map(str, places))} (expected there: wnids.txt, words.txt, "
            "train/<id>/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt)"
        )
    ids = sorted(read_lines(base / "wnids.txt"))
    number = {each: label for label, each in enumerate(ids)}
    train = []
    for each in ids:
        folder = base / "train" / each / "images"
        if not folder.is_dir():
            raise DataError(f"{folder} is missing, but wnids.txt lists its class")
        names = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
        train += [(f"train/{each}/images/{name}", number[each]) for name in names]
    test = []
    path = base / "val" / "val_annotations.txt"
    for line, text in enumerate(read_lines(path), start=1):
        name, _, rest = text.partition("\t")
        each = rest.split("\t")[0]
        if each not in number:
            raise DataError(f"{path}, entry {line}: {each!r} is not a class of wnids.txt")
        test.append((f"val/images/{name}", number[each]))
    return Listing(
        train=image_files(base, train),
        test=image_files(base, test),
        classes=_tiny_names(base, ids),
    )


def _tiny_names(base: Path, ids: Sequence[str]) -> tuple[str, ...]:
    """Return the first synonym of each class, or all of them where two classes share the first."""
    words = dict(line.partition("\t")[::2] for line in read_lines(base / "words.txt"))
    missing = [each for each in ids if not words.get(each)]
    if missing:
        raise DataError(f"{base / 'words.txt'} has no name for class {missing[0]!r}")
    first = [readable_name(words[each].split(",")[0]) for each in ids]
    return tuple(
        readable_name(words[each]) if first.count(name) > 1 else name
        for each, name in zip(ids, first, strict=True)
    )


def _embedded(name: str) -> Listing:
    from evolora.streams.mosaic.domains import load as load_domains

    (task,) = load_domains(order=[name]).tasks
    return Listing(
        train=_with_labels(task.train),
        val=_with_labels(task.val),
        test=_with_labels(task.test),
        classes=task.labels.classes,
    )


def _with_labels(data: Examples) -> Labelled:
    """Return the data set with its labels listed; read off the samples where it has no list."""
    if isinstance(data, Labelled):
        return data
    labels: list[int] = []
    for row in range(len(data)):
        example = data[row]
        if not isinstance(example.label, int):
            raise StreamError(
                f"{example.key}: classes can be split among tasks only where a sample has one label"
            )
        labels.append(example.label)
    return Rows(data=data, indices=range(len(data)), labels=labels)
