"""D-MoLE: the invariants of its specification (A.10), helpers, routers, every backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backbones.writers import FAMILIES, samples, writer
from tests.conftest import toy_task
from tests.contract.cases import base_scores, digest, mixed_batch, toy_backbone
from tests.methods.pairs import pair_learner, pair_task
from tests.methods.test_writing import TASKS, TEXTS, TRAINING, disturb
from torch import Tensor, nn

from evolora.allocation.settings import GradientAllocationConfig
from evolora.backbones.image_text import ImageText
from evolora.errors import ConfigError
from evolora.experts.sites import Site, SiteHost
from evolora.learner import Learner
from evolora.methods.d_mole import DMoLE, DMoLEConfig
from evolora.methods.lora import LoRAConfig, LoRALayer
from evolora.routing.autoencoders import UnitAutoEncoderTraining
from evolora.routing.route import BASE, Route
from evolora.routing.selection import Selection
from evolora.routing.selector import AutoEncoderSelector, RecogniserConfig
from evolora.storage.state import export_state
from evolora.training.config import TrainingConfig

SELECTOR = RecogniserConfig(training=UnitAutoEncoderTraining(hidden=8, steps=60))
GRADIENT = GradientAllocationConfig(budget=6, sample=8, floors={"vision": 0.25})
CLASSES = TrainingConfig(
    max_steps=4, warmup_steps=1, per_device_train_batch_size=6, learning_rate=1e-2,
    label_smoothing_factor=0.0,
)  # fmt: skip


def config(**given: Any) -> DMoLEConfig:
    return DMoLEConfig(**{"r": 2, "selector": SELECTOR, "allocation": GRADIENT, **given})


def classes(count: int = 2, **given: Any) -> Learner:
    learner = Learner(toy_backbone("clip"), method=config(**given), training=CLASSES)
    for index in range(count):
        learner.learn(toy_task(index))
    return learner


def selector_of(learner: Learner) -> AutoEncoderSelector:
    assert isinstance(learner.method.selector, AutoEncoderSelector)
    return learner.method.selector


def loosened(learner: Learner) -> Learner:
    """Let every auto-encoder take every row."""
    selector_of(learner).thresholds.frozen.fill_(1e6)
    return learner


def test_A_10_numbers_of_two_experts_at_one_linear() -> None:
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, 1.0]])
    site = Site(
        tower="t", layer=0, name="t.0.l", kind="linear", module=linear, d_in=2, d_out=1
    )  # fmt: skip
    layer = LoRALayer(site, LoRAConfig(r=1, lora_alpha=2.0), torch.device("cpu"))
    for task in range(2):
        layer.bank.grow(1, torch.Generator().manual_seed(task))
    layer.bank.freeze([0, 1])
    layer.bank.A.frozen.copy_(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    layer.bank.B.frozen.copy_(torch.tensor([[[3.0]], [[-1.0]]]))
    host = SiteHost()
    host.insert(site, layer)
    x = torch.tensor([[[2.0, 5.0]]]).expand(5, 1, 2)
    tasks = torch.tensor([BASE, 0, 1, 0, 1])
    helpers = torch.tensor([BASE, BASE, BASE, 1, 0])
    with torch.no_grad():
        host.set_route("t", Route(tasks, helpers=helpers))
        assert linear(x).flatten().tolist() == [7.0, 19.0, -3.0, 9.0, 9.0]
        for row, expected in enumerate((19.0, -3.0)):  # all rows alike, folded or not
            host.set_route("t", Route.of(row, 5))
            assert linear(x).flatten().tolist() == [expected] * 5
        same = torch.full((5,), 1)
        host.set_route("t", Route(same, uniform=1, helpers=torch.zeros(5, dtype=torch.long)))
        for _ in range(3):
            assert linear(x).flatten().tolist() == [9.0] * 5


@pytest.mark.parametrize("kind", FAMILIES)
def test_A_10_1_fresh_experts_are_the_base_bit_for_bit(kind: str) -> None:
    backbone = writer(kind)
    method = DMoLE(config(allocation=None), backbone)
    batch = backbone.collate(samples())
    for name in ("a", "b"):
        method.begin_task(name, TEXTS)
    helped = Selection(
        tasks=torch.ones(4, dtype=torch.long), helpers=torch.tensor([0, BASE, 0, BASE])
    )
    route = method.make_route(helped, batch)
    with backbone.host.disabled():
        plain = backbone.answer_losses(batch, route)
    with backbone.host.plain(), torch.no_grad():
        assert torch.equal(backbone.answer_losses(batch, route), plain)


@pytest.mark.parametrize("kind", ["llava", "internvl", "idefics3", "qwen2_vl"])
def test_A_10_8_rows_of_different_tasks_and_helpers_get_exactly_what_they_get_alone(
    kind: str,
) -> None:
    backbone = writer(kind)
    method = DMoLE(config(allocation=None), backbone)
    for name in ("a", "b", "c"):
        method.begin_task(name, TEXTS)
        method.finish_task()
    disturb(method)
    examples = samples()
    given = Selection(tasks=torch.tensor([2, 1, 2, BASE]), helpers=torch.tensor([0, 0, BASE, BASE]))
    batch = backbone.collate(examples)
    mixed = method.write(batch, TEXTS, tasks=given).texts
    assert mixed != method.write(batch, TEXTS, tasks=given.tasks).texts
    with torch.no_grad():
        losses = backbone.answer_losses(batch, method.make_route(given, batch))
    for row, example in enumerate(examples):
        one, own = backbone.collate([example]), given.take(torch.tensor([row])).settled()
        assert method.write(one, TEXTS, tasks=own).texts == mixed[row : row + 1]
        with torch.no_grad():
            loss = backbone.answer_losses(one, method.make_route(own, one))
        torch.testing.assert_close(losses[row : row + 1], loss, atol=1e-4, rtol=1e-4)


def test_A_10_2_nobody_is_the_base_and_7_two_tasks_add_up() -> None:
    learner = classes(2, allocation=None)
    method, batch = learner.method, mixed_batch(learner.backbone)
    rows = len(batch)
    outputs = {}
    site = next(iter(method.layers.values()))
    assert isinstance(site, LoRALayer)
    x = torch.randn(rows, 5, site.bank.d_in)
    out = torch.randn(rows, 5, site.bank.d_out)
    for name, task, helper in (("1", 0, BASE), ("2", 1, BASE), ("12", 1, 0), ("21", 0, 1)):
        helpers = None if helper == BASE else torch.full((rows,), helper)
        route = Route(torch.full((rows,), task), uniform=task, helpers=helpers)
        with torch.no_grad():
            outputs[name] = site(x, out.clone(), route) - out
    torch.testing.assert_close(outputs["12"], outputs["1"] + outputs["2"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs["12"], outputs["21"], atol=1e-5, rtol=1e-4)
    nobody = torch.full((rows,), BASE)
    scores = method.answer(batch, None, nobody, toy_task(0).labels).scores
    assert torch.equal(scores, base_scores("clip", batch, 0))


def test_A_10_3_a_later_task_changes_nothing_that_an_earlier_one_answers() -> None:
    learner = loosened(classes(2))
    batch = mixed_batch(learner.backbone)
    method = learner.method
    before = digest(method)
    rows = {name: value.clone() for name, value in export_state(method).items()}
    with torch.no_grad():
        encoded, told = method.told(batch, 1)
        assert told.helpers is not None and told.helpers.tolist() == [0] * len(batch)
        scores = method.answer(batch, encoded, told, toy_task(1).labels).scores
    learner.learn(toy_task(2))
    assert digest(method) != before
    selector = selector_of(learner)
    for stack in (selector.thresholds, *selector.bank.networks()):
        name = next(key for key, module in method.named_modules() if module is stack)
        kept = next(value for key, value in rows.items() if key.startswith(f"{name}."))
        assert torch.equal(stack.all()[: len(kept)].flatten(), kept.flatten())
    with torch.no_grad():
        encoded, again = method.told(batch, 1)
        assert again.helpers is not None and torch.equal(again.helpers, told.helpers)
        after = method.answer(batch, encoded, again, toy_task(1).labels).scores
    assert torch.equal(after, scores)


def test_A_10_4_5_11_only_what_the_budget_bought_for_the_task_trains() -> None:
    learner = classes(0)
    method: Any = learner.method
    for task in range(3):
        kept = {key: layer.bank.A.all().clone() for key, layer in method.layers.items()}
        learner.learn(toy_task(task))
        rows = method.allocator.rows()
        assert sum(rows[task]) == 6
        sites = [
            site for site, count in zip(method.allocator.sites, rows[task], strict=True) if count
        ]
        assert sum(site.tower == "vision" for site in sites) >= 1  # a quarter of 6, rounded down
        size = sum(2 * (site.d_in + site.d_out) for site in sites)
        recogniser = method.selector.bank.parameters_per_task()
        assert learner.costs[task].trainable_parameters == size + recogniser
        scores = method.allocator.scores[task]
        for tower in ("vision", "text"):  # in each tower the best ones
            inside = torch.tensor([site.tower == tower for site in method.allocator.sites])
            own = torch.tensor(rows[task], dtype=torch.bool)
            if (inside & ~own).any() and (inside & own).any():
                assert scores[inside & own].min() >= scores[inside & ~own].max()
        for key, old in kept.items():  # experts are only ever appended
            assert torch.equal(method.layers[key].bank.A.all()[: len(old)], old)
    assert not method.trainable()
    learner.begin(toy_task(3))
    method.preview(3, None)
    size = sum(parameter.numel() for parameter in method.trainable().values())
    assert size == sum(
        2 * (site.d_in + site.d_out)
        for site, count in zip(method.allocator.sites, method.allocator.rows()[3], strict=True)
        if count
    )


def test_A_10_4_saved_loaded_and_saved_again_is_the_same(tmp_path: Path) -> None:
    learner = classes(2)
    learner.save_pretrained(tmp_path / "one")
    again = Learner.from_pretrained(tmp_path / "one", model=toy_backbone("clip"))
    again.save_pretrained(tmp_path / "two")
    mine, theirs = export_state(learner.method), export_state(again.method)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    files = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]
    for name in files[0]:
        if name.endswith(".safetensors"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_route_of_training_has_the_helper_that_a_row_has_at_test() -> None:
    learner = classes(1)
    selector = selector_of(learner)
    learner.begin(toy_task(1))
    learner.method.preview(1, None)
    batch = replace(mixed_batch(learner.backbone), task=1)
    _, features = learner.method.routing_features(batch)
    errors = selector.bank.errors(features[str(selector.feature)])[:, 0]
    selector.thresholds.frozen.fill_(float(errors.median()))  # some rows pass, some do not
    expected = torch.where(errors < errors.median(), 0, BASE)
    assert {0, BASE} == set(expected.tolist())
    seen: list[Route] = []
    make = learner.method.make_route

    def spy(*args: Any) -> Route:
        seen.append(make(*args))
        return seen[-1]

    learner.method.make_route = spy  # type: ignore[method-assign]
    learner.method(batch)["loss"].backward()
    (route,) = seen
    assert route.uniform == 1 and route.helpers is not None
    assert torch.equal(route.helpers, expected)
    touched = [name for name, p in learner.method.named_parameters() if p.grad is not None]
    assert touched and set(touched) <= set(learner.method.trainable())


def test_what_helps_in_training_changes_what_is_learned() -> None:
    found = []
    for helper in ("none", "nearest", "nearest"):
        learner = classes(2, helper=helper, allocation=None)
        found.append(
            torch.cat([layer.bank.B.all()[1].flatten() for layer in learner.method.layers.values()])
        )
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize("router", ["per-sample", "batch-vote", "oracle"])
def test_a_stream_of_texts_is_learned_and_each_task_answered(router: Any) -> None:
    backbone = writer("internvl")
    learner = Learner(
        backbone,
        method=config(router=router, allocation=None, r=4),
        training=TrainingConfig(**{**vars(TRAINING), "max_steps": 40, "learning_rate": 2e-2}),
        evaluation_batch_size=3,
    )
    before = backbone.fingerprint()
    for task in TASKS:
        learner.learn(task)
    assert backbone.fingerprint() == before
    assert learner.method.routing == ("oracle" if router == "oracle" else "task-free")
    results = [learner.evaluate(task) for task in TASKS]
    if router == "oracle":
        assert [result.score for result in results] == [1.0, 1.0]
        assert results[0].routes == {"first": 6}
    for result in results:
        assert sum(result.routes.values()) == 6
    answers = learner.predict([None], ["what is it ? red"], task="first")
    assert answers[0].label == "red dot"


def test_a_row_is_answered_alike_whoever_is_beside_it_but_by_vote() -> None:
    learner = classes(3)
    batch = mixed_batch(learner.backbone)
    whole = learner.method.predict(batch, toy_task(0).labels)
    for row in range(len(batch)):
        alone = learner.method.predict(batch.take(torch.tensor([row])), toy_task(0).labels)
        assert alone.tasks[0] == whole.tasks[row]
        torch.testing.assert_close(alone.scores[0], whole.scores[row], atol=1e-5, rtol=1e-4)
    voted = classes(3, router="batch-vote")
    assert len(set(voted.method.predict(batch, toy_task(0).labels).tasks.tolist())) == 1


def test_what_is_kept_of_a_sample_knows_its_helper() -> None:
    learner = loosened(classes(2))
    data = toy_task(1).test
    (known,) = learner.batches(data, range(len(data)))
    method = learner.method
    with torch.no_grad():
        helped = method.told(known, 1)[1]
        alone = Selection.of(1, len(known))
        first = [method.embed(known, None, chosen) for chosen in (helped, alone)]
        again = [method.embed(known, None, chosen) for chosen in (helped, alone)]
        unknown = replace(known, known=None)
        plain = [method.embed(unknown, None, chosen) for chosen in (helped, alone)]
    assert not torch.allclose(first[0], first[1])
    for one, two, three in zip(first, again, plain, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vilt", "clip-fusion"])
def test_pairs_are_learned_with_the_features_of_their_backbone(kind: str) -> None:
    chosen = config(allocation=GradientAllocationConfig(budget=5, sample=8))
    learner = pair_learner(chosen, kind)
    for index in range(2):
        learner.learn(pair_task(index))
    assert learner.method.selector.feature == "layers"
    assert all(sum(row) == 5 for row in learner.method.allocator.rows())  # type: ignore[union-attr]
    assert sum(learner.evaluate(pair_task(0)).routes.values()) == len(pair_task(0).test)


def test_defaults_fit_every_backbone_and_floors_that_are_asked_for_are_checked() -> None:
    language = DMoLE(DMoLEConfig(), writer("llava"))
    towers = {key.split("/")[0] for key in language.layers}
    assert towers == {"vision", "language"}, "the projection stays frozen"
    assert language.selector.feature == "max-pooled"
    assert language.allocator is not None
    assert language.allocator.chosen.floors == {"vision": 0.25}  # type: ignore[union-attr]
    assert language.config == DMoLEConfig()
    vilt: Any = pair_learner(DMoLEConfig()).method
    assert vilt.allocator.chosen.floors == {}
    wrong = GradientAllocationConfig(budget=5, floors={"visoin": 0.25})
    learner = pair_learner(config(allocation=wrong))
    with pytest.raises(ConfigError, match="tower in floors 'visoin'"):
        learner.learn(pair_task(0))
    with pytest.raises(ConfigError, match="path of a"):
        DMoLEConfig(allocation="half")


def test_A_10_9_features_do_not_know_the_experts() -> None:
    learner = Learner(writer("internvl"), method=config(), training=TRAINING)
    backbone = learner.backbone
    assert isinstance(backbone, ImageText)
    batch = backbone.collate(samples())
    before = learner.method.routing_features(batch)[1]["max-pooled"]
    learner.learn(TASKS[0])
    disturb(learner.method)
    backbone.host.set_route("language", Route.of(0, 4))
    assert torch.equal(learner.method.routing_features(batch)[1]["max-pooled"], before)


def test_dropout_is_drawn_for_each_expert_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from evolora.randomness import StepRandom

    learner = classes(2, allocation=None, lora_dropout=0.5)
    drawn: list[str] = []
    plain = StepRandom.keep_mask

    def keep(self: Any, key: str, *args: Any) -> Tensor:
        drawn.append(key)
        return plain(self, key, *args)

    monkeypatch.setattr(StepRandom, "keep_mask", keep)
    name, site = next(iter(learner.method.layers.items()))
    assert isinstance(site, LoRALayer)
    x = torch.ones(2, 3, site.bank.d_in)
    route = Route(
        torch.tensor([1, 1]), uniform=1, helpers=torch.tensor([0, 0]), random=StepRandom(1)
    )
    site(x, torch.zeros(2, 3, site.bank.d_out), route)
    place = name.replace("/", ".")
    assert drawn == [f"{place}/dropout", f"{place}/helper/dropout"]
