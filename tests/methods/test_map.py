"""MAP: the missing code of a sample, from the data, decides its prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.methods.pairs import pair_learner, pair_task
from torch import Tensor

from evolora.errors import ConfigError
from evolora.learner import Learner
from evolora.methods.map import MapConfig, MapLayer, PoolerLayer
from evolora.routing.route import Route

MODES = pytest.mark.parametrize("mode", ["input", "attention"])


def small(mode: str = "input", **options: object) -> MapConfig:
    values: dict = {"mode": mode, "prompt_length": 6, "layers_to_transform": (0, 1), **options}
    return MapConfig(**values)


def prompts_of(learner: Learner) -> list[MapLayer]:
    return [layer for layer in learner.method.layers.values() if isinstance(layer, MapLayer)]


def embedded(learner: Learner, batch: object) -> Tensor:
    with torch.no_grad():
        return learner.backbone.encode(batch, learner.method.make_route(0, batch))


def test_the_stated_start() -> None:
    """Zeros with one row of ones: 0 complete, 1 image missing (code 2), 2 text missing."""
    for mode, ones in (("input", (0, 2, 1)), ("attention", (0, 2, 1))):
        for layer in prompts_of(pair_learner(small(mode))):
            for code, row in enumerate(ones):
                rows = {row, row + 3} if mode == "attention" else {row}
                expected = torch.zeros(6, 32)
                expected[list(rows)] = 1.0
                assert torch.equal(layer.prompts[code], expected)
    learner = pair_learner(small())
    pooler = learner.method.layers["multimodal/2/pooler"]
    assert isinstance(pooler, PoolerLayer)
    own, hidden = learner.backbone.model.pooler, torch.randn(2, 5, 32)
    with learner.backbone.host.disabled():
        expected = own(hidden)
    assert torch.equal(pooler(hidden, expected, Route.of(0, 2)), expected)


def test_default_sizes_are_the_authors() -> None:
    config = MapConfig()
    assert (config.prompt_length, config.layers_to_transform) == (16, (0, 1, 2, 3, 4, 5))
    learner = pair_learner(small(train_pooler=False))
    trained = sum(p.numel() for p in learner.method.parameters())
    assert trained == 2 * 3 * 6 * 32, "layers x sets x rows x width; 221 k at ViLT-B"
    assert 6 * 3 * 16 * 768 == 221_184


@MODES
def test_the_missing_code_decides(mode: str) -> None:
    learner = pair_learner(small(mode))
    learner.begin(pair_task(0))
    examples = [pair_task(0).train[row] for row in range(6)]
    batch = learner.backbone.collate(examples)
    before = embedded(learner, batch)
    for code in range(3):
        kept = [layer.prompts.detach().clone() for layer in prompts_of(learner)]
        with torch.no_grad():
            for layer in prompts_of(learner):
                layer.prompts[code] += 1.0
        changed = (embedded(learner, batch) != before).any(dim=1)
        assert changed.tolist() == [row % 3 == code for row in range(6)]
        with torch.no_grad():
            for layer, old in zip(prompts_of(learner), kept, strict=True):
                layer.prompts.copy_(old)


@MODES
def test_only_sets_of_codes_that_came_learn(mode: str) -> None:
    """The code is the data's: the same pixels and tokens, said to be complete, are complete."""
    learner = pair_learner(small(mode))
    learner.begin(pair_task(0))
    batch = learner.backbone.collate([pair_task(0, (1,)).train[row] for row in range(6)], task=0)
    learner.method(batch)["loss"].backward()
    for layer in prompts_of(learner):
        assert layer.prompts.grad.flatten(1).any(dim=1).tolist() == [False, True, False]
        layer.prompts.grad = None
    everywhere = {name: torch.ones_like(there) for name, there in batch.present.items()}
    learner.method(replace(batch, present=everywhere))["loss"].backward()
    for layer in prompts_of(learner):
        assert layer.prompts.grad.flatten(1).any(dim=1).tolist() == [True, False, False]


@MODES
def test_nothing_protects_older_tasks(mode: str) -> None:
    learner = pair_learner(small(mode))
    learner.learn(pair_task(0))
    before = [layer.prompts.detach().clone() for layer in prompts_of(learner)]
    learner.learn(pair_task(1))
    for layer, old in zip(prompts_of(learner), before, strict=True):
        assert layer.prompts.requires_grad and not torch.equal(layer.prompts, old)


@pytest.mark.parametrize(("mode", "length", "least"), [("input", 2, 3), ("attention", 5, 6)])
def test_too_short_prompts_are_refused(mode: str, length: int, least: int) -> None:
    with pytest.raises(ConfigError, match=f"prompt_length must be at least {least} in mode"):
        small(mode, prompt_length=length)
