"""BranchLoRA: a LoRA at its smallest, what is frozen, growth, routing on the prompt, task keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backbones.writers import FAMILIES, IMAGE, samples, writer
from tests.methods.test_writing import LINEARS, TASKS, TEXTS, TRAINING, disturb
from torch import Tensor

from evolora.backbones.base import Batch
from evolora.backbones.image_text import ImageText
from evolora.errors import ConfigError
from evolora.experts.sites import Site
from evolora.learner import Learner
from evolora.methods.branch_lora import BranchLayer, BranchLoRA, BranchLoRAConfig
from evolora.methods.lora import SequentialLoRA, SequentialLoRAConfig
from evolora.randomness import StepRandom, generator
from evolora.routing.gates import Gating
from evolora.routing.route import BASE, Route
from evolora.routing.selector import OracleSelectorConfig
from evolora.routing.task_keys import TaskKeySelector, TaskKeySelectorConfig
from evolora.training.config import TrainingConfig

SMALL: dict[str, Any] = {"r": 3, "num_branches": 4, "target_modules": LINEARS}


def layer_of(**settings: Any) -> BranchLayer:
    site = Site(
        tower="language", layer=0, name="a", kind="linear", module=torch.nn.Linear(4, 5),
        d_in=4, d_out=5,
    )  # fmt: skip
    layer = BranchLayer(site, BranchLoRAConfig(**settings), torch.device("cpu"))
    layer.begin_task(generator(0))
    disturb(layer)
    return layer


def with_tasks(backbone: ImageText, count: int = 3, **settings: Any) -> BranchLoRA:
    """A method with routers of several tasks, all of random values."""
    method = BranchLoRA(BranchLoRAConfig(**{**SMALL, **settings}), backbone)
    for index in range(count):
        method.begin_task(f"task {index}", TEXTS)
        method.finish_task()
    disturb(method)
    return method


def decisions(method: BranchLoRA) -> tuple[dict[str, list[Gating]], Any]:
    """Note what the router of each site decides; returns (site -> decisions, stop)."""
    seen: dict[str, list[Gating]] = {key: [] for key in method.layers}
    handles = [
        layer.router.register_forward_hook(lambda _, __, out, key=key: seen[key].append(out))
        for key, layer in method.layers.items()
    ]
    return seen, lambda: [handle.remove() for handle in handles]


def answered(batch: Batch, answers: Tensor) -> Batch:
    """The same prompts with other answers (b, a)."""
    return replace(batch, inputs={**batch.inputs, "answer_ids": answers})


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_layer_is_the_equation(renormalize: bool) -> None:
    layer = layer_of(r=3, lora_alpha=6.0, num_branches=4, renormalize=renormalize)
    x, out = torch.randn(2, 7, 4, generator=generator(1)), torch.zeros(2, 7, 5)
    expected = torch.zeros(2, 7, 5)
    a, b = layer.trunk.all()[0], layer.bank.B.all()
    for row in range(2):
        p = torch.softmax(x[row].mean(dim=0) @ layer.router.gate.all()[0], dim=0)
        chosen = p.argsort(descending=True)[:2]
        share = p / p[chosen].sum() if renormalize else p
        for branch in chosen.tolist():
            expected[row] += 2.0 * share[branch] * (x[row] @ a.T) @ b[branch]  # s = 6 / 3
    torch.testing.assert_close(layer(x, out, Route.of(0, 2)), expected, rtol=1e-4, atol=1e-5)
    assert layer.flops(7) == 2 * 4 * 4 + 2 * 7 * 3 * 4 + 2 * (2 + 7) * 3 * 5


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_one_branch_is_a_lora(dropout: float) -> None:
    lora = {"r": 4, "lora_alpha": 8.0, "lora_dropout": dropout, "target_modules": LINEARS}
    one = BranchLoRAConfig(num_branches=1, top_k=1, min_free_branches=1, **lora)
    left = BranchLoRA(one, writer("internvl"))
    right = SequentialLoRA(SequentialLoRAConfig(**lora), writer("internvl"))
    for method in (left, right):
        method.begin_task("a", TEXTS)
    disturb(left)
    with torch.no_grad():
        for mine, other in zip(left.layers.values(), right.layers.values(), strict=True):
            other.bank.A.active.copy_(mine.trunk.active)
            other.bank.B.active.copy_(mine.bank.B.active)
    losses = []
    for method in (left, right):
        batch = method.backbone.collate(samples(), task=0).with_random(StepRandom(3))
        losses.append(method(batch)["loss"])
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for mine, other in zip(left.layers.values(), right.layers.values(), strict=True):
        for got, wanted in ((mine.trunk, other.bank.A), (mine.bank.B, other.bank.B)):
            torch.testing.assert_close(got.active.grad, wanted.active.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_of_different_tasks_get_exactly_what_they_get_alone(kind: str) -> None:
    backbone = writer(kind)
    method = with_tasks(backbone)
    tasks = torch.tensor([2, 0, 1, BASE])
    mixed = method.write(backbone.collate(samples()), TEXTS, tasks=tasks)
    with backbone.host.disabled():
        base = backbone.write(backbone.collate(samples()), Route.of(0, 4), 6)
    for row, example in enumerate(samples()):
        one = backbone.collate([example])
        assert method.write(one, TEXTS, tasks=tasks[row : row + 1]).texts == mixed.texts[row:][:1]
    assert mixed.texts[3] == base[3] and mixed.texts[:3] != tuple(base[:3])


@pytest.mark.parametrize("token", ["mean", "first"])
@pytest.mark.parametrize("kind", ["llava", "internvl", "idefics3", "qwen2_vl"])
def test_the_prompt_decides_for_all_that_is_written(kind: str, token: Any) -> None:
    """Greedy with the cache equals a whole forward for each token, in which nothing is kept."""
    backbone = writer(kind)
    with torch.no_grad():  # what is written is read again here, and must not ask for an image
        backbone.model.get_output_embeddings().weight[IMAGE].zero_()
    method = with_tasks(backbone, routing_token=token)
    batch = backbone.collate(samples())
    route = method.make_route(torch.tensor([2, 0, 1, 0]), batch)
    seen, stop = decisions(method)
    written = backbone.write(batch, route, 6)
    stop()
    assert {len(found) for found in seen.values()} == {1}
    assert backbone.host.route_of("language").decisions is None
    answers = torch.zeros(4, 0, dtype=torch.long)
    again, stop = decisions(method)
    for _ in range(6):  # a token that is unknown yet stands where its logits are asked for
        asked = torch.cat([answers, answers.new_zeros(4, 1)], dim=1)
        with torch.no_grad():
            logits, _ = backbone.answer_logits(answered(batch, asked), route)
        answers = torch.cat([answers, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    stop()
    ends = backbone._end_tokens
    for row, text in enumerate(written):
        found = answers[row].tolist()
        end = next((place for place, token in enumerate(found) if token in ends), len(found))
        assert backbone.dialogues.read(found[:end]) == text
    for key, found in again.items():
        for gating in found:
            assert torch.equal(gating.ids, seen[key][0].ids)
            torch.testing.assert_close(gating.gates, seen[key][0].gates, rtol=1e-4, atol=1e-5)


def test_the_first_token_of_a_causal_model_tells_nothing_of_the_sample() -> None:
    backbone = writer("llava")
    spread = {}
    for token in ("first", "mean"):
        method = with_tasks(backbone, routing_token=token, towers=("language",))
        batch = backbone.collate(samples())
        seen, stop = decisions(method)
        with torch.no_grad():
            backbone.answer_losses(batch, method.make_route(0, batch))
        stop()
        gates = [found[0].gates for found in seen.values()]
        spread[token] = max(float((g - g[:1]).abs().max()) for g in gates)
        method.remove()
    assert spread["first"] < 1e-5 and spread["mean"] > 1e-3, spread


def test_padding_and_answers_do_not_decide() -> None:
    backbone = writer("internvl")
    method = with_tasks(backbone)
    found = []
    for example in (samples(), samples()[:1]):
        batch = backbone.collate(example)
        for answers in (batch.inputs["answer_ids"], batch.inputs["answer_ids"][:, :1]):
            seen, stop = decisions(method)
            with torch.no_grad():
                backbone.answer_logits(answered(batch, answers), method.make_route(0, batch))
            stop()
            found.append([g[0] for key, g in seen.items() if key.startswith("language")])
    for other in found[1:]:
        for gating, first in zip(other, found[0], strict=True):
            assert torch.equal(gating.ids[:1], first.ids[:1])
            torch.testing.assert_close(gating.gates[:1], first.gates[:1], rtol=1e-4, atol=1e-5)


def learned(**settings: Any) -> tuple[Learner, dict[str, Tensor], Tensor]:
    """A learner of one task, its state and the losses of samples under that task."""
    config = BranchLoRAConfig(**{**SMALL, "selector": OracleSelectorConfig(), **settings})
    learner = Learner(writer("internvl"), method=config, training=TRAINING)
    learner.learn(TASKS[0])
    state = {name: value.clone() for name, value in learner.method.state_dict().items()}
    return learner, state, losses_of(learner)


def losses_of(learner: Learner) -> Tensor:
    batch = learner.backbone.collate([TASKS[0].test[row] for row in range(4)])
    with torch.no_grad():
        return learner.backbone.answer_losses(batch, learner.method.make_route(0, batch))


def test_the_most_used_branches_and_the_trunk_are_frozen_for_good() -> None:
    learner, state, _ = learned()
    for layer in learner.method.branch_layers():
        used = layer.usage.counts
        assert layer.bank.frozen_ids() == sorted(layer.usage.most_used(2)) and used.sum() > 0
        assert layer.trunk.frozen_ids() == [0] and layer.router.gate.frozen_ids() == [0]
    frozen = {key: layer.bank.frozen_ids() for key, layer in learner.method.layers.items()}
    learner.learn(TASKS[1])
    after = learner.method.state_dict()
    for key, layer in learner.method.layers.items():
        for part in ("bank.B", "trunk", "router.gate"):
            name = f"layers.{key}.{part}.frozen"
            assert len(state[name]) > 0
            assert torch.equal(after[name][: len(state[name])], state[name]), name
        own = layer.usage.most_used(2)  # it may use frozen ones again
        assert set(layer.bank.frozen_ids()) == {*frozen[key], *own}
    assert any(len(layer.bank.frozen_ids()) > 2 for layer in learner.method.branch_layers())


def test_old_answers_stay_with_a_frozen_trunk_and_drift_with_one_that_learns() -> None:
    """Two branches at first: all that the first task used is frozen."""
    for when, same in (("first-task", True), ("never", False)):
        learner, _, before = learned(num_branches=2, freeze_trunk_after=when)
        learner.learn(TASKS[1])
        assert torch.equal(losses_of(learner), before) == same
        assert len(learner.method.branch_layers()[0].trunk.frozen_ids()) == same


def test_branches_never_run_out_and_old_routers_keep_to_those_they_knew() -> None:
    layer = layer_of(r=3, num_branches=4)
    x, out = torch.randn(40, 5, 4, generator=generator(2)), torch.zeros(40, 5, 5)
    sizes, kept = [], {}
    for task in range(6):
        if task:
            layer.begin_task(generator(0, task))
        fresh = layer.router(x.mean(1), torch.full((40,), task), uniform=task)
        assert set(fresh.ids.unique().tolist()).isdisjoint(layer.bank.frozen_ids())
        with torch.no_grad():
            layer.router.gate.active.copy_(
                torch.randn(layer.router.gate.active.shape, generator=generator(task))
            )
        train = Route.of(task, 40, random=StepRandom(task))
        layer(x, out.clone(), train)
        kept[task] = layer.router(x.mean(1), torch.full((40,), task), uniform=task)
        layer.finish_task()
        sizes.append(len(layer.bank))
        assert len(layer.bank.frozen_ids()) >= min(2, len(layer.bank))
    assert sizes[:2] == [4, 4] and sizes[-1] > 4 and sizes == sorted(sizes)
    mixed = torch.arange(40) % 6
    together = layer.router(x.mean(1), mixed)
    for task, found in kept.items():
        rows = mixed == task
        assert torch.equal(together.ids[rows], found.ids[rows])
        torch.testing.assert_close(together.gates[rows], found.gates[rows])


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_trunks_branches_and_routers_of_every_tower_learn(kind: str) -> None:
    backbone = writer(kind)
    method = BranchLoRA(BranchLoRAConfig(**SMALL), backbone)
    method.begin_task("a", TEXTS)
    disturb(method)
    method(backbone.collate(samples(), task=0))["loss"].backward()
    silent = [n for n, p in method.named_parameters() if p.numel() and not bool(p.grad.any())]
    assert silent == []
    assert {name.split("/")[0] for name in method.layers} == set(backbone.towers)


def test_a_task_key_is_what_minimises_the_alignment_loss() -> None:
    """L_align = sum over samples and modalities of 1 - cos(e, k), by descent from elsewhere."""
    draw = generator(4)
    e = torch.nn.functional.normalize(torch.randn(9, 2, 6, generator=draw) + 0.5, dim=-1)
    selector = TaskKeySelector(TaskKeySelectorConfig(), 2, 6)
    selector.learn(0, e, e, 0)
    key = torch.randn(2, 6, generator=draw, requires_grad=True)

    def loss(k: Tensor) -> Tensor:
        return (1.0 - torch.cosine_similarity(e, k.unsqueeze(0), dim=-1)).sum()

    optimizer = torch.optim.Adam([key], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        loss(key).backward()
        optimizer.step()
    closed = selector.keys.all()[0, 0]
    near = torch.cosine_similarity(key.detach(), closed, dim=-1)
    torch.testing.assert_close(near, torch.ones(2), atol=1e-4, rtol=0)
    assert float(loss(closed)) <= float(loss(key.detach())) + 1e-5


def test_two_tasks_are_learned_recognised_saved_and_loaded(tmp_path: Path) -> None:
    training = TrainingConfig(
        max_steps=40, per_device_train_batch_size=4, learning_rate=2e-2, warmup_steps=0,
        augment=False,
    )  # fmt: skip
    config = BranchLoRAConfig(r=4, lora_alpha=32.0, num_branches=3, target_modules=LINEARS)
    learner = Learner(writer("qwen2_vl"), method=config, training=training)
    for one in TASKS:
        learner.learn(one)
    scores = [learner.evaluate(one) for one in TASKS]
    found = [result.routes[one.name] for result, one in zip(scores, TASKS, strict=True)]
    assert min(found) >= 4  # pictures are noise and the model is random
    assert [result.score for result in scores] == [count / 6 for count in found]
    learner.save_pretrained(tmp_path)
    again = Learner.from_pretrained(tmp_path, writer("qwen2_vl"))
    assert again.method.config == config
    for name, value in learner.method.state_dict().items():
        assert torch.equal(again.method.state_dict()[name], value), name
    assert [again.evaluate(one) for one in TASKS] == scores


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 9}, r"top_k must be between 1 and num_branches \(8\); got 9"),
        ({"top_k": 1, "renormalize": True}, "use top_k of at least 2, or renormalize: false"),
        ({"freeze_top": -1}, "freeze_top must be at least 0; got -1"),
        ({"min_free_branches": -2}, "min_free_branches must be at least 0; got -2"),
        ({"r": 0}, "r must be at least 1; got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BranchLoRAConfig(**settings)
