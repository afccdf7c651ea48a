"""A small stream learned and answered with every fast path, and without any: the same matrix."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tests.conftest import ToyProcessor, toy_model, toy_task

from evolora.backbones.clip import DualEncoder
from evolora.experts import sites
from evolora.experts.dispatch import Thresholds
from evolora.experts.merge import FoldCache
from evolora.learner import Learner
from evolora.methods.lora import LoRAPerTaskConfig, SequentialLoRAConfig
from evolora.methods.moe_adapters import MoEAdaptersConfig
from evolora.routing.autoencoders import AutoEncoderTraining
from evolora.routing.selector import AutoEncoderSelectorConfig
from evolora.training.loop import TrainingConfig

SELECTOR = AutoEncoderSelectorConfig(training=AutoEncoderTraining(hidden=6, steps=40))
CONFIGS = [
    SequentialLoRAConfig(r=3, lora_dropout=0.1),
    LoRAPerTaskConfig(r=3),
    MoEAdaptersConfig(num_experts=6, r=8, selector=SELECTOR),
]


def learned(config, plain: bool) -> tuple[Learner, list[list[float]]]:
    backbone = DualEncoder(toy_model(), ToyProcessor(), name="toy")
    training = TrainingConfig(
        max_steps=6, warmup_steps=1, per_device_train_batch_size=6, learning_rate=1e-2
    )
    learner = Learner(backbone, method=config, training=training)
    tasks, matrix = [toy_task(index) for index in range(3)], []
    with backbone.host.plain() if plain else nullcontext():
        for task in tasks:
            learner.learn(task)
            matrix.append([learner.evaluate(each).score for each in tasks])
    return learner, matrix


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.type)
def test_the_matrix_is_the_same_with_and_without_fast_paths(config, monkeypatch) -> None:
    limits = Thresholds(fold_min_tokens=0)
    monkeypatch.setattr(sites, "thresholds_for", lambda _: limits)
    folds: list[object] = []
    fold = FoldCache._fold
    monkeypatch.setattr(FoldCache, "_fold", lambda *a: folds.append(a[1]) or fold(*a))
    slow, expected = learned(config, plain=True)
    assert not folds
    fast, matrix = learned(config, plain=False)
    assert bool(folds) == ("lora" in config.type)
    for got, row in zip(matrix, expected, strict=True):
        assert got == pytest.approx(row, abs=1e-6)
    for (name, one), two in zip(
        slow.method.state_dict().items(), fast.method.state_dict().values(), strict=True
    ):
        if one.is_floating_point():
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, msg=name)
    assert all(layer.formulation == "auto" for layer in slow.method.layers.values())


@pytest.mark.parametrize("config", CONFIGS[:1], ids=lambda config: config.type)
def test_a_fused_optimizer_of_the_users_own_leaves_nothing_stale(config, monkeypatch) -> None:
    """It writes parameters without touching their version counters."""
    monkeypatch.setattr(sites, "thresholds_for", lambda _: Thresholds(fold_min_tokens=0))
    backbone = DualEncoder(toy_model(), ToyProcessor(), name="toy")
    learner = Learner(backbone, method=config)
    task, method = toy_task(0), learner.method
    method.begin_task(task.name, task.labels)
    optimizer = torch.optim.AdamW(method.trainable().values(), lr=0.1, fused=True)
    batch = backbone.collate([task.train[row] for row in range(6)], task=0)
    answers = [learner.evaluate(task), method.predict(batch, task.labels).scores]
    for _ in range(2):
        method(batch)["loss"].backward()
        optimizer.step()
        answers.append(method.predict(batch, task.labels).scores)
    with backbone.host.plain():
        backbone.new_state()
        expected = method.predict(batch, task.labels).scores
    torch.testing.assert_close(answers[-1], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answers[1], answers[2])
