"""MoE-Adapters against specs/moe_adapters.md section 9: invariants 9.1.

Elsewhere: numbers 9.2 and scripts 9.3 in test_moe_adapters_numbers.py; 9.1-5 and the gate numbers
in tests/routing/test_gates.py, 9.1-11 and 9.3 e in tests/routing/test_selector.py; what holds for
every method in tests/contract.
"""

from __future__ import annotations

import pytest
import torch
from tests.conftest import toy_task
from tests.methods.toy_moe import (
    batches,
    forced,
    gatings,
    learner_of,
    method_of,
    randomize,
)
from torch import Tensor

from evolora.experts.mixing import mix
from evolora.learner import Learner
from evolora.methods.moe_adapters import (
    MoELayer,
)
from evolora.methods.zero_shot import ZeroShotConfig
from evolora.routing.route import BASE, Route


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("expert", ["bottleneck", "lora"])
def test_9_1_1_zero_init_identity_for_any_router_noise_and_k(make_backbone, top_k, expert) -> None:
    learner = learner_of(make_backbone, top_k=top_k, expert=expert)
    learner.begin(toy_task(0))
    randomize(method_of(learner))
    batch = next(batches(learner, 0))
    plain = make_backbone()
    route = Route.of(0, len(batch), random=batch.random)
    with torch.no_grad():
        embedding = learner.backbone.encode(batch, route)
        classes = learner.backbone.class_embeddings(toy_task(0).labels, 0, random=batch.random)
        assert torch.equal(embedding, plain.encode_base(batch, features=False).embedding)
        assert torch.equal(classes, plain.class_embeddings(toy_task(0).labels, BASE))


def test_9_1_2_the_base_path_at_any_point_of_training(make_backbone) -> None:
    learner = learner_of(make_backbone)
    plain = Learner(make_backbone(), method=ZeroShotConfig())
    batch = learner.backbone.collate([toy_task(2).test[row] for row in range(5)])
    expected = forced(plain, batch, BASE, own=2)
    calls = []
    for layer in method_of(learner).moe_layers():
        layer.register_forward_hook(lambda *_: calls.append(1))
    for task in (0, 1):
        learner.begin(toy_task(task))
        optimizer = torch.optim.AdamW(learner.method.trainable().values(), lr=1e-2)
        for step in batches(learner, task):
            optimizer.zero_grad()
            learner.method(step)["loss"].backward()
            optimizer.step()
            calls.clear()
            assert torch.equal(forced(learner, batch, BASE, own=2), expected)
            assert not calls
        learner.method.finish_task()


def test_9_1_3_frozen_experts_and_old_routers_are_bit_identical(make_backbone) -> None:
    learner = learner_of(make_backbone, freeze_top=2)
    layers = method_of(learner).moe_layers()
    kept: list[tuple[MoELayer, list[int], list[Tensor]]] = []
    for task in range(3):
        learner.learn(toy_task(task))
        for layer, ids, tensors in kept:
            assert set(ids) <= set(layer.bank.frozen_ids())
            for stack, rows in zip(layer.bank.stacks(), tensors, strict=True):
                assert torch.equal(stack.all()[ids].detach(), rows)
        for layer in layers:
            assert layer.routers.gate.frozen_ids() == list(range(task + 1))
        kept += [
            (layer, ids, [stack.all()[ids].detach().clone() for stack in layer.bank.stacks()])
            for layer in layers
            for ids in [layer.bank.frozen_ids()]
        ]
    assert all(ids for _, ids, _ in kept)


@pytest.mark.parametrize("text_routing", ["start", "end"])
def test_9_1_4_text_gates_are_constant_on_the_start_token_only(make_backbone, text_routing) -> None:
    learner = learner_of(make_backbone, text_routing=text_routing)
    learner.begin(toy_task(0))
    randomize(method_of(learner), experts=True)
    batch = learner.backbone.collate([toy_task(t).test[row] for t in range(3) for row in range(3)])

    def run() -> None:
        forced(learner, batch, 0)

    for name, found in gatings(method_of(learner), run).items():
        spread = max(float((gating.gates - gating.gates[:1]).abs().max()) for gating in found)
        if name.startswith("text") and text_routing == "start":
            assert spread == 0.0
        else:
            assert spread > 0.0


def layer_and_input(make_backbone, rows: int = 6, tokens: int = 7) -> tuple[MoELayer, Tensor]:
    learner = learner_of(make_backbone)
    for task in range(2):
        learner.begin(toy_task(task))
        learner.method.finish_task()
    randomize(method_of(learner), experts=True)
    x = torch.randn(rows, tokens, 32, generator=torch.Generator().manual_seed(4))
    return method_of(learner).moe_layers()[0], x


def test_9_1_6_patch_tokens_share_the_gates(make_backbone) -> None:
    layer, x = layer_and_input(make_backbone)
    route, out = Route.of(0, len(x)), torch.zeros_like(x)
    order = torch.cat([torch.tensor([0]), 1 + torch.randperm(x.shape[1] - 1)])
    with torch.no_grad():
        plain, permuted = layer(x, out, route), layer(x[:, order], out, route)
    torch.testing.assert_close(permuted, plain[:, order], rtol=0, atol=1e-6)
    gates = [layer.routers(each[:, 0], route.tasks, uniform=0) for each in (x, x[:, order])]
    assert torch.equal(gates[0].gates, gates[1].gates)


