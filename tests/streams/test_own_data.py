"""A user's folder or CSV: layouts, hold-outs, and what happens with the odd files in it."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.streams.builders import save_image, write

from evolora.errors import DataError, StreamError
from evolora.streams.own_data import load_csv, load_folder
from evolora.streams.task import Task


def fill(folder: Path, counts: dict[str, int]) -> None:
    """Write that many images per class folder; an image's red value is its number."""
    for name, count in counts.items():
        for number in range(count):
            save_image(folder / name / f"{number:03d}.png", (number, 0, 0))


def keys(data: Any) -> list[str]:
    return [data[row].key for row in range(len(data))]


def counts(task: Task, split: str) -> dict[str, int]:
    data = getattr(task, split)
    found = Counter(task.labels.classes[data[row].label] for row in range(len(data)))
    return dict(sorted(found.items()))


def test_tasks_classes_and_stratified_hold_outs(tmp_path: Path) -> None:
    fill(tmp_path / "pets", {"cat": 10, "big_dog": 20})
    fill(tmp_path / "cars", {"audi": 10, "bmw": 10})
    stream = load_folder(root=tmp_path)
    assert [task.name for task in stream] == ["cars", "pets"]
    assert stream.name == "folder" and "50 images" in stream.source
    pets = stream.tasks[1]
    assert pets.labels.classes == ("big dog", "cat")
    assert counts(pets, "test") == {"big dog": 4, "cat": 2}
    assert counts(pets, "val") == {"big dog": 2, "cat": 1}
    assert counts(pets, "train") == {"big dog": 14, "cat": 7}
    parts = [set(keys(data)) for data in (pets.train, pets.val, pets.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 30
    for row in range(len(pets.test)):
        example = pets.test[row]
        folder, name = example.key.split("/")[1:]
        assert pets.labels.classes[example.label] == folder.replace("_", " ")
        assert int(example.inputs["image"][0, 0, 0]) == int(name[:3])


def test_hold_out_depends_on_the_seed(tmp_path: Path) -> None:
    fill(tmp_path / "t", {"a": 30, "b": 30})
    first, again, other = (load_folder(root=tmp_path, seed=s).tasks[0] for s in (1, 1, 2))
    assert keys(first.test) == keys(again.test) != keys(other.test)


def test_single_task_root(tmp_path: Path) -> None:
    fill(tmp_path / "flora", {"rose": 5, "tulip": 5})
    (task,) = load_folder(root=tmp_path / "flora").tasks
    assert task.name == "flora" and task.labels.classes == ("rose", "tulip")


def test_given_splits_are_kept(tmp_path: Path) -> None:
    for split, count in (("Train", 4), ("valid", 2), ("test", 3)):
        fill(tmp_path / "pets" / split, {"cat": count, "dog": count})
    (task,) = load_folder(root=tmp_path).tasks
    assert task.name == "pets"
    assert [counts(task, split)["cat"] for split in ("train", "val", "test")] == [4, 2, 3]
    assert all("/test/" in key for key in keys(task.test))
    (single,) = load_folder(root=tmp_path / "pets").tasks
    assert single.name == "pets" and counts(single, "val") == {"cat": 2, "dog": 2}


def test_absent_val_is_held_out_or_left_empty(tmp_path: Path) -> None:
    for split in ("train", "test"):
        fill(tmp_path / "pets" / split, {"cat": 10, "dog": 10})
    (task,) = load_folder(root=tmp_path).tasks
    assert counts(task, "val") == {"cat": 1, "dog": 1} and counts(task, "train")["cat"] == 9
    (task,) = load_folder(root=tmp_path, val_fraction=0).tasks
    assert len(task.val) == 0 and counts(task, "train") == {"cat": 10, "dog": 10}


def test_order_templates_and_limit(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        fill(tmp_path / name, {"x": 10, "y": 10})
    stream = load_folder(root=tmp_path, order=["c", "a"], templates=["art of {}"], limit=4)
    assert [task.name for task in stream] == ["c", "a"]
    for task in stream:
        assert task.labels.templates == ("art of {}",)
        assert counts(task, "train") == {"x": 2, "y": 2} == counts(task, "test")
        assert counts(task, "val") == {"x": 1, "y": 1}


def test_a_class_with_one_sample_is_trained_on_only(tmp_path: Path) -> None:
    fill(tmp_path / "t", {"many": 10, "one": 1, "two": 2})
    (task,) = load_folder(root=tmp_path).tasks
    assert counts(task, "train")["one"] == 1 and "one" not in counts(task, "test")
    assert counts(task, "test") == {"many": 2, "two": 1}
    assert counts(task, "train")["two"] == 1


def test_nothing_to_test_on_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path / "t", {"a": 1, "b": 1})
    with pytest.raises(StreamError, match="every class has a single image"):
        load_folder(root=tmp_path)


def test_odd_files_are_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path / "t", {"a": 5, "b": 5, ".cache": 5})
    (tmp_path / "t" / "empty").mkdir()
    write(tmp_path / "t" / "a" / "notes.txt", "x")
    write(tmp_path / "t" / "a" / ".hidden.png", "x")
    write(tmp_path / "README.md", "x")
    save_image(tmp_path / "stray.png")
    with caplog.at_level(logging.INFO):
        (task,) = load_folder(root=tmp_path).tasks
    assert "skipped 3 files" in caplog.text
    assert task.labels.classes == ("a", "b")
    assert len(task.train) + len(task.val) + len(task.test) == 10


def test_an_unreadable_image_is_an_error_on_access_only(tmp_path: Path) -> None:
    fill(tmp_path / "t", {"a": 2, "b": 2})
    for number in range(2):
        write(tmp_path / "t" / "a" / f"{number:03d}.png", "no image")
    (task,) = load_folder(root=tmp_path, val_fraction=0).tasks
    assert task.train[1].label == 1
    with pytest.raises(DataError, match=r"cannot read image .*/t/a/00\d\.png'"):
        task.train[0]


def test_same_file_names_in_other_folders_stay_apart(tmp_path: Path) -> None:
    fill(tmp_path / "s", {"a": 4, "b": 4})
    fill(tmp_path / "t", {"a": 4, "b": 4})
    for task in load_folder(root=tmp_path):
        found = keys(task.train) + keys(task.val) + keys(task.test)
        assert len(set(found)) == 8 and all(key.startswith(f"{task.name}/") for key in found)


def test_names_that_read_alike_stay_apart(tmp_path: Path) -> None:
    fill(tmp_path / "t", {"a_b": 3, "a b": 3, "c_d": 3})
    (task,) = load_folder(root=tmp_path).tasks
    assert task.labels.classes == ("a b", "a_b", "c d")


def test_links_are_followed_but_never_in_a_circle(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", {"cat": 5})
    root = tmp_path / "root"
    fill(root / "t", {"dog": 5})
    (root / "t" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (root / "t" / "dog" / "loop").symlink_to(root)
    (task,) = load_folder(root=root).tasks
    assert task.labels.classes == ("cat", "dog")
    assert len(task.train) + len(task.val) + len(task.test) == 10


def test_a_link_to_nothing_is_named_when_read(tmp_path: Path) -> None:
    fill(tmp_path / "t", {"a": 5, "b": 5})
    (tmp_path / "t" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (task,) = load_folder(root=tmp_path).tasks
    with pytest.raises(DataError, match=r"gone\.png.*no such file"):
        for split in (task.train, task.val, task.test):
            keys(split)


def test_layout_errors(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="is not a folder"):
        load_folder(root=tmp_path / "none")
    with pytest.raises(StreamError, match="no images in"):
        load_folder(root=tmp_path)
    fill(tmp_path / "t", {"a": 2, "b": 2})
    with pytest.raises(StreamError, match=r"unknown task 'tt'; did you mean 't'"):
        load_folder(root=tmp_path, order=["tt"])
    with pytest.raises(StreamError, match="test_fraction must be in"):
        load_folder(root=tmp_path, test_fraction=0)
    with pytest.raises(StreamError, match=r"exactly one '\{\}'"):
        load_folder(root=tmp_path, templates=["a photo"])
    save_image(tmp_path / "t" / "loose.png")
    with pytest.raises(StreamError, match=r"mixes layouts: .*'t/loose\.png' and 't/a/000\.png'"):
        load_folder(root=tmp_path)


def test_folders_that_are_no_split_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "t" / "first", {"a": 2})
    with pytest.raises(StreamError, match="'first' is not a split"):
        load_folder(root=tmp_path)
    fill(tmp_path / "u" / "deep" / "er", {"a": 2})
    with pytest.raises(StreamError, match="mixes layouts"):
        load_folder(root=tmp_path)
    with pytest.raises(StreamError, match="fits no layout"):
        load_folder(root=tmp_path / "u" / ".." / "u")
    fill(tmp_path / "v" / "train", {"a": 2})
    fill(tmp_path / "v" / "extra", {"a": 2})
    with pytest.raises(StreamError, match="'train' is a split, 'extra' is not"):
        load_folder(root=tmp_path / "v")


def test_a_test_class_without_training_images_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "t" / "train", {"a": 2})
    fill(tmp_path / "t" / "test", {"a": 1, "b": 1})
    with pytest.raises(StreamError, match="class 'b' has no training image"):
        load_folder(root=tmp_path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    fill(tmp_path / "img", {".": 12})
    return tmp_path


def lines(header: str, rows: list[str]) -> str:
    return "\n".join([header, *rows]) + "\n"


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators_marks_and_paths(images: Path, separator: str) -> None:
    rows = [f"img/{n:03d}.png{separator}{'ab'[n % 2]}" for n in range(11)]
    rows.append(f"{images / 'img' / '011.png'}{separator}b")  # an absolute path
    text = "\ufeff" + lines(f"Image{separator} label ", rows)
    (task,) = load_csv(path=write(images / "mine.csv", text)).tasks
    assert task.name == "mine" and task.labels.classes == ("a", "b")
    assert len(task.train) + len(task.val) + len(task.test) == 12
    assert counts(task, "test") == {"a": 1, "b": 1}
    for row in range(len(task.train)):
        example = task.train[row]
        assert "ab"[int(example.inputs["image"][0, 0, 0]) % 2] == task.labels.classes[example.label]


def test_tasks_splits_and_extra_columns(images: Path) -> None:
    header = "id,image,label,task,split"
    rows = [
        f"{n},img/{n:03d}.png,{'xy'[n % 2]},{('late', 'early')[n // 6]},{split}"
        for n, split in enumerate(["train", "train", "val", "val", "test", "test"] * 2)
    ]
    stream = load_csv(path=write(images / "m.csv", lines(header, rows)))
    assert [task.name for task in stream] == ["late", "early"]  # as they appear
    early = load_csv(path=images / "m.csv", order=["early"]).tasks[0]
    assert keys(early.train) == ["img/006.png", "img/007.png"]
    assert keys(early.val) == ["img/008.png", "img/009.png"]
    assert keys(early.test) == ["img/010.png", "img/011.png"]


def test_quotes_blank_lines_and_commas_in_names(images: Path) -> None:
    rows = [f'"img/{n:03d}.png","{("red, round", "blue")[n % 2]}"\n' for n in range(12)]
    (task,) = load_csv(path=write(images / "m.csv", lines("image,label", rows))).tasks
    assert task.labels.classes == ("blue", "red, round")
    assert len(task.train) + len(task.val) + len(task.test) == 12


def test_every_bad_row_is_named_by_its_line(images: Path) -> None:
    rows = [
        "img/000.png,a,train",
        ",a,train",
        "img/002.png,,train",
        "img/003.png,a,trian",
        "img/gone.png,a,train",
        "img/000.png,b,test",
        "img/004.png,a",
        "img/005.png,a,train,extra",
        "",
        "nul\0.png,a,train",
    ]
    with pytest.raises(StreamError) as caught:
        load_csv(path=write(images / "m.csv", lines("image,label,split", rows)))
    message = str(caught.value)
    for part in (
        "line 3: no image",
        "line 4: no label",
        "line 5: unknown split 'trian'; did you mean 'train'",
        "line 6: no such image: img/gone.png",
        "line 7: same image as line 2",
        "and 3 more",
    ):
        assert part in message
    assert "line 2:" not in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has: nothing"),
        ("image,label\n", "has a header but no rows"),
        ("image,lable\nx,y\n", "did you mean 'lable'"),
        ("image,label,label\nx,y,z\n", "two columns 'label'"),
        ("a.png,cat\n", "needs the columns image,label"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(StreamError) as caught:
        load_csv(path=write(tmp_path / "m.csv", text))
    assert says in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="no such file"):
        load_csv(path=tmp_path / "none.csv")
    with pytest.raises(StreamError, match=r"cannot read .*directory"):
        load_csv(path=tmp_path)
    path = tmp_path / "utf16.csv"
    path.write_bytes("image,label\n".encode("utf-16"))
    with pytest.raises(StreamError, match="not UTF-8 text"):
        load_csv(path=path)


def test_streams_are_registered() -> None:
    from evolora.registry import STREAMS
    from evolora.streams import class_incremental, mtil

    assert STREAMS.get("folder") is load_folder
    assert STREAMS.get("csv") is load_csv
    assert STREAMS.get("mtil") is mtil.load
    assert STREAMS.get("class-incremental") is class_incremental.load
