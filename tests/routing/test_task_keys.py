"""Task keys: exact means per modality, per-sample decisions, unseen tasks never win."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evolora.errors import ConfigError
from evolora.routing.route import BASE
from evolora.routing.task_keys import TaskKeySelector, TaskKeySelectorConfig, moving_average

NAN = float("nan")


def taught(*tasks: Tensor, **settings) -> TaskKeySelector:
    selector = TaskKeySelector(TaskKeySelectorConfig(**settings), *tasks[0].shape[1:])
    for index, train in enumerate(tasks):
        selector.learn(index, train, train, 0)
    return selector


def chosen(selector: TaskKeySelector, inputs: Tensor) -> list[int]:
    return selector.select({"modalities": inputs}, len(inputs), None).tasks.tolist()


def test_golden_moving_averages_and_their_decisions() -> None:
    """G4: a key that was never moved must not win, however negative the others are."""
    first = torch.tensor([[1.0, 0], [3, 0], [0, 2], [0, 2]])
    keys = [moving_average(first, 0.99, 2), moving_average(torch.tensor([[-1.0, 1]]), 0.99, 2)]
    torch.testing.assert_close(torch.stack(keys), torch.tensor([[0.0198, 0.02], [-0.01, 0.01]]))
    selector = TaskKeySelector(TaskKeySelectorConfig(), 1, 2)
    selector.keys.grow(torch.stack(keys).view(2, 1, 1, 2))
    queries = torch.tensor([[1.0, 0], [-1, 0.5], [-1, -3]]).unsqueeze(1)
    expected = torch.tensor([[0.7035, -0.7071], [-0.3115, 0.9487], [-0.8967, -0.4472]])
    torch.testing.assert_close(selector.nearness(queries), expected, atol=1e-4, rtol=0)
    assert chosen(selector, queries) == [0, 1, 1]
    voted = TaskKeySelector(TaskKeySelectorConfig(group_size=3), 1, 2)
    voted.keys.grow(
        torch.stack(keys[:1] * 2).view(2, 1, 1, 2) * torch.tensor([1.0, -1]).view(2, 1, 1, 1)
    )
    assert chosen(voted, torch.tensor([[1.0, 1], [1, 0], [-1, -1]]).unsqueeze(1)) == [0, 0, 0]


def test_keys_are_means_over_the_samples_that_have_the_modality() -> None:
    train = torch.tensor([[[1.0, 0], [0, 4]], [[3.0, 2], [NAN, NAN]], [[NAN, NAN], [2, 0]]])
    selector = taught(train)
    assert torch.equal(selector.keys.all()[0, 0], torch.tensor([[2.0, 1], [1, 2]]))
    assert selector.keys.frozen_ids() == [0]


def test_only_what_the_input_has_counts() -> None:
    """Image says task 0, text says task 1; each alone decides, together the clearer one."""
    selector = taught(torch.tensor([[[1.0, 0], [1, 0]]]), torch.tensor([[[0.0, 1], [0, 1]]]))
    image, text = [1.0, 0.2], [0.0, 1.0]
    inputs = torch.tensor([[image, [NAN, NAN]], [[NAN, NAN], text], [image, text]])
    assert chosen(selector, inputs) == [0, 1, 1]
    for row in range(3):  # batch-mates do not matter
        assert chosen(selector, inputs[row : row + 1]) == chosen(selector, inputs)[row : row + 1]


def test_a_modality_that_a_task_never_had_does_not_count_against_it() -> None:
    only_text = torch.tensor([[[NAN, NAN], [0.0, 1]]])
    selector = taught(torch.tensor([[[1.0, 0], [1.0, 0]]]), only_text)
    assert chosen(selector, torch.tensor([[[1.0, 0.1], [0.0, 1]]])) == [1]


def test_keys_per_case() -> None:
    complete = torch.tensor([[[1.0, 0], [1, 0]]])
    alone = torch.tensor([[[0.0, 1], [NAN, NAN]]])
    other = torch.tensor([[[0.6, 0.8], [1, 0]]])
    inputs = torch.tensor([[[0.0, 1], [NAN, NAN]]])
    assert chosen(taught(torch.cat([complete] * 3 + [alone]), other), inputs) == [1]
    assert chosen(taught(torch.cat([complete] * 3 + [alone]), other, per_case=True), inputs) == [0]


def test_nothing_learned_goes_to_the_base() -> None:
    selector = TaskKeySelector(TaskKeySelectorConfig(), 2, 3)
    assert chosen(selector, torch.ones(2, 2, 3)) == [BASE, BASE]


@pytest.mark.parametrize(
    ("given", "text"),
    [({"decay": 1.0}, "decay"), ({"group_size": 0}, "group"), ({"shrinkage": 0.0}, "shrink")],
)
def test_wrong_settings(given: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        TaskKeySelectorConfig(**given)


def spread_tasks(seed: int, *means: float) -> list[Tensor]:
    """Return tasks that differ a little in a quiet direction; a loud one says nothing."""
    draw = torch.Generator().manual_seed(seed)
    noise = [torch.randn(200, 2, 3, generator=draw) for _ in means]
    loud = torch.tensor([10.0, 0.1, 0.1])
    return [n * loud + torch.tensor([0.0, mean, 1.0]) for n, mean in zip(noise, means, strict=True)]


def test_distances_in_units_of_the_spread_within_tasks() -> None:
    """Against the plain formula; the loud direction is the one that cosines follow."""
    tasks, unseen = spread_tasks(0, 0.0, 1.0, 2.0), spread_tasks(1, 0.0, 1.0, 2.0)
    selector = taught(*tasks, metric="mahalanobis", shrinkage=1e-4)
    rows, owner = torch.cat(unseen), torch.arange(3).repeat_interleave(200)
    found = torch.tensor(chosen(selector, rows))
    centred = torch.cat([task - task.mean(0) for task in tasks])
    wanted = torch.zeros(600, 3, dtype=torch.float64)
    for modality in range(2):
        spread = centred[:, modality].double()
        covariance = spread.T @ spread / 600
        shrunk = 0.9999 * covariance + 1e-4 * covariance.diagonal().mean() * torch.eye(3)
        for index, task in enumerate(tasks):
            away = (rows[:, modality] - task[:, modality].mean(0)).double()
            wanted[:, index] -= ((away @ torch.linalg.inv(shrunk)) * away).sum(1) / 2
    torch.testing.assert_close(selector.nearness(rows), wanted.float(), rtol=1e-3, atol=1e-3)
    assert (found == owner).float().mean() > 0.98
    plain = torch.tensor(chosen(taught(*tasks), rows))
    assert (plain == owner).float().mean() < 0.75  # cosine follows the loud direction


def test_spread_with_missing_modalities_and_a_task_of_one_sample() -> None:
    first, second = spread_tasks(2, 0.0, 1.0)
    second[:, 1] = NAN
    selector = taught(first, second, second[:1] + 1.0, metric="mahalanobis")
    rows = torch.cat([first[:5], second[:5]])
    assert torch.isfinite(selector.nearness(rows[:5])).all()
    assert chosen(selector, rows[3:4]) == chosen(selector, rows)[3:4]
    copy = TaskKeySelector(TaskKeySelectorConfig(metric="mahalanobis"), 2, 3)
    copy.keys.grow(torch.zeros(3, *selector.keys.shape))
    copy.keys.freeze(range(3))
    copy.load_state_dict(selector.state_dict())
    assert torch.equal(copy.nearness(rows), selector.nearness(rows))
