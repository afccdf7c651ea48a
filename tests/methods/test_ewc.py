"""EWC: what it holds, how strongly, and that it forgets less for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conftest import toy_task
from tests.methods.forgetting import forgotten, learner_of
from tests.methods.pairs import pair_learner, pair_task

from evolora.errors import ConfigError
from evolora.methods.ewc import EWC, EWCConfig
from evolora.methods.lora import SequentialLoRAConfig
from evolora.storage.state import export_state

SMALL: dict[str, Any] = {"r": 3, "fisher_samples": 12}


def test_it_forgets_less_than_sequential_lora() -> None:
    plain, plain_new = forgotten(SequentialLoRAConfig(r=3))
    held, held_new = forgotten(EWCConfig(**SMALL, strength=1e4))
    assert plain > 0.2, "there is something to forget"
    assert held < 0.6 * plain, (held, plain)
    assert held_new > plain_new - 0.1, "and learns what comes next"


def test_without_strength_it_is_sequential_lora() -> None:
    plain, free = learner_of(SequentialLoRAConfig(r=3)), learner_of(EWCConfig(r=3, strength=0.0))
    for learner in (plain, free):
        for index in range(2):
            learner.learn(toy_task(index))
    found = export_state(free.method)
    for name, value in export_state(plain.method).items():
        assert torch.equal(found[name], value), name


def test_a_learning_that_breaks_off_while_it_is_measured_leaves_nothing() -> None:
    learner = learner_of(EWCConfig(**SMALL), max_steps=3)
    broken, review = learner.method, learner.method.review

    def fails(*given: Any) -> None:
        review(*given)
        raise KeyboardInterrupt

    broken.review = fails  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        learner.learn(toy_task(0))
    assert isinstance(broken, EWC) and len(broken.elastic.importance) == 0
    del broken.review
    learner.learn(toy_task(0))
    again = learner_of(EWCConfig(**SMALL), max_steps=3)
    again.learn(toy_task(0))
    found = export_state(again.method)
    for name, value in export_state(broken).items():
        assert torch.equal(found[name], value), name


def test_the_penalty_is_that_of_the_values_that_moved() -> None:
    learner = learner_of(EWCConfig(**SMALL, strength=7.0), max_steps=4)
    method = learner.method
    assert isinstance(method, EWC)
    batch = learner.backbone.collate([toy_task(1).train[row] for row in range(4)], task=1)
    learner.learn(toy_task(0))
    assert (method.elastic.importance > 0).any() and (method.elastic.importance >= 0).all()
    learner.begin(toy_task(1))
    assert float(method(batch)["elastic"]) == 0.0
    with torch.no_grad():
        for parameter in method.held():
            parameter.add_(0.1)
    expected = 7.0 * 0.5 * 0.01 * method.elastic.importance.sum()
    terms = method(batch)
    torch.testing.assert_close(terms["elastic"], expected, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(terms["loss"].detach(), terms["task"] + terms["elastic"])


def test_importance_is_measured_on_the_task_s_own_samples_and_classes() -> None:
    """Empirical: the mean of the squared gradients of each sample's own loss."""
    learner = learner_of(EWCConfig(r=3, fisher="empirical", fisher_samples=3), max_steps=4)
    learner.learn(toy_task(0))
    method = learner.method
    assert isinstance(method, EWC)
    expected = torch.zeros_like(method.elastic.importance)
    for row in (0, 8, 16):  # spread evenly over 24
        batch = learner.backbone.collate([toy_task(0).train[row]], task=0)
        method.zero_grad()
        loss = method.task_loss(
            learner.backbone.encode(batch, method.make_route(0, batch)), batch, method.labels[0], 0
        )
        loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in method.held()]
        expected += torch.cat([grad.flatten() for grad in grads]).square() / 3
    torch.testing.assert_close(method.elastic.importance, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["vilt", "clip"])
def test_heads_are_not_held(kind: str) -> None:
    learner = pair_learner(EWCConfig(**SMALL), kind)
    for index in range(2):
        learner.learn(pair_task(index))
    method = learner.method
    assert isinstance(method, EWC)
    factors = sum(p.numel() for p in method.layers.parameters())
    assert len(method.elastic.importance) == factors
    assert (method.elastic.importance > 0).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1.0}, "strength must be at least 0"),
        ({"fisher_samples": 0}, "fisher_samples must be at least 1"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\]"),
        ({"r": 0}, "r must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EWCConfig(**settings)
