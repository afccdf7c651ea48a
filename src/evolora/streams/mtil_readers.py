"""Readers of the eleven MTIL data sets in the layouts in which their authors publish them.

A reader lists files and labels; no image is opened. Official splits are used where there are any;
Caltech101, EuroSAT and SUN397 are split 80/20 by a permutation with generator seed 42 over the
sorted file list, as in the benchmark's code. (That code lists SUN397 in the order of the file
system, so its exact split cannot be had; ours is the same on every machine.) Aircraft, DTD and
Flowers102 publish a validation split too, which becomes the task's ``val``: it calibrates, and is
never trained on. Pickles are not opened: CIFAR-100 is read from its binary version.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolora.errors import DataError
from evolora.streams.mtil_prompts import FLOWERS, class_name
from evolora.streams.packed import cifar100_split, idx_split
from evolora.streams.sampling import IMAGE_SUFFIXES, ImageFiles, Labelled, pick, read_text

if TYPE_CHECKING:
    import numpy as np

SPLIT_SEED = 42  # generator seed of the benchmark's random 80/20 splits


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A data set as listed: its splits and its class names in the order of the labels."""

    train: Labelled
    test: Labelled
    classes: tuple[str, ...]
    val: Labelled = field(default_factory=ImageFiles)


def benchmark_split(data: Labelled) -> tuple[Labelled, Labelled]:
    """Return the benchmark's random (train 80 %, test 20 %) of a list without official split."""
    import torch

    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(data), generator=generator).tolist()
    cut = int(0.8 * len(data))
    return pick(data, order[:cut]), pick(data, order[cut:])


def image_files(base: Path, rows: Iterable[tuple[str, int]]) -> ImageFiles:
    """Return the data set of (path relative to ``base``, label) rows.

    Raises:
        DataError: the first image is not there: lists without their images are a common half of a
            download. (All of them are not looked for: SUN397 has 108,754.)
    """
    rows = list(rows)
    if rows and not (base / rows[0][0]).exists():
        raise DataError(f"{base / rows[0][0]} is missing, but it is listed")
    return ImageFiles(
        paths=tuple(base / name for name, _ in rows),
        labels=tuple(label for _, label in rows),
        keys=tuple(name for name, _ in rows),
    )


def read_lines(path: Path) -> list[str]:
    """Return a text file's lines without blanks at their ends and without empty lines.

    Raises:
        DataError: the file is missing or not text.
    """
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def label_of(name: str, classes: Sequence[str], path: Path, row: int) -> int:
    """Return the index of a class name found in a list file; DataError with file and entry."""
    try:
        return classes.index(name)
    except ValueError:
        raise DataError(f"{path}, entry {row}: {name!r} is not a known class") from None


def _class_folders(base: Path, skip: Sequence[str] = ()) -> list[str]:
    names = sorted(
        entry.name
        for entry in base.iterdir()
        if entry.is_dir() and entry.name not in skip and not entry.name.startswith(".")
    )
    if not names:
        raise DataError(f"{base} holds no class folders")
    return names


def _images_in(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith(".")
    )


def _from_class_folders(base: Path, dataset: str, skip: Sequence[str] = ()) -> Listing:
    folders = _class_folders(base, skip)
    rows = [
        (f"{folder}/{name}", label)
        for label, folder in enumerate(folders)
        for name in _images_in(base / folder)
    ]
    train, test = benchmark_split(image_files(base, rows))
    return Listing(train=train, test=test, classes=tuple(class_name(dataset, n) for n in folders))


def _from_list(path: Path, base: Path, raw: Sequence[str], suffix: str = "") -> ImageFiles:
    """Return the images below ``base`` that a list file names by "<class>/<image>"."""
    return image_files(
        base,
        (
            (line + suffix, label_of(line.partition("/")[0], raw, path, number))
            for number, line in enumerate(read_lines(path), start=1)
        ),
    )


def read_aircraft(base: Path) -> Listing:
    base = base / "data" if (base / "data" / "variants.txt").exists() else base
    raw = read_lines(base / "variants.txt")

    def split(name: str) -> ImageFiles:
        path = base / f"images_variant_{name}.txt"
        rows = []
        for number, line in enumerate(read_lines(path), start=1):
            image, _, variant = line.partition(" ")
            rows.append((f"images/{image}.jpg", label_of(variant, raw, path, number)))
        return image_files(base, rows)

    classes = tuple(class_name("aircraft", name) for name in raw)
    return Listing(train=split("train"), val=split("val"), test=split("test"), classes=classes)


def read_caltech101(base: Path) -> Listing:
    return _from_class_folders(
        base / "101_ObjectCategories", "caltech101", skip=("BACKGROUND_Google",)
    )


def read_cifar100(base: Path) -> Listing:
    inner = base / "cifar-100-binary"
    base = inner if inner.is_dir() else base
    raw = read_lines(base / "fine_label_names.txt")
    return Listing(
        train=cifar100_split(base / "train.bin", len(raw)),
        test=cifar100_split(base / "test.bin", len(raw)),
        classes=tuple(class_name("cifar100", name) for name in raw),
    )


def read_dtd(base: Path) -> Listing:
    raw = _class_folders(base / "images")

    train, val, test = (
        _from_list(base / "labels" / f"{split}1.txt", base / "images", raw)
        for split in ("train", "val", "test")
    )
    classes = tuple(class_name("dtd", name) for name in raw)
    return Listing(train=train, val=val, test=test, classes=classes)


def read_eurosat(base: Path) -> Listing:
    return _from_class_folders(base, "eurosat")


