"""Task keys in place of an oracle: methods with experts per task become task-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import toy_task
from tests.methods.forgetting import learner_of, toy_backbone
from tests.methods.pairs import pair_learner, pair_task

from evolora.config import check_method
from evolora.learner import Learner
from evolora.methods.lora import LoRAPerTaskConfig
from evolora.methods.moe_adapters import MoEAdaptersConfig
from evolora.routing.selector import OracleSelectorConfig
from evolora.routing.task_keys import TaskKeySelectorConfig

KEYS = TaskKeySelectorConfig()
METHODS = pytest.mark.parametrize(
    "method",
    [
        LoRAPerTaskConfig(r=3, selector=KEYS),
        MoEAdaptersConfig(num_experts=4, r=4, selector=KEYS),
    ],
    ids=lambda config: config.type,
)


def test_the_oracle_stays_the_default_and_keys_can_be_asked_for() -> None:
    faults: list[str] = []
    told = check_method("lora-per-task", faults)
    assert told == LoRAPerTaskConfig() and told.selector == OracleSelectorConfig()
    for value in ("task-keys", {"type": "task-keys"}):
        config = check_method({"type": "lora-per-task", "selector": value}, faults)
        assert config.selector == TaskKeySelectorConfig()
    keys = {"type": "task-keys", "per_case": True}
    assert check_method({"type": "moe-adapters", "selector": keys}, faults).selector.per_case
    assert not faults
    assert check_method({"type": "lora-per-task", "selector": "none"}, faults) is None
    assert "method.selector.type: unknown type 'none'" in faults[0]


@METHODS
def test_no_task_is_told(method: Any, tmp_path: Path) -> None:
    learner = learner_of(method, max_steps=4)
    for index in range(3):
        learner.learn(toy_task(index))
    assert learner.method.routing == "task-free"
    for index in range(3):
        routes = learner.evaluate(toy_task(index)).routes
        assert routes[toy_task(index).name] >= 8, routes  # of 12, by a random model
        examples = [toy_task(index).test[row] for row in range(12)]
        batch = learner.backbone.collate(examples)
        told = [learner.method.predict(batch, toy_task(0).labels, oracle=t).tasks for t in (0, 1)]
        assert torch.equal(*told), "the oracle is not read"
    learner.save_pretrained(tmp_path)
    loaded = Learner.from_pretrained(tmp_path, model=toy_backbone())
    images = [toy_task(index).test[0].inputs["image"] for index in range(3)]
    assert loaded.predict(images) == learner.predict(images)
    assert {answer.task for answer in learner.predict(images)} <= set(learner.task_names)


@pytest.mark.parametrize("kind", ["vilt", "clip"])
def test_pairs_with_missing_modalities_are_recognised(kind: str) -> None:
    learner = pair_learner(LoRAPerTaskConfig(r=3, selector=KEYS), kind)
    tasks = [pair_task(index) for index in range(2)]
    for task in tasks:
        learner.learn(task)
    right = sum(learner.evaluate(task).routes.get(task.name, 0) for task in tasks)
    assert right >= 16, "of 24"
