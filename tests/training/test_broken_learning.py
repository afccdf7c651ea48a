"""A learning that breaks off leaves the learner as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conftest import toy_task
from tests.training.caching import MOE, learner_of
from torch import Tensor

from evolora.methods.er import ERConfig
from evolora.methods.ewc import EWCConfig
from evolora.methods.linear_probe import LinearProbeConfig
from evolora.methods.lora import LoRAPerTaskConfig
from evolora.storage.state import export_state
from evolora.training.loop import TrainingError


@pytest.mark.parametrize(
    "method",
    [
        *(MOE, LoRAPerTaskConfig(r=2), LinearProbeConfig()),
        *(EWCConfig(r=2, fisher_samples=4), ERConfig(r=2, capacity=6)),
    ],
    ids=lambda config: config.type,
)
def test_a_learning_that_fails_leaves_the_learner_as_it_was(method: Any) -> None:
    learner = learner_of(method)
    learner.learn(toy_task(0, 20))
    before = {key: value.clone() for key, value in export_state(learner.method).items()}
    score, costs = learner.evaluate(toy_task(0)), list(learner.costs)
    forward = learner.method.forward

    def broken(batch: Any) -> dict[str, Tensor]:
        terms = forward(batch)
        return {**terms, "loss": terms["loss"] * float("nan")}

    learner.method.forward = broken  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="the loss of green shapes is nan"):
        learner.learn(toy_task(1, 20))
    del learner.method.forward
    assert learner.task_names == ["red shapes"] and learner.costs == costs
    after = export_state(learner.method)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert learner.evaluate(toy_task(0)) == score
    fresh = learner_of(method)
    for each in (fresh, learner):
        if each is fresh:
            each.learn(toy_task(0, 20))
        each.learn(toy_task(1, 20))
    for key, value in export_state(fresh.method).items():
        assert torch.equal(export_state(learner.method)[key], value), key
