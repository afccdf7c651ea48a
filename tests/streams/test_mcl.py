"""The stream of modalities: its layout, its order, and what is wrong with a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evolora.config import load_stream
from evolora.errors import StreamError


def write(root: Path, modality: str, rows: list[dict[str, Any]], *, test: Any = None) -> None:
    folder = root / modality
    folder.mkdir(parents=True)
    for name in ("a.npy", "b.npy"):
        (folder / name).write_bytes(b"")
    for split, found in (("train", rows), ("test", rows if test is None else test)):
        (folder / f"{split}.json").write_text(json.dumps(found))


def test_modalities_are_read_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "image", [{"image": "a.npy", "question": "what ?", "answer": "cat"}])
    rows = [
        {"depth": ["a.npy", "b.npy"], "question": "where ?", "answer": ["left", "here"], "id": 7},
        {"depth": "a.npy", "image": "b.npy", "answer": "right"},
    ]
    write(tmp_path, "depth", rows)
    stream = load_stream(
        "mcl", root=str(tmp_path), order=["image", "depth"], metric={"depth": "cider-d"}
    )
    image, depth = stream.tasks
    assert (image.name, image.modalities, image.metric) == (
        "image",
        ("image", "text"),
        "exact-match",
    )
    assert depth.metric == "cider-d" and set(depth.modalities) == {"depth", "image", "text"}
    first, second = depth.train
    folder = tmp_path / "depth"
    assert first.inputs == {
        "depth": (str(folder / "a.npy"), str(folder / "b.npy")), "text": "where ?"
    }  # fmt: skip
    assert first.label == ("left", "here") and first.key == "7"
    assert "text" not in second.inputs and second.label == "right"
    short = load_stream("mcl", root=str(tmp_path), order=["depth"], limit=1)
    assert len(short.tasks[0].train) == 1


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        "audio",
        [{"audio": "a.npy", "answer": "bell"}],
        test=[{"audio": "gone.npy", "answer": "x"}],
    )
    with pytest.raises(StreamError, match=r"unknown modality folder 'audoi'; did you mean 'audio'"):
        load_stream("mcl", root=str(tmp_path), order=["audoi"])
    with pytest.raises(StreamError, match=r"no file .*gone\.npy"):
        load_stream("mcl", root=str(tmp_path), order=["audio"])
    write(tmp_path, "pc", [{"audio": "a.npy", "answer": "x"}])
    with pytest.raises(StreamError, match="needs 'pc', the file of the sample"):
        load_stream("mcl", root=str(tmp_path), order=["pc"])
    write(tmp_path, "video", [{"video": "a.npy", "answer": 3}])
    with pytest.raises(StreamError, match=r"needs a question .a text. and an answer"):
        load_stream("mcl", root=str(tmp_path), order=["video"])
