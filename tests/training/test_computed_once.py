"""Which passes run again and which do not, and whose results are whose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import toy_task
from tests.training.caching import METHODS, MOE, learner_of, rows_through

from evolora.methods.lora import LoRAPerTaskConfig
from evolora.methods.zero_shot import ZeroShotConfig
from evolora.storage.state import export_state, load_state
from evolora.streams.sampling import Rows
from evolora.streams.task import Example, Subset, Task


def test_blocks_below_run_once_per_sample_over_epochs_and_evaluations() -> None:
    learner = learner_of(METHODS["sequential"], max_steps=10)  # 80 rows of 20 samples
    task = toy_task(0, 20)
    backbone = learner.backbone
    assert rows_through(backbone, 0, lambda: learner.learn(task)) == 24  # filled up to 8 each
    assert rows_through(backbone, 0, lambda: learner.evaluate(task)) == 24  # 5, 5 and 2 of 12
    assert rows_through(backbone, 0, lambda: learner.evaluate(task)) == 0
    assert rows_through(backbone, 2, lambda: learner.evaluate(task)) == 12
    assert rows_through(backbone, 0, lambda: learner.learn(toy_task(1, 20))) == 24


def test_augmented_training_keeps_nothing_but_evaluation_does() -> None:
    learner = learner_of(METHODS["sequential"], augment=True, max_steps=10)
    task = toy_task(0, 20)
    assert rows_through(learner.backbone, 0, lambda: learner.learn(task)) == 80
    learner.evaluate(task)
    assert rows_through(learner.backbone, 0, lambda: learner.evaluate(task)) == 0


@pytest.mark.parametrize("name", ["zero-shot", "probe", "prompts only"])
def test_a_tower_without_experts_runs_once(name: str) -> None:
    learner = learner_of(METHODS[name], max_steps=10)
    task = toy_task(0, 20)
    trained = 0 if name == "zero-shot" else 24
    assert rows_through(learner.backbone, 0, lambda: learner.learn(task)) == trained
    assert rows_through(learner.backbone, 0, lambda: learner.evaluate(task)) == 24
    assert rows_through(learner.backbone, 0, lambda: learner.evaluate(task)) == 0


def test_answers_of_frozen_experts_are_kept() -> None:
    learner = learner_of(LoRAPerTaskConfig(r=2))
    first, second = toy_task(0, 20), toy_task(1, 20)
    learner.learn(first)
    before = learner.evaluate(first)
    learner.learn(second)
    rows = rows_through(learner.backbone, 3, lambda: learner.evaluate(first))
    assert rows == 0 and learner.evaluate(first) == before
    with torch.no_grad():
        for layer in learner.method.layers.values():
            layer.bank.B.frozen.add_(0.3)
    assert rows_through(learner.backbone, 3, lambda: learner.evaluate(first)) == 24
    plain = learner_of(LoRAPerTaskConfig(r=2), cache=False)
    for task in (first, second):
        plain.begin(task)
        plain.method.finish_task()
    load_state(plain.method, export_state(learner.method))
    assert learner.evaluate(first) == plain.evaluate(first)


def test_without_the_evaluation_cache_everything_runs_again() -> None:
    learner = learner_of(ZeroShotConfig(), cache=False)
    for _ in range(2):
        assert rows_through(learner.backbone, 0, lambda: learner.evaluate(toy_task(0))) == 12


def test_routing_features_come_from_the_pass_that_ran() -> None:
    learner = learner_of(MOE)
    task = toy_task(0, 20)
    learner.learn(task)
    learner.evaluate(task)
    base = rows_through(learner.backbone, 3, lambda: learner.features(task.test, "layers"))
    assert base == 0


def test_a_frozen_text_tower_runs_once_in_training() -> None:
    learner = learner_of(METHODS["images only"])
    task = toy_task(0, 20)
    rows = rows_through(learner.backbone, 0, lambda: learner.learn(task), tower="text")
    assert rows == len(task.labels.classes)


def test_prompts_below_the_experts_run_once_in_training() -> None:
    learner = learner_of(METHODS["sequential"])
    task = toy_task(0, 20)
    rows = rows_through(learner.backbone, 1, lambda: learner.learn(task), tower="text")
    assert rows == len(task.labels.classes)


def test_tasks_are_those_given(tmp_path: Path) -> None:
    task = Task(
        name="list",
        train=[toy_task(0).train[row] for row in range(12)],
        val=[],
        test=[toy_task(0).test[row] for row in range(6)],
        labels=toy_task(0).labels,
    )
    learner = learner_of(METHODS["sequential"])
    learner.learn(task)
    assert learner.evaluate(task).samples == 6


class Other:
    """The same keys as a task's, other pixels."""

    def __init__(self, data: Any, shift: int) -> None:
        self.data, self.shift, self.reads = data, shift, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Example:
        self.reads += 1
        example = self.data[index]
        image = (example.inputs["image"].int() + self.shift).clamp(0, 255).to(torch.uint8)
        return Example(inputs={"image": image}, label=example.label, key=example.key)


def test_equal_keys_are_not_equal_samples() -> None:
    learner, plain = learner_of(ZeroShotConfig()), learner_of(ZeroShotConfig(), cache=False)
    data = [Other(toy_task(0).test, shift) for shift in (0, 40)]
    for one in data:
        expected = plain.features(one, "layers")
        torch.testing.assert_close(learner.features(one, "layers"), expected)
    assert not torch.equal(learner.features(data[0], "layers"), learner.features(data[1], "layers"))


def test_a_sample_is_read_once_while_its_data_set_lives() -> None:
    learner = learner_of(ZeroShotConfig())
    data = Other(toy_task(0).test, 0)
    views: Sequence[Any] = (data, Subset(data, [3, 1]), Subset(Subset(data, [0, 3]), [1]))
    found = [learner.features(view, "pooled") for view in views]
    assert data.reads == len(data)
    torch.testing.assert_close(found[1], found[0][[3, 1]])
    torch.testing.assert_close(found[2], found[0][[3]])
    del data, views
    assert not learner.samples._known


def test_labels_are_those_of_the_view() -> None:
    learner = learner_of(ZeroShotConfig())
    data = toy_task(0).test
    renamed = Rows(data=data, indices=(0, 1, 2), labels=(2, 2, 2))
    for view, labels in ((data, [0, 1, 2]), (renamed, [2, 2, 2])):
        for _ in range(2):
            batch = next(iter(learner.batches(view, range(3))))
            assert batch.labels.tolist() == labels


def test_a_list_of_examples_is_read_each_time() -> None:
    learner = learner_of(ZeroShotConfig())
    examples = [toy_task(0).test[row] for row in range(4)]
    before = learner.features(examples, "pooled")
    examples[1] = toy_task(2).test[1]
    after = learner.features(examples, "pooled")
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]]) and not torch.equal(after[1], before[1])
