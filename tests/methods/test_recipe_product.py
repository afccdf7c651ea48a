"""Every combination of a recipe's parts learns on a model, or is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from tests.backbones.qformers import qformer
from tests.backbones.writers import samples, writer
from tests.conftest import toy_task
from tests.contract.cases import toy_backbone
from tests.methods.modalities import task as stage
from tests.methods.pairs import pair_learner, pair_task
from tests.methods.test_recipe import CODES
from tests.methods.test_writing import TASKS

from evolora.errors import ConfigError
from evolora.learner import Learner
from evolora.methods.recipe import RecipeConfig
from evolora.registry import PARTS
from evolora.routing.autoencoders import AutoEncoderTraining
from evolora.training.config import TrainingConfig

Names = tuple[str, ...]
"""Of experts, sites, gate, selector and allocation."""
SMALL: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "bottleneck": {"r": 2},
    "factors": {"num_factors": 4, "r": 2},
    "woven": {"r": 2},
    "linear": {"target_modules": ("all-linear",)},
    "tokens": {"num_experts": 3},
    "auto-encoder": {"training": AutoEncoderTraining(**CODES)},
    "pool": {"num_experts": 4},
    "gradient": {"budget": 2, "sample": 4},
    "uniform": {"budget": 2},
    "random": {"budget": 2},
}
"""Settings of parts, so that they fit toy models."""
CHOICES = ("experts", "sites", "gate", "selector", "allocation")
STEP = TrainingConfig(
    max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=0, augment=False
)


@cache
def combinations() -> tuple[dict[Names, RecipeConfig], dict[Names, str]]:
    """Return the recipes of all combinations, and the reasons of those that are refused."""
    made: dict[Names, RecipeConfig] = {}
    refused: dict[Names, str] = {}
    known = {
        (choice, name): PARTS[choice].get(name)(**SMALL.get(name, {}))
        for choice in CHOICES
        for name in PARTS[choice].names()
    }
    for names in product(*(PARTS[choice].names() for choice in CHOICES)):
        parts = {choice: known[choice, name] for choice, name in zip(CHOICES, names, strict=True)}
        try:
            made[names] = RecipeConfig(**parts)
        except ConfigError as error:
            refused[names] = str(error)
    return made, refused


def on_classes(method: RecipeConfig) -> tuple[Learner, Any, Any]:
    task = toy_task(0)
    learner = Learner(toy_backbone("clip"), method=method, training=STEP)
    return learner, task, [task.test[row] for row in range(3)]


def on_pairs(kind: str) -> Callable[[RecipeConfig], tuple[Learner, Any, Any]]:
    def make(method: RecipeConfig) -> tuple[Learner, Any, Any]:
        task = pair_task(0)
        return pair_learner(method, kind, max_steps=1), task, [task.test[row] for row in range(3)]

    return make


def on_texts(method: RecipeConfig) -> tuple[Learner, Any, Any]:
    return Learner(writer("llava"), method=method, training=STEP), TASKS[0], samples()


def on_modalities(method: RecipeConfig) -> tuple[Learner, Any, Any]:
    task = stage("video")
    return Learner(qformer("instructblip"), method=method, training=STEP), task, list(task.test)


MODELS = {
    "classes": on_classes,
    "pairs, one stream": on_pairs("vilt"),
    "pairs, two streams": on_pairs("clip"),
    "texts": on_texts,
    "modalities": on_modalities,
}


def outcome(method: RecipeConfig, model: str) -> str:
    """Learn one step; return why that was refused, or nothing."""
    try:
        learner, task, rows = MODELS[model](method)
    except ConfigError as error:
        return str(error)
    before = {key: value.clone() for key, value in learner.method.state_dict().items()}
    loss = learner.learn(task)
    assert loss is not None
    after = learner.method.state_dict()
    changed = [key for key in after if not torch.equal(after[key], before.get(key, torch.empty(0)))]
    assert changed
    batch = learner.backbone.collate(rows)
    with torch.no_grad():
        found = learner.method.route(batch)[1]
        states = learner.backbone.encode(batch, learner.method.make_route(found, batch))
    assert torch.isfinite(states).all()
    return ""


PRIVATE, BUDGETS = {"every-site"}, {"gradient", "uniform", "random"}
TELLS = {"task-keys", "auto-encoder", "oracle"}
MATRICES, ANYWHERE = {"lora", "bottleneck"}, {"linear", "attention", "qkv", "mlp", "q-former"}
TABLE = (
    ("own", MATRICES, ANYWHERE, TELLS, PRIVATE | BUDGETS),
    ("own", MATRICES, ANYWHERE, {"none"}, {"shared"}),
    ("own", MATRICES, ANYWHERE - {"mlp"}, {"modality"}, {"per-modality"}),
    ("top-k", MATRICES, ANYWHERE, TELLS | {"none"}, {"pool"}),
    ("tokens", MATRICES, ANYWHERE, {"none"}, {"shared"}),
    ("query", {"factors"}, ANYWHERE, TELLS, PRIVATE | BUDGETS),
    ("paths", {"woven"}, ANYWHERE - {"mlp"}, {"modality"}, {"per-modality"}),
)
"""What goes with what, as docs/recipes.md has it: gate, experts, sites, selector, allocation."""


def test_what_is_made_is_what_the_table_allows_and_the_rest_has_a_reason() -> None:
    made, refused = combinations()
    allowed = {
        (experts, sites, gate, selector, allocation)
        for gate, *rest in TABLE
        for experts, sites, selector, allocation in product(*rest)
    }
    assert set(made) == allowed
    assert len(made) + len(refused) == 4 * 5 * 5 * 5 * 7
    assert all(": use " in told or "need each other" in told for told in refused.values())


@pytest.mark.parametrize("model", MODELS)
def test_some_recipes_learn_on_every_model_or_are_refused(model: str) -> None:
    some = list(combinations()[0].values())[list(MODELS).index(model) :: 25]
    reasons = [outcome(method, model) for method in some]
    assert "" in reasons


@pytest.mark.parametrize("experts", ["woven", "lora"])
def test_a_modality_has_experts_at_any_linears_of_a_q_former(experts: str) -> None:
    method = RecipeConfig(
        experts=PARTS["experts"].get(experts)(r=2),
        sites=PARTS["sites"].get("qkv")(towers=("qformer",)),
        gate=PARTS["gate"].get("paths" if experts == "woven" else "own")(),
        selector=PARTS["selector"].get("modality")(),
        allocation=PARTS["allocation"].get("per-modality")(),
    )
    assert outcome(method, "modalities") == ""


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_recipe_learns_on_a_model_or_is_refused(model: str) -> None:
    made, _ = combinations()
    reasons = {names: outcome(method, model) for names, method in made.items()}
    assert any(not reason for reason in reasons.values())
