"""DynMoLE: who answers a token, its two loss terms, padding, and models that write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backbones.writers import samples, writer
from tests.conftest import ToyProcessor, toy_model, toy_task
from tests.methods.test_writing import LINEARS, TASKS, TEXTS, TRAINING, disturb
from torch import Tensor, nn

from evolora.backbones.clip import DualEncoder
from evolora.errors import ConfigError
from evolora.experts.sites import Site
from evolora.learner import Learner
from evolora.methods.dyn_mole import DynMoLE, DynMoLEConfig, DynMoLELayer
from evolora.randomness import StepRandom, generator
from evolora.routing.entropy_gates import tsallis_entropy
from evolora.routing.route import BASE, Route


def layer_of(config: DynMoLEConfig, d_in: int = 4, d_out: int = 3) -> DynMoLELayer:
    site = Site(
        tower="language", layer=0, name="language.0.q_proj", kind="linear",
        module=nn.Linear(d_in, d_out), d_in=d_in, d_out=d_out,
    )  # fmt: skip
    layer = DynMoLELayer(site, config, torch.device("cpu"))
    layer.bank.grow(config.num_experts, generator(0))
    layer.router.grow(generator(1))
    return layer


def test_a_sure_token_is_answered_by_two_experts_and_an_unsure_one_by_all() -> None:
    config = DynMoLEConfig(r=2, lora_alpha=4.0, num_experts=4, lora_dropout=0.0)
    layer = layer_of(config)
    chances = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    with torch.no_grad():
        disturb(layer)
        # the token e_i has the router's column i as its logits
        layer.router.weight.active.zero_()
        layer.router.weight.active[0, :, :2] = chances.log().T
        x = torch.eye(4)[None, :2]
        out = layer(x, torch.zeros(1, 2, 3), Route.of(0, 1))
        a, b = layer.bank.A.active, layer.bank.B.active
        each = torch.stack([2.0 * (x[0] @ a[e].T @ b[e]) for e in range(4)])  # (e, n, d)
    torch.testing.assert_close(out[0, 0], 0.875 * each[0, 0] + 0.125 * each[1, 0])
    torch.testing.assert_close(out[0, 1], each[:, 1].mean(dim=0))
    assert layer.terms is None  # nothing is kept outside training


def test_the_loss_has_balance_and_entropy_of_real_tokens() -> None:
    config = DynMoLEConfig(
        r=2, num_experts=4, lora_dropout=0.0, target_modules=("q_proj", "up_proj"),
        towers=("language",), balance=0.5, entropy=0.25,
    )  # fmt: skip
    backbone = writer("internvl")
    method = DynMoLE(config, backbone)
    method.begin_task("a", TEXTS)
    disturb(method)
    batch = backbone.collate(samples(), task=0).with_random(StepRandom(3))
    seen: dict[str, Tensor] = {}
    for key, layer in method.layers.items():
        assert isinstance(layer, DynMoLELayer)
        layer.router.register_forward_hook(lambda _, __, out, key=key: seen.update({key: out}))
    terms = method(batch)
    real = torch.cat(
        [batch.inputs["attention_mask"].bool(), batch.inputs["answer_ids"] != -100], dim=1
    )
    assert not bool(real.all()) and len(seen) == 4
    balances, entropies = [], []
    for p in (found[real] for found in seen.values()):
        entropies.append(tsallis_entropy(p, 1.1).mean())
        chosen = torch.zeros_like(p).scatter(1, p.topk(2, dim=1).indices, 1.0)
        balances.append(4 * (chosen.sum(0) / chosen.sum() * p.mean(0)).sum())
    torch.testing.assert_close(terms["balance"], 0.5 * torch.stack(balances).mean().detach())
    torch.testing.assert_close(terms["entropy"], 0.25 * torch.stack(entropies).mean().detach())
    total = terms["task"] + terms["balance"] + terms["entropy"]
    torch.testing.assert_close(terms["loss"].detach(), total)


def test_padding_counts_in_neither_term() -> None:
    backbone = writer("llava")
    config = DynMoLEConfig(
        r=2, num_experts=4, lora_dropout=0.0, target_modules=("q_proj",), towers=("language",)
    )
    method = DynMoLE(config, backbone)
    method.begin_task("a", TEXTS)
    disturb(method)
    one = backbone.collate(samples()[:1], task=0)
    padded = replace(
        one,
        inputs={
            **one.inputs,
            "input_ids": nn.functional.pad(one.inputs["input_ids"], (5, 0)),
            "attention_mask": nn.functional.pad(one.inputs["attention_mask"], (5, 0)),
            "answer_ids": nn.functional.pad(one.inputs["answer_ids"], (0, 4), value=-100),
        },
    )
    found = [method(batch.with_random(StepRandom(0))) for batch in (one, padded)]
    for name in ("balance", "entropy", "task"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def test_prompts_of_classes_end_at_their_end_token() -> None:
    backbone = DualEncoder(toy_model("clip"), ToyProcessor(), name="toy")
    prompts = backbone.tokenize(["a photo of a red dot .", "red"])
    summary = backbone.text_summary(prompts["input_ids"])
    route = replace(Route.of(0, 2), summary=summary)
    states = torch.zeros(*prompts["input_ids"].shape, 3)
    assert torch.equal(route.real(states), prompts["attention_mask"].bool())
    assert Route.of(0, 2).real(states) is None


def test_a_step_without_a_tower_uses_no_terms_of_the_step_before() -> None:
    method = DynMoLE(DynMoLEConfig(r=2), DualEncoder(toy_model("clip"), ToyProcessor(), name="toy"))
    method.begin_task("a", toy_task(0).labels)
    batch = method.backbone.collate([toy_task(0).train[row] for row in range(4)], task=0)
    batch = batch.with_random(StepRandom(0))
    method.backbone.encode(batch, method.make_route(0, batch))
    assert method.extra_losses(batch, torch.empty(0)).keys() == {"balance", "entropy"}
    assert method.extra_losses(batch, torch.empty(0)) == {}


@pytest.mark.parametrize("kind", ["internvl", "smolvlm", "qwen2_vl"])
def test_fresh_experts_are_the_base_and_mixed_rows_are_what_they_are_alone(kind: str) -> None:
    backbone = writer(kind)
    method = DynMoLE(DynMoLEConfig(r=2, num_experts=3, target_modules=LINEARS), backbone)
    method.begin_task("a", TEXTS)
    batch = backbone.collate(samples())
    route = method.make_route(0, batch)
    with torch.no_grad():
        with backbone.host.disabled():
            plain = backbone.answer_losses(batch, route)
        assert torch.equal(backbone.answer_losses(batch, route), plain)
    disturb(method)
    tasks = torch.tensor([0, BASE, 0, 0])
    mixed = method.write(batch, TEXTS, tasks=tasks).texts
    with torch.no_grad():
        losses = backbone.answer_losses(batch, method.make_route(tasks, batch))
    assert torch.equal(losses[1], plain[1]) and not torch.equal(losses[0], plain[0])
    for row, example in enumerate(samples()):
        alone = backbone.collate([example])
        assert method.write(alone, TEXTS, tasks=tasks[row : row + 1]).texts == (mixed[row],)


def test_all_experts_learn_in_every_task_and_are_kept(tmp_path: Path) -> None:
    config = DynMoLEConfig(r=2, num_experts=4)
    learner = Learner(writer("idefics3"), method=config, training=TRAINING)
    states: list[dict[str, Tensor]] = []
    for one in TASKS:
        learner.learn(one)
        states.append({k: v.clone() for k, v in learner.method.state_dict().items()})
    for name, before in states[0].items():
        changed = (states[1][name] != before).flatten(1).any(1) if before.dim() > 1 else None
        assert changed is None or bool(changed.all()), name
    assert not any(name.endswith("frozen") and len(t) for name, t in states[1].items())
    assert learner.evaluate(TASKS[0]).routes == {"shared": 6}
    learner.save_pretrained(tmp_path)
    again = Learner.from_pretrained(tmp_path, writer("idefics3"))
    for name, tensor in states[1].items():
        assert torch.equal(tensor, again.method.state_dict()[name]), name
    batch = learner.backbone.collate(samples())
    assert again.method.write(batch, TEXTS).texts == learner.method.write(batch, TEXTS).texts


def test_settings_that_cannot_be_are_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"top_k": 9}, r"top_k must be between 1 and num_experts \(8\); got 9"),
        ({"tsallis_q": 0.0}, "tsallis_q must be above 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"entropy_threshold": -0.1}, "entropy_threshold must be at least 0"),
        ({"balance": -1.0}, "balance must be at least 0"),
    ]
    for settings, message in wrong:
        with pytest.raises(ConfigError, match=message):
            DynMoLEConfig(**settings)
