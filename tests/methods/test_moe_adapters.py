"""MoE-Adapters against specs/moe_adapters.md section 9: invariants 9.1, numbers 9.2, scripts 9.3.

Elsewhere: 9.1-5 and the gate numbers in tests/routing/test_gates.py, 9.1-11 and 9.3 e in
tests/routing/test_selector.py; what holds for every method in tests/contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.conftest import toy_task
from torch import Tensor

from evolora.backbones.base import Batch
from evolora.backbones.clip import DualEncoder
from evolora.errors import ConfigError
from evolora.experts.mixing import mix
from evolora.learner import Learner
from evolora.methods.moe_adapters import (
    MoEAdapters,
    MoEAdaptersConfig,
    MoELayer,
    NoSelectorConfig,
    OracleSelectorConfig,
)
from evolora.methods.zero_shot import ZeroShotConfig
from evolora.randomness import StepRandom
from evolora.routing.autoencoders import AutoEncoderBank
from evolora.routing.gates import Gating, load_balance
from evolora.routing.route import BASE, Route
from evolora.streams.task import LabelSpace
from evolora.training.batches import TrainingBatches
from evolora.training.config import TrainingConfig, learning_rate

ORACLE = OracleSelectorConfig()
Make = Callable[..., DualEncoder]


def learner_of(make_backbone: Make, *, max_steps: int = 6, **settings: Any) -> Learner:
    values = {"num_experts": 5, "r": 4, "selector": ORACLE, **settings}
    return Learner(
        make_backbone(),
        method=MoEAdaptersConfig(**values),
        training=TrainingConfig(
            max_steps=max_steps, warmup_steps=2, per_device_train_batch_size=6, learning_rate=1e-2
        ),
    )


def method_of(learner: Learner) -> MoEAdapters:
    assert isinstance(learner.method, MoEAdapters)
    return learner.method


def batches(learner: Learner, task: int) -> Iterator[Batch]:
    feed = TrainingBatches(
        toy_task(task).train, learner.backbone, learner.training, seed=0, task=task,
        share=learner.share,
    )  # fmt: skip
    return feed.from_step(0)


def randomize(method: MoEAdapters, *, routers: bool = True, experts: bool = False) -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in method.moe_layers():
            stacks = [layer.routers.gate, layer.routers.noise] if routers else []
            stacks += layer.bank.stacks() if experts else []
            for stack in stacks:
                for values in (stack.active, stack.frozen):
                    values.copy_(0.5 * torch.randn(values.shape, generator=draw))


def gatings(method: MoEAdapters, run: Callable[[], Any]) -> dict[str, list[Gating]]:
    """Return what every site's router decided while ``run`` ran."""
    found: dict[str, list[Gating]] = {}
    handles = []
    for layer in method.moe_layers():

        def note(_: Any, __: Any, out: Gating, name: str = layer.name) -> None:
            found.setdefault(name, []).append(out)

        handles.append(layer.routers.register_forward_hook(note))
    run()
    for handle in handles:
        handle.remove()
    return found


def forced(learner: Learner, batch: Batch, task: int, own: int | None = None) -> Tensor:
    tasks = torch.full((len(batch),), task)
    labels = toy_task(task if own is None else own).labels
    with torch.no_grad():
        return learner.method.answer(batch, None, tasks, labels).scores


# -- 9.1 invariants --------------------------------------------------------------------------------


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
        plain = layer(x, out.clone(), route)  # a layer may overwrite the base output
        permuted = layer(x[:, order], out.clone(), route)
    torch.testing.assert_close(permuted, plain[:, order], rtol=0, atol=1e-6)
    gates = [layer.routers(each[:, 0], route.tasks, uniform=0) for each in (x, x[:, order])]
    assert torch.equal(gates[0].gates, gates[1].gates)


@pytest.mark.parametrize("tokens", [3, 20])
def test_9_1_7_dispatch_is_the_dense_sum_for_any_batch(make_backbone, tokens) -> None:
    layer, x = layer_and_input(make_backbone, tokens=tokens)
    out = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    tasks = torch.tensor([0, 1, 1, 0, 1, 0])
    with torch.no_grad():
        whole = layer(x, out.clone(), Route(tasks))
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


# -- 9.2 numbers -----------------------------------------------------------------------------------


def test_9_2_learning_rates() -> None:
    expected = {0: 1e-5, 49: 5e-4, 99: 1e-3, 100: 1e-3, 550: 5e-4, 999: 3.04617e-9, 1000: 0.0}
    for step, rate in expected.items():
        got = learning_rate(step, base=1e-3, warmup=100, total=1000)
        assert got == pytest.approx(rate, rel=1e-6, abs=1e-18)