def read_mat(path: Path) -> dict[str, Any]:
    """Return the variables of a MATLAB file.

    Raises:
        DataError: scipy is not installed, or the file is not a readable MATLAB file.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            f"{path} is a MATLAB file: reading it needs scipy (pip install 'evolora[data]')"
        ) from error
    try:
        content: dict[str, Any] = loadmat(str(path), squeeze_me=True)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except Exception as error:  # loadmat raises many kinds on damaged files
        raise DataError(f"{path} is not a readable MATLAB file: {error}") from error
    return content


def _variable(content: dict[str, Any], name: str, path: Path) -> np.ndarray[Any, Any]:
    import numpy as np

    if name not in content:
        raise DataError(f"{path} lacks the variable {name!r}")
    return np.atleast_1d(content[name])


def read_flowers(base: Path) -> Listing:
    labels = _variable(
        read_mat(base / "imagelabels.mat"), "labels", base / "imagelabels.mat"
    ).tolist()
    split_path = base / "setid.mat"
    sets = read_mat(split_path)

    def split(variable: str) -> ImageFiles:
        rows = []
        for number in _variable(sets, variable, split_path).tolist():
            if not (1 <= number <= len(labels) and 1 <= labels[number - 1] <= len(FLOWERS)):
                raise DataError(f"{split_path}: image {number} of {variable!r} has no valid label")
            rows.append((f"jpg/image_{number:05d}.jpg", int(labels[number - 1]) - 1))
        return image_files(base, rows)

    return Listing(train=split("trnid"), val=split("valid"), test=split("tstid"), classes=FLOWERS)


def read_food(base: Path) -> Listing:
    raw = read_lines(base / "meta" / "classes.txt")
    train, test = (
        _from_list(base / "meta" / f"{split}.txt", base / "images", raw, suffix=".jpg")
        for split in ("train", "test")
    )
    classes = tuple(class_name("food", name) for name in raw)
    return Listing(train=train, test=test, classes=classes)


def read_mnist(base: Path) -> Listing:
    return Listing(
        train=idx_split(base, "train"),
        test=idx_split(base, "t10k"),
        classes=tuple(class_name("mnist", str(digit)) for digit in range(10)),
    )


def read_pets(base: Path) -> Listing:
    folder = base / "annotations"
    names: dict[int, str] = {}

    def split(name: str) -> ImageFiles:
        path = folder / f"{name}.txt"
        rows = []
        for number, line in enumerate(read_lines(path), start=1):
            if line.startswith("#"):
                continue
            parts = line.split()
            if len(parts) < 2 or not parts[1].isdigit() or int(parts[1]) < 1:
                raise DataError(f"{path}, entry {number}: expected 'image class ...', got {line!r}")
            label = int(parts[1]) - 1
            names.setdefault(label, parts[0].rpartition("_")[0])
            rows.append((f"{parts[0]}.jpg", label))
        return image_files(base / "images", rows)

    train, test = split("trainval"), split("test")
    missing = sorted(set(range(max(names, default=0) + 1)) - set(names))
    if missing:
        raise DataError(f"{folder}: no image of class {missing[0] + 1} is listed")
    raw = [names[label] for label in sorted(names)]
    classes = tuple(class_name("pets", name) for name in raw)
    return Listing(train=train, test=test, classes=classes)


def read_cars(base: Path) -> Listing:
    if not (base / "devkit").is_dir():
        return _cars_csv(base)
    devkit = base / "devkit"
    meta = devkit / "cars_meta.mat"
    classes = tuple(str(name) for name in _variable(read_mat(meta), "class_names", meta))

    def split(path: Path, images: str) -> ImageFiles:
        rows = []
        for entry in _variable(read_mat(path), "annotations", path):
            if "class" not in (entry.dtype.names or ()):
                raise DataError(f"{path} has no labels; take the file '..._withlabels.mat'")
            rows.append((f"{images}/{entry['fname']}", int(entry["class"]) - 1))
        return image_files(base, rows)

    test = devkit / "cars_test_annos_withlabels.mat"
    test = test if test.exists() else base / test.name
    return Listing(
        train=split(devkit / "cars_train_annos.mat", "cars_train"),
        test=split(test, "cars_test"),
        classes=tuple(class_name("cars", name) for name in classes),
    )


def _cars_csv(base: Path) -> Listing:
    read = {}
    for split in ("train", "test"):
        path = base / f"{split}.csv"
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        for line, row in enumerate(rows, start=2):
            if not row.get("image") or not row.get("label"):
                raise DataError(f"{path}, line {line}: needs the columns 'image' and 'label'")
        read[split] = [(row["image"], row["label"]) for row in rows]
    raw = sorted({label for rows in read.values() for _, label in rows})
    data = {
        split: image_files(base, ((image, raw.index(label)) for image, label in rows))
        for split, rows in read.items()
    }
    classes = tuple(class_name("cars", name) for name in raw)
    return Listing(train=data["train"], test=data["test"], classes=classes)


def read_sun397(base: Path) -> Listing:
    path = base / "ClassName.txt"
    folders = [line.strip("/") for line in read_lines(path)]  # "/a/abbey" -> "a/abbey"
    rows = []
    for label, folder in enumerate(folders):
        if "/" not in folder:
            raise DataError(f"{path}, entry {label + 1}: expected '/letter/class', got {folder!r}")
        if not (base / folder).is_dir():
            raise DataError(f"{base / folder} is missing, but {path.name} lists its class")
        rows += [(f"{folder}/{image}", label) for image in _images_in(base / folder)]
    train, test = benchmark_split(image_files(base, rows))
    classes = tuple(class_name("sun397", folder) for folder in folders)
    return Listing(train=train, test=test, classes=classes)
