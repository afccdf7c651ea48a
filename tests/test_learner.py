"""The front door: predict, evaluate, learn; and whatever a user may hand in."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import ToyImages, ToyProcessor, toy_model, toy_task
from tests.training.worker import PLUGGED, TOY

import evolora
from evolora.backbones.clip import DualEncoder
from evolora.errors import ConfigError, DataError, EvoloraError, StorageError
from evolora.learner import Answer, Learner
from evolora.routing.autoencoders import AutoEncoderTraining
from evolora.routing.selector import AutoEncoderSelectorConfig
from evolora.streams.task import LabelSpace, Subset, Task
from evolora.training.config import TrainingConfig
from evolora.training.continual import seen_labels
from evolora.training.held_out import split_held_out

ROOT = Path(__file__).parents[1]
FAST = TrainingConfig(max_steps=12, warmup_steps=2, per_device_train_batch_size=8,
                      learning_rate=5e-3)  # fmt: skip
SELECTOR = AutoEncoderSelectorConfig(training=AutoEncoderTraining(hidden=8, steps=150))
MOE = evolora.MoEAdapters(num_experts=4, r=4, selector=SELECTOR)


def make(method: Any = MOE, tasks: int = 0, *, name: str = "toy") -> Learner:
    backbone = DualEncoder(toy_model(), ToyProcessor(), name=name)
    learner = Learner(backbone, method=method, training=FAST)
    for index in range(tasks):
        learner.learn(toy_task(index))
    return learner


@pytest.fixture(scope="module")
def learned() -> Learner:
    """MoE-Adapters after two toy tasks."""
    return make(tasks=2)


@pytest.fixture(scope="module")
def images() -> list[Any]:
    """Images of four toy tasks in turn: two learned, two not."""
    return [toy_task(i % 4).test[i % 12].inputs["image"] for i in range(64)]


def test_one_image_is_answered_as_its_row_in_a_batch_of_64(
    learned: Learner, images: list[Any]
) -> None:
    together = learned.predict(images)
    assert (
        len({answer.task for answer in together}) > 1
    )  # the batch is mixed, so it means something
    for image, row in zip(images, together, strict=True):
        (alone,) = learned.predict(image)
        assert (alone.label, alone.task) == (row.label, row.task)
        for (name, score), (row_name, row_score) in zip(alone.top, row.top, strict=True):
            assert abs(score - row_score) < 1e-5
            assert name == row_name or abs(score - row_score) < 1e-5


def test_more_images_than_a_batch_keep_their_order(learned: Learner, images: list[Any]) -> None:
    expected = learned.predict(images)
    learned.evaluation_batch_size, before = 5, learned.evaluation_batch_size
    try:
        got = learned.predict(images)
    finally:
        learned.evaluation_batch_size = before
    assert [(a.label, a.task) for a in got] == [(a.label, a.task) for a in expected]


def test_an_answer_lists_its_best_five_in_order(learned: Learner, images: list[Any]) -> None:
    for answer in learned.predict(images):
        scores = [score for _, score in answer.top]
        assert scores == sorted(scores, reverse=True)
        assert answer.top[0] == (answer.label, answer.score)
        # a task answers among its own three classes, the base among all six
        assert len(answer.top) == (5 if answer.task == "base" else 3)
        if answer.task != "base":
            assert answer.label.split()[0] == answer.task.split()[0]
            assert sum(scores) == pytest.approx(1, abs=1e-5)


def test_classes_replace_what_is_chosen_from(learned: Learner, images: list[Any]) -> None:
    for answer in learned.predict(images[:8], classes=["red ring", "blue dot"]):
        assert {name for name, _ in answer.top} == {"red ring", "blue dot"}
        assert sum(score for _, score in answer.top) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("classes", ["cat", [], [1, 2], [""], {"a", "b"}, 3, ["a", "a"], None])
def test_wrong_classes_are_one_error(learned: Learner, images: list[Any], classes: Any) -> None:
    if classes is None:
        assert learned.predict(images[0], classes=None)
        return
    with pytest.raises(EvoloraError, match="class"):
        learned.predict(images[0], classes=classes)


@pytest.mark.parametrize("name", sorted(set(TOY) - set(PLUGGED)))
def test_nothing_learned_yet_asks_for_classes_and_then_the_base_answers(
    name: str, images: list[Any]
) -> None:
    learner = make(TOY[name])
    with pytest.raises(DataError, match="nothing is learned yet; pass classes="):
        learner.predict(images[0])
    answers = learner.predict(images[:3], classes=["red dot", "blue bar"])
    base = make(evolora.ZeroShot()).predict(images[:3], classes=["red dot", "blue bar"])
    assert answers == base and {answer.task for answer in answers} == {"base"}
    result = learner.evaluate(toy_task(0))
    assert result.routes == {"base": 12} and 0 <= result.score <= 1
    with pytest.raises(ConfigError, match="nothing is learned yet"):
        learner.predict(images[0], task="red shapes")


def test_a_list_may_mix_all_kinds_of_images(learned: Learner, tmp_path: Path) -> None:
    pixels = toy_task(0).test[0].inputs["image"]
    array = pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    picture.save(tmp_path / "a.png")
    encoded = (tmp_path / "a.png").read_bytes()
    kinds = [pixels, array, picture, str(tmp_path / "a.png"), tmp_path / "a.png", encoded]
    answers = learned.predict(kinds)
    assert len(answers) == 6
    for answer in answers[1:]:
        assert (answer.label, answer.task) == (answers[0].label, answers[0].task)
        assert answer.score == pytest.approx(answers[0].score, abs=1e-6)
    assert learned.predict(tuple(kinds)) == answers


def test_an_oracle_method_answers_by_the_task_it_is_told(images: list[Any]) -> None:
    learner = make(evolora.LoRAPerTask(r=2), tasks=2)
    assert {a.task for a in learner.predict(images[:8])} == {"base"}  # it cannot know
    for index, name in enumerate(learner.task_names):
        answers = learner.predict(images, task=name)
        assert {a.task for a in answers} == {name}
        assert {a.label for a in answers} <= set(toy_task(index).labels.classes)
        batch = learner.backbone.collate([toy_task(index).test[row] for row in range(12)])
        expected = learner.method.predict(batch, toy_task(index).labels, oracle=index).scores
        told = learner.predict(
            [toy_task(index).test[i].inputs["image"] for i in range(12)], task=name
        )
        assert [a.score for a in told] == pytest.approx(
            expected.max(dim=1).values.tolist(), abs=1e-5
        )
    first, second = (
        learner.predict(images[0], task=name, classes=["red dot", "blue bar"])[0].score
        for name in learner.task_names
    )
    assert first != second  # other experts, not only other labels


def test_a_told_task_overrides_the_selector(learned: Learner, images: list[Any]) -> None:
    told = learned.predict(images, task="green shapes")
    assert {a.task for a in told} == {"green shapes"}
    own = [a for a in learned.predict(images) if a.task == "green shapes"]
    assert own and set(a.label for a in own) <= set(a.label for a in told)


def test_a_told_task_of_a_method_without_experts_is_the_base(images: list[Any]) -> None:
    learner = make(evolora.ZeroShot(), tasks=1)
    (answer,) = learner.predict(images[0], task="red shapes")
    assert answer.task == "base" and answer.label in toy_task(0).labels.classes


def test_an_unknown_task_is_refused_with_the_nearest(learned: Learner, images: list[Any]) -> None:
    with pytest.raises(ConfigError, match="unknown task 'red shape'; did you mean 'red shapes'"):
        learned.predict(images[0], task="red shape")


def png(mode: str, size: tuple[int, int] = (20, 14), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def gif() -> bytes:
    frames = [Image.new("RGB", (20, 14), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


# name -> (content of in.png or the value itself, whether there is an answer)
INPUTS: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "missing file": (lambda folder: folder / "no.png", False),
    "text file": (lambda folder: b"this is no image", False),
    "empty file": (lambda folder: b"", False),
    "truncated": (lambda folder: png("RGB")[:40], False),
    "1 x 1 px": (lambda folder: png("RGB", (1, 1)), True),
    "1 x 3000 px": (lambda folder: png("RGB", (3000, 1)), True),
    "10k x 10k px": (lambda folder: png("L", (10_000, 10_000), format="JPEG"), True),
    "too large": (lambda folder: png("1", (20_000, 20_000)), False),
    "cmyk": (lambda folder: png("CMYK", format="JPEG"), True),
    "16-bit": (lambda folder: png("I;16"), True),
    "palette with alpha": (lambda folder: png("P", transparency=0), True),
    "animated gif": (lambda folder: gif(), True),
    "a folder": (lambda folder: folder, False),
    "an address": (lambda folder: "https://example.org/a.png", False),
    "empty list": (lambda folder: [], False),
    "a list in a list": (lambda folder: [[folder / "no.png"]], False),
    "none": (lambda folder: None, False),
    "a number": (lambda folder: 3, False),
    "a dict": (lambda folder: {"image": "a.png"}, False),
    "a batch array": (lambda folder: np.zeros((2, 16, 16, 3), np.uint8), False),
    "a float array": (lambda folder: np.zeros((16, 16, 3), np.float32), False),
    "an empty array": (lambda folder: np.zeros((0, 16, 3), np.uint8), False),
    "a generator": (lambda folder: (image for image in ()), False),
    "a pipe": (lambda folder: _pipe(folder), False),
    "a name with nul": (lambda folder: "a\0.png", False),
}


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


@pytest.mark.parametrize("name", INPUTS)
def test_any_input_gives_an_answer_or_one_error(
    name: str, learned: Learner, tmp_path: Path
) -> None:
    build, answered = INPUTS[name]
    given = build(tmp_path)
    if isinstance(given, bytes):
        (tmp_path / "in.png").write_bytes(given)
        given = tmp_path / "in.png"
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(learned.predict(given))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert outcome, "predict hangs"
    if answered:
        assert isinstance(outcome[0], list) and isinstance(outcome[0][0], Answer), outcome[0]
    else:
        assert isinstance(outcome[0], DataError), repr(outcome[0])
        assert "\n" not in str(outcome[0])


def test_an_error_in_a_list_says_which_image(learned: Learner, images: list[Any]) -> None:
    with pytest.raises(DataError, match="image 2 of 3: cannot read an image from array float32"):
        learned.predict([images[0], np.zeros((4, 4, 3), np.float32), images[1]])


def test_evaluate_counts_what_predict_answers(learned: Learner) -> None:
    for index in (0, 1, 2):
        task = toy_task(index)
        result = learned.evaluate(task)
        batch = learned.backbone.collate([task.test[row] for row in range(12)])
        predicted = learned.method.predict(batch, task.labels)
        truth = torch.tensor([task.test[row].label for row in range(12)])
        assert result.score == int((predicted.labels == truth).sum()) / 12
        assert result.samples == 12 and sum(result.routes.values()) == 12
        named = {-1: "base", 0: "red shapes", 1: "green shapes"}
        for route, name in named.items():
            assert result.routes.get(name, 0) == int((predicted.tasks == route).sum())


def test_the_seen_label_space_offsets_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand case: tasks of 3, 2 and 4 classes; the answers are given, the score must be theirs."""
    sizes = (3, 2, 4)
    tasks = [
        dataclasses.replace(
            toy_task(index),
            labels=LabelSpace(
                classes=tuple(f"{index}{i}" for i in range(size)), templates=("a {} .",)
            ),
        )
        for index, size in enumerate(sizes)
    ]
    space, offsets = seen_labels(tasks)
    assert offsets == [0, 3, 5]
    assert space.classes == ("00", "01", "02", "10", "11", "20", "21", "22", "23")
    assert space.templates == ("a {} .",)
    assert [space.classes[offsets[1] + i] for i in range(2)] == list(tasks[1].labels.classes)

    class Answered:
        """Says class 4 ("11") for every image."""

        scores = torch.eye(6)[torch.full((12,), 4)]
        tasks = torch.full((12,), -1)

    learner = make(evolora.ZeroShot())
    monkeypatch.setattr(learner.method, "predict", lambda *_, **__: Answered())
    # Test labels are 0, 1, 2, 0, 1, 2, ...: with offset 3, "11" is right where the label is 1.
    assert learner.evaluate(tasks[1], labels=space, offset=offsets[1]).score == 4 / 12
    assert learner.evaluate(tasks[1], labels=space, offset=2).score == 4 / 12
    assert learner.evaluate(tasks[1], labels=space, offset=5).score == 0
    assert learner.evaluate(tasks[0], labels=space, offset=offsets[0]).score == 0


