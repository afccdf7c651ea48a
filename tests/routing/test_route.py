"""Route: a value that says who answers each row."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from evolora.errors import RouteError
from evolora.randomness import StepRandom
from evolora.routing.route import BASE, Decisions, Route
from evolora.routing.selection import Selection
from evolora.routing.spans import TokenSpans


def test_uniform_routes() -> None:
    base, task = Route.of(BASE, 3), Route.of(2, 3)
    assert base.nobody and not base.everybody
    assert task.everybody and not task.nobody
    assert task.rows == 3 and task.tasks.tolist() == [2, 2, 2]


def test_mixed_routes() -> None:
    random = StepRandom(5)
    route = Route(
        torch.tensor([BASE, 1, 0, BASE]), summary=torch.tensor([9, 7, 5, 3]), random=random
    )
    assert not route.nobody and not route.everybody
    assert route.active.tolist() == [1, 2]
    part = route.of_active
    assert part.tasks.tolist() == [1, 0] and part.summary.tolist() == [7, 5]
    assert part.random is random and part.uniform is None
    assert part is route.of_active  # the same value for every site of a forward
    assert Route(torch.tensor([BASE, BASE])).nobody
    assert Route(torch.tensor([0, 1])).everybody


def test_summaries() -> None:
    tokens = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(Route.of(0, 2).summarize(tokens), tokens[:, 0])
    assert torch.equal(Route.of(0, 2, summary="mean").summarize(tokens), tokens.mean(1))
    index = torch.tensor([2, 1])
    picked = Route.of(0, 2, summary=index).summarize(tokens)
    assert torch.equal(picked, torch.stack([tokens[0, 2], tokens[1, 1]]))
    with pytest.raises(RouteError, match="speaks for 3 rows, the input has 2"):
        Route.of(0, 3).summarize(tokens)


def test_a_route_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Route.of(0, 2).uniform = 1  # type: ignore[misc]


def test_a_second_task_helps_some_rows() -> None:
    route = Route(torch.tensor([2, BASE, 2]), uniform=None, helpers=torch.tensor([0, BASE, BASE]))
    assert route.active.tolist() == [0, 2]
    assert route.of_active.helpers is not None and route.of_active.helpers.tolist() == [0, BASE]
    assert Route.of(2, 3).alone == 2
    helped = Route(torch.tensor([2, 2]), uniform=2, helpers=torch.tensor([BASE, 1]))
    assert helped.everybody and helped.alone is None, "a helper's experts may stand lower"


def test_a_selection_is_given_in_three_ways_and_settled_by_one_look() -> None:
    one = Selection.of(3, 2)
    assert one.tasks.tolist() == [3, 3] and one.uniform == 3
    rows = Selection.of(torch.tensor([1, BASE]), 2)
    assert rows.uniform is None and rows.pairs() == [(BASE, BASE), (1, BASE)]
    nobody = Selection(tasks=torch.tensor([1, 1]), helpers=torch.tensor([BASE, BASE])).settled()
    assert nobody.uniform == 1 and nobody.helpers is None
    helped = Selection(
        tasks=torch.tensor([1, 1, 2]),
        helpers=torch.tensor([0, BASE, 0]),
        scores=torch.rand(3, 3),
    )
    assert helped.settled().uniform is None and helped.settled().helpers is not None
    assert helped.pairs() == [(1, BASE), (1, 0), (2, 0)]
    part = helped.take(torch.tensor([0, 1])).settled()
    assert part.uniform == 1 and part.helpers is not None and part.helpers.tolist() == [0, BASE]
    assert part.scores is not None and part.scores.shape == (2, 3)


def test_only_the_samples_own_tokens_speak_for_it() -> None:
    tokens = torch.arange(24.0).view(2, 3, 4)
    every, text = Route.of(0, 2), Route.of(0, 2, summary=torch.tensor([1, 2]))
    assert every.real(tokens) is None
    assert torch.equal(every.mean(tokens), tokens.mean(1))
    assert torch.equal(every.first(tokens), tokens[:, 0])
    # a text ends at its summary; behind it is padding
    assert text.real(tokens).tolist() == [[True, True, False], [True, True, True]]
    assert torch.equal(text.mean(tokens), torch.stack([tokens[0, :2].mean(0), tokens[1].mean(0)]))
    # a prompt begins behind its padding; an answer is of no modality
    of = {
        "image": torch.tensor([[False, True, False], [False, False, False]]),
        "text": torch.tensor([[False, False, False], [True, True, False]]),
    }
    spans = TokenSpans(of, torch.ones(2, 2, dtype=torch.bool))
    prompt = dataclasses.replace(every, spans=spans)
    assert torch.equal(prompt.first(tokens), torch.stack([tokens[0, 1], tokens[1, 0]]))
    assert torch.equal(prompt.mean(tokens), torch.stack([tokens[0, 1], tokens[1, :2].mean(0)]))
    last = prompt.take(torch.tensor([1]))
    assert torch.equal(last.mean(tokens[1:]), tokens[1:, :2].mean(1))


def test_a_gate_is_asked_once_of_a_prompt_that_is_being_answered() -> None:
    asked = []

    def decide() -> int:
        asked.append(None)
        return len(asked)

    route = Route(torch.tensor([0, BASE]))
    assert [route.once("a", decide) for _ in range(2)] == [1, 2]
    answering = dataclasses.replace(route, decisions=Decisions())
    assert [answering.once("a", decide), answering.of_active.once("a", decide)] == [3, 3]
    assert answering.once("b", decide) == 4
    assert dataclasses.replace(route, decisions=Decisions()).once("a", decide) == 5