@pytest.mark.parametrize("tokens", [3, 20])
def test_9_1_7_dispatch_is_the_dense_sum_for_any_batch(make_backbone, tokens) -> None:
    layer, x = layer_and_input(make_backbone, tokens=tokens)
    out = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    tasks = torch.tensor([0, 1, 1, 0, 1, 0])
    with torch.no_grad():
        whole = layer(x, out, Route(tasks))
        gating = layer.routers(x[:, 0], tasks)
        dense = torch.zeros(6, 5).scatter(1, gating.ids, gating.gates)
        every = torch.arange(5).expand(6, 5)
        reference = mix(out, x, layer.bank, every, dense, formulation="gather")
        torch.testing.assert_close(whole, reference, rtol=1e-5, atol=1e-6)
        order = torch.randperm(6)
        permuted = layer(x[order], out[order], Route(tasks[order]))
        torch.testing.assert_close(permuted, whole[order], rtol=1e-5, atol=1e-6)
        for row in range(6):
            one = slice(row, row + 1)
            alone = layer(x[one], out[one], Route.of(int(tasks[row]), 1))
            torch.testing.assert_close(alone, whole[one], rtol=1e-5, atol=1e-6)


def test_9_1_8_counts_are_conserved_and_freezing_is_monotone(make_backbone) -> None:
    learner = learner_of(make_backbone, freeze_top=2, min_free_experts=0)
    layers = method_of(learner).moe_layers()
    frozen: list[set[int]] = [set() for _ in layers]
    for task in range(3):
        learner.begin(toy_task(task))
        assert all(int(layer.usage.counts.sum()) == 0 for layer in layers), "counts are not reset"
        for step, batch in enumerate(batches(learner, task), start=1):
            learner.method(batch)
            for layer in layers:
                rows = len(batch) if layer.tower == "vision" else 3
                assert int(layer.usage.counts.sum()) == 2 * rows * step
        forced(learner, batch, task)  # evaluation counts nothing
        assert all(int(layer.usage.counts.sum()) == 2 * step * rows_of(layer) for layer in layers)
        top = [set(layer.usage.most_used(2)) for layer in layers]
        learner.method.finish_task()
        for index, layer in enumerate(layers):
            now = set(layer.bank.frozen_ids())
            assert now == frozen[index] | top[index]
            frozen[index] = now


def rows_of(layer: MoELayer) -> int:
    return 6 if layer.tower == "vision" else 3


def test_9_1_9_first_step_gradients(make_backbone) -> None:
    """Ours differs in one documented point: an unselected expert's gradient is zero, not none."""
    learner = learner_of(make_backbone, num_experts=12)
    learner.begin(toy_task(0))
    batch = next(batches(learner, 0))
    found = gatings(method_of(learner), lambda: learner.method(batch)["loss"].backward())
    for layer in method_of(learner).moe_layers():
        for tensor in (layer.routers.gate, layer.routers.noise, layer.bank.A, layer.bank.down_bias):
            assert tensor.active.grad.abs().max() == 0
        chosen = torch.zeros(12, dtype=torch.bool)
        chosen[found[layer.name][0].ids.flatten()] = True
        assert torch.equal(layer.bank.up_bias.active.grad.abs().sum(1) > 0, chosen)
        up = layer.bank.B.active.grad.flatten(1).abs().sum(1) > 0
        assert not (up & ~chosen).any() and up.any()
        assert layer.name.startswith("vision") or not chosen.all(), "a test needs unselected ones"


def test_9_1_10_retention_where_only_frozen_experts_answer(make_backbone) -> None:
    """freeze_top = all used experts: the condition holds by construction, answers cannot move."""
    learner = learner_of(make_backbone, freeze_top=5, min_free_experts=2)
    learner.learn(toy_task(0))
    batch = learner.backbone.collate([toy_task(0).test[row] for row in range(9)])
    before = forced(learner, batch, 0)
    found = gatings(method_of(learner), lambda: forced(learner, batch, 0))
    for layer in method_of(learner).moe_layers():
        used = {i for gating in found.get(layer.name, []) for i in gating.ids.flatten().tolist()}
        assert used <= set(layer.bank.frozen_ids())
    for task in (1, 2):
        learner.learn(toy_task(task))
    torch.testing.assert_close(forced(learner, batch, 0), before, rtol=0, atol=1e-6)
    assert len(method_of(learner).moe_layers()[0].bank) > 5, "the pool grew"


def test_9_1_12_transfer_cannot_exceed_and_equals_zero_shot_with_an_oracle(make_backbone) -> None:
    learner = learner_of(make_backbone)
    plain = Learner(make_backbone(), method=ZeroShotConfig())
    tasks = [toy_task(index) for index in range(3)]
    expected = [plain.evaluate(task) for task in tasks]
    for learned, task in enumerate(tasks):
        for unseen in range(learned, 3):
            assert learner.evaluate(tasks[unseen]) == expected[unseen]
        learner.learn(task)
    assert learner.evaluate(tasks[0]).routes == {"red shapes": 12}


@pytest.mark.parametrize("noise_at_test", [False, True])
def test_9_1_13_evaluation_twice_is_identical(make_backbone, noise_at_test) -> None:
    """Finding 5: the authors' class-incremental evaluation draws new noise each time."""
    learner = learner_of(make_backbone, noise_at_test=noise_at_test)
    learner.learn(toy_task(0))
    batch = learner.backbone.collate([toy_task(0).test[row] for row in range(6)])
    first = forced(learner, batch, 0)
    assert torch.equal(forced(learner, batch, 0), first)
    quiet = learner_of(make_backbone, noise_at_test=not noise_at_test)
    quiet.learn(toy_task(0))
    assert not torch.equal(forced(quiet, batch, 0), first), "the option changes nothing"
