"""Builds tiny data sets on disk in the layouts that their authors publish."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def save_image(path: Path, color: tuple[int, int, int] = (10, 20, 30), size: int = 8) -> Path:
    """Write a one-colored image; PNG and BMP keep the color exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), color).save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def aircraft(root: Path) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    write(base / "variants.txt", "707-320\nF-16A/B\nBAE 146-200\n")
    number = 0
    for split in ("train", "val", "test"):
        lines = []
        for variant in ("BAE 146-200", "707-320", "F-16A/B"):
            number += 1
            lines.append(f"{number:07d} {variant}")
            save_image(base / "images" / f"{number:07d}.jpg")
        write(base / f"images_variant_{split}.txt", "\n".join(lines) + "\n")


def caltech101(root: Path) -> None:
    base = root / "caltech101" / "101_ObjectCategories"
    for folder in ("BACKGROUND_Google", "Faces", "Faces_easy", "accordion", "water_lilly"):
        for number in range(5):
            save_image(base / folder / f"image_{number + 1:04d}.jpg")


def cifar100(root: Path, classes: Sequence[str] = ("apple", "lawn_mower", "worm")) -> None:
    base = root / "cifar-100-binary"
    write(base / "fine_label_names.txt", "\n".join(classes) + "\n\n")
    for split, per_class in (("train", 4), ("test", 2)):
        rows = bytearray()
        for repeat in range(per_class):
            for label in range(len(classes)):
                planes = bytes([label]) * 1024 + bytes([repeat]) * 1024 + bytes([200]) * 1024
                rows += bytes([9, label]) + planes
        (base / f"{split}.bin").write_bytes(bytes(rows))


def dtd(root: Path) -> None:
    base = root / "dtd"
    classes = ("banded", "polka-dotted")
    for split in ("train", "val", "test"):
        names = [f"{name}/{name}_{split}.jpg" for name in classes]
        for name in names:
            save_image(base / "images" / name)
        write(base / "labels" / f"{split}1.txt", "\n".join(reversed(names)) + "\n")


def eurosat(root: Path) -> None:
    for folder in ("AnnualCrop", "SeaLake"):
        for number in range(10):
            save_image(root / "eurosat" / "2750" / folder / f"{folder}_{number + 1}.jpg")


def flowers(root: Path) -> None:
    from scipy.io import savemat

    base = root / "flowers-102"
    base.mkdir(parents=True)
    for number in range(1, 7):
        save_image(base / "jpg" / f"image_{number:05d}.jpg")
    savemat(base / "imagelabels.mat", {"labels": np.array([[77, 77, 1, 1, 102, 102]])})
    ids = {"trnid": [[2, 3]], "valid": [[1, 4]], "tstid": [[5, 6]]}
    savemat(base / "setid.mat", {key: np.array(value) for key, value in ids.items()})


def food(root: Path) -> None:
    base = root / "food-101"
    classes = ("apple_pie", "waffles")
    write(base / "meta" / "classes.txt", "\n".join(classes))
    for split in ("train", "test"):
        names = [f"{name}/{split}1" for name in classes]
        for name in names:
            save_image(base / "images" / f"{name}.jpg")
        write(base / "meta" / f"{split}.txt", "\n".join(names))


def mnist(root: Path, compress: bool = True) -> None:
    base = root / "MNIST" / "raw"
    base.mkdir(parents=True)
    for split, count in (("train", 20), ("t10k", 10)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.repeat(labels, 784).astype(np.uint8) * 20
        _idx(base / f"{split}-images-idx3-ubyte", (0x803, count, 28, 28), pixels, compress)
        _idx(base / f"{split}-labels-idx1-ubyte", (0x801, count), labels, compress)


def _idx(path: Path, header: Sequence[int], values: np.ndarray[Any, Any], compress: bool) -> None:
    data = struct.pack(f">{len(header)}I", *header) + values.tobytes()
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


def pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    for split, number in (("trainval", 1), ("test", 2)):
        lines = ["#Image CLASS-ID SPECIES BREED ID"]
        for label, name in ((1, "Abyssinian"), (2, "american_bulldog")):
            lines.append(f"{name}_{number} {label} 1 1")
            save_image(base / "images" / f"{name}_{number}.jpg")
        write(base / "annotations" / f"{split}.txt", "\n".join(lines) + "\n")


def cars(root: Path) -> None:
    from scipy.io import savemat

    base = root / "stanford_cars"
    devkit = base / "devkit"
    devkit.mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    savemat(devkit / "cars_meta.mat", {"class_names": names[None]})
    fields = [("bbox_x1", object), ("class", object), ("fname", object)]
    for split, file in (
        ("train", "cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        entries = np.zeros((1, 2), dtype=fields)
        for column, label in enumerate((2, 1)):
            name = f"{column + 1:05d}.jpg"
            entries[0, column] = (39, label, name)
            save_image(base / f"cars_{split}" / name)
        savemat(devkit / file, {"annotations": entries})


def sun397(root: Path) -> None:
    base = root / "SUN397"
    classes = ("a/abbey", "a/apartment_building/outdoor", "y/youth_hostel")
    write(base / "ClassName.txt", "".join(f"/{name}\n" for name in classes))
    for name in classes:
        for number in range(5):
            save_image(base / name / f"sun_{number}.jpg")


ALL = {
    function.__name__: function
    for function in (
        *(aircraft, caltech101, cifar100, dtd, eurosat, flowers),
        *(food, mnist, pets, cars, sun397),
    )
}


def tiny_imagenet(root: Path, classes: int = 4) -> None:
    base = root / "tiny-imagenet-200"
    ids = [f"n{number:08d}" for number in range(classes)]
    write(base / "wnids.txt", "\n".join(reversed(ids)))
    names = ["crane, machine", "crane, bird", *(f"thing_{n}, stuff" for n in range(classes - 2))]
    lines = [f"{each}\t{name}" for each, name in zip(ids, names, strict=True)]
    write(base / "words.txt", "\n".join([*lines, "n99999999\tsomething else"]))
    annotations = []
    for number, each in enumerate(ids):
        for image in range(3):
            save_image(base / "train" / each / "images" / f"{each}_{image}.JPEG")
        name = f"val_{number}.JPEG"
        save_image(base / "val" / "images" / name)
        annotations.append(f"{name}\t{each}\t0\t0\t62\t62")
    write(base / "val" / "val_annotations.txt", "\n".join(annotations))
