"""Methods on models that write: identity, mixed batches, learning, keeping, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backbones.writers import FAMILIES, picture, samples, writer
from tests.conftest import toy_task
from tests.methods.texts import TEXTS, task

from evolora.allocation.settings import GradientAllocationConfig
from evolora.backbones.answer_tokens import NO_ANSWER
from evolora.backbones.image_text import ImageText
from evolora.errors import ConfigError
from evolora.learner import Learner
from evolora.methods.answers import Objective
from evolora.methods.er import ERConfig
from evolora.methods.ewc import EWCConfig
from evolora.methods.full_finetuning import FullFinetuningConfig
from evolora.methods.linear_probe import LinearProbeConfig
from evolora.methods.lora import (
    JointLoRAConfig,
    LoRAPerTask,
    LoRAPerTaskConfig,
    SequentialLoRAConfig,
)
from evolora.methods.lwf import LwFConfig
from evolora.methods.o_lora import OLoRAConfig
from evolora.methods.zero_shot import ZeroShotConfig
from evolora.regularizers.elastic import token_surprise
from evolora.routing.route import BASE
from evolora.routing.task_keys import TaskKeySelectorConfig
from evolora.streams.task import LabelSpace, Task
from evolora.training.config import TrainingConfig

LINEARS = ("all-linear",)
TRAINING = TrainingConfig(
    max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=0, augment=False
)


TASKS = (task("first", "red dot"), task("second", "blue cross ."))


def disturb(method: torch.nn.Module, seed: int = 3) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*method.parameters(), *method.buffers()]:
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.15)


def three_tasks(backbone: ImageText) -> LoRAPerTask:
    method = LoRAPerTask(LoRAPerTaskConfig(r=2, target_modules=LINEARS), backbone)
    for name in ("a", "b", "c"):
        method.begin_task(name, TEXTS)
        method.finish_task()
    return method


@pytest.mark.parametrize("kind", FAMILIES)
def test_fresh_experts_answer_as_the_base_bit_for_bit(kind: str) -> None:
    backbone = writer(kind)
    batch = backbone.collate(samples())
    nothing = LoRAPerTask(LoRAPerTaskConfig(r=2, target_modules=LINEARS), writer(kind))
    base = nothing.write(batch, TEXTS)
    assert base.tasks.tolist() == [BASE] * 4
    method = three_tasks(backbone)
    route = method.make_route(1, batch)
    with backbone.host.disabled():
        plain = backbone.answer_losses(batch, route)
    with backbone.host.plain(), torch.no_grad():
        assert torch.equal(backbone.answer_losses(batch, route), plain)
    assert method.write(batch, TEXTS, oracle=1).texts == base.texts


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_of_different_tasks_get_exactly_what_they_get_alone(kind: str) -> None:
    backbone = writer(kind)
    method = three_tasks(backbone)
    disturb(method)
    examples = samples()
    tasks = torch.tensor([2, 0, 1, BASE])
    batch = backbone.collate(examples)
    mixed = method.write(batch, TEXTS, tasks=tasks)
    assert torch.equal(mixed.tasks, tasks)
    base = method.write(batch, TEXTS, tasks=torch.full((4,), BASE)).texts
    with torch.no_grad():
        losses = backbone.answer_losses(batch, method.make_route(tasks, batch))
    alone = []
    for row, example in enumerate(examples):
        one = backbone.collate([example])
        alone += method.write(one, TEXTS, tasks=tasks[row : row + 1]).texts
        with torch.no_grad():
            loss = backbone.answer_losses(one, method.make_route(int(tasks[row]), one))
        torch.testing.assert_close(losses[row : row + 1], loss, atol=1e-4, rtol=1e-4)
    assert mixed.texts == tuple(alone)
    assert mixed.texts[3] == base[3] and mixed.texts[:3] != base[:3]


@pytest.mark.parametrize("kind", FAMILIES)
def test_experts_of_every_tower_run_and_learn(kind: str) -> None:
    backbone = writer(kind)
    method = LoRAPerTask(LoRAPerTaskConfig(r=2, target_modules=LINEARS), backbone)
    method.begin_task("a", TEXTS)
    disturb(method)
    batch = Learner(backbone, method=ZeroShotConfig()).backbone.collate(samples(), task=0)
    method(batch)["loss"].backward()
    silent = [
        name
        for name, parameter in method.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.abs().sum() > 0)
    ]
    assert silent == []
    assert {name.split("/")[0] for name in method.layers} == set(backbone.towers)


def test_the_loss_of_a_batch_is_the_mean_over_rows_not_over_tokens() -> None:
    backbone = writer("internvl")
    method = three_tasks(backbone)
    batch = backbone.collate(samples(), task=1)
    rows = [
        float(method(backbone.collate([example], task=1))["loss"].detach()) for example in samples()
    ]
    assert float(method(batch)["loss"].detach()) == pytest.approx(sum(rows) / 4, abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        SequentialLoRAConfig(r=2, lora_dropout=0.1, target_modules=LINEARS),
        LoRAPerTaskConfig(r=2, target_modules=LINEARS, selector=TaskKeySelectorConfig()),
        EWCConfig(r=2, fisher="empirical", fisher_samples=3),
        EWCConfig(r=2, fisher_samples=3),
        OLoRAConfig(r=2, lora_dropout=0.1),
        LwFConfig(r=2, lora_dropout=0.1),
        ERConfig(r=2, capacity=6),
        FullFinetuningConfig(),
        LoRAPerTaskConfig(
            r=2, target_modules=LINEARS, allocation=GradientAllocationConfig(budget=5)
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_methods_learn_two_tasks_and_are_judged(config: Any) -> None:
    backbone = writer("internvl")
    before = backbone.fingerprint()
    learner = Learner(backbone, method=config, training=TRAINING, evaluation_batch_size=4)
    for one in TASKS:
        assert learner.learn(one) is not None
    results = [learner.evaluate(one) for one in TASKS]
    assert all(0 <= result.score <= 1 and result.samples == 6 for result in results)
    assert all(sum(result.routes.values()) == 6 for result in results)
    assert set(results[0].by_case) == {"complete", "image_missing"}
    assert backbone.fingerprint() == before


def test_lora_learns_to_write_the_answer_of_each_task_and_keeps_it(tmp_path: Path) -> None:
    backbone = writer("qwen2_vl")
    config = LoRAPerTaskConfig(r=4, target_modules=LINEARS)
    training = TrainingConfig(
        max_steps=40, per_device_train_batch_size=4, learning_rate=2e-2, warmup_steps=0,
        augment=False,
    )  # fmt: skip
    learner = Learner(backbone, method=config, training=training, evaluation_batch_size=3)
    learner.learn(TASKS[0])
    assert learner.evaluate(TASKS[0]).score == 1.0
    learner.learn(TASKS[1])
    scores = [learner.evaluate(one) for one in TASKS]
    assert [result.score for result in scores] == [1.0, 1.0]
    assert scores[0].routes == {"first": 6}
    learner.save_pretrained(tmp_path)
    again = Learner.from_pretrained(tmp_path, writer("qwen2_vl"))
    assert again.method.labels == [TEXTS, TEXTS]
    answers = again.predict([picture(3), None], ["what is it ?", "is it ?"], task="second")
    assert [answer.label for answer in answers] == ["blue cross ."] * 2
    assert answers[0].score is None and answers[0].task == "second"
    assert answers[1].line(used=True) == "blue cross .\tby second from text"
    with pytest.raises(ConfigError, match="writes its answers"):
        again.predict(picture(3), "what ?", classes=["red"])


@pytest.mark.parametrize("kind", FAMILIES)
def test_by_default_every_linear_of_a_model_that_writes_gets_an_expert(kind: str) -> None:
    backbone = writer(kind)
    method = Learner(backbone, method=SequentialLoRAConfig(r=2)).method
    every = backbone.sites("linear", target_modules=LINEARS)
    assert list(method.layers) == [site.key for site in every]


def test_replayed_rows_are_cut_to_the_longest_answer_of_their_own_task() -> None:
    backbone = writer("internvl")
    method = Learner(backbone, method=ERConfig(r=2, capacity=4)).method
    for name, longest in (("short", 1), ("long", 6)):
        method.begin_task(name, LabelSpace.of_texts(longest))
    examples = [TASKS[1].train[row] for row in range(2)]
    mixed = replace(backbone.collate(examples, task=1), tasks=(0, 1))
    route = method.make_route(0, mixed)
    each = [backbone.answer_losses(mixed, route, limit=limit) for limit in (1, 6)]
    expected = (each[0][0] + each[1][1]) / 2
    assert not torch.isclose(each[0][0], each[1][0])
    method.objective = Objective()
    torch.testing.assert_close(method(mixed)["loss"].detach(), expected.detach())


def test_the_importance_of_a_model_that_writes_is_measured_on_drawn_tokens() -> None:
    """Each token is drawn from the model's own chances; where an answer has ended there is none."""
    draw = torch.Generator().manual_seed(0)
    bias = torch.tensor([1.0, 0.0, -1.0], requires_grad=True)
    answers = torch.tensor([[0, 2, NO_ANSWER]]).expand(4000, 3)
    each = token_surprise(bias.expand(4000, 3, 3), answers, draw=draw)
    assert not each[:, 2].any() and set(each.shape) == {4000, 3}
    chances = bias.detach().softmax(0)
    for token in (0, 1):
        drawn = [torch.isclose(each[:, token], -chance.log()) for chance in chances]
        shares = torch.stack([one.float().mean() for one in drawn])
        torch.testing.assert_close(shares, chances, atol=0.03, rtol=0)
    told = token_surprise(bias.expand(4000, 3, 3), answers)
    expected = torch.stack([-chances[0].log(), -chances[2].log(), torch.zeros(())])
    torch.testing.assert_close(told[0].detach(), expected)


