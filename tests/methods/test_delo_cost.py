"""What DeLo runs: forwards are counted by hooks, not by time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.backbones.pairs import make, memory
from tests.methods.pairs import pair_learner, pair_task

from evolora.backbones.memory import Known
from evolora.experts.factor_pool import FactorPool
from evolora.learner import Learner
from evolora.methods.agreement import _embed_without
from evolora.methods.delo import DeLoConfig
from evolora.randomness import StepRandom
from evolora.routing.selector import OracleSelectorConfig

SMALL: dict[str, Any] = {"num_factors": 6, "r": 2}
KINDS = pytest.mark.parametrize("kind", ["vilt", "clip"])


@contextmanager
def counted(learner: Learner) -> Iterator[Counter]:
    """Count the rows that meet each block, by (tower, block, with experts)."""
    rows: Counter = Counter()
    backbone = learner.backbone

    def count(tower: str, index: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            rows[tower, index, backbone.host.enabled] += len(args[0])

        return hook

    handles = [
        block.register_forward_pre_hook(count(tower, index))
        for tower in backbone.towers
        for index, block in enumerate(backbone.blocks(tower))
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def passes(learner: Learner, batch: Any, *, clean: bool, experts: bool) -> Counter:
    """One pass of each kind that is asked for: every block, every row that has something there."""
    every = torch.ones(len(batch), dtype=torch.bool)
    seen = {"vision": batch.present["image"], "text": batch.present["text"], "multimodal": every}
    return Counter(
        {
            (tower, index, kind): int(seen[tower].sum())
            for tower in learner.backbone.towers
            for index in range(len(learner.backbone.blocks(tower)))
            for kind, wanted in ((False, clean), (True, experts))
            if wanted
        }
    )


def taught(kind: str, tasks: int = 2, **settings: Any) -> Learner:
    learner = pair_learner(DeLoConfig(**SMALL, **settings), kind, max_steps=2)
    for index in range(tasks):
        learner.learn(pair_task(index))
    return learner


def mixed(learner: Learner) -> Any:
    return learner.backbone.collate([pair_task(i).test[r] for r in range(3) for i in (0, 1)])


def known(batch: Any, kept: Any) -> Any:
    names = tuple(key.encode() for key in batch.keys)
    return replace(batch, known=Known(samples=names, memory=kept))


@KINDS
def test_not_being_told_the_task_costs_one_clean_pass(kind: str) -> None:
    learner = taught(kind)
    batch, labels = mixed(learner), pair_task(0).labels
    with counted(learner) as rows:
        tasks = learner.method.predict(batch, labels).tasks
    assert len(set(tasks.tolist())) == 2, "rows of both tasks run in one forward"
    assert rows == passes(learner, batch, clean=True, experts=True)


@KINDS
def test_told_the_task_only_clean_queries_need_the_clean_pass(kind: str) -> None:
    learner = taught(kind, selector=OracleSelectorConfig())
    batch, labels = mixed(learner), pair_task(0).labels
    with counted(learner) as rows:
        learner.method.predict(batch, labels, oracle=0)
    assert rows == passes(learner, batch, clean=kind == "clip", experts=True)


@KINDS
def test_a_known_sample_has_no_further_clean_pass(kind: str) -> None:
    learner = taught(kind)
    batch, labels = mixed(learner), pair_task(0).labels
    batch = known(batch, memory())
    first = learner.method.predict(batch, labels)
    with counted(learner) as rows:
        again = learner.method.predict(batch, labels)
    assert torch.equal(first.tasks, again.tasks) and torch.equal(first.scores, again.scores)
    assert rows == passes(learner, batch, clean=False, experts=True), "tasks are mixed"


def test_the_clean_pass_leaves_what_lies_below_the_experts() -> None:
    """No block of ViLT that is without experts runs more than once for a known sample."""
    learner = pair_learner(DeLoConfig(layers_to_transform=(1,), **SMALL), max_steps=2)
    for index in range(2):
        learner.learn(pair_task(index))
    batch, labels = mixed(learner), pair_task(0).labels
    plain = learner.method.predict(batch, labels)
    with counted(learner) as rows:
        shared = learner.method.predict(known(batch, memory()), labels)
    blocks = len(learner.backbone.blocks("multimodal"))
    expected = {("multimodal", index, False): 6 for index in range(blocks)}
    expected.update({("multimodal", index, True): 6 for index in range(1, blocks)})
    assert rows == expected
    torch.testing.assert_close(shared.scores, plain.scores)


@KINDS
def test_a_step_runs_again_no_more_than_complete_samples(kind: str) -> None:
    """ViLT runs them without a modality; CLIP, whose towers never meet, runs nothing."""
    learner = pair_learner(DeLoConfig(**SMALL), kind)
    learner.begin(pair_task(0))
    data = pair_task(0, (0, 1, 2, 1)).train
    batch = learner.backbone.collate([data[row] for row in range(8)], task=0)
    batch = replace(known(batch, memory()), random=StepRandom(0))
    learner.method(batch)  # CLIP asks for the queries of samples it has not met
    with counted(learner) as rows:
        learner.method(batch)
    expected = passes(learner, batch, clean=False, experts=True)
    if kind == "vilt":
        expected = Counter({block: count + 2 for block, count in expected.items()})
    assert rows == expected


def test_in_two_streams_what_is_left_of_a_sample_is_as_it_was() -> None:
    """What consistency takes from the first forward is what a second one gives, gradients too."""
    learner = pair_learner(DeLoConfig(**SMALL), "clip")
    learner.begin(pair_task(0))
    method, backbone = learner.method, learner.backbone
    with torch.no_grad():
        for pool in (m for m in method.modules() if isinstance(m, FactorPool)):
            pool.B.active.normal_(generator=torch.Generator().manual_seed(3))
    batch = backbone.collate([pair_task(0, (0,)).train[row] for row in range(6)], task=0)
    lost = {"text": torch.arange(6) % 2 == 0, "image": torch.arange(6) % 2 == 1}
    found = []
    whole = backbone.encode(batch, method.make_route(0, batch))
    part = backbone.without(batch, lost)
    for embedding in (
        _embed_without(method, batch, whole, torch.arange(6), lost),
        backbone.encode(part, method.make_route(0, part)),
    ):
        method.zero_grad()
        (embedding * torch.linspace(-1, 1, embedding.shape[1])).sum().backward()
        grads = [p.grad for p in method.parameters() if p.grad is not None]
        found.append((embedding.detach(), torch.cat([grad.flatten() for grad in grads])))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert make("vilt").parts.keys() != set(backbone.modalities), "one stream has no such shortcut"
