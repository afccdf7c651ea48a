"""A user's conversations through `evolora run` and `evolora predict`: what works, what is refused.

Every fault is one line on standard error with exit code 2 that names the row, file or input.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.backbones.writers import writer

from evolora.cli import main

CONFIG = """
backbone: {{name_or_path: {model}}}
stream: {{name: conversations, path: rows.jsonl, max_new_tokens: 3, val_fraction: 0}}
method: {{type: lwf, r: 2}}
training:
  {{max_steps: 4, per_device_train_batch_size: 4, learning_rate: 1e-2, warmup_steps: 0,
   augment: false}}
"""


def row(question: str, answer: Any = "red dot", **more: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": said, **more}


def rows_of_every_kind(task: str) -> list[dict[str, Any]]:
    """Text only, one image (marked or not, or alone), two images, turns, an answer too long."""
    long = "is it red . is it green . is it blue ."
    kinds = [
        row("is it red ?", "yes"),
        row("<image>\nwhat is it ?", image="0.png"),
        row("what is this ?", image="1.png"),
        row("<image>", image="2.png"),
        row("is <image> this <image> ?", "no", image=["0.png", "wide.png"]),
        row("where is it ?", long),
        row("what is it ?", ["red", "green", "red"]),
    ]
    turns = kinds[0]["conversations"] + row("what ?", "blue bar")["conversations"]
    kinds.append({"conversations": turns})
    return [{**one, "task": task, "split": split} for one in kinds for split in ("train", "test")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model, its images, a file of two tasks, and the run that learned them."""
    place = tmp_path_factory.mktemp("user")
    backbone = writer("idefics3")
    backbone.model.save_pretrained(place / "model")  # type: ignore[operator]
    backbone.processor.save_pretrained(place / "model")
    for index in range(3):
        Image.new("RGB", (16, 16), (80 * index, 0, 200)).save(place / f"{index}.png")
    Image.new("RGB", (40, 12), (0, 90, 0)).save(place / "wide.png")
    (place / "bad.png").write_bytes(b"no image at all")
    (place / "lwf.yaml").write_text(CONFIG.format(model=place / "model"))
    write(place / "rows.jsonl", [*rows_of_every_kind("one"), *rows_of_every_kind("two")])
    assert run(place, "--out", str(place / "run")) == 0
    return place


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(one) for one in rows))
    return str(path)


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(words)
    return int(end.value.code or 0)


def run(folder: Path, *words: str, rows: str = "rows.jsonl") -> int:
    path = f"stream.path={folder / rows}"
    return call("run", str(folder / "lwf.yaml"), path, *words, "--quiet")


def predicted(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert call("predict", str(folder / "run"), *words, "--json") == 0
    (answer,) = json.loads(capsys.readouterr().out)
    return dict(answer)


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    said = capsys.readouterr()
    assert code == 2 and said.out == ""
    assert len(said.err.strip().splitlines()) == 1, said.err
    return said.err


def test_rows_of_every_kind_are_learned_and_judged(folder: Path) -> None:
    matrix = json.loads((folder / "run" / "matrix.json").read_text())
    assert matrix["tasks"] == ["one", "two"]
    cases = json.loads((folder / "run" / "routing.json").read_text())["after"][-1]
    assert set(cases["scores_by_missing"]["one"]) == {"complete", "image_missing"}


def test_every_kind_of_input_is_answered_within_the_limit(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, wide = str(folder / "0.png"), str(folder / "wide.png")
    inputs = {
        "text": ("--text", "is it red ?"),
        "image": (one,),
        "image and text": ("--image", one, "--text", "what is it ?"),
        "several": (one, wide, "--text", "is <image> this <image> ?"),
    }
    found = {name: predicted(capsys, folder, *words) for name, words in inputs.items()}
    assert [answer["used"] for answer in found.values()] == [
        ["text"], ["image"], ["image", "text"], ["image", "text"]
    ]  # fmt: skip
    assert found["several"]["file"] == f"{one}, {wide}"
    for answer in found.values():
        assert answer["task"] == "shared" and answer["score"] is None
        assert len(answer["label"].split()) <= 3


def test_an_input_that_cannot_be_answered_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    saved, one = str(folder / "run"), str(folder / "0.png")

    def said(*words: str) -> str:
        return refused(capsys, call("predict", saved, *words))

    assert "bad.png" in said(str(folder / "bad.png"), "--text", "what ?")
    assert "none.png" in said(str(folder / "none.png"))
    assert "input 2 of 2" in said(one, str(folder / "bad.png"))
    assert "a text is empty" in said(one, "--text", " ")
    assert "neither an image nor a text" in said()
    assert "'input 1' has 1 images and 2 <image> markers" in said(
        one, "--text", "<image> is <image>"
    )
    assert "'input 1' has a prompt of 30" in said("--text", "is it " * 150)
    assert "put the choices into the text" in said(one, "--classes", "red,blue")


def test_a_prompt_beyond_the_limit_is_refused_by_row(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row("is it ?", split=split) for split in ("train", "test")] * 2
    name = write(folder / "long.jsonl", [*rows, row("is it " * 20, split="train")])
    limit = "backbone.text_length=30"
    code = run(folder, limit, "--out", str(folder / "long"), rows=name)
    found = refused(capsys, code)
    assert "'long.jsonl:5' has a prompt of" in found
    assert "the limit is 30 (backbone.text_length)" in found


def test_an_image_that_cannot_be_read_is_refused_by_file_and_row(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row("what ?", image="0.png", split=split) for split in ("train", "test")] * 2
    name = write(folder / "unread.jsonl", [*rows, row("what ?", image="bad.png", split="train")])
    for workers in (0, 2):
        workers_word = f"training.dataloader_num_workers={workers}"
        code = run(folder, workers_word, "--out", str(folder / f"unread{workers}"), rows=name)
        found = refused(capsys, code)
        assert "unread.jsonl:5" in found and "bad.png" in found and "cannot" in found
    broken = (folder / "bad.png").read_bytes()
    (folder / "bad.png").write_bytes((folder / "0.png").read_bytes())
    assert run(folder, "--out", str(folder / "unread0"), "--resume", rows=name) == 0
    (folder / "bad.png").write_bytes(broken)


def test_bad_rows_are_named_by_line_before_anything_is_learned(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = row("what ?", image="0.png")
    bad = [row("<image><image> ?", image="0.png"), row("what ?", image="gone.png"), {"ask": "?"}]
    name = write(folder / "bad.jsonl", [good, bad[0], good, bad[1], bad[2]])
    found = refused(capsys, run(folder, "--out", str(folder / "bad"), rows=name))
    assert "line 2: 1 images and 2 <image> markers" in found
    assert "line 4: no such image" in found and "gone.png" in found
    assert "line 5: no conversations; it has ask" in found
    assert not (folder / "bad").exists()


def test_too_few_rows_to_hold_any_out_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write(folder / "few.jsonl", [row("what ?")])
    found = refused(capsys, run(folder, "--out", str(folder / "few"), rows=name))
    assert "task 'few' needs training and test samples; got 1 and 0" in found
