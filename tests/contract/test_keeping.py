"""The contract on keeping: saved and loaded, or killed and resumed, a method is the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tests.conftest import toy_task
from tests.contract.cases import (
    BOTH,
    EVERY,
    answer,
    make,
    mixed_batch,
    teach,
    toy_backbone,
)
from torch import Tensor

from evolora.learner import Learner, Progress
from evolora.storage.state import export_state, load_state


def assert_same_state(left: Learner, right: Learner) -> None:
    a, b = export_state(left.method), export_state(right.method)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@EVERY
@BOTH
def test_saved_and_loaded_is_equal(name: str, kind: str, tmp_path: Path) -> None:
    learner = teach(make(name, kind), 2)
    learner.save_pretrained(tmp_path)
    loaded = Learner.from_pretrained(tmp_path, model=toy_backbone(kind))
    assert loaded.method.config == learner.method.config
    assert loaded.task_names == learner.task_names
    assert loaded.method.labels == learner.method.labels
    assert_same_state(learner, loaded)
    batch = mixed_batch(learner.backbone)
    for task in (0, 1):
        assert torch.equal(answer(learner, batch, task), answer(loaded, batch, task))
    images = [toy_task(task).test[row].inputs["image"] for task in range(3) for row in range(3)]
    assert learner.predict(images) == loaded.predict(images)
    if learner.method.joint:
        return
    loaded.recall([toy_task(0), toy_task(1)])  # for methods that replay them
    loaded.training, loaded.method.objective = learner.training, learner.method.objective
    learner.learn(toy_task(2))  # and what it learns next is the same as well
    loaded.learn(toy_task(2))
    assert_same_state(learner, loaded)


@EVERY
def test_resumed_in_the_middle_is_equal(name: str) -> None:
    learner = make(name, save_steps=3, max_steps=5)
    states: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []

    def save(step: int, moments: Mapping[str, Tensor]) -> None:
        state = {k: v.clone() for k, v in export_state(learner.method).items()}
        states.append((step, state, {k: v.clone() for k, v in moments.items()}))

    joint = learner.method.joint
    if joint:
        learner.learn_jointly([toy_task(0), toy_task(1)], save=save)
    else:
        learner.learn(toy_task(0))
        learner.learn(toy_task(1), save=save)
    assert len(states) == (0 if name == "zero-shot" else 3 if joint else 1)
    for step, state, moments in states:
        again = make(name, save_steps=3, max_steps=5)
        again.begin(toy_task(0))
        if not joint:
            again.method.finish_task()
        again.begin(toy_task(1))
        load_state(again.method, state)
        place = Progress(step=step, moments=moments)
        if joint:
            again.learn_jointly([toy_task(0), toy_task(1)], progress=place)
        else:
            again.learn(toy_task(1), progress=place)
        assert_same_state(learner, again)
