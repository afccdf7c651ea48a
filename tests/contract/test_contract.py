"""The contract: every registered method is enrolled by being registered, and cannot opt out.

A method only brings a toy configuration and says which of two strong claims it makes.
"""

from __future__ import annotations

import functools
import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import ToyProcessor, toy_model, toy_task
from torch import Tensor

from evolora.backbones.base import Batch
from evolora.backbones.clip import DualEncoder
from evolora.errors import RouteError
from evolora.experts.bank import GrowingStack
from evolora.learner import Learner, Progress
from evolora.methods.full_finetuning import FullFinetuningConfig
from evolora.methods.linear_probe import LinearProbeConfig
from evolora.methods.lora import JointLoRAConfig, LoRAPerTaskConfig, SequentialLoRAConfig
from evolora.methods.moe_adapters import MoEAdaptersConfig, MoELayer
from evolora.methods.zero_shot import ZeroShotConfig
from evolora.registry import METHODS
from evolora.routing.autoencoders import AutoEncoderTraining
from evolora.routing.route import BASE, Route
from evolora.routing.selector import AutoEncoderSelectorConfig
from evolora.storage.state import export_state, load_state
from evolora.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a method takes part.

    Args:
        config: toy configuration.
        sites: whether it has experts at sites (the others own whole weights or vectors).
        retains: it claims that a finished task's answers never change under its route.
        fresh: it claims that every task, not only the first, starts as the base model.
        settings: training settings that differ from the toy ones.
        dead: parameter name endings whose gradient is zero by mathematics.
    """

    config: Any
    sites: bool = True
    retains: bool = False
    fresh: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    dead: tuple[str, ...] = ()


SELECTOR = AutoEncoderSelectorConfig(training=AutoEncoderTraining(hidden=6, steps=60))
CASES = {
    "zero-shot": Case(config=ZeroShotConfig(), sites=False, retains=True, fresh=True),
    "linear-probe": Case(config=LinearProbeConfig(), sites=False, retains=True, fresh=True),
    # A shift of all keys does not change a softmax over them: k_proj.bias has no gradient.
    "full-finetuning": Case(
        config=FullFinetuningConfig(),
        sites=False,
        dead=("k_proj/bias",),
        settings={"learning_rate": 1e-3},
    ),
    "sequential-lora": Case(config=SequentialLoRAConfig(r=3, lora_dropout=0.1)),
    "joint-lora": Case(config=JointLoRAConfig(r=3)),
    "lora-per-task": Case(config=LoRAPerTaskConfig(r=3), retains=True, fresh=True),
    # All that a task used is frozen here, so that retention is exact; the paper freezes two.
    "moe-adapters": Case(
        # every used expert is frozen, so a new router starts on experts that are still zero
        config=MoEAdaptersConfig(num_experts=4, freeze_top=9, r=8, selector=SELECTOR),
        retains=True,
        fresh=True,
    ),
}
KINDS = ("clip", "siglip")
EVERY = pytest.mark.parametrize("name", METHODS.names())
BOTH = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> None:
    """Every task ends with a garbage collection; it need not search what was imported."""
    gc.freeze()


def case_of(name: str) -> Case:
    if name not in CASES:
        pytest.fail(f"method {name!r} is registered but has no toy configuration in CASES")
    return CASES[name]


def toy_backbone(kind: str) -> DualEncoder:
    return DualEncoder(toy_model(kind), ToyProcessor(), name="toy")


def make(name: str, kind: str = "clip", **settings: Any) -> Learner:
    case = case_of(name)
    values: dict[str, Any] = {
        "max_steps": 4,
        "warmup_steps": 1,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "label_smoothing_factor": 0.0,
        **case.settings,
        **settings,
    }
    return Learner(toy_backbone(kind), method=case.config, training=TrainingConfig(**values))


def teach(learner: Learner, count: int = 2) -> Learner:
    tasks = [toy_task(index) for index in range(count)]
    if learner.method.joint:
        learner.learn_jointly(tasks)
    else:
        for task in tasks:
            learner.learn(task)
    return learner


@functools.cache
def taught(name: str, kind: str = "clip") -> Learner:
    """A learner of two tasks; shared, so a test must leave it as it was."""
    return teach(make(name, kind))


def mixed_batch(backbone: DualEncoder, rows: int = 3) -> Batch:
    """Rows of two learned tasks and one that nobody learned, alternating."""
    examples = [toy_task(task).test[row] for row in range(rows) for task in (0, 1, 2)]
    return backbone.collate(examples)


def answer(learner: Learner, batch: Batch, task: int) -> Tensor:
    """Scores over the task's labels with the selector overruled."""
    tasks = torch.full((len(batch),), learner.method.expert_task(task))
    labels = toy_task(task).labels
    with torch.no_grad():
        return learner.method.answer(batch, None, tasks, labels).scores


