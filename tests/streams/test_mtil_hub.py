"""MTIL through the `datasets` library, from saved folders: no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from evolora.errors import DataError, StreamError
from evolora.streams import mtil
from evolora.streams.mtil_hub import HUB
from evolora.streams.mtil_prompts import CLASS_COUNTS, FLOWERS

datasets = pytest.importorskip("datasets")


def save(
    folder: Path,
    splits: dict[str, list[int | str]],
    names: list[str] | None,
    label: str = "label",
    image: str = "image",
) -> None:
    """Save a data set whose image of row n is a 4 x 4 square of gray level n."""
    kind = datasets.Value("string") if names is None else datasets.ClassLabel(names=names)
    if names is None and all(isinstance(v, int) for values in splits.values() for v in values):
        kind = datasets.Value("int64")
    features = datasets.Features({image: datasets.Image(), label: kind})
    parts = {}
    row = 0
    for split, values in splits.items():
        images = []
        for _ in values:
            images.append(Image.new("RGB", (4, 4), (row, row, row)))
            row += 1
        columns: dict[str, Any] = {image: images, label: values}
        parts[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(folder))


def load(root: Path, *names: str) -> Any:
    return mtil.load(root=root, source="datasets", order=names)


def rows(data: Any) -> list[tuple[int, int]]:
    """Return (gray level, label) of every row."""
    examples = [data[row] for row in range(len(data))]
    return [(int(e.inputs["image"][0, 0, 0]), e.label) for e in examples]


def test_every_data_set_has_an_entry() -> None:
    assert set(HUB) == set(CLASS_COUNTS)


def test_official_splits_and_other_column_names(tmp_path: Path) -> None:
    save(
        tmp_path / "cifar100",
        {"train": [1, 0, 1], "test": [0]},
        ["apple", "lawn_mower"],
        label="fine_label",
        image="img",
    )
    save(
        tmp_path / "aircraft",
        {"train": [0], "validation": [1], "test": [1, 0]},
        ["707-320", "A310"],
        label="variant",
    )
    cifar, aircraft = load(tmp_path, "cifar100", "aircraft").tasks
    assert cifar.labels.classes == ("apple", "lawn mower")
    assert rows(cifar.train) == [(0, 1), (1, 0), (2, 1)] and rows(cifar.test) == [(3, 0)]
    assert len(cifar.val) == 0
    assert rows(aircraft.val) == [(1, 1)] and rows(aircraft.test) == [(2, 1), (3, 0)]


def test_unsplit_sets_are_joined_split_and_lose_the_background(tmp_path: Path) -> None:
    names = ["background_google", "faces", "yin_yang"]
    save(tmp_path / "caltech101", {"train": [0, 1, 2, 1, 0, 2], "test": [1, 2, 2, 1, 0, 1]}, names)
    (task,) = load(tmp_path, "caltech101").tasks
    assert task.labels.classes == ("off-center face", "yin and yang symbol")
    kept = [(1, 0), (2, 1), (3, 0), (5, 1), (6, 0), (7, 1), (8, 1), (9, 0), (11, 0)]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(42)).tolist()
    assert rows(task.train) == [kept[row] for row in order[:7]]
    assert rows(task.test) == [kept[row] for row in order[7:]]


def test_flowers_named_by_number_or_not_at_all(tmp_path: Path) -> None:
    numbered = sorted(str(n) for n in range(1, 103))  # "1", "10", "100", ...
    splits: dict[str, list[int | str]] = {"train": [0, 1], "validation": [0], "test": [2]}
    save(tmp_path / "a" / "flowers", splits, numbered)
    save(tmp_path / "b" / "flowers", splits, None)
    (first,) = load(tmp_path / "a", "flowers").tasks
    assert [first.labels.classes[n] for n in (0, 1)] == [FLOWERS[0], FLOWERS[9]]
    (second,) = load(tmp_path / "b", "flowers").tasks
    assert second.labels.classes == FLOWERS


def test_labels_given_as_text(tmp_path: Path) -> None:
    save(tmp_path / "cars", {"train": ["BMW", "Audi"], "test": ["BMW"]}, None)
    (task,) = load(tmp_path, "cars").tasks
    assert task.labels.classes == ("Audi", "BMW")
    assert rows(task.train) == [(0, 1), (1, 0)] and rows(task.test) == [(2, 1)]


def test_image_folder_that_datasets_reads(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat_one", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (4, 4), (9, 9, 9)).save(folder / "x.png")
    (task,) = load(tmp_path, "pets").tasks
    assert task.labels.classes == ("Cat One", "Dog")
    assert sorted(label for _, label in rows(task.train)) == [0, 1]


def test_missing_folders_splits_and_names_are_listed_together(tmp_path: Path) -> None:
    save(tmp_path / "mnist", {"train": [0]}, [str(n) for n in range(10)])
    save(tmp_path / "cars", {"train": [0], "test": [1]}, None)
    with pytest.raises(StreamError) as caught:
        load(tmp_path, "food", "mnist", "cars")
    message = str(caught.value)
    assert f"food: no folder {tmp_path / 'food'}" in message
    assert "mnist: mnist: no split ['test'] (there are: train)" in message
    assert "cars: cars: column 'label' has numbers without class names" in message


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(name: str, *args: object, **options: object) -> None:
        asked.append(name)
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(StreamError) as caught:
        mtil.load(source="datasets", order=["mnist", "food"], hub={"food": "me/my-food"})
    assert asked == ["ylecun/mnist", "me/my-food"]
    assert "mnist: ylecun/mnist: Couldn't reach the Hub" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_image_is_named_on_access(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    bad = {"image": [{"bytes": b"no image", "path": None}], "label": [0]}
    part = datasets.Dataset.from_dict(bad, features=features)
    parts = datasets.DatasetDict({"train": part, "test": part})
    parts.save_to_disk(str(tmp_path / "cars"))
    (task,) = load(tmp_path, "cars").tasks
    with pytest.raises(DataError, match="cars/train:0: cannot read image"):
        task.train[0]
