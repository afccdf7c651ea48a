"""The contract of methods that need image and text in one sequence, held on a ViLT.

Enrolled by ``needs_one_stream``; what tests/methods/test_pairs.py asks of every method is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backbones.pairs import vilt
from tests.conftest import toy_vilt
from tests.contract.cases import CASES, ONE_STREAM, call_counts, digest
from tests.methods.pairs import pair_learner, pair_task
from torch import Tensor

from evolora.backbones.base import Batch
from evolora.errors import ConfigError
from evolora.learner import Learner, Progress
from evolora.randomness import StepRandom
from evolora.routing.route import BASE, Route
from evolora.storage.state import export_state, load_state

EVERY = pytest.mark.parametrize("name", ONE_STREAM)


def batch_of(learner: Learner, task: int = 0) -> Batch:
    data = pair_task(task).train
    batch = learner.backbone.collate([data[row] for row in range(9)], task=task)
    return replace(batch, random=StepRandom(0))


def taught(name: str, count: int = 2, **training: Any) -> Learner:
    learner = pair_learner(CASES[name].config, **training)
    for index in range(count):
        learner.learn(pair_task(index))
    return learner


def answers(learner: Learner, batch: Batch) -> Tensor:
    with torch.no_grad():
        tasks = torch.zeros(len(batch), dtype=torch.long)
        return learner.method.answer(batch, None, tasks, pair_task(0).labels).scores


def assert_same_state(left: Learner, right: Learner, **close: float) -> None:
    a, b = export_state(left.method), export_state(right.method)
    assert a.keys() == b.keys()
    for key in a:
        if close:
            torch.testing.assert_close(a[key], b[key], **close)
        else:
            assert torch.equal(a[key], b[key]), key


def test_some_method_is_held_to_it() -> None:
    assert {"map", "rebq"} <= set(ONE_STREAM)


@EVERY
def test_the_base_stays_and_answers_where_nothing_is_on(name: str) -> None:
    learner = taught(name)
    batch, model = batch_of(learner), learner.backbone.model
    assert digest(model) == digest(toy_vilt())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    untouched = vilt()
    expected = untouched.encode(batch, Route.of(BASE, 9))
    counts, stop = call_counts(learner)
    with learner.backbone.host.disabled():
        assert torch.equal(learner.backbone.encode(batch, Route.of(0, 9)), expected)
    assert torch.equal(learner.backbone.encode(batch, Route.of(BASE, 9)), expected)
    stop()
    assert not any(counts.values())
    learner.method.remove()
    assert torch.equal(learner.backbone.encode(batch, Route.of(0, 9)), expected)
    fresh = dict(untouched.model.named_modules())
    for path, module in model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert vars(module).keys() == vars(fresh[path]).keys()


@EVERY
def test_every_layer_runs_and_matters(name: str) -> None:
    learner = taught(name, 1)
    batch = batch_of(learner)
    counts, stop = call_counts(learner)
    before = answers(learner, batch)
    stop()
    assert counts and all(counts.values())
    for layer in learner.method.layers.values():
        values = [v for v in layer.state_dict().values() if v.is_floating_point() and v.numel()]
        kept = [value.clone() for value in values]
        with torch.no_grad():
            for value in values:
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
            changed = answers(learner, batch)
            for value, old in zip(values, kept, strict=True):
                value.copy_(old)
        assert not values or (changed - before).abs().max() > 1e-6
    assert torch.equal(answers(learner, batch), before)


@EVERY
def test_every_parameter_gets_a_gradient_in_each_task(name: str) -> None:
    learner = pair_learner(CASES[name].config)
    for index in range(2):
        learner.begin(pair_task(index))
        learner.method(batch_of(learner, index))["loss"].backward()
        for key, parameter in learner.method.trainable().items():
            rows = parameter.grad
            assert rows is not None and rows.flatten(1 if rows.dim() > 1 else 0).any(-1).all(), key
        learner.method.finish_task()


@EVERY
def test_saved_and_loaded_it_answers_and_learns_the_same(name: str, tmp_path: Path) -> None:
    learner = taught(name)
    learner.save_pretrained(tmp_path)
    loaded = Learner.from_pretrained(tmp_path, vilt())
    assert loaded.method.config == learner.method.config
    assert_same_state(learner, loaded)
    batch = batch_of(learner)
    assert torch.equal(answers(learner, batch), answers(loaded, batch))
    loaded.training, loaded.method.objective = learner.training, learner.method.objective
    for one in (learner, loaded):
        one.learn(pair_task(2))
    assert_same_state(learner, loaded)


@EVERY
def test_resumed_in_the_middle_is_equal(name: str) -> None:
    learner, states = taught(name, 1, max_steps=5, save_steps=3), []

    def save(step: int, moments: Mapping[str, Tensor]) -> None:
        state = {k: v.clone() for k, v in export_state(learner.method).items()}
        states.append((step, state, {k: v.clone() for k, v in moments.items()}))

    learner.learn(pair_task(1), save=save)
    ((step, state, moments),) = states
    again = pair_learner(CASES[name].config, max_steps=5, save_steps=3)
    again.begin(pair_task(0))
    again.method.finish_task()
    again.begin(pair_task(1))
    load_state(again.method, state)
    again.learn(pair_task(1), progress=Progress(step=step, moments=moments))
    assert_same_state(learner, again)


@EVERY
def test_gradient_checkpointing_learns_the_same(name: str) -> None:
    plain, again = taught(name), taught(name, gradient_checkpointing=True)
    assert_same_state(plain, again, rtol=1e-3, atol=1e-5)


@EVERY
def test_what_is_kept_below_the_prompts_changes_nothing(name: str) -> None:
    config = replace(CASES[name].config, layers_to_transform=(-1,))
    off, kept = (pair_learner(config, prefix_cache=how) for how in ("off", "ram"))
    for index in range(2):
        for learner in (off, kept):
            learner.learn(pair_task(index))
    assert_same_state(off, kept, rtol=1e-3, atol=1e-5)
    with pytest.raises(ConfigError, match="expert stands in block 0 of the multimodal tower"):
        pair_learner(CASES[name].config, prefix_cache="ram")
