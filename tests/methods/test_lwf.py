"""LwF: what the teacher is, what is asked of it, and that less is forgotten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conftest import toy_task
from tests.methods.forgetting import forgotten, learner_of
from tests.methods.pairs import pair_learner, pair_task
from tests.methods.test_writing import TASKS, TRAINING, disturb

from evolora.backbones.image_text import ImageText
from evolora.errors import ConfigError
from evolora.learner import Learner
from evolora.methods.lora import LoRALayer, SequentialLoRAConfig
from evolora.methods.lwf import STUDENT, TEACHER, LwF, LwFConfig
from evolora.storage.state import export_state
from evolora.streams.task import Task


def kl(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over all but the last axis."""
    q, p = (torch.softmax(each / temperature, dim=-1) for each in (teacher, logits))
    return (q * (q.log() - p.log())).sum(dim=-1).mean()


def banks(learner: Learner) -> list[Any]:
    return [layer.bank for layer in learner.method.layers.values() if isinstance(layer, LoRALayer)]


def at_second_task(learner: Learner, tasks: tuple[Task, Task]) -> LwF:
    """A method that has begun a second task, and whose student has moved a little."""
    learner.learn(tasks[0])
    learner.begin(tasks[1])
    method = learner.method
    assert isinstance(method, LwF)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for bank in banks(learner):
            assert bank.frozen_ids() == [TEACHER]
            for stack in bank.stacks():
                assert torch.equal(stack.all()[STUDENT], stack.all()[TEACHER])
                stack.active.add_(torch.randn(stack.active.shape, generator=draw) * 0.1)
    return method


def test_it_forgets_less_than_sequential_lora() -> None:
    plain, plain_new = forgotten(SequentialLoRAConfig(r=3))
    held, held_new = forgotten(LwFConfig(r=3, strength=40.0))
    assert plain > 0.2, "there is something to forget"
    assert held < 0.7 * plain, (held, plain)
    assert held_new > plain_new - 0.15, "and learns what comes next"


def test_without_strength_it_is_sequential_lora() -> None:
    plain, free = learner_of(SequentialLoRAConfig(r=3)), learner_of(LwFConfig(r=3, strength=0.0))
    for learner in (plain, free):
        for index in range(2):
            learner.learn(toy_task(index))
    found = export_state(free.method)
    for name, value in export_state(plain.method).items():
        assert torch.equal(found[name], value), name


def test_by_class_prompts_the_teacher_tells_the_chances_of_earlier_classes() -> None:
    learner = learner_of(LwFConfig(r=2, strength=3.0, temperature=1.5), max_steps=4)
    learner.learn(toy_task(2))
    method = at_second_task(learner, (toy_task(0), toy_task(1)))
    batch = learner.backbone.collate([toy_task(1).train[row] for row in range(5)], task=2)
    found = float(method(batch)["distillation"])
    expected = 0.0
    for earlier in (2, 0):
        both = []
        for expert in (STUDENT, TEACHER):
            with torch.no_grad():
                embedding = learner.backbone.encode(batch, method.make_route(expert, batch))
                classes = learner.backbone.class_embeddings(  # type: ignore[attr-defined]
                    toy_task(earlier).labels, expert, ensemble=False, version=-7
                )
                both.append(learner.backbone.logits(embedding, classes))  # type: ignore[attr-defined]
        expected += 3.0 * float(kl(both[0], both[1], 1.5))
    assert found == pytest.approx(expected, rel=1e-4) and found > 0
    with torch.no_grad():
        assert float(method(batch)["distillation"]) == pytest.approx(found, rel=1e-4)
        for bank in banks(learner):  # what was kept of a student that only was looked at is stale
            bank.B.active.mul_(1.5)
        assert float(method(batch)["distillation"]) != pytest.approx(found, rel=1e-2)


@pytest.mark.parametrize("kind", ["vilt", "clip"])
@pytest.mark.parametrize("several", [False, True])
def test_by_heads_it_is_those_of_earlier_tasks(kind: str, several: bool) -> None:
    learner = pair_learner(LwFConfig(r=2), kind)
    tasks = pair_task(0, several=several), pair_task(1, several=several)
    method = at_second_task(learner, tasks)
    batch = learner.backbone.collate([tasks[1].train[row] for row in range(4)], task=1)
    with torch.no_grad():
        both = [
            method.heads.of_task(learner.backbone.encode(batch, method.make_route(e, batch)), 0)
            for e in (STUDENT, TEACHER)
        ]
    terms = method(batch)
    if not several:
        assert float(terms["distillation"]) == pytest.approx(float(kl(*both, 2.0)), rel=1e-4)
    else:
        coins = [torch.stack([each, -each], dim=-1) / 2 for each in both]
        q, p = (torch.sigmoid(each) for each in (coins[1], coins[0]))
        expected = (q * (q.log() - p.log())).sum(dim=(1, 2)).mean()
        assert float(terms["distillation"]) == pytest.approx(float(expected), rel=1e-4)
    terms["loss"].backward()
    for bank in banks(learner):
        assert bank.A.active.shape[0] == 1 and bank.A.active.grad is not None


def test_a_model_that_writes_is_held_at_every_answer_token() -> None:
    from tests.backbones.writers import writer

    backbone = writer("internvl")
    learner = Learner(backbone, method=LwFConfig(r=2, strength=0.5), training=TRAINING)
    method = at_second_task(learner, TASKS)
    assert isinstance(backbone, ImageText)
    examples = [TASKS[index % 2].train[index] for index in range(4)]
    batch = backbone.collate(examples, task=1)
    expected = 0.0
    for example in examples:
        one = backbone.collate([example], task=1)
        with torch.no_grad():
            both = [
                backbone.answer_logits(one, method.make_route(expert, one))[0][0]
                for expert in (STUDENT, TEACHER)
            ]
        expected += 0.5 * float(kl(both[0], both[1], 2.0)) / len(examples)
    terms = method(batch)
    assert float(terms["distillation"]) == pytest.approx(expected, rel=1e-3) and expected > 0
    torch.testing.assert_close(terms["loss"].detach(), terms["task"] + terms["distillation"])
    route, smoothing = method.make_route(STUDENT, batch), TRAINING.label_smoothing_factor
    plain = backbone.answer_losses(batch, route, smoothing=smoothing).mean()
    torch.testing.assert_close(terms["task"], plain.detach())


def test_the_teacher_is_gone_when_the_task_ends() -> None:
    learner = learner_of(LwFConfig(r=2), max_steps=3)
    for index in range(3):
        learner.learn(toy_task(index))
        assert {len(bank) for bank in banks(learner)} == {1}
        assert not any(bank.frozen_ids() for bank in banks(learner))


def test_the_teacher_drops_nothing_out() -> None:
    learner = learner_of(LwFConfig(r=2, lora_dropout=0.5), max_steps=3)
    method = at_second_task(learner, (toy_task(0), toy_task(1)))
    disturb(method)
    from evolora.randomness import StepRandom

    batch = learner.backbone.collate([toy_task(1).train[row] for row in range(4)], task=1)
    noisy = batch.with_random(StepRandom(5))
    seen: list[Any] = []
    encode = learner.backbone.encode
    learner.backbone.encode = lambda b, r: seen.append(r) or encode(b, r)  # type: ignore
    method(noisy)
    assert [(r.uniform, r.random is None) for r in seen] == [(STUDENT, False), (TEACHER, True)]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="strength must be at least 0; got -1"):
        LwFConfig(strength=-1.0)
    with pytest.raises(ConfigError, match="temperature must be above 0; got 0"):
        LwFConfig(temperature=0.0)
