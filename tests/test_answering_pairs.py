"""Predictions from an image, a text, or both; what is missing is said and never guessed."""

from __future__ import annotations

import pytest
import torch
from tests.methods.pairs import pair_learner, pair_task

from evolora.errors import DataError
from evolora.learner import Learner
from evolora.methods.delo import DeLoConfig


@pytest.fixture(scope="module")
def learned() -> Learner:
    learner = pair_learner(DeLoConfig(num_factors=4, r=2))
    for index in range(2):
        learner.learn(pair_task(index))
    return learner


def image_of(index: int = 0) -> torch.Tensor:
    return pair_task(index, (0,)).test[0].inputs["image"]


def test_either_side_or_both(learned: Learner) -> None:
    image = image_of().permute(1, 2, 0).numpy()
    alone = learned.predict(image)[0]
    text = learned.predict(texts="a red dot")[0]
    both = learned.predict(image, "a red dot")[0]
    assert [a.used for a in (alone, text, both)] == [("image",), ("text",), ("image", "text")]
    assert all(a.task in learned.task_names for a in (alone, text, both))
    rows = learned.predict([image, None, image], [None, "a red dot", "a red dot"])
    for row, one in zip(rows, (alone, text, both), strict=True):
        assert (row.label, row.task, row.used) == (one.label, one.task, one.used)
        assert row.score == pytest.approx(one.score, abs=1e-5)


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (None, None, "neither an image nor a text was given; pass at least one"),
        ([], [], "neither an image nor a text was given; pass at least one"),
        ([None], [None], "neither an image nor a text was given"),
        ([None, None], ["a", None], "input 2 of 2: neither an image nor a text"),
        (None, [3], "a text must be a string; got int"),
        (["a.png"], ["a", "b"], "1 images and 2 texts were given"),
        (None, ["a red dot", " "], "a text is empty"),
        ("no-such.png", None, "no-such.png"),
    ],
)
def test_what_cannot_be_answered_is_refused(learned: Learner, images, texts, message: str) -> None:
    with pytest.raises(DataError, match=message):
        learned.predict(images, texts)


def test_a_text_for_a_model_that_sees_none(make_backbone) -> None:
    learner = Learner(make_backbone(), method=DeLoConfig(num_factors=4, r=2))
    with pytest.raises(DataError, match="this model sees no text, only image"):
        learner.predict(texts="a red dot")


def test_several_labels_are_all_named() -> None:
    learner = pair_learner(DeLoConfig(num_factors=4, r=2), max_steps=40)
    task = pair_task(0, several=True)
    learner.learn(task)
    answer = learner.predict(texts="a red ring")[0]
    always = task.labels.classes[2]
    assert always in answer.label.split(", ")
    assert dict(answer.top)[always] > 0.5