def test_joint_training_sees_both_tasks() -> None:
    learner = Learner(
        writer("llava"), method=JointLoRAConfig(r=2, target_modules=LINEARS), training=TRAINING
    )
    assert learner.learn_jointly(TASKS) is not None
    assert learner.evaluate(TASKS[0]).routes == {"shared": 6}


def test_gradient_checkpointing_gives_the_same_experts() -> None:
    found = []
    for wanted in (False, True):
        training = TrainingConfig(
            max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, warmup_steps=0,
            augment=False, gradient_checkpointing=wanted,
        )  # fmt: skip
        learner = Learner(
            writer("internvl"), method=SequentialLoRAConfig(r=2, target_modules=LINEARS),
            training=training,
        )  # fmt: skip
        learner.learn(TASKS[0])
        found.append([p.detach().clone() for p in learner.method.parameters()])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_what_does_not_go_together_is_refused() -> None:
    backbone = writer("llava")
    with pytest.raises(ConfigError, match="linear-probe learns classes; ImageText writes"):
        Learner(backbone, method=LinearProbeConfig())
    with pytest.raises(ConfigError, match="logit_scope: seen is about classes"):
        Learner(backbone, method=ERConfig(logit_scope="seen"))
    with pytest.raises(ConfigError, match="the task has classes, ImageText writes"):
        Learner(backbone, method=SequentialLoRAConfig(), training=TRAINING).learn(toy_task(0))
    with pytest.raises(ConfigError, match="unknown metric 'accuracy'"):
        Task(name="x", train=TASKS[0].train, val=TASKS[0].val, test=TASKS[0].test, labels=TEXTS)
    kept = TrainingConfig(
        max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, warmup_steps=0,
        augment=False, prefix_cache="ram",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="ImageText cannot go on from kept activations"):
        Learner(backbone, method=SequentialLoRAConfig(), training=kept)
