"""MCL's data sets as published: each layout's rows, prompts, and what is not there."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from evolora.config import load_stream
from evolora.errors import ConfigError, StreamError
from evolora.streams.mcl_published import published
from evolora.streams.task import Example


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def table(file: Path, *rows: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows(rows)


def read(root: Path, modality: str, split: str = "train", **source: Any) -> list[Example]:
    return published(root, modality, [{"split": split, "files": "files", **source}])[split]


def said(rows: list[Example]) -> list[tuple[Any, Any]]:
    return [(row.inputs["text"], row.label) for row in rows]


def test_captions_are_one_by_one_in_training_and_together_in_tests(tmp_path: Path) -> None:
    put(tmp_path, "files/video0.mp4", "files/video1.mp4")
    rows = [
        {"video": "video0.mp4", "caption": "a man runs", "image_id": "0"},
        {"video": "video1.mp4", "caption": ["a cat", "a tom cat"], "instance_id": "1"},
        {"video": "video0.mp4", "caption": "someone runs", "image_id": "0"},
    ]
    (tmp_path / "cap.json").write_text(json.dumps(rows))
    options = {"format": "captions", "annotations": "cap.json"}
    train = read(tmp_path, "video", **options)
    asked = "a short description."
    assert said(train) == [
        (asked, "a man runs"), (asked, "a cat"), (asked, "a tom cat"), (asked, "someone runs"),
    ]  # fmt: skip
    assert train[0].inputs["video"] == str(tmp_path / "files/video0.mp4")
    test = read(tmp_path, "video", "test", **options)
    assert [row.label for row in test] == [("a man runs", "someone runs"), ("a cat", "a tom cat")]


def test_cocos_own_layout_names_its_files_by_number(tmp_path: Path) -> None:
    put(tmp_path, "files/000007.jpg")
    content = {
        "images": [{"id": 7, "file_name": "000007.jpg"}],
        "annotations": [
            {"image_id": 7, "caption": "a dog."}, {"image_id": 7, "caption": "one dog."},
        ],
    }  # fmt: skip
    (tmp_path / "coco.json").write_text(json.dumps(content))
    rows = read(tmp_path, "image", "test", format="captions", annotations="coco.json")
    assert said(rows) == [("a short description", ("a dog.", "one dog."))]


def test_questions_stand_in_the_published_prompts(tmp_path: Path) -> None:
    put(tmp_path, "files/video7010.mp4", "files/vid1.avi")
    own = [{"video_id": 7010, "question": "who is it?", "answer": "man", "id": 1}]
    (tmp_path / "msrvtt.json").write_text(json.dumps(own))
    lavis = [{"video": "vid1.avi", "question": "what {is}?", "answer": "cat", "question_id": 2}]
    (tmp_path / "msvd.json").write_text(json.dumps(lavis))
    first = read(tmp_path, "video", format="qa", annotations="msrvtt.json")
    assert said(first) == [("based on the given video respond to who is it?.", "man")]
    second = read(
        tmp_path, "video", format="qa", annotations="msvd.json", ask="Question: {} Answer:"
    )
    assert said(second) == [("Question: what {is}? Answer:", "cat")]


def test_audio_sets_name_files_in_their_own_ways(tmp_path: Path, caplog: Any) -> None:
    put(tmp_path, "files/abc_30.flac", "files/rain.wav", "files/12.flac")
    head = ["audiocap_id", "youtube_id", "start_time", "caption"]
    table(tmp_path / "ac.csv", head, [1, "abc", 30, "Rain, then\nwind"], [2, "gone", 0, "Dogs"])
    with caplog.at_level(logging.WARNING):
        rows = read(tmp_path, "audio", format="audiocaps", annotations="ac.csv")
    assert said(rows) == [("a short description.", "Rain, then\nwind")]
    assert "1 of 2 rows left out" in caplog.text
    table(
        tmp_path / "qa.csv", [*head, "question", "answer"],
        [1, "abc", 30, "Rain", "what falls?", "rain"],
    )  # fmt: skip
    rows = read(tmp_path, "audio", format="audiocaps", annotations="qa.csv")
    assert said(rows) == [("Question: what falls? Answer:", "rain")]
    columns = ["file_name", *(f"caption_{n}" for n in range(1, 6))]
    table(tmp_path / "clotho.csv", columns, ["rain.wav", "a", "b", "c", "d", "e"])
    rows = read(tmp_path, "audio", "test", format="clotho", annotations="clotho.csv")
    assert [row.label for row in rows] == [("a", "b", "c", "d", "e")]
    columns = ["file_name", "QuestionText", "answer", "confidence"]
    answers = [["rain.wav", "Is it wet?", one, "yes"] for one in ("yes", "yes", "no")]
    table(tmp_path / "aqa.csv", columns, *answers)
    rows = read(tmp_path, "audio", "val", format="clotho-qa", annotations="aqa.csv", ask="{}")
    assert said(rows) == [("Is it wet?", ("yes", "yes", "no"))]
    caps = {"num_captions_per_audio": 1, "data": [{"id": "12.wav", "caption": "A bell."}]}
    (tmp_path / "wav.json").write_text(json.dumps(caps))
    rows = read(tmp_path, "audio", format="wavcaps", annotations="wav.json")
    assert said(rows) == [("a short description.", "A bell.")]


def test_depth_sets_are_pairs(tmp_path: Path) -> None:
    put(tmp_path, "files/1.jpg", "maps/1.png", "files/2.jpg", "sun/k.jpg", "sun/k.png")
    turns = [
        {"from": "human", "value": "<image>\nWhat is near?"}, {"from": "gpt", "value": "A cup."},
        {"from": "human", "value": "And far?"}, {"from": "gpt", "value": "A wall."},
    ]  # fmt: skip
    fused = [
        {"source": "llava", "image": "1.jpg", "conversations": turns},
        {"source": "cc3m", "image_id": "1.jpg", "caption": "a kitchen"},
        {"source": "cc3m", "image_id": "2.jpg", "caption": "without a depth map"},
    ]
    (tmp_path / "fused.json").write_text(json.dumps(fused))
    options = {"format": "depth", "annotations": "fused.json", "depth_files": "maps"}
    rows = read(tmp_path, "depth", **options)
    assert said(rows) == [
        ("What is near?", "A cup."), ("And far?", "A wall."),
        ("describe the depth briefly.", "a kitchen"),
    ]  # fmt: skip
    assert rows[0].inputs["depth"] == (str(tmp_path / "files/1.jpg"), str(tmp_path / "maps/1.png"))
    scenes = [{"image_path": "k.jpg", "label": "kitchen"}, {"image_path": "x", "label": "office"}]
    (tmp_path / "sun.json").write_text(json.dumps(scenes))
    rows = read(tmp_path, "depth", "test", format="scenes", annotations="sun.json", files="sun")
    assert len(rows) == 1 and rows[0].label == "kitchen"
    assert rows[0].inputs["text"].startswith("['kitchen', 'office'] What is the category")


def test_objects_are_named_by_their_id(tmp_path: Path) -> None:
    put(tmp_path, "files/a1/a1_8192.npz", "files/b2.ply")
    table(tmp_path / "cap3d.csv", ["a1", "a red chair, worn"], ["b2", "a cup"], ["c3", "gone"])
    rows = read(tmp_path, "pc", format="cap3d", annotations="cap3d.csv")
    assert said(rows) == [
        ("describe the 3d model.", "a red chair, worn"), ("describe the 3d model.", "a cup"),
    ]  # fmt: skip
    assert rows[0].inputs["pc"] == str(tmp_path / "files/a1/a1_8192.npz")
    assert rows[1].inputs["pc"] == str(tmp_path / "files/b2.ply")
    lavis = [{"sample_id": "a1", "data": ["a chair", "a seat"]}]
    (tmp_path / "cap3d.json").write_text(json.dumps(lavis))
    rows = read(tmp_path, "pc", "val", format="cap3d", annotations="cap3d.json")
    assert rows[0].label == ("a chair", "a seat")
    asked = [{"sample_id": "a1", "question": "what color?", "answer": "red", "caption": "x"}]
    (tmp_path / "qa.json").write_text(json.dumps(asked))
    rows = read(tmp_path, "pc", format="cap3d-qa", annotations="qa.json")
    assert said(rows) == [("based on the given input respond to what color?.", "red")]


def test_a_stream_mixes_published_sets_and_own_folders(tmp_path: Path) -> None:
    put(tmp_path, "pc-files/a.npy", "audio/a.wav")
    table(tmp_path / "cap3d.csv", ["a", "a cup"])
    for split in ("train", "test"):
        row = [{"audio": "a.wav", "question": "what?", "answer": "bell"}]
        (tmp_path / "audio" / f"{split}.json").write_text(json.dumps(row))
    source = {"format": "cap3d", "annotations": "cap3d.csv", "files": "pc-files"}
    sources = {"pc": [{**source, "split": split} for split in ("train", "test")]}
    stream = load_stream("mcl", root=str(tmp_path), order=["audio", "pc"], sources=sources)
    audio, pc = stream.tasks
    assert audio.train[0].label == "bell"
    assert pc.train[0].label == "a cup" and len(pc.test) == 1 and len(pc.val) == 0


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    put(tmp_path, "files/other.mp4")
    (tmp_path / "a.json").write_text(json.dumps([{"video": "gone.mp4", "caption": "x"}]))
    options = {"annotations": "a.json"}
    with pytest.raises(ConfigError, match="unknown format 'captoins'; did you mean 'captions'"):
        read(tmp_path, "video", format="captoins", **options)
    with pytest.raises(ConfigError, match="unknown split 'dev'"):
        read(tmp_path, "video", "dev", format="captions", **options)
    with pytest.raises(ConfigError, match=r"a source of 'video'.*'folder'"):
        read(tmp_path, "video", format="captions", folder="x", **options)
    with pytest.raises(StreamError, match="none of the files of its 1 rows is in files"):
        read(tmp_path, "video", format="captions", **options)
    with pytest.raises(StreamError, match="is not laid out as 'qa': KeyError"):
        read(tmp_path, "video", format="qa", **options)
    with pytest.raises(StreamError, match="no such file"):
        read(tmp_path, "video", format="qa", annotations="gone.json")
    (tmp_path / "bad.json").write_text("[1,\n2")
    with pytest.raises(StreamError, match=r"not valid JSON \(line 2\)"):
        read(tmp_path, "video", format="qa", annotations="bad.json")
