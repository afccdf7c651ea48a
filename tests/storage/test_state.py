"""Method state <-> tensors: through growth, strictly, and all or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conftest import toy_task

from evolora.errors import StorageError
from evolora.methods.moe_adapters import MoEAdapters, MoEAdaptersConfig
from evolora.routing.autoencoders import AutoEncoderTraining
from evolora.routing.selector import AutoEncoderSelectorConfig
from evolora.storage.state import export_state, load_state

SELECTOR = AutoEncoderSelectorConfig(training=AutoEncoderTraining(hidden=4, steps=5))


def grown(make_backbone: Any, tasks: int = 3, r: int = 4) -> MoEAdapters:
    """Return a method whose pool had to grow: every task freezes two of three experts."""
    config = MoEAdaptersConfig(num_experts=3, r=r, min_free_experts=2, selector=SELECTOR)
    method = MoEAdapters(config, make_backbone())
    for index in range(tasks):
        task = toy_task(index)
        method.begin_task(task.name, task.labels)
        for number, layer in enumerate(method.moe_layers()):
            layer.usage.counts[(number + index) % len(layer.bank)] = 5
            layer.usage.counts[-1] = 9
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.add_(torch.randn_like(parameter))
        method.finish_task()
        features = torch.randn(9, method.backbone.feature_widths()["layers"])
        method.selector.learn(index, features, features, 0)
    return method


def fresh(make_backbone: Any, tasks: int = 3, r: int = 4) -> MoEAdapters:
    config = MoEAdaptersConfig(num_experts=3, r=r, min_free_experts=2, selector=SELECTOR)
    method = MoEAdapters(config, make_backbone())
    for index in range(tasks):
        task = toy_task(index)
        method.begin_task(task.name, task.labels)
    return method


def test_state_survives_growth_bit_for_bit_and_stays_usable(make_backbone: Any) -> None:
    method = grown(make_backbone)
    assert len(method.moe_layers()[0].bank) > 3  # it did grow
    other = fresh(make_backbone)
    load_state(other, export_state(method))
    mine, theirs = export_state(method), export_state(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert method.trainable().keys() == other.trainable().keys()
    for a, b in zip(method.moe_layers(), other.moe_layers(), strict=True):
        assert a.bank.frozen_ids() == b.bank.frozen_ids()
        assert a.routers.experts == b.routers.experts
    batch = method.backbone.collate([toy_task(i).test[0] for i in range(3)])
    labels = toy_task(0).labels
    assert torch.equal(method.predict(batch, labels).scores, other.predict(batch, labels).scores)
    for both in (method, other):  # the next task allocates the same, at the same places
        both.begin_task("next", toy_task(3).labels)
    assert all(
        torch.equal(value, export_state(other)[name])
        for name, value in export_state(method).items()
    )


def test_loading_copies(make_backbone: Any) -> None:
    saved = export_state(grown(make_backbone, tasks=1))
    other = fresh(make_backbone, tasks=1)
    load_state(other, saved)
    name = next(iter(other.trainable()))
    before = saved[name].clone()
    with torch.no_grad():
        other.trainable()[name].add_(1)
    assert torch.equal(saved[name], before)


def test_missing_and_unknown_tensors_are_named(make_backbone: Any) -> None:
    saved = export_state(grown(make_backbone))
    other = fresh(make_backbone)
    lacking = {k: v for k, v in saved.items() if k != "layers.vision/0/mlp.bank.A.active"}
    with pytest.raises(StorageError, match=r"lacks 'layers\.vision/0/mlp\.bank\.A\.active'"):
        load_state(other, lacking)
    with pytest.raises(StorageError, match="unknown 'extra'"):
        load_state(other, {**saved, "extra": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.vision/0/mlp.bank.A.active", lambda t: t[..., :-1]),
        ("layers.vision/0/mlp.bank.B.frozen", lambda t: t.flatten(1)),
        ("layers.text/1/mlp.bank.A.slot", lambda t: t[:-1]),
        ("layers.text/1/mlp.bank.A.slot", torch.zeros_like),
        ("layers.text/1/mlp.usage.counts", lambda t: t[None]),
        ("selector.bank.encoder.frozen", lambda t: t[:, :-1]),
    ],
)
def test_a_tensor_of_another_shape_is_refused_and_nothing_is_loaded(
    name: str, change: Any, make_backbone: Any
) -> None:
    saved = export_state(grown(make_backbone))
    other = fresh(make_backbone)
    before = {key: value.clone() for key, value in export_state(other).items()}
    with pytest.raises(StorageError, match=name.replace(".", r"\.")):
        load_state(other, {**saved, name: change(saved[name])})
    after = export_state(other)
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_another_rank_is_refused(make_backbone: Any) -> None:
    with pytest.raises(StorageError, match="has shape"):
        load_state(fresh(make_backbone, r=8), export_state(grown(make_backbone, r=4)))
