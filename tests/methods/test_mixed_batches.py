"""Rows of several tasks in one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conftest import toy_task
from tests.training.caching import learner_of, rows_through

from evolora.methods.lora import LoRAPerTaskConfig
from evolora.methods.moe_adapters import MoEAdaptersConfig
from evolora.routing.route import BASE
from evolora.routing.selector import OracleSelectorConfig


@pytest.mark.parametrize(
    "method",
    [
        LoRAPerTaskConfig(r=2),
        MoEAdaptersConfig(num_experts=4, r=4, selector=OracleSelectorConfig()),
    ],
    ids=["lora", "moe"],
)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_rows_of_several_tasks_run_in_one_forward(method: Any, kind: str) -> None:
    learner = learner_of(method, kind=kind)
    for index in range(2):
        learner.learn(toy_task(index, 20))
    examples = [toy_task(row % 3).test[row] for row in range(9)]
    batch = learner.backbone.collate(examples)
    tasks = torch.tensor([row % 3 if row % 3 < 2 else BASE for row in range(9)])
    labels = toy_task(0).labels
    found: list[Any] = []
    with torch.no_grad():
        encoded = learner.backbone.encode_base(batch)

        def answer() -> None:
            found.append(learner.method.answer(batch, encoded, tasks, labels))

        assert rows_through(learner.backbone, 0, answer) == 6
        assert torch.equal(found[0].tasks, tasks)
        for row in range(9):
            one = torch.tensor([row])
            alone = learner.method.answer(batch.take(one), None, tasks[one], labels)
            torch.testing.assert_close(alone.scores[0], found[0].scores[row], rtol=1e-4, atol=1e-5)
