"""UPMC-Food101-CMML and MM-IMDb-CMML from files in the published layout."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.streams.builders import save_image

from evolora.config import load_stream
from evolora.errors import StreamError
from evolora.streams.cmml import load_food101, load_mm_imdb

Entry = dict[str, Any]
SIZES = (("train", 3), ("val", 1), ("test", 2))


def food(entry: Callable[[int, int], Entry] | None = None) -> list[Entry]:
    """Return the published list for 100 dishes; the last dishes of the file belong to task 0."""
    items = []
    for dish in range(100):
        for split, count in SIZES:
            for number in range(count):
                item = {
                    "image": f"{split}/dish_{dish:02d}/{number}.png",
                    "text": f"recipe {dish} {number}" if number else ["recipe", f"of {dish}"],
                    "label": dish,
                    "task_id": dish // 10,
                    "split": split,
                }
                items.append({**item, **(entry(dish, number) if entry else {})})
    return items[::-1]


def films() -> list[Entry]:
    """Return the published list; a film of task t has genre 4t, and genre (4t + 7) mod 20 too."""
    items = []
    for task in range(5):
        for split, count in SIZES:
            for number in range(count):
                label = [0] * 20
                label[4 * task + number % 4] = label[(4 * task + 7) % 20] = 1
                image = f"{task}_{split}_{number}.png"
                plots = [f"plot {task}", "second plot"]
                items.append(
                    {"image": image, "text": plots, "label": label, "task_id": task, "split": split}
                )
    return items


def write(root: Path, name: str, items: Any, images: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{name}.json").write_text(json.dumps(items))
    if images:
        for item in items:
            save_image(root / "images" / item["image"], size=2)
    return root


def food_root(tmp_path: Path, items: Any = None, images: bool = True) -> Path:
    chosen = food() if items is None else items
    write(tmp_path / "UPMC-Food101-CMML", "UPMC-Food101-CMML", chosen, images)
    return tmp_path


def film_root(tmp_path: Path, items: Any = None) -> Path:
    write(tmp_path / "MM-IMDB-CMML", "MM-IMDB-CMML", films() if items is None else items)
    return tmp_path


def test_food101_has_ten_tasks_of_ten_dishes(tmp_path: Path) -> None:
    root = food_root(tmp_path)
    stream = load_stream("upmc-food101-cmml", root=str(root))
    assert stream.label_protocol == "seen" and len(stream) == 10
    assert stream.source == "UPMC-Food101-CMML, 600 samples"
    classes = [name for task in stream for name in task.labels.classes]
    assert classes == [f"dish {number:02d}" for number in range(100)]
    for number, task in enumerate(stream):
        assert (task.metric, task.modalities) == ("accuracy", ("image", "text"))
        assert [len(part) for part in (task.train, task.val, task.test)] == [30, 10, 20]
        for row in range(len(task.train)):
            example = task.train[row]
            dish = 10 * number + example.label
            assert f"/dish_{dish:02d}/" in example.key
            first = example.key.endswith("/0.png")
            assert example.inputs["text"] == (
                f"recipe. of {dish}" if first else f"recipe {dish} {example.key[-5]}"
            )
            assert tuple(example.inputs["image"].shape) == (3, 2, 2)
    inner = load_food101(root=root / "UPMC-Food101-CMML", limit=10)
    assert sorted(inner.tasks[3].train.labels) == list(range(10))


def test_food101_takes_names_from_the_file_or_the_user(tmp_path: Path) -> None:
    named = food_root(tmp_path / "a", food(lambda d, _: {"label": f"soup_{d % 10}{d // 10}"}))
    stream = load_food101(root=named)
    assert stream.tasks[2].labels.classes[:2] == ("soup 02", "soup 12")
    with pytest.raises(StreamError, match="the file names its classes"):
        load_food101(root=named, classes=[str(n) for n in range(100)])
    flat = food_root(tmp_path / "b", food(lambda d, n: {"image": f"{n}-{d}.png"}), images=False)
    for item in food():
        save_image(flat / "UPMC-Food101-CMML/images" / f"{item['image'][-5]}-{item['label']}.png")
    assert load_food101(root=flat).tasks[9].labels.classes[0] == "class 90"
    given = load_food101(root=flat, classes=[f"dish_{n}" for n in range(100)])
    assert given.tasks[9].labels.classes[0] == "dish 90"
    with pytest.raises(StreamError, match="100 classes; got 1 names"):
        load_food101(root=flat, classes=["x"])


def test_mm_imdb_has_five_tasks_of_four_genres(tmp_path: Path) -> None:
    root = film_root(tmp_path)
    stream = load_stream("mm-imdb-cmml", root=str(root))
    assert stream.label_protocol == "seen" and len(stream) == 5
    for number, task in enumerate(stream):
        assert task.metric == "macro-f1" and task.labels.multi_label
        assert task.labels.classes == tuple(f"class {4 * number + place}" for place in range(4))
        assert [len(part) for part in (task.train, task.val, task.test)] == [3, 1, 2]
        assert task.train[1].label == (0, 1, 0, 0)
        assert task.train[1].inputs["text"] == f"plot {number}. second plot"
    # The genre at (4 t + 7) mod 20 is of another task: a label has a place per own class only.
    assert task.train.labels == ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0))
    named = load_mm_imdb(root=root, classes=[f"genre_{n}" for n in range(20)])
    assert named.tasks[4].labels.classes[0] == "genre 16"


@pytest.mark.parametrize("load", [load_food101, load_mm_imdb])
def test_modalities_are_missing_as_asked(tmp_path: Path, load: Callable[..., Any]) -> None:
    root = film_root(food_root(tmp_path))
    missing = {"kind": "both", "rate": 0.7, "seed": 1}
    first, again = (load(root=root, missing=missing) for _ in range(2))
    for task, other in zip(first, again, strict=True):
        count = len(task.train)
        assert task.train.codes == other.train.codes and len(task.train.codes) == count
        lost = int(count * 0.7)
        assert task.train.codes.count(2) == lost // 2
        assert task.train.codes.count(1) == lost - lost // 2
        for row, code in enumerate(task.train.codes):
            assert len(task.train[row].inputs) == (1 if code else 2)
    assert "missing both 70 %, seed 1" in first.source


def test_missing_files_are_named_with_the_places(tmp_path: Path) -> None:
    with pytest.raises(StreamError) as error:
        load_food101(root=tmp_path)
    text = str(error.value)
    assert f"{tmp_path} or {tmp_path / 'UPMC-Food101-CMML'}" in text
    assert "UPMC-Food101-CMML.json and images/" in text
    root = food_root(tmp_path)
    (
        root / "UPMC-Food101-CMML/images/test/dish_49/1.png"
    ).unlink()  # first of its split in the list
    with pytest.raises(StreamError, match=r"task 4, test: .*images/test/dish_49/1.png is missing"):
        load_food101(root=root)


def test_an_incomplete_copy_is_said_to_be_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = food_root(tmp_path, [item for item in food() if item["label"] != 57])
    with caplog.at_level(logging.WARNING):
        stream = load_food101(root=root)
    assert "task 5 has 9 classes, the published one 10" in caplog.text
    assert len(stream.tasks[5].labels.classes) == 9
    few = [item for item in food() if item["task_id"] != 6]
    with pytest.raises(StreamError, match="task 6 has no samples in the file"):
        load_food101(root=food_root(tmp_path, few, images=False))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task_id": 10}, "sample 0: task_id must be 0 to 9; got 10"),
        ({"task_id": True}, "task_id must be 0 to 9; got True"),
        ({"split": "dev"}, "split must be one of train, val, test; got 'dev'"),
        ({"text": [1]}, r"text must be a string or a list of strings; got \[1\]"),
        ({"image": None}, "image must be a path; got None"),
        ({"label": 100}, "label must be a class name or 0 to 99; got 100"),
        ({"label": 0}, "class 0 is in tasks 0 and 9"),
    ],
)
def test_a_file_in_another_layout_is_refused(tmp_path: Path, change: Entry, words: str) -> None:
    items = food()
    items[0] = {**items[0], **change}
    with pytest.raises(StreamError, match=words):
        load_food101(root=food_root(tmp_path, items, images=False))


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ({}, "must hold a list of samples"),
        ([1], "sample 0: expected an object"),
        ([{"imag": "x"}], "no 'image'; did you mean 'imag'"),
    ],
)
def test_a_file_that_is_no_list_of_samples_is_refused(
    tmp_path: Path, items: Any, words: str
) -> None:
    with pytest.raises(StreamError, match=words):
        load_food101(root=food_root(tmp_path, items, images=False))


def test_labels_of_films_are_checked(tmp_path: Path) -> None:
    items = films()
    items[2]["label"] = [0, 1]
    with pytest.raises(StreamError, match="sample 2: label must be a list of 20 zeros and ones"):
        load_mm_imdb(root=film_root(tmp_path, items))
    (tmp_path / "MM-IMDB-CMML/MM-IMDB-CMML.json").write_text("[\n{")
    with pytest.raises(StreamError, match=r"not valid JSON \(line 2\)"):
        load_mm_imdb(root=tmp_path)
