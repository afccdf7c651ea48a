"""DeLo: its experts run and learn, guidance follows the data's own flags, keys route per sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backbones.pairs import make
from tests.methods.pairs import pair_learner, pair_task
from torch import Tensor

from evolora.errors import ConfigError
from evolora.experts.factor_layer import FactorLayer, guided
from evolora.experts.factor_pool import FactorPool
from evolora.learner import Learner
from evolora.methods.agreement import alignment, consistency, divergence
from evolora.methods.delo import DeLo, DeLoConfig
from evolora.randomness import StepRandom
from evolora.routing.route import BASE
from evolora.routing.selector import OracleSelectorConfig

SMALL: dict[str, Any] = {"num_factors": 6, "r": 2}
KINDS = pytest.mark.parametrize("kind", ["vilt", "clip"])


def layers_of(learner: Learner) -> list[FactorLayer]:
    return [layer for layer in learner.method.modules() if isinstance(layer, FactorLayer)]


def pools_of(learner: Learner) -> list[FactorPool]:
    return [pool for pool in learner.method.modules() if isinstance(pool, FactorPool)]


def batch_of(learner: Learner, codes: tuple[int, ...] = (0, 1, 2), *, task: int = 0, rows: int = 6):
    data = pair_task(task, codes)
    return learner.backbone.collate([data.train[row] for row in range(rows)], task=task)


def embedded(learner: Learner, batch: Any, task: int = 0) -> Tensor:
    method = learner.method
    with torch.no_grad():
        return learner.backbone.encode(batch, method.make_route(task, batch))


def perturb(learner: Learner) -> None:
    with torch.no_grad():
        for layer in layers_of(learner):
            for pool in layer.pools.values():
                pool.B.active.normal_(generator=torch.Generator().manual_seed(3))


def test_golden_losses() -> None:
    """G5."""
    teacher, learner = torch.tensor([[1.0, 1, 0]]), torch.tensor([[2.0, 0, -1]])
    assert divergence(teacher, learner).item() == pytest.approx(0.463214, abs=1e-6)
    images, texts = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[0.0, 1], [2, 2]])
    assert alignment(torch.stack([images, texts], dim=1)).item() == pytest.approx(0.5)


def test_divergence_of_several_labels_is_that_of_coins() -> None:
    teacher, learner = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 0.0]])
    p, q = teacher.double().sigmoid(), learner.double().sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    assert divergence(teacher, learner, True).item() == pytest.approx(expected.item(), abs=1e-6)
    assert divergence(teacher, teacher, True).item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(
    ("cmgr", "rows"),
    [
        ("symmetric", [[1, 2], [3, 3], [6, 6]]),
        ("text_only", [[1, 2], [3, 3], [5, 6]]),
        ("off", [[1, 2], [3, 4], [5, 6]]),
    ],
)
def test_the_other_query_stands_in_for_a_missing_one(cmgr: Any, rows: list) -> None:
    queries = torch.tensor([[1.0, 2], [3, 4], [5, 6]]).unsqueeze(2)
    present = torch.tensor([[True, True], [True, False], [False, True]])
    got = guided(queries, present, ("image", "text"), cmgr)
    assert got.squeeze(2).tolist() == rows


@KINDS
def test_a_fresh_task_is_the_frozen_model(kind: str) -> None:
    """I1: B is zero, so a new task starts as the frozen model."""
    learner = pair_learner(DeLoConfig(**SMALL), kind)
    learner.begin(pair_task(0))
    batch = batch_of(learner)
    base = learner.backbone.encode_base(batch).embedding
    torch.testing.assert_close(embedded(learner, batch), base, rtol=0, atol=1e-6)


@KINDS
def test_experts_run_everywhere_and_change_the_answer(kind: str) -> None:
    """I2: The test that would have caught the released code."""
    learner = pair_learner(DeLoConfig(**SMALL), kind)
    learner.begin(pair_task(0))
    batch, calls = batch_of(learner, (0,)), []
    for layer in layers_of(learner):
        for pool in layer.pools.values():
            choose = pool.choose
            pool.choose = lambda *a, _own=choose, **k: calls.append(1) or _own(*a, **k)
    before = embedded(learner, batch)
    blocks = sum(len(learner.backbone.blocks(tower)) for tower in learner.backbone.towers)
    assert len(calls) == blocks * 3 * (2 if kind == "vilt" else 1)
    perturb(learner)
    assert not torch.allclose(embedded(learner, batch), before)


@KINDS
@pytest.mark.parametrize("how", ["weighted", "straight_through", "none"])
def test_every_active_tensor_gets_gradient(kind: str, how: Any) -> None:
    """I3: after one step; at B = 0 that of A is zero."""
    learner = pair_learner(DeLoConfig(router_grad=how, **SMALL), kind)
    learner.learn(pair_task(0))
    learner.begin(pair_task(1))
    task = batch_of(learner, (0, 1, 2), task=1, rows=12)
    learner.method(replace(task, task=1, random=StepRandom(0)))["loss"].backward()
    for layer in layers_of(learner):
        for pool in layer.pools.values():
            assert pool.B.active.grad.abs().sum() > 0
            assert pool.A.active.grad is not None and not pool.A.active.grad.any(), "B is zero"
            routers = (pool.down_router, pool.up_router, pool.down_offset, pool.up_offset)
            assert all((r.active.grad is not None) == (how != "none") for r in routers)
    trained = {id(p) for p in learner.method.parameters() if p.requires_grad}
    for layer in layers_of(learner):
        for pool in layer.pools.values():
            assert id(pool.A.frozen) not in trained and pool.A.frozen.shape[0] == 6


@KINDS
def test_older_pools_and_keys_stay_bit_for_bit(kind: str) -> None:
    """I5: nothing of an older task moves or is in the optimizer."""
    learner = pair_learner(DeLoConfig(**SMALL), kind)
    learner.learn(pair_task(0))
    before = [stack.all().clone() for pool in pools_of(learner) for stack in pool.stacks()]
    assert not any(len(stack.active) for pool in pools_of(learner) for stack in pool.stacks())
    keys = learner.method.selector.keys.all().clone()
    learner.learn(pair_task(1))
    after = [stack for pool in pools_of(learner) for stack in pool.stacks()]
    for stack, old in zip(after, before, strict=True):
        assert torch.equal(stack.all()[: len(old)], old)
    assert torch.equal(learner.method.selector.keys.all()[:1], keys)


def chosen_factors(learner: Learner, batch: Any) -> list[Tensor]:
    """The factors each pool of the first block chooses, by (site, modality)."""
    found: list[Tensor] = []
    for layer in layers_of(learner)[:3]:
        for pool in layer.pools.values():
            own = type(pool).choose

            def choose(*a: Any, _own: Any = own, _pool: Any = pool, **k: Any) -> Any:
                result = _own(_pool, *a, **k)
                found.append(result[0])
                return result

            pool.choose = choose
    embedded(learner, batch)
    for layer in layers_of(learner)[:3]:
        for pool in layer.pools.values():
            del pool.choose
    return found


def test_a_missing_text_is_routed_by_the_image() -> None:
    """I6: what stands in for the text, or for the image, cannot change a choice."""
    learner = pair_learner(DeLoConfig(**SMALL))
    learner.begin(pair_task(0))
    for code, name in ((1, "input_ids"), (2, "pixel_values")):
        batch = batch_of(learner, (code,))
        first = learner.method.queries
        embedded(learner, batch)
        assert first._guided is not None
        assert torch.equal(first._guided[:, 0], first._guided[:, 1])
        inputs = dict(batch.inputs)
        value = inputs[name]
        inputs[name] = torch.where(value == 5, 6, 5) if code == 1 else -value
        if code == 1:
            inputs[name] = inputs[name].clamp(max=9)
        # The first block is entered by what the frozen embeddings made: the rest stays as it was.
        changed = chosen_factors(learner, replace(batch, inputs=inputs))
        for got, expected in zip(changed, chosen_factors(learner, batch), strict=True):
            assert torch.equal(got, expected)


def test_guidance_does_not_touch_complete_samples() -> None:
    """I7: the switch is for incomplete samples."""
    found = []
    for cmgr in ("symmetric", "text_only", "off"):
        learner = pair_learner(DeLoConfig(cmgr=cmgr, **SMALL))
        learner.begin(pair_task(0))
        perturb(learner)
        found.append(embedded(learner, batch_of(learner, (0, 1, 2), rows=9)))
    assert torch.equal(found[0][::3], found[1][::3]) and torch.equal(found[0][::3], found[2][::3])
    assert torch.equal(found[0][1::3], found[1][1::3])
    assert not torch.equal(found[0][1::3], found[2][1::3])
    assert not torch.equal(found[0][2::3], found[1][2::3])


@KINDS
def test_batch_mates_and_padding_do_not_matter(kind: str) -> None:
    """I8, I9: neither the batch nor its padding changes an answer."""
    learner = pair_learner(DeLoConfig(**SMALL), kind)
    for index in range(2):
        learner.learn(pair_task(index))
    examples = [pair_task(index).test[row] for row in range(6) for index in (0, 1)]
    batch = learner.backbone.collate(examples)
    whole = learner.method.predict(batch, pair_task(0).labels)
    for row in range(len(batch)):
        one = learner.backbone.collate([examples[row]])
        alone = learner.method.predict(one, pair_task(0).labels)
        assert alone.tasks[0] == whole.tasks[row]
        torch.testing.assert_close(alone.scores[0], whole.scores[row], rtol=0, atol=1e-5)


@KINDS
def test_the_right_key_gives_the_oracles_answer(kind: str) -> None:
    """I11: told or inferred, the same task answers the same."""
    learner = pair_learner(DeLoConfig(**SMALL), kind)
    for index in range(2):
        learner.learn(pair_task(index))
    for index in range(2):
        batch = batch_of(learner, task=index)
        inferred = learner.method.predict(batch, pair_task(index).labels)
        assert BASE not in inferred.tasks.tolist() and inferred.tasks.max() < 2
        told = learner.method.answer(
            batch, None, torch.full((len(batch),), index), pair_task(index).labels
        )
        right = inferred.tasks == index
        assert right.any()
        torch.testing.assert_close(inferred.scores[right], told.scores[right], rtol=1e-5, atol=1e-6)


def test_factors_of_one_modality_may_act_on_its_tokens_alone() -> None:
    whole, own = (
        pair_learner(DeLoConfig(token_scope=scope, layers_to_transform=(-1,), **SMALL))
        for scope in ("all", "own_modality")
    )
    for learner in (whole, own):
        learner.begin(pair_task(0))
    layer, batch = layers_of(own)[0], batch_of(own, (0,))
    perturb(own)
    with torch.no_grad():
        for one in layers_of(own):
            one.pools["text"].B.active.zero_()
    changed: list[Tensor] = []
    original = layer.forward

    def spy(x: Tensor, out: Tensor, route: Any) -> Tensor:
        before = out.clone()
        result = original(x, out, route)
        changed.append((result != before).any(dim=2).any(dim=0))
        spans = route.spans
        assert not (changed[0] & ~spans.positions("image")).any() and changed[0].any()
        return result

    layer.forward = spy  # type: ignore[method-assign]
    embedded(own, batch)
    assert changed


@pytest.mark.parametrize(("direction", "moves"), [("distil", False), ("released", True)])
def test_which_answer_learns_from_which(direction: Any, moves: bool) -> None:
    learner = pair_learner(DeLoConfig(cons_direction=direction, **SMALL))
    learner.begin(pair_task(0))
    batch = replace(batch_of(learner, (0,)), random=StepRandom(0))
    whole = embedded(learner, batch).requires_grad_()
    perturb(learner)
    consistency(learner.method, batch, whole, torch.arange(6), direction).backward()
    assert (whole.grad is not None and bool(whole.grad.any())) == moves
    pools = [pool.B.active.grad for pool in pools_of(learner)]
    assert all((grad is not None and bool(grad.any())) != moves for grad in pools)


def test_consistency_pulls_answers_together() -> None:
    """The distilled term alone brings the poorer answer nearer to the complete one."""
    learner = pair_learner(DeLoConfig(consistency=5.0, align=0.0, **SMALL), max_steps=30)
    plain = pair_learner(DeLoConfig(consistency=0.0, align=0.0, **SMALL), max_steps=30)
    task, distances = pair_task(0, (0,)), []
    for one in (learner, plain):
        one.learn(task)
        batch = batch_of(one, (0,), rows=24)
        lost = torch.ones(24, dtype=torch.bool)
        poorer = one.backbone.without(batch, {"text": lost})
        heads = one.method.heads
        whole, part = (heads.of_task(embedded(one, b), 0) for b in (batch, poorer))
        distances.append(divergence(whole, part).item())
    assert distances[0] < distances[1]


def test_presets() -> None:
    paper, formula = DeLoConfig(), DeLoConfig(preset="released_formula")
    assert (paper.router_grad, paper.cmgr, paper.selector.type) == (
        "weighted", "symmetric", "task-keys",
    )  # fmt: skip
    assert (formula.router_grad, formula.cfs_mode, formula.head_mode) == (
        "none", "logit_sum", "all_seen",
    )  # fmt: skip
    assert DeLoConfig(preset="released_formula", cmgr="off").cmgr == "off"
    behaviour = pair_learner(DeLoConfig(preset="released_behaviour", **SMALL))
    assert isinstance(behaviour.method, DeLo) and not behaviour.method.layers
    assert behaviour.method.routing == "oracle"
    behaviour.learn(pair_task(0))
    assert {name.split(".")[0] for name in behaviour.method.trainable()} <= {"heads"}


@pytest.mark.parametrize("preset", ["released_formula", "released_behaviour"])
def test_presets_learn(preset: Any) -> None:
    learner = pair_learner(DeLoConfig(preset=preset, **SMALL))
    for index in range(2):
        learner.learn(pair_task(index))
    assert 0.0 <= learner.evaluate(pair_task(0)).score <= 1.0


@KINDS
def test_saved_and_loaded_it_answers_the_same(kind: str, tmp_path: Path) -> None:
    """I12: logits and keys, after a strict load."""
    learner = pair_learner(DeLoConfig(**SMALL), kind)
    for index in range(2):
        learner.learn(pair_task(index))
    learner.save_pretrained(tmp_path)
    again = Learner.from_pretrained(tmp_path, make(kind))
    keys = [one.method.selector.keys.all() for one in (learner, again)]
    assert torch.equal(*keys)
    labels = pair_task(1).labels
    first, second = (one.method.predict(batch_of(one, task=1), labels) for one in (learner, again))
    assert torch.equal(first.scores, second.scores) and torch.equal(first.tasks, second.tasks)


@pytest.mark.parametrize(
    ("given", "text"),
    [({"align": -1.0}, "align must be at least 0; got -1"), ({"r": 20}, "between 1 and num_fact")],
)
def test_wrong_settings_are_refused(given: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        DeLoConfig(**given)


def test_an_oracle_is_a_choice() -> None:
    learner = pair_learner(DeLoConfig(selector=OracleSelectorConfig(), **SMALL))
    assert learner.method.routing == "oracle" and learner.method.selector.feature is None
