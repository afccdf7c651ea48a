"""Recipes: those of one method's parts are that method, bit by bit; others work or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.backbones.writers import samples, writer
from tests.conftest import toy_task
from tests.contract.cases import mixed_batch, toy_backbone
from tests.methods.modalities import task as stage
from tests.methods.pairs import pair_learner, pair_task
from tests.methods.test_d_mole import config as d_mole
from tests.methods.test_pathweave import answers as path_answers
from tests.methods.test_pathweave import learner as path_learner
from tests.methods.test_writing import TASKS, TRAINING
from torch import Tensor

from evolora.config import check_method
from evolora.errors import ConfigError
from evolora.learner import Learner
from evolora.methods.delo import DeLoConfig
from evolora.methods.lora import LoRAPerTaskConfig, SequentialLoRAConfig
from evolora.methods.moe_adapters import MoEAdaptersConfig
from evolora.methods.moe_lora import MoELoRAConfig
from evolora.methods.pathweave import PathWeaveConfig
from evolora.methods.recipe import RecipeConfig
from evolora.routing.autoencoders import AutoEncoderTraining
from evolora.routing.selector import AutoEncoderSelectorConfig, NoSelectorConfig
from evolora.routing.task_keys import TaskKeySelectorConfig
from evolora.training.config import TrainingConfig

SHORT = TrainingConfig(
    max_steps=3,
    warmup_steps=1,
    per_device_train_batch_size=6,
    learning_rate=1e-2,
    label_smoothing_factor=0.0,
)
CODES = {"hidden": 6, "steps": 30}
DDAS = AutoEncoderSelectorConfig(training=AutoEncoderTraining(**CODES))
OF_D_MOLE = {
    "type": "auto-encoder",
    "feature": "auto",
    "quantile": 0.95,
    "strict": True,
    "choose": "nearest-passing",
    "helper": "threshold",
    "training": {
        "hidden": 8, "steps": 60, "weight_decay": 0.0, "squash": "unit", "start": "mean",
    },
}  # fmt: skip


def recipe(**parts: Any) -> RecipeConfig:
    """A recipe as a configuration file gives it."""
    faults: list[str] = []
    found = check_method({"type": "recipe", **parts}, faults)
    if faults:
        raise ConfigError("; ".join(faults))
    assert isinstance(found, RecipeConfig)
    return found


def of_classes(method: Any) -> tuple[Learner, list[Tensor]]:
    """A dual encoder that learned two tasks, and what it answers."""
    learner = Learner(toy_backbone("clip"), method=method, training=SHORT)
    for index in range(2):
        learner.learn(toy_task(index))
    batch = mixed_batch(learner.backbone)
    return learner, [learner.method.predict(batch, toy_task(t).labels).scores for t in range(2)]


def of_pairs(kind: str) -> Callable[[Any], tuple[Learner, list[Tensor]]]:
    def learn(method: Any) -> tuple[Learner, list[Tensor]]:
        learner = pair_learner(method, kind, max_steps=3)
        for index in range(2):
            learner.learn(pair_task(index))
        tests = [pair_task(index) for index in range(2)]
        batches = [learner.backbone.collate([t.test[row] for row in range(6)]) for t in tests]
        return learner, [
            learner.method.predict(batch, t.labels).scores
            for batch, t in zip(batches, tests, strict=True)
        ]

    return learn


def of_texts(method: Any) -> tuple[Learner, list[Tensor]]:
    learner = Learner(writer("llava"), method=method, training=TRAINING)
    for one in TASKS[:2]:
        learner.learn(one)
    batch = learner.backbone.collate(samples())
    with torch.no_grad():
        found = learner.method.route(batch)[1]
        states = learner.backbone.encode(batch, learner.method.make_route(found, batch))
    return learner, [found.tasks, states]


def of_modalities(method: Any) -> tuple[Learner, list[Tensor]]:
    learner = path_learner(config=method)
    for name in ("video", "audio", "pc"):
        learner.learn(stage(name))
    return learner, [path_answers(learner, name) for name in ("image", "video", "audio video")]


BUDGET = {"type": "gradient", "budget": 6, "sample": 8, "floors": {"vision": 0.25}}
EVERY_LINEAR = {"type": "linear", "target_modules": ["all-linear"]}
POOL = {"type": "pool", "num_experts": 4, "freeze_top": 1, "min_free_experts": 3}
SAME: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "moe-adapters": (
        of_classes,
        MoEAdaptersConfig(
            num_experts=4, freeze_top=1, min_free_experts=3, r=6, load_balance=0.01, selector=DDAS
        ),
        {
            "experts": {"type": "bottleneck", "r": 6},
            "sites": "mlp",
            "gate": "top-k",
            "allocation": POOL,
            "selector": {"type": "auto-encoder", "training": CODES},
            "losses": ["load-balance"],
        },
    ),
    "moe-adapters with linear experts and one router": (
        of_classes,
        MoEAdaptersConfig(
            num_experts=4, freeze_top=1, min_free_experts=3, r=4, expert="lora", scale=2.0,
            routers="shared", dropout=0.0, selector=NoSelectorConfig(),
        ),
        {
            "experts": {"type": "lora", "r": 4, "lora_alpha": 8.0},
            "sites": "mlp",
            "gate": "top-k",
            "allocation": POOL,
            "selector": "none",
        },
    ),
    "d-mole": (
        of_classes,
        d_mole(),
        {
            "experts": {"type": "lora", "r": 2, "lora_dropout": 0.05},
            "sites": EVERY_LINEAR,
            "allocation": BUDGET,
            "selector": OF_D_MOLE,
        },
    ),
    "d-mole on a model that writes": (
        of_texts,
        d_mole(),
        {
            "experts": {"type": "lora", "r": 2, "lora_dropout": 0.05},
            "sites": {**EVERY_LINEAR, "towers": ["vision", "language"]},
            "allocation": BUDGET,
            "selector": OF_D_MOLE,
        },
    ),
    "delo": (
        of_pairs("vilt"),
        DeLoConfig(num_factors=4, r=2),
        {
            "experts": {"type": "factors", "num_factors": 4, "r": 2},
            "sites": "qkv",
            "gate": "query",
            "losses": ["align", "consistency"],
        },
    ),
    "delo on two streams": (
        of_pairs("clip"),
        DeLoConfig(num_factors=4, r=2, token_scope="own_modality", cmgr="text_only"),
        {
            "experts": {"type": "factors", "num_factors": 4, "r": 2},
            "sites": "qkv",
            "gate": {"type": "query", "token_scope": "own_modality", "cmgr": "text_only"},
            "losses": ["consistency"],
        },
    ),
    "pathweave": (
        of_modalities,
        PathWeaveConfig(r=2),
        {
            "experts": {"type": "woven", "r": 2},
            "sites": "q-former",
            "gate": "paths",
            "selector": "modality",
            "allocation": "per-modality",
        },
    ),
    "lora-per-task": (
        of_classes,
        LoRAPerTaskConfig(r=3, selector=TaskKeySelectorConfig(metric="mahalanobis")),
        {
            "experts": {"type": "lora", "r": 3},
            "selector": {"type": "task-keys", "metric": "mahalanobis"},
        },
    ),
    "sequential-lora": (
        of_classes,
        SequentialLoRAConfig(r=3),
        {"experts": {"type": "lora", "r": 3}, "selector": "none", "allocation": "shared"},
    ),
    "moe-lora": (
        of_classes,
        MoELoRAConfig(r=6, num_experts=3, lora_alpha=12.0, lora_dropout=0.1),
        {
            "experts": {"type": "lora", "r": 2, "lora_alpha": 4.0, "lora_dropout": 0.1},
            "gate": {"type": "tokens", "num_experts": 3},
            "selector": "none",
            "allocation": "shared",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_recipe_of_a_methods_parts_is_the_method_bit_by_bit(name: str) -> None:
    learn, method, parts = SAME[name]
    (own, expected), (mixed, got) = learn(method), learn(recipe(**parts))
    state, other = own.method.state_dict(), mixed.method.state_dict()
    bounds = {key for key in other if key.startswith("selector.bounds")}
    assert state.keys() == other.keys() - bounds
    assert any(value.any() for key, value in state.items() if ".B." in key)  # they learned
    for key, value in state.items():
        assert torch.equal(value, other[key]), key
    for one, two in zip(expected, got, strict=True):
        assert torch.equal(one, two)
