"""The contract on learning: what trains, what runs, what stays as it was."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import toy_model, toy_task
from tests.contract.cases import (
    BOTH,
    EVERY,
    answer,
    call_counts,
    case_of,
    digest,
    make,
    mixed_batch,
    stacks,
    taught,
    teach,
    training_batches,
)

from evolora.methods.moe_adapters import MoELayer


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
