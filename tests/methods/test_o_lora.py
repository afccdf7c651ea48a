"""O-LoRA: the sum of all tasks' LoRAs, and the overlap that its loss holds down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conftest import toy_task
from tests.methods.forgetting import learner_of

from evolora.errors import ConfigError
from evolora.learner import Learner
from evolora.methods.lora import LoRALayer
from evolora.methods.o_lora import OLoRA, OLoRAConfig
from evolora.regularizers.orthogonal import overlap


def banks(learner: Learner) -> list[Any]:
    return [layer.bank for layer in learner.method.layers.values() if isinstance(layer, LoRALayer)]


def shared(learner: Learner) -> float:
    """How much the newest LoRAs read of what the earlier ones read."""
    total = 0.0
    for bank in banks(learner):
        rows = torch.nn.functional.normalize(bank.A.all().detach(), dim=-1)
        total += float(overlap(rows[:-1], rows[-1])) / (len(rows) - 1)
    return total / len(banks(learner))


def taught(tasks: int, **settings: Any) -> Learner:
    learner = learner_of(OLoRAConfig(r=2, **settings))
    for index in range(tasks):
        learner.learn(toy_task(index))
    return learner


def test_all_tasks_answer_together_and_merged_is_the_same_as_their_sum() -> None:
    learner = taught(3)
    backbone, method = learner.backbone, learner.method
    batch = backbone.collate([toy_task(0).test[row] for row in range(6)])
    site = backbone.sites("linear", towers=["vision"], layers=[0], target_modules=["fc1"])[0]
    bank = next(b for key, b in zip(method.layers, banks(learner), strict=True) if key == site.key)
    assert len(bank) == 3 and bank.frozen_ids() == [0, 1, 2]
    a, b = bank.A.all(), bank.B.all()
    assert all(bool(one.any()) for one in b)
    change = bank.scale * torch.einsum("erd,ero->od", a, b)
    route = method.make_route(0, batch)
    tokens = torch.randn(6, 4, site.d_in, generator=torch.Generator().manual_seed(0))
    backbone.host.set_route("vision", route)
    with torch.no_grad():
        base = torch.nn.functional.linear(tokens, site.module.weight, site.module.bias)
        expected = base + tokens @ change.T
        torch.testing.assert_close(site.module(tokens), expected, atol=1e-5, rtol=1e-4)
        with backbone.host.plain():
            apart = backbone.encode(batch, route)
        folded = [backbone.encode(batch, route) for _ in range(300)][-1]
    assert backbone.host.folded_bytes > 0
    torch.testing.assert_close(folded, apart, atol=1e-5, rtol=1e-4)


def test_only_the_new_lora_trains_and_its_loss_has_the_overlap() -> None:
    learner = taught(2, orthogonality=0.25, l2=0.5)
    learner.begin(toy_task(2))
    batch = learner.backbone.collate([toy_task(2).train[row] for row in range(4)], task=2)
    terms = learner.method(batch)
    overlaps, norms = 0.0, 0.0
    for bank in banks(learner):
        a = bank.A.all().detach()
        overlaps += float((a[0] @ a[2].T).abs().sum() + (a[1] @ a[2].T).abs().sum())
        norms += float(a[2].norm() + bank.B.all().detach()[2].norm())
    assert float(terms["overlap"]) == pytest.approx(0.25 * overlaps, rel=1e-5)
    assert float(terms["l2"]) == pytest.approx(0.5 * norms, rel=1e-5)
    total = terms["task"] + terms["overlap"] + terms["l2"]
    torch.testing.assert_close(terms["loss"].detach(), total)
    terms["loss"].backward()
    for bank in banks(learner):
        assert bank.A.active.shape[0] == 1 and bank.A.active.grad.abs().sum() > 0
        assert bank.A.frozen.grad is None


def test_the_first_task_has_no_overlap_and_without_weight_there_is_none() -> None:
    learner = learner_of(OLoRAConfig(r=2))
    learner.begin(toy_task(0))
    batch = learner.backbone.collate([toy_task(0).train[0]], task=0)
    assert set(learner.method(batch)) == {"loss", "task"}
    learner = learner_of(OLoRAConfig(r=2, orthogonality=0.0), max_steps=2)
    learner.learn(toy_task(0))
    learner.begin(toy_task(1))
    batch = learner.backbone.collate([toy_task(1).train[0]], task=1)
    assert set(learner.method(batch)) == {"loss", "task"}


def test_the_loss_turns_new_loras_away_from_earlier_ones() -> None:
    held, free = (shared(taught(2, orthogonality=weight)) for weight in (0.5, 0.0))
    assert held < 0.5 * free, (held, free)


def test_its_answers_need_no_task() -> None:
    learner = taught(2)
    assert isinstance(learner.method, OLoRA)
    answers = learner.predict([toy_task(0).test[0].inputs["image"]])
    assert answers[0].task == "shared"


def test_negative_weights_are_refused() -> None:
    for name in ("orthogonality", "l2"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 0; got -1"):
            OLoRAConfig(**{name: -1.0})
