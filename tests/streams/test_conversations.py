"""Conversations in LLaVA's layout: what is read, how it is split, and every bad row by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.backbones.writers import writer

from evolora.config import load_stream
from evolora.errors import ConfigError, DataError, StreamError
from evolora.learner import Learner
from evolora.methods.lora import SequentialLoRAConfig
from evolora.streams.task import Stream
from evolora.training.config import TrainingConfig


def row(
    question: str = "<image>\nwhat is it ?", answer: Any = "red", **more: Any
) -> dict[str, Any]:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "1", "conversations": said, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(10):
        Image.new("RGB", (16, 16), (index * 20, 0, 0)).save(tmp_path / f"{index}.png")
    return tmp_path


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    lines = path.suffix == ".jsonl"
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


def load(path: Path, **options: Any) -> Stream:
    return load_stream("conversations", path=str(path), **options)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_rows_become_samples_and_all_about_an_image_is_on_one_side(folder: Path, name: str) -> None:
    rows = [row(image=f"{index}.png") for index in range(10)]
    rows += [row("<image>\nis it red ?", "yes", image=f"{index}.png") for index in range(10)]
    stream = load(write(folder / name, rows), max_new_tokens=5, metric="token-f1")
    (task,) = stream.tasks
    assert (task.name, task.metric, task.labels.max_new_tokens) == ("a", "token-f1", 5)
    assert [len(part) for part in (task.train, task.val, task.test)] == [14, 2, 4]
    parts = [{row.group for row in part.rows} for part in (task.train, task.val, task.test)]  # type: ignore[attr-defined]
    assert set.union(*parts) == {f"{index}.png" for index in range(10)}
    assert sum(map(len, parts)) == 10
    example = task.train[0]
    assert example.inputs["image"].shape == (3, 16, 16)
    assert example.inputs["text"] == "<image>\nwhat is it ?" and example.label == ("red",)


def test_every_answer_is_a_sample_with_what_was_said_before(folder: Path) -> None:
    long = row(image=["0.png", "1.png"], split="test")
    long["conversations"] = [
        {"from": "human", "value": "<image> or <image> ?"},
        {"from": "gpt", "value": ["red", "dark red"]},
        {"from": "human", "value": "why ?"},
        {"from": "gpt", "value": "it is"},
    ]
    (task,) = load(write(folder / "a.json", [long, row("is it ?", "no")]), val_fraction=0).tasks
    first, second = task.test[0], task.test[1]
    assert len(first.inputs["image"]) == 2 and first.inputs["text"] == "<image> or <image> ?"
    assert first.label == ("red", "dark red")
    assert second.inputs["text"] == ("<image> or <image> ?", "red", "why ?")
    assert second.label == ("it is",) and second.key == "a.json[0]/2"
    assert "image" not in task.train[0].inputs


def test_tasks_are_rows_files_or_folders(folder: Path) -> None:
    images = str(folder)
    tasks = [row(image=f"{index}.png", task="xy"[index % 2]) for index in range(6)]
    names = [task.name for task in load(write(folder / "rows" / "a.jsonl", tasks), images=images)]
    assert names == ["x", "y"]
    write(folder / "own" / "b.json", tasks)
    for split in ("train", "test"):
        path = folder / "own" / "c"
        path.mkdir(exist_ok=True)
        write(path / f"{split}.json", [row(image=f"{index}.png") for index in range(3)])
    stream = load(folder / "own", images=images, order=["c", "y"], metric={"c": "vqa-accuracy"})
    assert [task.name for task in stream] == ["c", "y"]
    assert [task.metric for task in stream] == ["vqa-accuracy", "exact-match"]
    assert len(stream.tasks[0].test) == 3 and len(stream.tasks[0].train) == 2
    with pytest.raises(ConfigError, match="unknown task 'z'"):
        load(folder / "own", images=images, order=["z"])
    with pytest.raises(ConfigError, match="unknown metric 'exact'"):
        load(folder / "own", images=images, metric="exact")


BAD = {
    "no conversations; it has conversation": {"conversation": []},
    "conversations must be a list of turns": {"conversations": []},
    "turn 1 must be from 'human'; got 'gpt'": {"conversations": [{"from": "gpt", "value": "a"}]},
    "the last turn is a human's": {"conversations": [{"from": "human", "value": "a"}]},
    "turn 2 is empty": row(answer=" "),
    "the value of turn 2 must be a text; got 3": row(answer=3),
    "1 images and 2 <image> markers": row("<image><image> ?", image="0.png"),
    "no such image: .*none.png": row(image="none.png"),
    "image must be a file name": row(image=3),
    "unknown split 'tset'; did you mean 'test'": row(image="0.png", split="tset"),
    "not a JSON object": [1],
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("message", BAD)
def test_a_bad_row_is_named_by_its_line(folder: Path, name: str, message: str) -> None:
    good = row(image="1.png")
    file = write(folder / name, [good, BAD[message]])
    line = 2 if name.endswith("l") else 1 + file.read_text().split("\n").index(" },") + 1
    with pytest.raises(StreamError, match=rf"{name} has bad rows: line {line}: {message}"):
        load(file)


def test_a_file_that_is_no_list_of_rows_is_refused(folder: Path) -> None:
    for text, message in (
        ("{}", "must hold a JSON list"),
        ("[", "breaks off"),
        ("[{},\n {,}]", "line 2: not valid JSON"),
        ("[{} {}]", "a comma is missing"),
        ("[]", "has no rows"),
    ):
        (folder / "a.json").write_text(text)
        with pytest.raises(StreamError, match=message):
            load(folder / "a.json")
    with pytest.raises(StreamError, match="no such file"):
        load(folder / "none.json")
    (folder / "empty").mkdir()
    with pytest.raises(StreamError, match="no conversations in"):
        load(folder / "empty")


def test_an_image_that_cannot_be_decoded_is_named_when_it_is_read(folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"nothing")
    rows = [row(image=f"{index}.png") for index in range(3)] + [row(image="bad.png", split="val")]
    (task,) = load(write(folder / "a.json", rows)).tasks
    with pytest.raises(DataError, match=r"a\.json\[3\]: .*bad\.png"):
        task.val[0]


def test_a_model_learns_a_users_conversations(folder: Path) -> None:
    rows = [row("<image>\nwhat is it ?", "red dot", image=f"{index}.png") for index in range(8)]
    rows += [row("what is it ?", "blue bar") for _ in range(8)]
    stream = load(write(folder / "a.json", rows), max_new_tokens=4)
    training = TrainingConfig(
        max_steps=30, per_device_train_batch_size=4, learning_rate=2e-2, warmup_steps=0,
        augment=False, label_smoothing_factor=0.0,
    )  # fmt: skip
    config = SequentialLoRAConfig(r=4, target_modules=("all-linear",))
    learner = Learner(writer("internvl"), method=config, training=training)
    learner.learn(stream.tasks[0])
    assert learner.evaluate(stream.tasks[0]).score == 1.0
