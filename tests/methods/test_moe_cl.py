"""MoE-CL: golden numbers, who learns what from the discriminator, what is kept and what is not."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backbones.writers import samples, writer
from tests.conftest import ToyProcessor, toy_model, toy_task
from tests.methods.pairs import pair_learner, pair_task
from tests.methods.test_writing import TASKS, TEXTS, TRAINING, disturb
from torch import Tensor, nn

from evolora.backbones.base import Batch
from evolora.backbones.clip import DualEncoder
from evolora.errors import ConfigError
from evolora.experts.feed_forward import FeedForward
from evolora.experts.sites import Site, SiteHost
from evolora.learner import Learner
from evolora.methods.moe_cl import MoECL, MoECLConfig, MoECLLayer
from evolora.randomness import StepRandom, generator
from evolora.routing.route import BASE, Route
from evolora.routing.selector import OracleSelectorConfig
from evolora.training.config import TrainingConfig

ORACLE = OracleSelectorConfig()
PLAIN: dict[str, Any] = {"r": 2, "lora_dropout": 0.0, "selector": ORACLE}


class OneWide(nn.Module):
    """A gated MLP of width one:  3 * (2 x) * x."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(1, 1, bias=False) for _ in "123")
        with torch.no_grad():
            for linear, value in zip(self.children(), (2.0, 1.0, 3.0), strict=True):
                linear.weight.fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.gate_proj(x) * self.up_proj(x))
        return result


def one_wide(config: MoECLConfig) -> tuple[OneWide, MoECLLayer, SiteHost]:
    mlp = OneWide()
    parts = FeedForward(
        up=mlp.up_proj, gate=mlp.gate_proj, down=mlp.down_proj, activation=lambda x: x
    )
    site = Site(
        tower="language", layer=0, name="language.0.ffn", kind="ffn",
        module=mlp.down_proj, d_in=1, d_out=1, mlp=parts,
    )  # fmt: skip
    layer = MoECLLayer(site, config, torch.device("cpu"), judged=True)
    host = SiteHost()
    host.insert(site, layer)
    layer.begin_task(0, generator(0))
    return mlp, layer, host


def test_the_golden_mixture_of_a_shared_and_a_task_expert() -> None:
    """FFN_shared = 3, FFN_task = 5, gate logits (0, ln 3): weights .25 and .75, output 4.5."""
    mlp, layer, host = one_wide(MoECLConfig(r=1, lora_alpha=1.0, lora_dropout=0.0))
    host.set_route("language", Route.of(0, 1))
    x = torch.tensor([[[1.0]]])
    with torch.no_grad():
        assert mlp(x).item() == 6.0  # both are the base
        for name, shared, own in (("gate", -1.0, 1.0), ("up", 0.0, 0.0), ("down", 0.0, -4 / 3)):
            bank: Any = layer.bank[name]
            bank.A.active.fill_(1.0)
            bank.B.active.copy_(torch.tensor([shared, own]).view(2, 1, 1))
        layer.router.weight.active.copy_(torch.tensor([[[0.0], [math.log(3.0)]]]))
        # shared: 3 * (2 - 1) = 3 ; own: (3 - 4/3) * (2 + 1) = 5
        assert layer.router(x).flatten().tolist() == pytest.approx([0.25, 0.75])
        assert mlp(x).item() == pytest.approx(4.5)
        rows = torch.tensor([0, BASE, 0])
        host.set_route("language", Route(rows))
        mixed = mlp(torch.tensor([1.0, 2.0, 1.0]).view(3, 1, 1)).flatten().tolist()
        assert mixed == pytest.approx([4.5, 24.0, 4.5]) and mixed[1] == 24.0


def clip(config: MoECLConfig, tasks: int = 1) -> tuple[MoECL, Batch]:
    backbone = DualEncoder(toy_model("clip"), ToyProcessor(), name="toy")
    method = MoECL(config, backbone)
    for index in range(tasks):
        if index:
            method.finish_task()
        method.begin_task(f"task {index}", toy_task(index).labels)
    batch = backbone.collate([toy_task(tasks - 1).train[row] for row in range(6)], task=tasks - 1)
    disturb(method)
    return method, batch.with_random(StepRandom(5))


def judge(method: MoECL, batch: Batch) -> Tensor:
    method.backbone.encode(batch, method.make_route(batch.task or 0, batch))
    return method.extra_losses(batch, torch.empty(0))["discriminator"]