@pytest.mark.parametrize(("total", "highest"), [(16, 5.6667e-4), (20, 7.0e-4)])
def test_9_2_learning_rate_where_warm_up_never_ends(total: int, highest: float) -> None:
    """Finding 7. The authors' loop is inclusive: ``total`` iterations are total + 1 updates."""
    rates = [learning_rate(s, base=1e-3, warmup=30, total=total) for s in range(total + 1)]
    assert max(rates) == pytest.approx(highest, rel=1e-4)
    assert rates == sorted(rates)


def test_9_2_cross_entropy_with_smoothing(make_backbone, monkeypatch) -> None:
    """Through the method's own forward: logits [2, 1, 0], label 0, smoothing 0.2."""
    learner = learner_of(make_backbone)
    learner.begin(toy_task(0))
    batch = learner.backbone.collate([toy_task(0).train[0]], task=0, random=StepRandom(0))
    assert batch.labels.tolist() == [0]
    fixed = torch.tensor([[2.0, 1.0, 0.0]])
    monkeypatch.setattr(learner.backbone, "logits", lambda *_: fixed)
    assert learner.method.objective.label_smoothing == 0.2
    assert float(learner.method(batch)["loss"]) == pytest.approx(0.60760593, abs=1e-7)


def published_backbone() -> DualEncoder:
    """The shape of OpenAI's ViT-B/16, without storage."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
            "num_hidden_layers": 12, "projection_dim": 512}  # fmt: skip
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
              "num_hidden_layers": 12, "image_size": 224, "patch_size": 16}  # fmt: skip
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=512))
    return DualEncoder(model, None)


LABELS = LabelSpace(classes=("a", "b"))


def test_9_2_parameters_of_mtil() -> None:
    backbone = published_backbone()
    assert sum(p.numel() for p in backbone.model.parameters()) == 149_620_737
    method = MoEAdapters(MoEAdaptersConfig(), backbone)
    per_expert = {layer.tower: layer.bank.parameters_per_expert() for layer in method.moe_layers()}
    assert per_expert == {"vision": 99_136, "text": 66_112}
    for task in range(11):
        method.begin_task(str(task), LABELS)
        assert sum(p.numel() for p in method.trainable().values()) < 51_059_712
    sizes = {"bank": 0, "routers": 0}
    for name, tensor in method.stored().items():
        part = next((part for part in sizes if f".{part}." in name), None)
        if part and tensor.is_floating_point():
            sizes[part] += tensor.numel()
    assert sizes == {"bank": 43_625_472, "routers": 7_434_240}
    assert sum(sizes.values()) == 51_059_712
    autoencoder = AutoEncoderBank(43_264, 100, device="meta").parameters_per_task()
    assert sum(sizes.values()) + autoencoder == 59_755_876


def test_9_2_parameters_of_the_class_incremental_setting() -> None:
    config = MoEAdaptersConfig(
        num_experts=2, routers="shared", freeze_top=0, min_free_experts=0,
        selector=NoSelectorConfig(),
    )  # fmt: skip
    method = MoEAdapters(config, published_backbone())
    for task in range(10):
        method.begin_task(str(task), LABELS)
        method.finish_task()
        stored = [t for t in method.stored().values() if t.is_floating_point()]
        assert sum(tensor.numel() for tensor in stored) == 4_027_392
        assert sum(p.numel() for p in method.trainable().values()) == 4_027_392


# -- 9.3 scripted ----------------------------------------------------------------------------------


def test_9_3_d_scripted_counts_give_the_frozen_list(make_backbone) -> None:
    learner = learner_of(make_backbone, min_free_experts=0)
    first, second, *_ = method_of(learner).moe_layers()
    script = [
        # counts of two sites -> frozen after the task
        (([5, 9, 1, 7, 0], [0, 0, 4, 4, 9]), ([1, 3], [2, 4])),
        (([0, 9, 8, 9, 1], [6, 0, 5, 0, 0]), ([1, 3], [0, 2, 4])),  # top two are frozen already
        (([3, 0, 0, 0, 0], [0, 0, 0, 0, 0]), ([0, 1, 3], [0, 2, 4])),  # an unused one never is
        (([2, 2, 2, 2, 2], [1, 1, 0, 0, 0]), ([0, 1, 3], [0, 1, 2, 4])),  # ties: smaller index
    ]
    for task, (counts, frozen) in enumerate(script):
        learner.method.begin_task(str(task), LABELS)
        for layer, values in zip((first, second), counts, strict=True):
            layer.usage.counts += torch.tensor(values)
        learner.method.finish_task()
        assert (first.bank.frozen_ids(), second.bank.frozen_ids()) == frozen


# -- options ---------------------------------------------------------------------------------------


def test_load_balancing_is_importance_plus_load(make_backbone) -> None:
    learner = learner_of(make_backbone, load_balance=0.01)
    learner.begin(toy_task(0))
    randomize(method_of(learner))
    batch = next(batches(learner, 0))
    terms: dict[str, Tensor] = {}
    found = gatings(method_of(learner), lambda: terms.update(learner.method(batch)))
    expected = 0.0
    for gatings_of_site in found.values():
        (gating,) = gatings_of_site
        dense = torch.zeros(len(gating.gates), 5).scatter(1, gating.ids, gating.gates)
        expected += (load_balance(dense) + load_balance(gating.chance)).item()
    assert terms["load_balance"].item() == pytest.approx(0.01 * expected, rel=1e-5)
    whole = terms["task"].item() + terms["load_balance"].item()
    assert terms["loss"].item() == pytest.approx(whole, rel=1e-5)
    terms["loss"].backward()
    assert all(layer.routers.noise.active.grad.any() for layer in method_of(learner).moe_layers())


def test_load_balancing_levels_the_load(make_backbone) -> None:
    def variation(weight: float) -> float:
        learner = learner_of(make_backbone, load_balance=weight, max_steps=30)
        learner.learn(toy_task(0))
        counts = [layer.usage.counts.float() for layer in method_of(learner).moe_layers()]
        return sum(float(c.var() / c.mean() ** 2) for c in counts)

    assert variation(1.0) < variation(0.0)


def test_no_auxiliary_loss_by_default(make_backbone) -> None:
    learner = learner_of(make_backbone)
    learner.begin(toy_task(0))
    terms = learner.method(next(batches(learner, 0)))
    assert set(terms) == {"loss", "task"}
    assert terms["loss"].item() == terms["task"].item()


def test_noise_spreads_training_and_spares_evaluation(make_backbone) -> None:
    chosen = {}
    for noise in (True, False):
        learner = learner_of(make_backbone, noise=noise)
        learner.begin(toy_task(0))
        learner.method(next(batches(learner, 0)))
        layer = method_of(learner).moe_layers()[0]
        chosen[noise] = layer.usage.most_used(5)
    assert len(chosen[True]) > 2
    assert chosen[False] == [0, 1]  # ties of a fresh router


def test_a_fresh_router_starts_on_experts_that_may_still_learn(make_backbone) -> None:
    learner = learner_of(make_backbone, noise=False, freeze_top=2)
    learner.learn(toy_task(0))
    layer = method_of(learner).moe_layers()[0]
    frozen = layer.bank.frozen_ids()
    learner.begin(toy_task(1))
    learner.method(next(batches(learner, 1)))
    assert frozen and not set(layer.usage.most_used(2)) & set(frozen)


def test_a_pool_grows_when_too_few_experts_are_free(make_backbone) -> None:
    learner = learner_of(make_backbone, num_experts=3, freeze_top=2, min_free_experts=2)
    layers = method_of(learner).moe_layers()
    for task, size in enumerate((3, 4, 5)):
        learner.begin(toy_task(task))
        assert [len(layer.bank) for layer in layers] == [size] * len(layers)
        assert all(layer.routers.experts == size for layer in layers)
        assert all(len(layer.usage.counts) == size for layer in layers)
        for layer in layers:
            layer.usage.counts[-2:] += 1
        learner.method.finish_task()


def test_a_shared_router_uses_what_its_pool_grew_by(make_backbone) -> None:
    learner = learner_of(
        make_backbone, num_experts=2, freeze_top=2, routers="shared", selector=NoSelectorConfig()
    )
    for task in range(2):
        learner.learn(toy_task(task))
    for layer in method_of(learner).moe_layers():
        assert len(layer.routers) == 1 and len(layer.bank) == 4
        assert (layer.usage.counts > 0).sum() > 2, "new experts are never chosen"
    assert learner.evaluate(toy_task(1)).routes == {"shared": 12}


def test_towers_and_layers_can_be_chosen(make_backbone) -> None:
    learner = learner_of(make_backbone, towers=("vision",), layers_to_transform=(-1,))
    assert [layer.name for layer in method_of(learner).moe_layers()] == ["vision.1.mlp"]
    learner.learn(toy_task(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 6, "num_experts": 5}, "top_k must be between 1 and num_experts"),
        ({"top_k": 0}, "top_k must be between 1"),
        ({"r": 0}, "r must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"selector": NoSelectorConfig()}, "'per-task' need a selector"),
        ({"routers": "shared"}, "leave nothing to select"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoEAdaptersConfig(**settings)


def test_experts_start_small(make_backbone) -> None:
    """Kaiming-uniform with a = sqrt(5) is uniform in +-1/sqrt(d_in); tasks draw their own."""
    learner = learner_of(make_backbone)
    learner.begin(toy_task(0))
    draws = [layer.bank.A.active.detach() for layer in method_of(learner).moe_layers()]
    assert all(0 < float(a.abs().max()) <= 1 / math.sqrt(32) for a in draws)
    assert not torch.equal(draws[0], draws[1])
