"""CMIT, CoIN and UCIT from files in their published layouts."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.backbones.writers import writer
from tests.streams import instruction_sets as build

from evolora.config import load_stream
from evolora.doctor import examine
from evolora.errors import ConfigError, StreamError
from evolora.learner import Learner
from evolora.methods.lora import SequentialLoRAConfig
from evolora.registry import ANSWER_METRICS
from evolora.streams.instruction_sets import CMIT, COIN, SETS, UCIT
from evolora.streams.task import Stream
from evolora.training.config import TrainingConfig

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "cmit": build.cmit,
    "coin": build.coin,
    "ucit": build.ucit,
}


def load(name: str, root: Path, **options: Any) -> Stream:
    return load_stream(name, root=str(root), **options)


def named(stream: Stream, name: str) -> Any:
    return next(task for task in stream if task.name == name)


def test_the_orders_metrics_and_counts_are_the_published_ones() -> None:
    assert [(task.name, task.metric, task.rows, task.passes) for task in CMIT.tasks] == [
        ("vizwiz-caption", "cider-d", 117_155, 1),
        ("sk-vg", "iou-accuracy", 23_404, 5),
        ("textcaps", "cider-d", 109_765, 1),
        ("iconqa", "option-accuracy", 18_946, 5),
        ("ocrvqa", "exact-match", 166_043, 1),
        ("flickr30k", "cider-d", 145_000, 1),
        ("vizwiz", "textvqa-accuracy", 20_523, 5),
        ("kvqa", "exact-match", 146_408, 1),
        ("pmcvqa", "option-accuracy", 176_948, 1),
    ]
    assert sum(task.rows or 0 for task in CMIT.tasks) == 924_192
    coin = "ScienceQA TextVQA ImageNet GQA VizWiz Grounding VQAv2 OCR-VQA"
    assert [task.name for task in COIN.tasks] == coin.split()
    ucit = "ImageNet-R ArxivQA VizWiz-caption IconQA CLEVR-Math Flickr30k"
    assert [task.name for task in UCIT.tasks] == ucit.split()
    for one in SETS.values():
        for task in one.tasks:
            assert task.metric in ANSWER_METRICS


@pytest.mark.parametrize("name", BUILDERS)
def test_every_row_of_a_published_layout_is_read_and_can_be_judged(
    tmp_path: Path, name: str
) -> None:
    stream = load(name, BUILDERS[name](tmp_path / "data"))
    assert [task.name for task in stream] == [task.name for task in SETS[name].tasks]
    for task in stream:
        examples = [*task.train, *task.test]  # decodes every image
        assert len(task.train) and len(task.test) and len(task.val) == 0
        assert all(isinstance(one.inputs["text"], str) for one in examples)
        answers = [one.label for one in task.test]
        best = ANSWER_METRICS.get(task.metric).score([a[0] for a in answers], answers)
        if task.metric != "cider-d":  # all references are alike here, so no word is rare
            assert best.mean == 1.0


def test_cmit_asks_as_published(tmp_path: Path) -> None:
    stream = load("cmit", build.cmit(tmp_path / "data"))
    caption = named(stream, "vizwiz-caption").test[0]
    assert caption.inputs["text"] == "Provide a one-sentence caption for the provided image."
    assert caption.label == ("a red dot", "a small dot")
    assert named(stream, "flickr30k").test[0].inputs["image"][0, 0, 0] == 160
    box = named(stream, "sk-vg").test[0]
    assert box.inputs["text"] == (
        "Based on the knowledge Dots are round.\nPlease provide the bounding box coordinate of "
        "the region this sentence describes: <ref>the dot</ref>"
    )
    assert box.label == ("[[50, 200, 300, 800]]",)
    choice = named(stream, "iconqa").test[1]
    assert choice.inputs["text"] == (
        "which ?\nA. a bar\nB. a dot\nAnswer with the option's letter from the given choices "
        "directly."
    )
    assert choice.label == ("B", "a dot")
    short = "Answer the question using a single word or phrase."
    assert named(stream, "kvqa").test[0].inputs["text"] == f"who ? {short}"
    assert named(stream, "kvqa").test[0].label == ("Ann",)
    people = named(stream, "vizwiz").test[1]
    assert people.label == tuple(build.PEOPLE)
    assert people.inputs["text"] == (
        "who ? When the provided information is insufficient, respond with 'Unanswerable'. " + short
    )
    limits = {task.name: task.labels.max_new_tokens for task in stream}
    assert limits["flickr30k"] == 30 and limits["vizwiz"] == limits["pmcvqa"] == 10
    assert limits["kvqa"] == limits["sk-vg"] == 100


def test_the_source_says_which_tasks_are_trained_on_several_times(tmp_path: Path) -> None:
    root = build.cmit(tmp_path / "data")
    assert load("cmit", root).source == (
        f"CMIT, 9 of 9 tasks below {root}; published training goes through sk-vg 5 times, "
        "iconqa 5 times, vizwiz 5 times"
    )
    assert load("cmit", root, order=["kvqa"]).source == f"CMIT, 1 of 9 tasks below {root}"


def test_a_model_learns_and_is_tested_on_tasks_of_every_kind(tmp_path: Path) -> None:
    order = ["sk-vg", "textcaps", "iconqa", "vizwiz", "kvqa"]
    stream = load("cmit", build.cmit(tmp_path / "data"), order=order, max_new_tokens=2)
    training = TrainingConfig(
        max_steps=1, per_device_train_batch_size=2, warmup_steps=0, augment=False,
        label_smoothing_factor=0.0,
    )  # fmt: skip
    config = SequentialLoRAConfig(r=2, target_modules=("all-linear",))
    learner = Learner(writer("internvl"), method=config, training=training)
    for task in stream:
        learner.learn(task)
        assert 0.0 <= learner.evaluate(task).score <= 1.0


def test_coin_and_ucit_ask_what_their_rows_say(tmp_path: Path) -> None:
    coin = load("coin", build.coin(tmp_path / "coin"))
    science = named(coin, "ScienceQA").test
    assert science[0].inputs["text"] == "<image>\nwhat ?\nBe short." and science[0].label == ("B",)
    assert "image" not in science[2].inputs
    assert named(coin, "TextVQA").test[0].label == tuple(build.PEOPLE)
    assert named(coin, "Grounding").test[0].label == ("[0.1, 0.2, 0.5, 0.9]",)
    ucit = load("ucit", build.ucit(tmp_path / "ucit"))
    assert named(ucit, "CLEVR-Math").test[0].label == ("3",)
    assert named(ucit, "Flickr30k").test[0].label == ("a red dot", "a small dot")


def test_folders_may_be_spelt_in_other_ways(tmp_path: Path) -> None:
    root = build.cmit(tmp_path / "data")
    (root / "sk-vg").rename(root / "SKVG")
    for path in root.glob("SKVG/*.jsonl"):
        path.write_text(path.read_text().replace("data/sk-vg/", "data/SKVG/"))
    (root / "vizwiz-caption").rename(root / "vizwiz_caption")
    (root / "skvg").mkdir()  # empty: the other one has the rows
    train = root / "vizwiz_caption" / "train.jsonl"
    train.write_text(train.read_text().replace("vizwiz-caption", "vizwiz_caption"))
    assert [len(task.train) for task in load("cmit", root)] == [3] * 9
    root = build.coin(tmp_path / "coin", "Instructions_Diverse")
    with pytest.raises(StreamError, match="8 of 8 CoIN tasks cannot be read: ScienceQA: no train"):
        load("coin", root)
    assert len(load("coin", root, instructions="Instructions_Diverse")) == 8
    data = build.ucit(tmp_path / "ucit")
    for path in (data / "instructions").iterdir():
        shutil.move(path, data / path.name)
    assert len(load("ucit", data)) == 6


def test_one_message_names_every_task_that_is_missing_or_bad(tmp_path: Path) -> None:
    root = build.cmit(tmp_path / "data")
    shutil.rmtree(root / "kvqa")
    (root / "pmcvqa" / "test_clean.jsonl").unlink()
    (root / "vizwiz" / "vizwiz_val_annotations.json").unlink()
    bad = root / "ocrvqa" / "train.jsonl"
    bad.write_text(bad.read_text() + '{"conversations": []}\n')
    with pytest.raises(StreamError) as caught:
        load("cmit", root)
    message = str(caught.value)
    assert "4 of 9 CMIT tasks cannot be read" in message
    assert f"kvqa: no train.jsonl in {root / 'kvqa'}" in message
    assert f"pmcvqa: no test_clean.jsonl in {root / 'pmcvqa'}" in message
    assert "vizwiz: no vizwiz_val_annotations.json, which has the test answers" in message
    assert f"ocrvqa: {bad} has bad rows: line 4: conversations must be a list" in message
    order = ["textcaps", "sk-vg"]
    assert [task.name for task in load("cmit", root, order=order)] == order
    with pytest.raises(ConfigError, match="unknown CMIT task 'textcap'; did you mean 'textcaps'"):
        load("cmit", root, order=["textcap"])
    with pytest.raises(ConfigError, match="unknown metric"):
        load("cmit", root, order=order, metric={"textcaps": "cider"})


BAD_ROWS = {
    ("kvqa", "test.jsonl"): {
        "no answer; it has image, question": {"question": "who ?"},
        "answer must be a text or a list of them; got ' '": {"question": "who ?", "answer": " "},
        "question must be a text; got 3": {"question": 3, "answer": "a"},
        "no such image": {"image": "none.png", "question": "who ?", "answer": "a"},
        "0 images and 1 <image> markers": {"image": None, "question": "<image>", "answer": "a"},
    },
    ("pmcvqa", "test_clean.jsonl"): {
        "choices must be a list of 2 to 10": {"question": "q", "choices": ["a"], "answer": 0},
        "answer must be the place of a choice": {"question": "q", "choices": [1, 2], "answer": 2},
    },
    ("sk-vg", "test.jsonl"): {
        "bbox must be .* got .1, 2, 3.": {"bbox": [1, 2, 3]},
        "width and height must be positive": {"bbox": [1, 2, 3, 4], "width": 0, "height": 9},
        "with x1 < x2": {"bbox": [9, 2, 3, 4], "width": 9, "height": 9},
    },
    ("vizwiz", "vizwiz_val.jsonl"): {
        "no answers of question '9'": {"question": "who ?", "question_id": 9},
    },
}


@pytest.mark.parametrize(
    ("place", "message"), [(place, one) for place, rows in BAD_ROWS.items() for one in rows]
)
def test_a_bad_test_row_is_named_by_file_and_line(
    tmp_path: Path, place: tuple[str, str], message: str
) -> None:
    task, name = place
    file = build.cmit(tmp_path / "data") / task / name
    row = {"image": f"data/{task}/images/val/0.png", **BAD_ROWS[place][message]}
    file.write_text(file.read_text() + json.dumps(row) + "\n")
    with pytest.raises(StreamError, match=f"{name} has bad rows: line 3: .*{message}"):
        load("cmit", tmp_path / "data", order=[task])


def test_bad_files_of_answers_are_named(tmp_path: Path) -> None:
    root = build.cmit(tmp_path / "data")
    captions = root / "textcaps" / "val.json"
    whole = json.loads(captions.read_text())
    for change, message in (
        ({"annotations": whole["annotations"][2:]}, r"images\[0\]: no caption of image id 7"),
        ({"annotations": [*whole["annotations"], {"image_id": 8}]}, r"annotations\[4\]: needs"),
        ({"images": [{"id": 7}]}, r"images\[0\]: needs id and file_name"),
        ({"images": []}, "has no images"),
        ({"images": {}}, "needs the lists images and annotations; it has images, annotations"),
    ):
        captions.write_text(json.dumps({**whole, **change}))
        with pytest.raises(StreamError, match=message):
            load("cmit", root, order=["textcaps"])
    captions.write_text("{,}")
    with pytest.raises(StreamError, match=r"val\.json, line 1: not valid JSON"):
        load("cmit", root, order=["textcaps"])
    people = root / "vizwiz" / "vizwiz_val_annotations.json"
    for text, message in (
        ('{"rows": []}', "neither annotations nor data; it has rows"),
        ('{"data": [{"question_id": 0, "answers": ["red"]}]}', "row 1: needs question_id and at"),
        ("[]", "must hold a JSON object; it holds list"),
    ):
        people.write_text(text)
        with pytest.raises(StreamError, match=message):
            load("cmit", root, order=["vizwiz"])


def test_answers_that_must_be_letters_are(tmp_path: Path) -> None:
    root = build.coin(tmp_path)
    file = root / "Instructions_Original" / "ScienceQA" / "test.json"
    file.write_text(file.read_text().replace('"A"', '"a dot"'))
    with pytest.raises(StreamError, match="must be an option's letter; got 'a dot'"):
        load("coin", root, order=["ScienceQA"])


def test_counts_that_are_not_the_published_ones_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = build.cmit(tmp_path / "data")
    with caplog.at_level(logging.WARNING):
        load("cmit", root, order=["flickr30k"], limit=1)
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [
        "cmit/flickr30k has 3 training rows, the published set 145000: complete the data before "
        "comparing",
        "cmit/flickr30k has 1 test rows, the published set 1000: complete the data before "
        "comparing",
    ]


def test_doctor_says_which_tasks_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def finding() -> str:
        found = [one for one in examine() if one["name"] == "published instructions"]
        return str(found[0]["detail"])

    assert "cmit 0 of 9 tasks" in finding() and "docs/streams.md" in finding()
    root = build.cmit(tmp_path / "data")
    assert "cmit 9 of 9 tasks, coin 0 of 8" in finding() and "docs" not in finding()
    (root / "kvqa" / "train.jsonl").unlink()
    assert "cmit 8 of 9 tasks" in finding()


def test_options_change_metrics_limits_images_and_size(tmp_path: Path) -> None:
    root = build.coin(tmp_path / "coin")
    shutil.move(root / "ImageNet", tmp_path / "elsewhere" / "ImageNet")
    options: dict[str, Any] = {"order": ["ImageNet"], "metric": "token-f1", "limit": 1}
    with pytest.raises(StreamError, match="no such image"):
        load("coin", root, **options)
    images = str(tmp_path / "elsewhere")
    (task,) = load("coin", root, images=images, max_new_tokens={"ImageNet": 7}, **options)
    assert (task.metric, task.labels.max_new_tokens) == ("token-f1", 7)
    assert (len(task.train), len(task.test)) == (1, 1)
