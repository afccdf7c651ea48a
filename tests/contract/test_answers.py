"""The contract on answers: per sample, repeatable, and the base's own where nothing is learned."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import toy_model, toy_task
from tests.contract.cases import (
    BOTH,
    EVERY,
    base_scores,
    call_counts,
    case_of,
    image_features,
    make,
    mixed_batch,
    taught,
    teach,
    text_features,
)

from evolora.errors import RouteError
from evolora.routing.route import BASE, Route


@EVERY
@BOTH
def test_batch_mates_do_not_matter(name: str, kind: str) -> None:
    learner = taught(name, kind)
    batch = mixed_batch(learner.backbone)
    labels = toy_task(0).labels
    whole = learner.method.predict(batch, labels, oracle=1)
    for row in range(len(batch)):
        alone = learner.method.predict(batch.take(torch.tensor([row])), labels, oracle=1)
        assert alone.tasks.tolist() == whole.tasks[row : row + 1].tolist()
        torch.testing.assert_close(alone.scores[0], whole.scores[row], rtol=0, atol=1e-5)


@EVERY
def test_answers_twice_are_identical(name: str) -> None:
    learner = taught(name)
    batch = mixed_batch(learner.backbone)
    first, second = (learner.method.predict(batch, toy_task(1).labels, oracle=1) for _ in range(2))
    assert torch.equal(first.scores, second.scores) and torch.equal(first.tasks, second.tasks)
    assert learner.evaluate(toy_task(1)) == learner.evaluate(toy_task(1))


@EVERY
def test_rows_of_the_base_are_the_untouched_model(name: str) -> None:
    learner = taught(name)
    backbone = learner.backbone
    batch = mixed_batch(backbone)
    tokens = backbone.tokenize(toy_task(0).labels.prompts())
    untouched = toy_model("clip")
    counts, stop = call_counts(learner)
    backbone.host.set_route("vision", Route.of(BASE, len(batch)))
    backbone.host.set_route("text", Route.of(BASE, 3))
    assert torch.equal(image_features(backbone.model, batch), image_features(untouched, batch))
    assert torch.equal(text_features(backbone.model, tokens), text_features(untouched, tokens))
    assert torch.equal(
        learner.method.answer(
            batch, None, torch.full((len(batch),), BASE), toy_task(2).labels
        ).scores,
        base_scores("clip", batch, 2),
    )
    assert not any(counts.values())
    tasks = torch.full((len(batch),), BASE)
    tasks[1::2] = 0
    backbone.host.set_route("vision", learner.method.make_route(tasks, batch))
    if case_of(name).prompts:
        stop()
        with pytest.raises(RouteError, match="cannot run in one forward"):
            image_features(backbone.model, batch)
        return
    mixed, base = image_features(backbone.model, batch), image_features(untouched, batch)
    stop()
    assert torch.equal(mixed[::2], base[::2])
    if case_of(name).sites:
        assert not torch.equal(mixed[1::2], base[1::2])
        assert any(counts.values())


@EVERY
def test_disabled_is_the_base(name: str) -> None:
    learner = taught(name)
    batch = mixed_batch(learner.backbone)
    counts, stop = call_counts(learner)
    with learner.backbone.host.disabled():
        features = image_features(learner.backbone.model, batch)
    stop()
    assert torch.equal(features, image_features(toy_model("clip"), batch))
    assert not any(counts.values())


@EVERY
@BOTH
def test_remove_leaves_no_trace(name: str, kind: str) -> None:
    learner = teach(make(name, kind), 1)
    batch = mixed_batch(learner.backbone)
    model, fresh = learner.backbone.model, toy_model(kind)
    learner.method.remove()
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks
        assert vars(module).keys() == vars(fresh.get_submodule(_path(model, module))).keys()
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in fresh.named_modules()
    ]
    assert torch.equal(image_features(model, batch), image_features(fresh, batch))


def _path(model: torch.nn.Module, wanted: torch.nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


@EVERY
def test_a_site_without_a_route_raises(name: str) -> None:
    learner = make(name)
    learner.begin(toy_task(0))
    batch = mixed_batch(learner.backbone)
    if not case_of(name).sites:
        image_features(learner.backbone.model, batch)
        return
    with pytest.raises(RouteError, match="no route for the 'vision' tower"):
        image_features(learner.backbone.model, batch)
    learner.backbone.host.set_route("vision", Route.of(0, 2))
    with pytest.raises(RouteError, match="rows"):
        image_features(learner.backbone.model, batch)


@EVERY
def test_before_any_task_the_base_answers(name: str) -> None:
    learner = make(name)
    batch = mixed_batch(learner.backbone)
    prediction = learner.method.predict(batch, toy_task(0).labels)
    assert prediction.tasks.tolist() == [BASE] * len(batch)
    assert torch.equal(prediction.scores, base_scores("clip", batch, 0))
