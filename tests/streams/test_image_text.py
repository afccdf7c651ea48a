"""A user's own image + text file: columns, absent parts, several labels, refusals by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.streams.builders import save_image, write

from evolora.config import load_stream
from evolora.errors import DataError, StreamError
from evolora.streams.image_text import load


def shop(tmp_path: Path, rows: int = 40) -> Path:
    """Write a CSV of two tasks; each fifth row has no text, each seventh (but those) no image."""
    lines = ["image,text,label,task"]
    for row in range(rows):
        image = "" if row % 7 == 6 and row % 5 != 4 else f"i/{row}.png"
        text = "" if row % 5 == 4 else f'"mug, number {row}"'
        if image:
            save_image(tmp_path / image, (row, 0, 0), size=2)
        label = ("mug", "soup_plate", "car", "train")[row % 4]
        lines.append(f"{image},{text},{label},{'kitchen' if row % 4 < 2 else 'toys'}")
    return write(tmp_path / "shop.csv", "\n".join(lines) + "\n")


def test_a_csv_of_image_and_text(tmp_path: Path) -> None:
    stream = load_stream("image-text", path=str(shop(tmp_path)))
    assert (stream.name, stream.label_protocol, len(stream)) == ("image-text", "seen", 2)
    assert "shop.csv (40 samples)" in stream.source
    kitchen = stream.tasks[0]
    assert kitchen.labels.classes == ("mug", "soup plate") and kitchen.metric == "accuracy"
    assert kitchen.modalities == ("image", "text") and not kitchen.labels.multi_label
    assert sum(len(part) for part in (kitchen.train, kitchen.val, kitchen.test)) == 20
    kinds = set()
    for data in (kitchen.train, kitchen.val, kitchen.test):
        for place in range(len(data)):
            example = data[place]
            row = int(example.key.removeprefix("shop.csv:")) - 2
            kinds.add(frozenset(example.inputs))
            assert example.label == row % 4
            assert ("text" in example.inputs) == (row % 5 != 4)
            if "image" in example.inputs:
                assert int(example.inputs["image"][0, 0, 0]) == row
            if "text" in example.inputs:
                assert example.inputs["text"] == f"mug, number {row}"
    assert kinds == {frozenset(("image", "text")), frozenset(("image",)), frozenset(("text",))}


def test_simulation_spares_what_is_absent_already(tmp_path: Path) -> None:
    path = shop(tmp_path)
    whole = load(path=path)
    stream = load(path=path, missing={"kind": "image", "rate": 1.0})
    for task, before in zip(stream, whole, strict=True):
        for row in range(len(task.train)):
            expected = "text" if "text" in before.train[row].inputs else "image"
            assert set(task.train[row].inputs) == {expected}


def test_labels_make_it_multi_label(tmp_path: Path) -> None:
    lines = ["text;labels;split"]
    for row in range(8):
        split = "test" if row > 5 else "train"
        lines.append(f'plot {row};"{"drama; war" if row % 2 else "war;war"}";{split}')
    (task,) = load(path=write(tmp_path / "films.csv", "\n".join(lines))).tasks
    assert task.labels.classes == ("drama", "war") and task.labels.multi_label
    assert task.metric == "macro-f1" and task.name == "films"
    assert [task.test[row].label for row in range(2)] == [(0, 1), (1, 1)]
    assert set(task.train[0].inputs) == {"text"}


def test_json_lines(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", (7, 0, 0), size=2)
    rows = [
        {"image": "a.png", "text": None, "labels": ["x", "y"], "split": "train", "note": 3},
        {"text": ["one", "two"], "labels": "y", "split": "train"},
        {"text": "last", "labels": ["x"], "split": "test", "image": ""},
        {"text": "val", "labels": ["x"], "split": "val"},
    ]
    text = "\n\n".join(json.dumps(row) for row in rows)
    (task,) = load(path=write(tmp_path / "own.jsonl", text)).tasks
    assert task.train[0].label == (1, 1) and set(task.train[0].inputs) == {"image"}
    assert task.train[1].inputs == {"text": "one. two"} and task.train[1].key == "own.jsonl:3"
    assert task.test[0].inputs == {"text": "last"} and len(task.val) == 1
    assert task.train.codes == (1, 2)


def test_bad_rows_are_named_by_line(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    lines = [
        "image,text,label,split",
        ",,x,train",
        "a.png,hi,,train",
        "a.png,hi,x,trian",
        "b.png,hi,x,train",
        "a.png,hi,x",
        "a.png,hi,x,train",
        "a.png,other,x,test",
        ",same,x,",
        ",same,x,",
        ",fine,x;y,",
    ]
    with pytest.raises(StreamError) as error:
        load(path=write(tmp_path / "own.csv", "\n".join(lines)))
    text = str(error.value)
    assert "line 2: neither image nor text; line 3: no label; line 4: unknown split" in text
    assert "line 5: no such image: b.png; line 6: 3 columns instead of 4 and 3 more" in text
    for bad, words in (
        (lines[6:8], "line 3: same image as line 2"),
        (lines[8:10], "line 3: same text as line 2"),
        (lines[10:], r"line 2: several labels \('x;y'\); call the column labels"),
    ):
        padded = [row if row.count(",") == 3 else f"{row}," for row in bad]
        with pytest.raises(StreamError, match=words):
            load(path=write(tmp_path / "own.csv", "\n".join([lines[0], *padded])))


def test_one_image_may_have_several_texts_within_a_split(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    lines = ["image,text,label,split", "a.png,one,x,train", "a.png,two,x,train", ",t,x,test"]
    (task,) = load(path=write(tmp_path / "own.csv", "\n".join(lines)), val_fraction=0).tasks
    assert [task.train[row].inputs["text"] for row in range(2)] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "image,label,labels\n,x,y\n", "both label .* and labels"),
        ("a.csv", "picture,label\nx,y\n", "needs the columns image and text .* it has: label"),
        ("a.csv", "image,text\na,b\n", "label or labels; it has: image, text"),
        ("a.csv", "text,text,label\na,b,c\n", "two columns 'text'"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"tex', "line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("a.jsonl", '{"text": {}, "label": "x"}', "line 1: text must hold text; got {}"),
        ("a.jsonl", '{"text": "a", "labels": [true]}', "line 1: a list must hold text; got True"),
    ],
)
def test_files_that_are_none_are_refused(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    with pytest.raises(StreamError, match=words):
        load(path=write(tmp_path / name, content))


def test_tasks_and_classes_are_checked(tmp_path: Path) -> None:
    lines = [f"text {row},{'xy'[row % 2]},{'ab'[row % 2]},{row}" for row in range(20)]
    path = write(tmp_path / "own.csv", "text,label,task,extra\n" + "\n".join(lines))
    assert [task.name for task in load(path=path, order=["b", "a"])] == ["b", "a"]
    with pytest.raises(StreamError, match="order: unknown task 'c'"):
        load(path=path, order=["c"])
    with pytest.raises(StreamError, match="label_protocol must be one of 'seen', 'task'"):
        load(path=path, label_protocol="sen")  # type: ignore[arg-type]
    with pytest.raises(StreamError, match="repeats a task name"):
        load(path=path, order=["a", "a"])
    same = write(tmp_path / "same.csv", path.read_text().replace(",y,", ",x,"))
    with pytest.raises(StreamError, match="class 'x' is in the tasks 'a' and 'b'"):
        load(path=same)
    assert load(path=same, label_protocol="task").label_protocol == "task"
    rows = "text,label,split\na,x,train\nb,y,test\n"
    with pytest.raises(StreamError, match=r"new.csv:3: task 'new': class 'y' has no training"):
        load(path=write(tmp_path / "new.csv", rows))
    with pytest.raises(StreamError, match="nothing to test on"):
        load(path=write(tmp_path / "one.csv", "text,label\na,x\nb,y\n"))
    with pytest.raises(StreamError, match="has no training samples"):
        load(path=write(tmp_path / "none.csv", "text,label,split\na,x,test\n"))


def test_an_image_that_is_none_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.png", "no picture")
    lines = ["image,text,label,split", "a.png,one,x,train", ",two,x,test"]
    (task,) = load(path=write(tmp_path / "own.csv", "\n".join(lines)), val_fraction=0).tasks
    with pytest.raises(DataError, match=r"a\.png"):
        task.train[0]
