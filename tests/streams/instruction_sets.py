"""Builds CMIT, CoIN and UCIT on disk, a few rows each, in the layouts that are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.streams.builders import save_image, write

PEOPLE = ["red"] * 6 + ["dark red"] * 4


def said(question: str, answer: str, image: str | None) -> dict[str, Any]:
    """Return a training row."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "1", **({"image": image} if image else {}), "conversations": turns}


def write_rows(path: Path, rows: list[Any]) -> None:
    lines = path.suffix == ".jsonl"
    write(path, "\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows, indent=1))


def write_captions(path: Path, names: list[str]) -> None:
    images = [{"id": 7 + place, "file_name": name} for place, name in enumerate(names)]
    notes = [
        {"image_id": image["id"], "caption": f"a {word} dot"}
        for image in images
        for word in ("red", "small")
    ]
    write(path, json.dumps({"images": images, "annotations": notes}))


def train(folder: Path, file: str, names: list[str], answer: str = "red") -> None:
    write_rows(folder / file, [said("<image>\nwhat is it ?", answer, name) for name in names])


def cmit(data: Path) -> Path:
    """Write CMIT into a folder called ``data``, whose name image names begin with."""
    files = {
        "vizwiz-caption": "train.jsonl",
        "sk-vg": "train.jsonl",
        "textcaps": "train.jsonl",
        "iconqa": "multi_text_choice_train.jsonl",
        "ocrvqa": "train.jsonl",
        "flickr30k": "train.jsonl",
        "vizwiz": "train.jsonl",
        "kvqa": "train.jsonl",
        "pmcvqa": "train.jsonl",
    }
    asked = {}
    for name, file in files.items():
        for number in range(3):
            save_image(data / name / "images" / "val" / f"{number}.png", (80 * number, 0, 0))
        names = [f"{data.name}/{name}/images/val/{number}.png" for number in range(3)]
        train(data / name, file, names)
        asked[name] = names[:2]
    write_captions(data / "vizwiz-caption" / "val.json", ["0.png", "1.png"])
    write_captions(data / "textcaps" / "val.json", ["val/0.png", "val/1.png"])
    write_captions(data / "flickr30k" / "flickr30k_test_karpathy.json", ["images/val/2.png"])
    box = {"bbox": [10, 20, 60, 80], "width": 200, "height": 100}
    write_rows(
        data / "sk-vg" / "test.jsonl",
        [{"image": name, "sent": "the dot", "knowledge": "Dots are round", **box}
         for name in asked["sk-vg"]],
    )  # fmt: skip
    for name, file in (("iconqa", "multi_text_choice_test.jsonl"), ("pmcvqa", "test_clean.jsonl")):
        choice = {"question": "which ?", "choices": ["a bar", "a dot"], "answer": 1}
        write_rows(data / name / file, [{"image": one, **choice} for one in asked[name]])
    for name, file in (
        ("ocrvqa", "ocrvqa_val.jsonl"),
        ("kvqa", "test.jsonl"),
        ("vizwiz", "vizwiz_val.jsonl"),
    ):
        question = {"question": "who ?", "answer": "Ann"}
        rows = [{"image": one, "question_id": n, **question} for n, one in enumerate(asked[name])]
        write_rows(data / name / file, rows)
    notes = [{"question_id": n, "answers": [{"answer": one} for one in PEOPLE]} for n in range(2)]
    write(data / "vizwiz" / "vizwiz_val_annotations.json", json.dumps({"annotations": notes}))
    return data


COIN_TASKS = (
    *("ScienceQA", "TextVQA", "ImageNet", "GQA"),
    *("VizWiz", "Grounding", "VQAv2", "OCRVQA"),
)


def coin(root: Path, instructions: str = "Instructions_Original") -> Path:
    """Write CoIN: instructions and images below one root."""
    for name in COIN_TASKS:
        folder = root / instructions / name
        for number in range(2):
            save_image(root / name / f"{number}.png")
        names = [f"./{name}/{number}.png" for number in range(2)]
        train(folder, "train.json", names)
        file = {"TextVQA": "val.json", "VizWiz": "val.json", "OCRVQA": "test_1.json"}
        answer = {"ScienceQA": "B", "Grounding": None}.get(name, "red")
        rows = [
            {"question_id": f"q{n}", "image": one, "text": "<image>\nwhat ?\nBe short."}
            | ({"answer": answer} if answer else {"answer_bbox": "[0.1, 0.2, 0.5, 0.9]"})
            for n, one in enumerate(names)
        ]
        if name == "ScienceQA":
            rows.append({"question_id": "q2", "text": "which ?", "answer": "A"})
        write_rows(folder / file.get(name, "test.json"), rows)
    data = [{"question_id": f"q{n}", "answers": PEOPLE} for n in range(2)]
    write(root / "TextVQA" / "TextVQA_0.5.1_val.json", json.dumps({"data": data}))
    return root


def ucit(root: Path) -> Path:
    """Write UCIT as its data set's page says: instructions/ beside datasets/."""
    files = {
        "ImageNet-R": "train.json",
        "ArxivQA": "train_4w.json",
        "VizWiz": "train.json",
        "IconQA": "train.json",
        "CLEVR": "train_4w.json",
        "Flickr30k": "train_brief_4w.json",
    }
    for name, file in files.items():
        folder = root / "instructions" / name
        for number in range(2):
            save_image(root / "datasets" / name / "test" / f"{number}.png")
        names = [f"{name}/test/{number}.png" for number in range(2)]
        train(folder, file, names)
        rows = [
            {"question_id": str(n), "image": one, "text": "<image>\nhow many ?", "answer": 3}
            for n, one in enumerate(names)
        ]
        if name in ("VizWiz", "Flickr30k"):
            rows = [{key: row[key] for key in row if key != "answer"} for row in rows]
            write_captions(folder / "val_coco_type_3000.json", ["1.png", "0.png"])
        write_rows(folder / "test_3000.json", rows)
    return root
