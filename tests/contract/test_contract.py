"""The contract: every registered method is enrolled by being registered, and cannot opt out.

A method only brings a toy configuration and says which of two strong claims it makes (`cases`).
This file has enrolment and the base model as the start; the files beside it have the rest.
"""

from __future__ import annotations

import pytest
import torch
from tests.conftest import toy_task
from tests.contract.cases import (
    BOTH,
    CASES,
    EVERY,
    ONE_STREAM,
    PLUGGED,
    answer,
    base_scores,
    case_of,
    image_features,
    make,
    mixed_batch,
    taught,
    teach,
    toy_backbone,
)

from evolora.errors import ConfigError
from evolora.learner import Learner
from evolora.registry import METHODS
from evolora.routing.route import BASE


def test_every_registered_method_is_enrolled() -> None:
    assert sorted(CASES) == METHODS.names()
    for name, case in CASES.items():
        assert case.config.type == name
        assert METHODS.get(name).config_class is type(case.config)


def test_a_method_without_a_toy_configuration_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="no toy configuration"):
        case_of("not-enrolled")


@pytest.mark.parametrize("name", ONE_STREAM)
def test_a_method_of_one_stream_refuses_two_towers(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} needs image and text in one sequence"):
        make(name)


@pytest.mark.parametrize("name", PLUGGED)
def test_a_method_of_modalities_refuses_a_model_that_takes_none(name: str) -> None:
    config = METHODS.get(name).config_class()
    with pytest.raises(ConfigError, match=f"{name} learns classes|{name} needs a model that"):
        Learner(toy_backbone("clip"), method=config)


@EVERY
def test_sites_are_as_claimed(name: str) -> None:
    assert bool(taught(name).method.layers) == case_of(name).sites


@EVERY
@BOTH
def test_identity_at_init(name: str, kind: str) -> None:
    """Bit for bit: zero factors add exact zeros, a copy of the weights computes the same."""
    learner = make(name, kind)
    batch = mixed_batch(learner.backbone)
    learner.begin(toy_task(0))
    if case_of(name).prompts:
        assert not torch.equal(answer(learner, batch, 0), base_scores(kind, batch, 0))
        return
    assert torch.equal(answer(learner, batch, 0), base_scores(kind, batch, 0))
    with torch.no_grad(), learner.method.weights():
        embedding = learner.backbone.encode(batch, learner.method.make_route(0, batch))
        classes = learner.backbone.class_embeddings(toy_task(0).labels, 0, version=-1)
    untouched = toy_backbone(kind)
    assert torch.equal(embedding, image_features(untouched.model, batch))
    with torch.no_grad():
        assert torch.equal(classes, untouched.class_embeddings(toy_task(0).labels, BASE))


@EVERY
def test_every_task_starts_as_the_base_where_claimed(name: str) -> None:
    learner = teach(make(name), 1)
    batch = mixed_batch(learner.backbone)
    learner.begin(toy_task(1))
    same = torch.equal(answer(learner, batch, 1), base_scores("clip", batch, 1))
    if case_of(name).fresh:
        assert same
    elif not learner.method.joint:
        assert not same, "it starts fresh: claim it"
