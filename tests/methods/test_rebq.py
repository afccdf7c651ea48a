"""RebQ: queries rebuilt from what is there; repaired it learns every task, released only one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.pairs import pair_learner, pair_task
from torch import Tensor

from evolora.backbones.base import Batch
from evolora.errors import ConfigError
from evolora.experts.prompt_pool import PromptPool
from evolora.learner import Learner
from evolora.methods.rebq import RebQ, RebQConfig

SMALL: dict[str, Any] = {
    "components_per_task": 3,
    "prompt_length": 4,
    "layers_to_transform": (0, 1),
}


def pools(learner: Learner) -> dict[str, PromptPool]:
    assert isinstance(learner.method, RebQ)
    return learner.method._pools()


def batch_of(learner: Learner, codes: tuple[int, ...] = (0, 1, 2), task: int = 0) -> Batch:
    data = pair_task(task, codes).train
    return learner.backbone.collate([data[row] for row in range(6)], task=task)


def test_pools_are_as_the_authors() -> None:
    """Three pools per block: 23.59 M at ViLT-B with 128 components in 8 blocks."""
    learner = pair_learner(RebQConfig(**SMALL))
    learner.begin(pair_task(0))
    names = {name.rpartition("multimodal/")[2] for name in pools(learner)}
    kinds = ("memory.pool", "answer.pools.image", "answer.pools.text")
    assert names == {f"{block}/{kind}" for block in (0, 1) for kind in kinds}
    own = sum(v.numel() for k, v in learner.method.trainable().items() if k.startswith("layers."))
    assert own == 2 * 3 * 3 * (32 + 32 + 4 * 32)
    assert 8 * 3 * 128 * (768 + 768 + 8 * 768) == 23_592_960
    assert RebQConfig().layers_to_transform == tuple(range(8))


@pytest.mark.parametrize("reinit", [True, False])
def test_repaired_it_learns_in_every_task_and_released_only_in_the_first(reinit: bool) -> None:
    learner = pair_learner(RebQConfig(reinit=reinit, **SMALL))
    for task in range(2):
        learner.begin(pair_task(task))
        learner.method(batch_of(learner, task=task))["loss"].backward()
        for name, pool in pools(learner).items():
            for stack in pool.stacks():
                got = stack.active.grad.flatten(1).any(dim=1)
                if reinit or task == 0:
                    assert len(got) == 3 and got.all(), name
                else:
                    assert len(got) == 6 and not got.any(), "old slices and new ones: zero"
                    assert stack.all()[:3].any() and not stack.all()[3:].any()
        learner.method.finish_task()


def test_older_components_stay_bit_for_bit_and_leave_the_optimizer() -> None:
    learner = pair_learner(RebQConfig(**SMALL), weight_decay=0.1)
    learner.learn(pair_task(0))
    before = {n: [s.all().clone() for s in p.stacks()] for n, p in pools(learner).items()}
    learner.learn(pair_task(1))
    for name, pool in pools(learner).items():
        for stack, old in zip(pool.stacks(), before[name], strict=True):
            assert torch.equal(stack.all()[:3], old) and len(stack) == 6
    learner.begin(pair_task(2))
    trained = [p for n, p in learner.method.trainable().items() if n.startswith("layers")]
    assert trained and all(len(p) == 3 for p in trained)


def test_released_weight_decay_shrinks_what_no_longer_learns() -> None:
    learner = pair_learner(RebQConfig(reinit=False, **SMALL), weight_decay=0.1)
    learner.learn(pair_task(0))
    before = {n: [s.all().clone() for s in p.stacks()] for n, p in pools(learner).items()}
    learner.learn(pair_task(1))
    for name, pool in pools(learner).items():
        for stack, old in zip(pool.stacks(), before[name], strict=True):
            now = stack.all()[:3]
            ratio = (now.norm() / old.norm()).item()
            assert 0.9 < ratio < 0.9999
            torch.testing.assert_close(now, old * ratio, rtol=1e-4, atol=1e-6)


def queries_of(learner: Learner, batch: Batch) -> Tensor:
    with torch.no_grad():
        queries = learner.method.make_route(0, batch).queries
    assert queries is not None
    return queries


def test_a_missing_query_is_rebuilt_from_the_other() -> None:
    learner = pair_learner(RebQConfig(**SMALL))
    learner.learn(pair_task(0))
    batch = batch_of(learner)
    heads = learner.backbone.encode_base(batch).features["heads"]
    queries = queries_of(learner, batch)
    there = ~heads.isnan()
    assert torch.equal(queries[there], heads[there]) and not queries.isnan().any()
    assert there.any(dim=2).tolist() == [[True, True], [True, False], [False, True]] * 2
    # What memory holds, and nothing else, decides the missing ones.
    before = queries.clone()
    with torch.no_grad():
        for name, pool in pools(learner).items():
            if "memory" in name:
                pool.prompts.frozen.add_(1.0)
    now = queries_of(learner, batch)
    assert torch.equal(now[there], before[there])
    assert ((now != before).any(dim=2) == ~there.any(dim=2)).all()


def test_a_rebuilt_query_is_drawn_to_that_of_the_complete_sample() -> None:
    """Its loss is the distance in the rebuild pass, and trains memory alone towards it."""
    learner = pair_learner(RebQConfig(reconstruction=1.0, **SMALL))
    learner.begin(pair_task(0))
    batch = batch_of(learner, (0,))
    terms = learner.method(batch)
    method = learner.method
    every = torch.ones(6, dtype=torch.bool)
    with torch.enable_grad():
        whole = method._routed(0, batch, None)[1]
        errors = []
        for index, name in enumerate(("image", "text")):
            part = learner.backbone.without(batch, {name: every})
            errors.append((method._routed(0, part, None)[1][:, index] - whole[:, index]).square())
    torch.testing.assert_close(terms["reconstruction"], torch.stack(errors).mean().detach())
    torch.testing.assert_close(
        terms["loss"].detach(), terms["task"] + terms["reconstruction"], rtol=1e-5, atol=1e-6
    )
    incomplete = learner.method(batch_of(learner, (1, 2)))
    assert "reconstruction" not in incomplete

    def gap(weight: float) -> float:
        one = pair_learner(RebQConfig(reconstruction=weight, **SMALL), max_steps=30)
        one.learn(pair_task(0, (0,)))
        batch = batch_of(one, (0,))
        with torch.enable_grad():
            whole = one.method._routed(0, batch, None)[1]
            part = one.backbone.without(batch, {"text": every})
            made = one.method._routed(0, part, None)[1]
        return (made[:, 1] - whole[:, 1]).square().mean().item()

    assert gap(10.0) < gap(0.0)


def test_the_complete_sample_learns_nothing_from_what_is_rebuilt() -> None:
    found = []
    for weight in (0.0, 5.0):
        learner = pair_learner(RebQConfig(reconstruction=weight, **SMALL))
        learner.begin(pair_task(0))
        learner.method(batch_of(learner, (0,)))["loss"].backward()
        found.append([s.active.grad for p in pools(learner).values() for s in p.stacks()])
    batch, method, every = batch_of(learner, (0,)), learner.method, torch.ones(6, dtype=torch.bool)
    target = method._routed(0, batch, None)[1].detach()
    errors = []
    for index, name in enumerate(("image", "text")):
        made = method._routed(0, learner.backbone.without(batch, {name: every}), None)[1]
        errors.append((made[:, index] - target[:, index]).square())
    own = [s.active for p in pools(learner).values() for s in p.stacks()]
    grads = torch.autograd.grad(torch.stack(errors).mean(), own, allow_unused=True)
    for without, with_term, extra in zip(*found, grads, strict=True):
        expected = without if extra is None else without + 5.0 * extra
        torch.testing.assert_close(with_term, expected, rtol=1e-3, atol=1e-6)
    assert sum(extra is not None for extra in grads) == 2 * 3, "memory alone"


def test_memory_is_four_tokens_in_every_block_of_the_rebuild_pass_alone() -> None:
    learner = pair_learner(RebQConfig(**SMALL))
    learner.learn(pair_task(0))
    batch, lengths = batch_of(learner), []
    for block in learner.backbone.blocks("multimodal"):
        block.layernorm_before.register_forward_pre_hook(
            lambda _, args: lengths.append(args[0].shape[1])
        )
    with torch.no_grad():
        learner.backbone.encode_base(batch)
        route = learner.method.make_route(0, batch, learner.backbone.encode_base(batch))
        learner.backbone.encode(batch, route)
    own = lengths[-1]
    assert lengths[-6:] == [own + 4] * 3 + [own] * 3


def test_complete_samples_are_learned_without_either_side_too() -> None:
    learner = pair_learner(RebQConfig(reconstruction=0.0, **SMALL))
    learner.begin(pair_task(0))
    batch = batch_of(learner, (0, 0, 1))
    rows = torch.tensor([0, 1, 3, 4])
    every = torch.ones(4, dtype=torch.bool)
    parts = [learner.backbone.without(batch.take(rows), {n: every}) for n in ("image", "text")]
    heads = learner.method.heads
    logits, labels = [], []
    for part in (batch, *parts):
        route = learner.method.make_route(0, part)
        logits.append(heads.of_task(learner.backbone.encode(part, route), 0))
        labels.append(part.labels)
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels))
    torch.testing.assert_close(learner.method(batch)["loss"], expected)


def test_a_sample_is_answered_alike_among_others() -> None:
    learner = pair_learner(RebQConfig(**SMALL))
    for index in range(2):
        learner.learn(pair_task(index))
    batch = batch_of(learner)
    whole = learner.method.predict(batch, pair_task(0).labels).scores
    for row in range(6):
        alone = learner.method.predict(batch.take(torch.tensor([row])), pair_task(0).labels)
        torch.testing.assert_close(alone.scores[0], whole[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"components_per_task": 0}, "components_per_task must be at least 1; got 0"),
        ({"reconstruction": -1.0}, "reconstruction must be at least 0; got -1"),
    ],
)
def test_wrong_settings_are_refused(given: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        replace(RebQConfig(), **given)