def base_scores(kind: str, batch: Batch, task: int) -> Tensor:
    """Scores of an untouched model of the same weights, through a method that cannot touch it."""
    plain = Learner(toy_backbone(kind), method=ZeroShotConfig())
    with torch.no_grad():
        tasks = torch.full((len(batch),), BASE)
        return plain.method.answer(batch, None, tasks, toy_task(task).labels).scores


def image_features(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        output = model.get_image_features(pixel_values=batch.inputs["pixel_values"])
    return output if isinstance(output, Tensor) else output.pooler_output


def text_features(model: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model.get_text_features(**tokens)
    return output if isinstance(output, Tensor) else output.pooler_output


def digest(model: torch.nn.Module) -> str:
    """Hash of the weights as they are now (the backbone's own fingerprint is cached)."""
    total = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        total.update(key.encode() + value.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def call_counts(learner: Learner) -> tuple[dict[str, int], Callable[[], None]]:
    """Count forwards of every expert layer; returns (counts, stop)."""
    counts = dict.fromkeys(learner.method.layers, 0)
    handles = []
    for key, layer in learner.method.layers.items():

        def count(*_: Any, key: str = key) -> None:
            counts[key] += 1

        handles.append(layer.register_forward_hook(count))
    return counts, lambda: [handle.remove() for handle in handles] and None


def training_batches(learner: Learner, task: int) -> Iterator[Batch]:
    from evolora.training.batches import TrainingBatches

    feed = TrainingBatches(
        toy_task(task).train,
        learner.backbone,
        learner.training,
        seed=0,
        task=task,
        share=learner.share,
    )
    return feed.from_step(0)


def stacks(method: torch.nn.Module) -> dict[str, GrowingStack]:
    return {name: m for name, m in method.named_modules() if isinstance(m, GrowingStack)}


# -- enrolment -------------------------------------------------------------------------------------


def test_every_registered_method_is_enrolled() -> None:
    assert sorted(CASES) == METHODS.names()
    for name, case in CASES.items():
        assert case.config.type == name
        assert METHODS.get(name).config_class is type(case.config)


def test_a_method_without_a_toy_configuration_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="no toy configuration"):
        case_of("not-enrolled")


@EVERY
def test_sites_are_as_claimed(name: str) -> None:
    assert bool(taught(name).method.layers) == case_of(name).sites


# -- identity --------------------------------------------------------------------------------------


@EVERY
@BOTH
def test_identity_at_init(name: str, kind: str) -> None:
    """Bit for bit: zero factors add exact zeros, a copy of the weights computes the same."""
    learner = make(name, kind)
    batch = mixed_batch(learner.backbone)
    learner.begin(toy_task(0))
    assert torch.equal(answer(learner, batch, 0), base_scores(kind, batch, 0))
    route = Route.of(0, len(batch), summary=learner.backbone.vision_summary)
    with torch.no_grad(), learner.method.weights():
        embedding = learner.backbone.encode(batch, route)
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


# -- training --------------------------------------------------------------------------------------


@EVERY
@BOTH
def test_base_weights_are_bit_identical_after_training(name: str, kind: str) -> None:
    learner = taught(name, kind)
    assert digest(learner.backbone.model) == digest(toy_model(kind))
    assert not any(p.requires_grad for p in learner.backbone.model.parameters())
    assert all(p.grad is None for p in learner.backbone.model.parameters())


@EVERY
@BOTH
def test_all_own_parameters_and_nothing_else_get_a_gradient(name: str, kind: str) -> None:
    learner = make(name, kind, max_steps=8)
    method = learner.method
    learner.begin(toy_task(0))
    trainable = method.trainable()
    if name == "zero-shot":
        assert not trainable and not method.stored()
        return
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    touched = {key: torch.zeros_like(p, dtype=torch.bool) for key, p in trainable.items()}
    used = {key: c.counts > 0 for key, c in method.counters().items()}
    ready = {key: torch.zeros_like(chosen) for key, chosen in used.items()}
    for batch in training_batches(learner, 0):
        optimizer.zero_grad()
        for counter in method.counters().values():
            counter.reset()
        method(batch)["loss"].backward()
        for key, counter in method.counters().items():
            ready[key] |= (counter.counts > 0) & method.layers[key].bank.B.active.flatten(1).any(1)
            used[key] |= counter.counts > 0
        for key, parameter in trainable.items():
            if parameter.grad is not None:
                touched[key] |= parameter.grad != 0
        optimizer.step()
    for key, seen in touched.items():
        if key.endswith(case_of(name).dead or ("never",)):
            continue
        layer = next((site for site in used if key.startswith(f"layers.{site}.bank.")), None)
        if layer is None:
            assert seen.any(), f"{key} never got a gradient"
            continue
        # An expert that the gate never chose has none; a down projection has none while its up
        # projection is still zero.
        up = ".bank.B." in key or ".bank.up_bias." in key
        expected = used[layer] if up else ready[layer]
        rows = seen.flatten(1).any(dim=1)
        assert torch.equal(rows, expected), f"{key}: {rows} against {expected}"
        assert expected.sum() >= 2
    assert all(p.grad is None for p in learner.backbone.model.parameters())


@EVERY
def test_training_lowers_the_loss(name: str) -> None:
    if name == "zero-shot":
        assert make(name).learn(toy_task(0)) is None
        return
    learner = make(name, max_steps=40)
    if learner.method.joint:
        learner.learn_jointly([toy_task(0)])
    else:
        learner.learn(toy_task(0))
    batch = next(training_batches(learner, 0))
    fresh = make(name)
    fresh.begin(toy_task(0))
    with torch.no_grad():
        losses = [float(each.method(batch)["loss"]) for each in (fresh, learner)]
    assert losses[1] < 0.8 * losses[0], losses


# -- experts really run ----------------------------------------------------------------------------


@EVERY
def test_every_expert_layer_runs_once_per_tower_forward(name: str) -> None:
    learner = make(name)
    learner.begin(toy_task(0))
    counts, stop = call_counts(learner)
    learner.method(next(training_batches(learner, 0)))
    stop()
    assert set(counts.values()) <= {1}
    assert bool(counts) == case_of(name).sites


@EVERY
def test_a_perturbed_parameter_changes_the_answer(name: str) -> None:
    learner = teach(make(name), 1)
    batch = mixed_batch(learner.backbone)
    before = answer(learner, batch, 0)
    groups = learner.method.layers.values() if case_of(name).sites else [learner.method]
    for group in groups:
        values = [t for n, t in group.state_dict().items() if t.is_floating_point() and t.numel()]
        if isinstance(group, MoELayer):  # gates of two experts may stay as they are; experts not
            values = [t for s in group.bank.stacks() for t in (s.frozen, s.active.detach())]
        kept = [value.clone() for value in values]
        with torch.no_grad():
            for value in values:
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
        changed = answer(learner, batch, 0)
        with torch.no_grad():
            for value, old in zip(values, kept, strict=True):
                value.copy_(old)
        if name == "zero-shot":
            assert not values
        else:
            assert (changed - before).abs().max() > 1e-5
    assert torch.equal(answer(learner, batch, 0), before)


# -- retention -------------------------------------------------------------------------------------


@EVERY
def test_frozen_things_stay_bit_identical(name: str) -> None:
    learner = make(name)
    if learner.method.joint:
        pytest.skip("joint training sees all tasks at once: there is no next task")
    learner.learn(toy_task(0))
    batch = mixed_batch(learner.backbone)
    before = {
        key: (stack.frozen_ids(), stack.take(torch.tensor(stack.frozen_ids(), dtype=torch.long)))
        for key, stack in stacks(learner.method).items()
    }
    before = {key: (ids, rows.detach().clone()) for key, (ids, rows) in before.items()}
    scores = answer(learner, batch, 0)
    for task in (1, 2):
        learner.learn(toy_task(task))
    for key, stack in stacks(learner.method).items():
        ids, rows = before[key]
        assert set(ids) <= set(stack.frozen_ids())
        now = stack.take(torch.tensor(ids, dtype=torch.long)).detach()
        assert torch.equal(now[..., : rows.shape[-1]] if rows.dim() > 1 else now, rows), key
    after = answer(learner, batch, 0)
    if case_of(name).retains:
        torch.testing.assert_close(after, scores, rtol=0, atol=0)
    else:
        assert not torch.equal(after, scores), "it forgets nothing: claim it"


# -- answers ---------------------------------------------------------------------------------------


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
    backbone.host.set_route("vision", Route(tasks))
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


# -- keeping ---------------------------------------------------------------------------------------


def assert_same_state(left: Learner, right: Learner) -> None:
    a, b = export_state(left.method), export_state(right.method)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@EVERY
@BOTH
def test_saved_and_loaded_is_equal(name: str, kind: str, tmp_path: Path) -> None:
    learner = teach(make(name, kind), 2)
    learner.save_pretrained(tmp_path)
    loaded = Learner.from_pretrained(tmp_path, model=toy_backbone(kind))
    assert loaded.method.config == learner.method.config
    assert loaded.task_names == learner.task_names
    assert loaded.method.labels == learner.method.labels
    assert_same_state(learner, loaded)
    batch = mixed_batch(learner.backbone)
    for task in (0, 1):
        assert torch.equal(answer(learner, batch, task), answer(loaded, batch, task))
    images = [toy_task(task).test[row].inputs["image"] for task in range(3) for row in range(3)]
    assert learner.predict(images) == loaded.predict(images)
    if learner.method.joint:
        return
    loaded.training, loaded.method.objective = learner.training, learner.method.objective
    learner.learn(toy_task(2))  # and what it learns next is the same as well
    loaded.learn(toy_task(2))
    assert_same_state(learner, loaded)


@EVERY
def test_resumed_in_the_middle_is_equal(name: str) -> None:
    learner = make(name, save_steps=3, max_steps=5)
    states: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []

    def save(step: int, moments: Mapping[str, Tensor]) -> None:
        state = {k: v.clone() for k, v in export_state(learner.method).items()}
        states.append((step, state, {k: v.clone() for k, v in moments.items()}))

    joint = learner.method.joint
    if joint:
        learner.learn_jointly([toy_task(0), toy_task(1)], save=save)
    else:
        learner.learn(toy_task(0))
        learner.learn(toy_task(1), save=save)
    assert len(states) == (0 if name == "zero-shot" else 3 if joint else 1)
    for step, state, moments in states:
        again = make(name, save_steps=3, max_steps=5)
        again.begin(toy_task(0))
        if not joint:
            again.method.finish_task()
        again.begin(toy_task(1))
        load_state(again.method, state)
        place = Progress(step=step, moments=moments)
        if joint:
            again.learn_jointly([toy_task(0), toy_task(1)], progress=place)
        else:
            again.learn(toy_task(1), progress=place)
        assert_same_state(learner, again)