def test_a_task_name_is_learned_once(learned: Learner) -> None:
    with pytest.raises(
        ConfigError, match=r"'red shapes' is already learned .learned: red shapes, gr"
    ):
        learned.learn(toy_task(0))
    assert learned.task_names == ["red shapes", "green shapes"]


def test_learning_jointly_is_for_joint_methods(learned: Learner) -> None:
    with pytest.raises(
        ConfigError, match=r"moe-adapters learns one task after another.*joint-lora"
    ):
        learned.learn_jointly([toy_task(2), toy_task(3)])
    assert learned.task_names == ["red shapes", "green shapes"]
    with pytest.raises(ConfigError, match="at least one task"):
        make(evolora.JointLoRA(r=2)).learn_jointly([])


def test_joint_batches_take_the_tasks_in_turn_and_from_any_step() -> None:
    learner = make(evolora.JointLoRA(r=2))
    learner.training = TrainingConfig(
        max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    run = learner._task_run("all", [(i, toy_task(i).train) for i in range(3)], 12)
    whole = [(batch.task, batch.keys) for batch in run.batches(0)]
    assert [task for task, _ in whole] == [task for _ in range(4) for task in (0, 0, 1, 1, 2, 2)]
    assert all(key.startswith(f"{task}/") for task, keys in whole for key in keys)
    for step in (1, 2, 3, 7, 11):
        assert [(b.task, b.keys) for b in run.batches(step)] == whole[2 * step :]


def test_a_tenth_is_held_out_where_there_is_no_validation_split() -> None:
    def task(rows: int, val: int) -> Task:
        return dataclasses.replace(toy_task(0, rows), val=ToyImages(0, val, 2))

    train, held = split_held_out(task(24, 5))
    assert (len(train), len(held)) == (24, 5)
    train, held = split_held_out(task(25, 0))
    assert isinstance(train, Subset) and isinstance(held, Subset)
    assert list(held.indices) == [0, 10, 20] and len(train) == 22
    assert set(held.indices).isdisjoint(train.indices)
    train, held = split_held_out(task(1, 0))  # one sample must serve both
    assert (len(train), len(held)) == (1, 1)


def test_a_new_process_without_data_gives_the_same_answers(
    tmp_path: Path, images: list[Any]
) -> None:
    from tests.conftest import WordTokenizer
    from transformers import CLIPImageProcessor, CLIPProcessor

    pixels = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    shown = CLIPImageProcessor(**pixels, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    toy_model().save_pretrained(tmp_path / "clip")
    CLIPProcessor(shown, WordTokenizer()).save_pretrained(tmp_path / "clip")
    learner = make(tasks=2, name=str(tmp_path / "clip"))
    learner.save_pretrained(tmp_path / "artefact")
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    expected = learner.predict([tmp_path / "a.png"])[0]
    code = (
        "import sys, json, evolora, dataclasses\n"
        "learner = evolora.Learner.from_pretrained(sys.argv[1])\n"
        "print(json.dumps(dataclasses.asdict(learner.predict([sys.argv[2]])[0])))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "artefact"), str(tmp_path / "a.png")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["label"], answer["task"]) == (expected.label, expected.task)
    assert answer["score"] == pytest.approx(expected.score, abs=1e-6)


def test_a_loaded_learner_goes_on_learning_as_the_saved_one(tmp_path: Path) -> None:
    learner = make(tasks=2)
    learner.save_pretrained(tmp_path)
    loaded = Learner.from_pretrained(
        tmp_path, DualEncoder(toy_model(), ToyProcessor()), training=FAST
    )
    assert loaded.costs == learner.costs
    for both in (learner, loaded):
        both.learn(toy_task(2))
    mine, theirs = learner.method.state_dict(), loaded.method.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_misspelt_backbone_is_refused_at_once(tmp_path: Path) -> None:
    learner = make(tasks=0, name="clip-tny")
    learner.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"no backbone 'clip-tny'.*openai/clip"):
        Learner.from_pretrained(tmp_path)
    with pytest.raises(StorageError, match="no artefact at"):
        Learner.from_pretrained(tmp_path / "nothing")
