"""CODA-Prompt and L2P: what is frozen, what is chosen, on one stream and on vision towers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.contract.cases import toy_backbone
from tests.methods.pairs import pair_learner, pair_task
from torch.nn import functional as F

from evolora.backbones.base import Batch
from evolora.errors import ConfigError
from evolora.experts.prompt_pool import PromptPool
from evolora.learner import Learner
from evolora.methods.coda_prompt import CodaPromptConfig
from evolora.methods.l2p import L2P, L2PConfig

CODA = CodaPromptConfig(components_per_task=3, prompt_length=4, layers_to_transform=(0, 1))
FREE = replace(CODA, orthogonality=0.0)
SMALL = L2PConfig(pool_size=5, top_k=2, prompt_length=3)
KINDS = pytest.mark.parametrize("kind", ["vilt", "clip"])


def batch_of(learner: Learner, task: int = 0, codes: tuple[int, ...] = (0, 1, 2)) -> Batch:
    data = pair_task(task, codes).train
    return learner.backbone.collate([data[row] for row in range(6)], task=task)


def pools(learner: Learner) -> list[PromptPool]:
    return [module for module in learner.method.modules() if isinstance(module, PromptPool)]


@KINDS
def test_each_task_adds_components_and_freezes_older_ones(kind: str) -> None:
    learner = pair_learner(CODA, kind)
    learner.learn(pair_task(0))
    before = [[stack.all().clone() for stack in pool.stacks()] for pool in pools(learner)]
    learner.learn(pair_task(1))
    assert len(before) == 2
    for pool, old in zip(pools(learner), before, strict=True):
        for stack, rows in zip(pool.stacks(), old, strict=True):
            assert torch.equal(stack.all()[:3], rows) and len(stack) == 6
            assert not torch.equal(stack.all()[3:], rows)


@KINDS
def test_every_new_component_learns(kind: str) -> None:
    learner = pair_learner(FREE, kind)
    learner.learn(pair_task(0))
    learner.begin(pair_task(1))
    learner.method(batch_of(learner, 1))["loss"].backward()
    for pool in pools(learner):
        for stack in pool.stacks():
            assert stack.active.shape[0] == 3 and stack.active.grad.flatten(1).any(dim=1).all()


def test_the_orthogonality_term_is_weighted_and_may_be_left_out() -> None:
    learner = pair_learner(CODA, max_steps=8)
    learner.learn(pair_task(0))
    total = sum(float(pool.orthogonality().detach()) for pool in pools(learner))
    term = learner.method.extra_losses(batch_of(learner), torch.empty(0))["orthogonality"]
    assert total > 0 and term.item() == pytest.approx(0.1 * total)
    other = pair_learner(FREE, max_steps=8)
    other.learn(pair_task(0))
    assert other.method.extra_losses(batch_of(other), torch.empty(0)) == {}


@KINDS
def test_l2p_takes_the_nearest_prompts_and_only_they_learn(kind: str) -> None:
    learner = pair_learner(SMALL, kind)
    learner.begin(pair_task(0))
    assert isinstance(learner.method, L2P)
    pool, batch = learner.method.pool, batch_of(learner, codes=(0, 2) if kind == "vilt" else (0,))
    query = learner.backbone.encode_base(batch).embedding
    cosines = F.cosine_similarity(query[:, None], pool.keys[None], dim=2)
    best = cosines.argsort(dim=1, descending=True)[:, :2]
    route = learner.method.make_route(0, batch)
    assert torch.equal(pool.nearest(route)[1], best)
    assert torch.equal(pool(route), pool.prompts[best].flatten(1, 2))
    terms = learner.method(batch)
    expected = 0.5 * (1 - cosines.gather(1, best)).sum(dim=1).mean()
    torch.testing.assert_close(terms["pull"], expected.detach())
    terms["loss"].backward()
    chosen = torch.zeros(5, dtype=torch.bool).index_fill(0, best.flatten(), True)
    assert torch.equal(pool.prompts.grad.flatten(1).any(dim=1), chosen)
    assert torch.equal(pool.keys.grad.any(dim=1), chosen) and not chosen.all()


def test_a_sample_without_an_image_has_no_prompts_in_a_vision_tower() -> None:
    learner = pair_learner(SMALL, "clip")
    learner.begin(pair_task(0))
    batch = batch_of(learner)
    with torch.no_grad():
        route = learner.method.make_route(0, batch)
        changed = (
            learner.backbone.encode(batch, route) != learner.backbone.encode_base(batch).embedding
        )
    width = learner.backbone.encoder.width
    assert changed[:, :width].any(dim=1).tolist() == [True, True, False] * 2
    # The text tower has none.
    torch.testing.assert_close(
        learner.backbone.encode(batch, route)[:, width:],
        learner.backbone.encode_base(batch).embedding[:, width:],
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("config", [CODA, SMALL], ids=["coda", "l2p"])
@KINDS
def test_gradient_checkpointing_learns_the_same(config: Any, kind: str) -> None:
    found = []
    for again in (False, True):
        learner = pair_learner(config, kind, gradient_checkpointing=again)
        for index in range(2):
            learner.learn(pair_task(index))
        found.append(learner.method.state_dict())
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CodaPromptConfig(components_per_task=0), "components_per_task must be at least 1"),
        (lambda: CodaPromptConfig(orthogonality=-1), "orthogonality must be at least 0; got -1"),
        (lambda: L2PConfig(top_k=11), r"top_k must be between 1 and pool_size \(10\); got 11"),
        (lambda: L2PConfig(prompt_length=0), "prompt_length must be at least 1; got 0"),
        (lambda: L2PConfig(pull=-0.5), "pull must be at least 0; got -0.5"),
        (
            lambda: Learner(toy_backbone("clip"), method=CodaPromptConfig()),
            "layers_to_transform: the vision tower has 2 blocks; got 2",
        ),
    ],
)
def test_wrong_settings_are_refused(make: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()