def test_the_discriminator_lowers_its_loss_and_the_shared_expert_raises_it() -> None:
    config = MoECLConfig(**PLAIN, num_tasks=4, layers_to_transform=(1,))
    method, batch = clip(config)
    layer = method.moe_layers()[0]
    assert layer.name == "vision.1.ffn" and layer.discriminator is not None
    before = judge(method, batch)
    before.backward()
    judges = [layer.discriminator.active]
    shared = [stack.active for bank in layer.banks() for stack in bank.stacks()]
    for chosen, lowers in ((judges, True), (shared, False)):
        kept = [parameter.detach().clone() for parameter in chosen]
        with torch.no_grad():
            for parameter in chosen:
                assert parameter.grad is not None
                parameter.sub_(0.01 * parameter.grad)  # a step of descent
            after = judge(method, batch)
            for parameter, old in zip(chosen, kept, strict=True):
                parameter.copy_(old)
        assert (after < before) if lowers else (after > before)
    for parameter in shared:
        assert parameter.grad is not None
        assert bool(parameter.grad[0].abs().sum() > 0)
        assert not bool(parameter.grad[1].any())  # the task's own, and the gate, are not judged
    assert layer.router.weight.active.grad is None


def test_a_lower_task_expert_is_reached_through_the_layers_above() -> None:
    method, batch = clip(MoECLConfig(**PLAIN, num_tasks=4, towers=("vision",)))
    low, high = method.moe_layers()
    judge(method, batch).backward()
    for layer, reached in ((low, True), (high, False)):
        grads = [stack.active.grad for bank in layer.banks() for stack in bank.stacks()]
        assert all((grad is not None and bool(grad[1].any())) is reached for grad in grads)


def test_strength_weighs_the_loss_and_class_prompts_are_not_judged() -> None:
    method, batch = clip(MoECLConfig(**PLAIN, num_tasks=4))
    judged = [layer.name for layer in method.moe_layers() if layer.discriminator is not None]
    assert judged == ["vision.0.ffn", "vision.1.ffn"]
    once = judge(method, batch)
    twice = judge(clip(MoECLConfig(**PLAIN, num_tasks=4, disc_weight=2.0))[0], batch)
    torch.testing.assert_close(twice, 2 * once)
    none = clip(MoECLConfig(**PLAIN, num_tasks=4, disc_weight=0.0))[0]
    assert not any("discriminator" in name or "memory" in name for name in none.state_dict())
    assert none(batch).keys() == {"loss", "task"}


