"""MoE-Adapters: every option does what it says, or is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.conftest import toy_task
from tests.methods.toy_moe import (
    batches,
    gatings,
    learner_of,
    method_of,
    randomize,
)
from torch import Tensor

from evolora.errors import ConfigError
from evolora.methods.moe_adapters import MoEAdaptersConfig
from evolora.routing.gates import load_balance
from evolora.routing.selector import NoSelectorConfig


def test_load_balancing_is_importance_plus_load(make_backbone) -> None:
    learner = learner_of(make_backbone, load_balance=0.01)
    learner.begin(toy_task(0))
    randomize(method_of(learner))
    batch = next(batches(learner, 0))
    terms: dict[str, Tensor] = {}
    found = gatings(method_of(learner), lambda: terms.update(learner.method(batch)))
    expected = 0.0
    for gatings_of_site in found.values():
        (gating,) = gatings_of_site
        dense = torch.zeros(len(gating.gates), 5).scatter(1, gating.ids, gating.gates)
        expected += (load_balance(dense) + load_balance(gating.chance)).item()
    assert terms["load_balance"].item() == pytest.approx(0.01 * expected, rel=1e-5)
    whole = terms["task"].item() + terms["load_balance"].item()
    assert terms["loss"].item() == pytest.approx(whole, rel=1e-5)
    terms["loss"].backward()
    assert all(layer.routers.noise.active.grad.any() for layer in method_of(learner).moe_layers())


def test_load_balancing_levels_the_load(make_backbone) -> None:
    def variation(weight: float) -> float:
        learner = learner_of(make_backbone, load_balance=weight, max_steps=30)
        learner.learn(toy_task(0))
        counts = [layer.usage.counts.float() for layer in method_of(learner).moe_layers()]
        return sum(float(c.var() / c.mean() ** 2) for c in counts)

    assert variation(1.0) < variation(0.0)


def test_no_auxiliary_loss_by_default(make_backbone) -> None:
    learner = learner_of(make_backbone)
    learner.begin(toy_task(0))
    terms = learner.method(next(batches(learner, 0)))
    assert set(terms) == {"loss", "task"}
    assert terms["loss"].item() == terms["task"].item()


def test_noise_spreads_training_and_spares_evaluation(make_backbone) -> None:
    chosen = {}
    for noise in (True, False):
        learner = learner_of(make_backbone, noise=noise)
        learner.begin(toy_task(0))
        learner.method(next(batches(learner, 0)))
        layer = method_of(learner).moe_layers()[0]
        chosen[noise] = layer.usage.most_used(5)
    assert len(chosen[True]) > 2
    assert chosen[False] == [0, 1]  # ties of a fresh router


def test_a_fresh_router_starts_on_experts_that_may_still_learn(make_backbone) -> None:
    learner = learner_of(make_backbone, noise=False, freeze_top=2)
    learner.learn(toy_task(0))
    layer = method_of(learner).moe_layers()[0]
    frozen = layer.bank.frozen_ids()
    learner.begin(toy_task(1))
    learner.method(next(batches(learner, 1)))
    assert frozen and not set(layer.usage.most_used(2)) & set(frozen)


def test_a_pool_grows_when_too_few_experts_are_free(make_backbone) -> None:
    learner = learner_of(make_backbone, num_experts=3, freeze_top=2, min_free_experts=2)
    layers = method_of(learner).moe_layers()
    for task, size in enumerate((3, 4, 5)):
        learner.begin(toy_task(task))
        assert [len(layer.bank) for layer in layers] == [size] * len(layers)
        assert all(layer.routers.experts == size for layer in layers)
        assert all(len(layer.usage.counts) == size for layer in layers)
        for layer in layers:
            layer.usage.counts[-2:] += 1
        learner.method.finish_task()


def test_a_shared_router_uses_what_its_pool_grew_by(make_backbone) -> None:
    learner = learner_of(
        make_backbone, num_experts=2, freeze_top=2, routers="shared", selector=NoSelectorConfig()
    )
    for task in range(2):
        learner.learn(toy_task(task))
    for layer in method_of(learner).moe_layers():
        assert len(layer.routers) == 1 and len(layer.bank) == 4
        assert (layer.usage.counts > 0).sum() > 2, "new experts are never chosen"
    assert learner.evaluate(toy_task(1)).routes == {"shared": 12}


def test_towers_and_layers_can_be_chosen(make_backbone) -> None:
    learner = learner_of(make_backbone, towers=("vision",), layers_to_transform=(-1,))
    assert [layer.name for layer in method_of(learner).moe_layers()] == ["vision.1.mlp"]
    learner.learn(toy_task(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 6, "num_experts": 5}, "top_k must be between 1 and num_experts"),
        ({"top_k": 0}, "top_k must be between 1"),
        ({"r": 0}, "r must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"selector": NoSelectorConfig()}, "'per-task' need a selector"),
        ({"routers": "shared"}, "leave nothing to select"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoEAdaptersConfig(**settings)


def test_experts_start_small(make_backbone) -> None:
    """Kaiming-uniform with a = sqrt(5) is uniform in +-1/sqrt(d_in); tasks draw their own."""
    learner = learner_of(make_backbone)
    learner.begin(toy_task(0))
    draws = [layer.bank.A.active.detach() for layer in method_of(learner).moe_layers()]
    assert all(0 < float(a.abs().max()) <= 1 / math.sqrt(32) for a in draws)
    assert not torch.equal(draws[0], draws[1])
