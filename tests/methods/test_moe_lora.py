"""MoELoRA: the equation by hand, one product for all experts, what trains, published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.backbones.writers import FAMILIES, samples, writer
from tests.conftest import toy_task
from tests.contract.cases import make, toy_backbone
from tests.methods.test_writing import LINEARS, TASKS, TEXTS, TRAINING, disturb
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evolora.errors import ConfigError
from evolora.experts.sites import Site
from evolora.learner import Learner
from evolora.methods.lora import SequentialLoRA, SequentialLoRAConfig
from evolora.methods.moe_lora import MoELoRA, MoELoRAConfig, MoELoRALayer
from evolora.randomness import StepRandom, generator
from evolora.routing.route import Route

SMALL = MoELoRAConfig(r=6, num_experts=3, lora_alpha=12.0, target_modules=LINEARS)


def layer_of(config: MoELoRAConfig, d_in: int = 4, d_out: int = 5) -> MoELoRALayer:
    linear = torch.nn.Linear(d_in, d_out)
    site = Site(
        tower="language", layer=0, name="a", kind="linear", module=linear, d_in=d_in, d_out=d_out
    )
    layer = MoELoRALayer(site, config, torch.device("cpu"))
    layer.begin_task(lambda: generator(0))
    disturb(layer)
    return layer


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_layer_is_the_equation(top_k: int | None) -> None:
    config = MoELoRAConfig(r=6, num_experts=3, lora_alpha=12.0, top_k=top_k)
    layer = layer_of(config)
    a, b = layer.bank.A.all(), layer.bank.B.all()
    x, out = torch.randn(2, 7, 4, generator=generator(1)), torch.zeros(2, 7, 5)
    expected = torch.zeros(2, 7, 5)
    for row in range(2):
        for token in range(7):
            p = torch.softmax(layer.router.weight.all()[0] @ x[row, token], dim=0)
            if top_k is not None:
                p = torch.where(p >= p.sort().values[-top_k], p, 0.0)
                p = p / p.sum()
            for expert in range(3):
                own = b[expert].T @ (a[expert] @ x[row, token])
                expected[row, token] += 2.0 * p[expert] * own  # s = 12 / 6
    got = layer(x, out, Route.of(0, 2))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert layer.bank.r == 2
    experts = 2 * 2 * 7 * 2 * (4 + 5) if top_k else 3 * 2 * 7 * 2 * (4 + 5)
    assert layer.flops(7) == 2 * 7 * 4 * 3 + experts


def test_fresh_experts_are_normal_and_add_exact_zeros() -> None:
    method = MoELoRA(SMALL, writer("llava"))
    method.begin_task("a", TEXTS)
    for layer in method.layers.values():
        assert 0.005 < float(layer.bank.A.all().detach().std()) < 0.02
        assert not layer.bank.B.all().any()
    batch = method.backbone.collate(samples())
    route = method.make_route(0, batch)
    with torch.no_grad():
        fresh = method.backbone.answer_losses(batch, route)
        with method.backbone.host.disabled():
            assert torch.equal(fresh, method.backbone.answer_losses(batch, route))


class Largest(TorchDispatchMode):
    """Remembers the number of values of the largest tensor that anything returned."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, Tensor):
                self.seen = max(self.seen, value.numel())
        return result


def test_nothing_of_the_size_of_all_experts_outputs_is_made() -> None:
    layer = layer_of(MoELoRAConfig(r=8, num_experts=8), d_in=4, d_out=64)
    x = torch.randn(3, 10, 4, requires_grad=True)
    base = torch.randn(3, 10, 64, requires_grad=True)
    with Largest() as largest:
        layer(x, base * 1.0, Route.of(0, 3)).sum().backward()
    assert largest.seen == 3 * 10 * 64  # of one output; of all experts it would be eight times that


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_one_expert_is_a_lora(dropout: float) -> None:
    one = MoELoRAConfig(
        r=4, num_experts=1, lora_alpha=8.0, lora_dropout=dropout, target_modules=LINEARS
    )
    lora = SequentialLoRAConfig(r=4, lora_alpha=8.0, lora_dropout=dropout, target_modules=LINEARS)
    left, right = MoELoRA(one, writer("internvl")), SequentialLoRA(lora, writer("internvl"))
    for method in (left, right):
        method.begin_task("a", TEXTS)
    disturb(left)
    with torch.no_grad():
        for mine, other in zip(left.layers.values(), right.layers.values(), strict=True):
            for name in ("A", "B"):
                getattr(other.bank, name).active.copy_(getattr(mine.bank, name).active)
    losses = []
    for method in (left, right):
        batch = method.backbone.collate(samples(), task=0).with_random(StepRandom(3))
        losses.append(method(batch)["loss"])
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for mine, other in zip(left.layers.values(), right.layers.values(), strict=True):
        torch.testing.assert_close(
            mine.bank.B.active.grad, other.bank.B.active.grad, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_row_is_answered_as_it_is_alone(kind: str) -> None:
    backbone = writer(kind)
    method = MoELoRA(SMALL, backbone)
    method.begin_task("a", TEXTS)
    disturb(method)
    whole = method.write(backbone.collate(samples()), TEXTS)
    alone = [method.write(backbone.collate([one]), TEXTS).texts[0] for one in samples()]
    assert whole.texts == tuple(alone)
    with backbone.host.disabled():
        base = backbone.write(backbone.collate(samples()), Route.of(0, 4), 6)
    assert whole.texts != tuple(base)


def test_all_experts_and_routers_of_all_towers_train_on_every_task() -> None:
    backbone = writer("llava")
    learner = Learner(backbone, method=SMALL, training=TRAINING)
    learner.learn(TASKS[0])
    assert {name.split("/")[0] for name in learner.method.layers} == set(backbone.towers)
    before = {name: value.detach().clone() for name, value in learner.method.named_parameters()}
    learner.learn(TASKS[1])
    after = dict(learner.method.named_parameters())
    assert after.keys() == before.keys()
    same = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert [name for name in same if after[name].numel()] == []
    assert not any(each.bank.frozen_ids() for each in learner.method.layers.values())
    assert learner.evaluate(TASKS[1]).routes == {"shared": 6}


def test_tokens_may_take_few_experts_on_clip() -> None:
    config = MoELoRAConfig(r=6, num_experts=3, lora_alpha=12.0, top_k=2)
    learner = Learner(toy_backbone("clip"), method=config, training=make("moe-lora").training)
    learner.learn(toy_task(0))
    method = learner.method
    learned = [layer.bank.B.all().flatten(1).any(dim=1).sum() for layer in method.layers.values()]
    assert min(learned) == 2 and max(learned) == 3  # where no token chose the third, it is zero
    assert learner.evaluate(toy_task(0)).samples == len(toy_task(0).test)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 10, "num_experts": 4}, "rank of all 4 experts together.*multiple.*got 10"),
        ({"r": 4, "num_experts": 8}, "rank of all 8 experts together.*got 4"),
        ({"num_experts": 0}, "num_experts must be at least 1; got 0"),
        ({"num_experts": 4, "top_k": 5}, r"top_k must be between 1 and num_experts \(4\).*got 5"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MoELoRAConfig(**settings)