def test_what_the_discriminator_reads_is_the_mean_output_of_the_shared_expert() -> None:
    method, batch = clip(MoECLConfig(**PLAIN, num_tasks=2, layers_to_transform=(1,)))
    layer = method.moe_layers()[0]
    route = method.make_route(0, batch)
    with torch.no_grad():
        method.backbone.encode(batch, route)
        assert layer.pooled is not None
        found = layer.pooled[0]
        # with all weight on the shared expert, the MLP's own output is the shared expert's
        own = [bank.B.active[1].clone() for bank in layer.banks()]
        for bank in layer.banks():
            for stack in bank.stacks():
                stack.active[1] = stack.active[0]
        seen: list[Tensor] = []
        module: Any = method.backbone.blocks("vision")[1]
        handle = module.mlp.register_forward_hook(lambda _, __, out: seen.append(out))
        method.backbone.encode(batch, route)
        handle.remove()
        assert not torch.equal(own[0], layer.banks()[0].B.active[1])
    torch.testing.assert_close(found, seen[0].mean(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", [0, 4])
def test_with_a_memory_the_discriminator_meets_every_task(memory: int) -> None:
    config = MoECLConfig(**PLAIN, discriminator_memory=memory, layers_to_transform=(1,))
    training = TrainingConfig(
        max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=0
    )
    learner = Learner(
        DualEncoder(toy_model("clip"), ToyProcessor(), name="toy"), method=config, training=training
    )
    learner.learn(toy_task(0))
    learner.begin(toy_task(1))
    method: Any = learner.method
    layer = method.moe_layers()[0]
    batch = learner.backbone.collate([toy_task(1).train[row] for row in range(6)], task=1)
    batch = batch.with_random(StepRandom(0))
    judge(method, batch).backward()
    grad = layer.discriminator.active.grad
    # cross-entropy moves rows by chance - (1 of the label): with one label, along one feature
    direction = layer._judged(_pooled(method, layer, batch)).mean(dim=0)
    along = torch.nn.functional.cosine_similarity(grad[1], direction, dim=0)
    if memory == 0:
        assert layer.memory is None
        assert float(along) < -0.9  # "always the newest task" is all there is to learn
        return
    assert tuple(layer.memory.frozen.shape) == (1, 4, 32)
    told = layer._judged(layer.memory.all()[0])
    logits = told @ layer.discriminator.all().T
    alone = torch.nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    total = judge(method, batch)
    method.backbone.encode(batch, method.make_route(1, batch))
    kept, layer.memory = layer.memory, None
    torch.testing.assert_close(total - layer.adversary(1), alone)
    layer.memory = kept


def _pooled(method: MoECL, layer: MoECLLayer, batch: Batch) -> Tensor:
    with torch.no_grad():
        method.backbone.encode(batch, method.make_route(batch.task or 0, batch))
    assert layer.pooled is not None
    return layer.pooled[0]


def test_tasks_without_a_sample_for_a_tower_are_not_replayed() -> None:
    method, batch = clip(MoECLConfig(**PLAIN, discriminator_memory=3, layers_to_transform=(1,)), 2)
    layer = method.moe_layers()[0]
    layer.remember(torch.empty(0, 32))
    found = judge(method, batch)
    layer.memory = None
    method.backbone.encode(batch, method.make_route(1, batch))
    alone = layer.adversary(1)
    assert alone is not None and torch.equal(found, alone) and bool(found.isfinite())


def test_a_later_task_changes_answers_but_no_earlier_experts(tmp_path: Path) -> None:
    learner = Learner(
        writer("internvl"), method=MoECLConfig(r=2, discriminator_memory=3), training=TRAINING
    )
    method: Any = learner.method
    learner.learn(TASKS[0])
    batch = learner.backbone.collate([TASKS[0].test[row] for row in range(3)], task=0)

    def losses() -> Tensor:
        with torch.no_grad():
            found: Tensor = method.backbone.answer_losses(batch, method.make_route(0, batch))
        return found

    before = losses()
    own = [bank.A.frozen.clone() for layer in method.moe_layers() for bank in layer.banks()]
    memory = method.moe_layers()[0].memory.frozen.clone()
    learner.learn(TASKS[1])
    assert not torch.equal(losses(), before)  # the shared expert and the gates went on learning
    after = [bank.A.frozen[:1] for layer in method.moe_layers() for bank in layer.banks()]
    assert all(torch.equal(a, b) for a, b in zip(own, after, strict=True))
    for layer in method.moe_layers():
        assert layer.bank["down"].frozen_ids() == [1, 2]
    assert torch.equal(method.moe_layers()[0].memory.frozen[:1], memory)
    assert len(method.moe_layers()[0].memory) == 2
    learner.save_pretrained(tmp_path)
    again = Learner.from_pretrained(tmp_path, writer("internvl"))
    for name, tensor in learner.method.state_dict().items():
        assert torch.equal(tensor, again.method.state_dict()[name]), name
    results = [learner.evaluate(one) for one in TASKS]
    assert [sum(result.routes.values()) for result in results] == [6, 6]


@pytest.mark.parametrize("kind", ["llava", "idefics3", "qwen2_5_vl"])
def test_a_fresh_mixture_is_the_base_and_mixed_rows_are_what_they_are_alone(kind: str) -> None:
    backbone = writer(kind)
    method = MoECL(MoECLConfig(**PLAIN), backbone)
    for name in "ab":
        method.begin_task(name, TEXTS)
        method.finish_task()
    batch = backbone.collate(samples())
    with backbone.host.disabled(), torch.no_grad():
        plain = backbone.answer_losses(batch, method.make_route(0, batch))
    with torch.no_grad():
        assert torch.equal(backbone.answer_losses(batch, method.make_route(1, batch)), plain)
    disturb(method)
    tasks = torch.tensor([1, 0, BASE, 1])
    mixed = method.write(batch, TEXTS, tasks=tasks).texts
    with torch.no_grad():
        losses = backbone.answer_losses(batch, method.make_route(tasks, batch))
    assert torch.equal(losses[2], plain[2]) and not torch.equal(losses[0], plain[0])
    for row, example in enumerate(samples()):
        alone = backbone.collate([example])
        assert method.write(alone, TEXTS, tasks=tasks[row : row + 1]).texts == (mixed[row],)
        with torch.no_grad():
            loss = backbone.answer_losses(alone, method.make_route(int(tasks[row]), alone))
        torch.testing.assert_close(losses[row : row + 1], loss, rtol=1e-4, atol=1e-4)


def test_padding_does_not_reach_the_discriminator() -> None:
    backbone = writer("llava")
    method = MoECL(MoECLConfig(**PLAIN, num_tasks=2), backbone)
    method.begin_task("a", TEXTS)
    disturb(method)
    examples = samples()

    def pooled(chosen: list[int]) -> Tensor:
        batch = backbone.collate([examples[row] for row in chosen], task=0)
        batch = batch.with_random(StepRandom(0))
        with torch.no_grad():
            backbone.answer_losses(batch, method.make_route(0, batch))
        found = method.moe_layers()[0].pooled
        assert found is not None
        return found[0]

    whole = pooled([0, 1, 2, 3])
    for row in range(4):
        torch.testing.assert_close(pooled([row])[0], whole[row], rtol=1e-3, atol=1e-4)


def test_in_one_stream_padded_texts_do_not_count() -> None:
    learner = pair_learner(MoECLConfig(**PLAIN, num_tasks=2))
    task = pair_task(0, codes=(0,))
    learner.begin(task)
    disturb(learner.method)
    method: Any = learner.method
    assert list(method.layers) == ["multimodal/0/ffn", "multimodal/1/ffn", "multimodal/2/ffn"]
    batch = learner.backbone.collate([task.train[row] for row in range(4)], task=0)
    found = _pooled(method, method.moe_layers()[0], batch.with_random(StepRandom(0)))
    longer = replace(
        batch,
        inputs={
            **batch.inputs,
            **{
                name: torch.nn.functional.pad(batch.inputs[name], (0, 3))
                for name in ("input_ids", "attention_mask")
            },
        },
        random=StepRandom(0),
    )
    torch.testing.assert_close(_pooled(method, method.moe_layers()[0], longer), found)


def test_two_experts_cost_the_base_no_further_product() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    backbone = writer("llava")
    method = MoECL(MoECLConfig(**PLAIN), backbone)
    method.begin_task("a", TEXTS)
    batch = backbone.collate(samples()[:1])
    route = method.make_route(0, batch)
    counts = []
    for stop in (backbone.host.disabled, nullcontext):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), stop():
            backbone.encode(batch, route)
        counts.append(int(counter.get_total_flops()))
    tokens = batch.inputs["input_ids"].shape[1]
    told = sum(layer.flops(tokens) for layer in method.moe_layers())
    assert told / 2 < counts[1] - counts[0] <= told  # torch does not count products in place


def test_gradient_checkpointing_gives_the_same_experts() -> None:
    found = []
    for wanted in (False, True):
        learner = Learner(
            writer("internvl"),
            method=MoECLConfig(r=2, discriminator_memory=2, num_tasks=2),
            training=replace(TRAINING, max_steps=2, gradient_checkpointing=wanted),
        )
        learner.learn(TASKS[0])
        learner.learn(TASKS[1])
        found.append([p.detach().clone() for p in learner.method.parameters()])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_llama_2_7b_has_362496_values_per_expert_and_layer() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    with torch.device("meta"):
        mlp: Any = LlamaMLP(config)
    parts = FeedForward(
        up=mlp.up_proj, gate=mlp.gate_proj, down=mlp.down_proj, activation=mlp.act_fn
    )
    site = Site(
        tower="language", layer=0, name="language.0.ffn", kind="ffn",
        module=mlp, d_in=4096, d_out=4096, mlp=parts,
    )  # fmt: skip
    layer = MoECLLayer(site, MoECLConfig(num_tasks=4), torch.device("meta"), judged=True)
    for task in range(4):
        layer.begin_task(task, generator(0))
    of_one = sum(bank.parameters_per_expert() for bank in layer.banks())
    assert of_one == 362_496 and round(32 * of_one / 1e6, 1) == 11.6
    assert sum(p.numel() for bank in layer.banks() for p in bank.parameters()) == 5 * 362_496
    assert layer.router.weight.active.shape == (1, 2, 4096)
    assert layer.discriminator is not None and layer.discriminator.active.shape == (4, 4096)


def test_settings_that_cannot_be_are_refused() -> None:
    for settings, message in (
        ({"r": 0}, "r must be at least 1"),
        ({"disc_weight": -1.0}, "disc_weight must be at least 0"),
        ({"discriminator_memory": -1}, "discriminator_memory must be at least 0"),
        ({"num_tasks": 0}, "num_tasks must be at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in"),
    ):
        with pytest.raises(ConfigError, match=message):
            MoECLConfig(**settings)
