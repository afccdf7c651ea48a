"""AutoEncoderBank: one per task, stacked, never changed again."""

from __future__ import annotations

import pytest
import torch

from evolora.routing import autoencoders
from evolora.routing.autoencoders import AutoEncoderBank, AutoEncoderTraining

SQUASHES = ("center", "sigmoid")
FEATURES = 12


def domain(task: int, rows: int = 60, seed: int = 0) -> torch.Tensor:
    """Rows on a task's own 3-dimensional subspace, off the origin."""
    subspace = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(task))
    draw = torch.Generator().manual_seed(1000 * task + seed)
    codes = torch.randn(rows, 3, generator=draw)
    return codes @ subspace + 2.0 * subspace.sum(0) + 0.05 * torch.randn(rows, 1, generator=draw)


def fitted(tasks: int, squash: str = "center") -> AutoEncoderBank:
    bank = AutoEncoderBank(FEATURES, 5, squash)
    training = AutoEncoderTraining(hidden=5, steps=150, squash=squash)
    for task in range(tasks):
        bank.fit(domain(task), training, seed=task)
    return bank


@pytest.mark.parametrize("squash", SQUASHES)
def test_own_inputs_are_nearest(squash: str) -> None:
    bank = fitted(4, squash)
    assert len(bank) == 4
    for task in range(4):
        errors = bank.errors(domain(task, seed=1))
        assert errors.shape == (60, 4)
        assert (errors.argmin(dim=1) == task).float().mean() > 0.9


@pytest.mark.parametrize("squash", SQUASHES)
def test_errors_are_the_definition(squash: str) -> None:
    bank = fitted(2, squash)
    x = domain(1, rows=3, seed=2)
    for task in range(2):
        w1, b1, w2, b2 = (stack.all()[task] for stack in bank.networks())
        if squash == "sigmoid":
            z = x.sigmoid()
            out = ((z @ w1 + b1).relu() @ w2 + b2).sigmoid()
        else:
            z = x - bank.center.all()[task]
            out = (z @ w1 + b1).relu() @ w2 + b2
        expected = ((out - z) ** 2).mean(dim=1)
        torch.testing.assert_close(bank.errors(x)[:, task], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("squash", SQUASHES)
def test_9_1_11_adding_a_task_changes_no_other_score(squash: str) -> None:
    bank = fitted(2, squash)
    x = torch.cat([domain(0, seed=3), domain(5, seed=3)])
    before = bank.errors(x)
    tensors = [stack.all().clone() for stack in (*bank.networks(), bank.center)]
    bank.fit(domain(2), AutoEncoderTraining(hidden=5, steps=20, squash=squash), seed=9)
    assert torch.equal(bank.errors(x)[:, :2], before)
    for stack, old in zip([*bank.networks(), bank.center], tensors, strict=True):
        assert torch.equal(stack.all()[:2], old)
    assert not [p for p in bank.parameters() if p.requires_grad], "a fitted one trains no more"


@pytest.mark.parametrize("squash", SQUASHES)
def test_chunks_give_the_same_scores(squash: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = fitted(3, squash)
    x = domain(1, rows=7)
    whole = bank.errors(x)
    for size in (1, 2, 3):
        monkeypatch.setattr(autoencoders, "TASKS_PER_CHUNK", size)
        torch.testing.assert_close(bank.errors(x), whole, rtol=1e-6, atol=1e-9)


def test_fitting_depends_on_the_seed_alone() -> None:
    training = AutoEncoderTraining(hidden=5, steps=10)
    banks = []
    for seed, noise in ((1, 0), (1, 7), (2, 0)):
        torch.manual_seed(noise)
        bank = AutoEncoderBank(FEATURES, 5)
        bank.fit(domain(0), training, seed)
        banks.append(bank.encoder.all())
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])


def test_fitting_works_where_gradients_are_off() -> None:
    training = AutoEncoderTraining(hidden=5, steps=10)
    on, off = AutoEncoderBank(FEATURES, 5), AutoEncoderBank(FEATURES, 5)
    on.fit(domain(0), training, 1)
    with torch.no_grad():
        off.fit(domain(0), training, 1)
    assert torch.equal(on.decoder.all(), off.decoder.all())


def test_an_empty_bank_scores_nothing() -> None:
    assert AutoEncoderBank(FEATURES, 5).errors(domain(0)).shape == (60, 0)


def test_9_2_parameters_of_one_autoencoder_on_alexnet_features() -> None:
    bank = AutoEncoderBank(43_264, 100, device="meta")
    assert bank.parameters_per_task() == 8_696_164
