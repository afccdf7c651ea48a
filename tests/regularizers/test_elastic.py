"""The elastic penalty, on models whose Fisher information is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evolora.errors import ConfigError
from evolora.regularizers.elastic import ElasticMemory, diagonal_fisher, surprise
from evolora.storage.state import export_state, load_state

INPUTS = torch.tensor([[1.0, 2.0], [3.0, -1.0]])


def coins(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Logits (b, 1) of one label per sample: p = sigmoid(w . x)."""
    return (rows @ weight).unsqueeze(1)


def test_a_fair_coin_s_fisher_is_exact_whatever_is_drawn() -> None:
    """F_i = mean p (1 - p) x_i^2; at p = 1/2 each draw gives (y - p)^2 = 1/4."""
    weight = nn.Parameter(torch.zeros(2))
    draw = torch.Generator().manual_seed(0)
    terms = [
        surprise(coins(weight, INPUTS[row : row + 1]), torch.ones(1, 1), several=True, draw=draw)
        for row in (0, 1)
    ]
    found = diagonal_fisher(terms, [weight])
    torch.testing.assert_close(found, torch.tensor([(1 + 9) / 8, (4 + 1) / 8]))


def test_the_empirical_fisher_is_that_of_the_given_labels() -> None:
    """F_i = mean (y - p)^2 x_i^2; a value that no sample depends on has none."""
    weight, idle = nn.Parameter(torch.tensor([0.5, -0.25])), nn.Parameter(torch.ones(3))
    labels = torch.tensor([[1.0], [0.0]])
    terms = [surprise(coins(weight, INPUTS[[row]]), labels[[row]], several=True) for row in (0, 1)]
    chances = (INPUTS @ weight).sigmoid()
    expected = ((labels[:, 0] - chances).square().unsqueeze(1) * INPUTS.square()).mean(0).detach()
    found = diagonal_fisher(terms, [weight, idle])
    torch.testing.assert_close(found, torch.cat([expected, torch.zeros(3)]))


@pytest.mark.parametrize("group", [1, 4])
def test_drawn_labels_give_the_fisher_on_average_in_groups_too(group: int) -> None:
    """Three classes, logits z: F = p_c (1 - p_c) for a bias z_c."""
    bias = nn.Parameter(torch.tensor([1.0, 0.0, -1.0]))
    draw = torch.Generator().manual_seed(1)
    labels = torch.zeros(group, dtype=torch.long)  # not read
    terms = (surprise(bias.expand(group, 3), labels, draw=draw) for _ in range(12_000 // group))
    chances = bias.detach().softmax(0)
    expected = chances * (1 - chances)
    torch.testing.assert_close(diagonal_fisher(terms, [bias]), expected, rtol=0.1, atol=0.0)


def test_the_penalty_by_hand_and_how_tasks_add_up() -> None:
    first, second = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))
    memory, parameters = ElasticMemory(), [first, second]
    memory.make_room(parameters)
    assert memory.penalty(parameters) == 0.0
    memory.remember(parameters, torch.tensor([4.0, 0.0, 2.0]))
    with torch.no_grad():
        first.add_(torch.tensor([0.5, 7.0]))
        second.sub_(1.0)
    penalty = memory.penalty(parameters)
    assert penalty == 0.5 * (4 * 0.25 + 2 * 1)
    penalty.backward()
    assert first.grad is not None and second.grad is not None
    assert first.grad.tolist() == [2.0, 0.0] and second.grad.tolist() == [[-2.0]]
    memory.remember(parameters, torch.tensor([1.0, 1.0, 1.0]), decay=0.5)
    assert memory.importance.tolist() == [3.0, 1.0, 2.0]
    assert memory.anchor.tolist() == [1.5, 9.0, 2.0]
    assert memory.penalty(parameters) == 0.0


def test_what_is_remembered_is_state_and_other_parameters_are_refused() -> None:
    memory, parameter = ElasticMemory(), nn.Parameter(torch.ones(3))
    memory.make_room([parameter])
    memory.remember([parameter], torch.arange(3.0))
    again = ElasticMemory()
    load_state(again, export_state(memory))
    assert torch.equal(again.importance, memory.importance)
    assert torch.equal(again.anchor, memory.anchor)
    again.make_room([parameter])
    assert torch.equal(again.importance, memory.importance)
    with pytest.raises(ConfigError, match="3 values are remembered; the parameters given have 2"):
        again.penalty([nn.Parameter(torch.ones(2))])
