"""Every method that does not need prompts, on image and text with heads, modalities missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.cases import CASES
from tests.methods.pairs import pair_learner, pair_task

from evolora.errors import ConfigError
from evolora.methods.evolora import EvoloraConfig
from evolora.registry import METHODS
from evolora.streams.task import LabelSpace

NAMES = [
    entry.name
    for entry in METHODS
    if not entry.value.needs_prompts and not entry.value.needs_modalities
]
ONE_STREAM = [entry.name for entry in METHODS if entry.value.needs_one_stream]
EACH = [(n, k) for n in NAMES for k in ("vilt", "clip") if k == "vilt" or n not in ONE_STREAM]


# Cases are for CLIP; where a method looks at the model first, here it finds heads.
OWN = {"evolora": EvoloraConfig()}


def config_of(name: str) -> Any:
    return OWN.get(name, CASES[name].config)


def taught(name: str, kind: str, *, several: bool = False, count: int = 2) -> tuple[Any, list]:
    learner = pair_learner(config_of(name), kind)
    tasks = [pair_task(index, several=several) for index in range(count)]
    if learner.method.joint:
        learner.learn_jointly(tasks)
    else:
        for task in tasks:
            learner.learn(task)
    return learner, tasks


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_it_learns_answers_and_keeps_older_heads(name: str, kind: str) -> None:
    learner, tasks = taught(name, kind)
    heads = learner.method.heads
    replays = learner.method.reservoir is not None
    frozen = 0 if learner.method.joint or replays else 3
    assert heads.weight.frozen.shape[0] == frozen and len(heads.weight) == 6
    classes = tuple(name for task in tasks for name in task.labels.classes)
    for index, task in enumerate(tasks):
        result = learner.evaluate(task, labels=LabelSpace(classes=classes), offset=3 * index)
        assert set(result.by_case) == {"complete", "text_missing", "image_missing"}
        assert 0.0 <= result.score <= 1.0
    batch = learner.backbone.collate([tasks[1].test[row] for row in range(6)])
    whole = learner.method.predict(batch, LabelSpace(classes=classes), oracle=1)
    for row in range(6):
        alone = learner.method.predict(
            batch.take(torch.tensor([row])), LabelSpace(classes=classes), oracle=1
        )
        torch.testing.assert_close(alone.scores[0], whole.scores[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_several_labels_are_learned_and_scored(name: str) -> None:
    learner, tasks = taught(name, "vilt", several=True, count=1)
    before = pair_learner(config_of(name))
    before.begin(tasks[0])
    batch = learner.backbone.collate([tasks[0].train[row] for row in range(12)], task=0)
    scores = learner.method.predict(batch, tasks[0].labels, oracle=0).scores
    assert scores.shape == (12, 3) and not torch.allclose(scores.sum(dim=1), torch.ones(12))
    # The third class is there in every sample: some steps suffice to say so.
    assert (scores[:, 2] > scores[:, :2].mean(dim=1)).all()
    assert 0.0 < learner.evaluate(tasks[0]).score <= 1.0


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, k in EACH if CASES[n].retains])
def test_answers_of_a_finished_task_stay(name: str, kind: str) -> None:
    learner = pair_learner(config_of(name), kind)
    first = pair_task(0)
    learner.learn(first)
    batch = learner.backbone.collate([first.test[row] for row in range(6)])
    tasks = torch.full((6,), learner.method.expert_task(0))

    def answer() -> torch.Tensor:
        with torch.no_grad():
            return learner.method.answer(batch, None, tasks, first.labels).scores

    before = answer()
    learner.learn(pair_task(1))
    torch.testing.assert_close(answer(), before, rtol=0, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("name", ONE_STREAM)
def test_a_method_of_one_stream_refuses_two_towers(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} needs .*; ClipFusion runs them apart"):
        pair_learner(CASES[name].config, "clip")
