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
    ("given", "text"), [({"decay": 1.0}, "decay"), ({"group_size": 0}, "group")]
)
def test_wrong_settings(given: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        TaskKeySelectorConfig(**given)
