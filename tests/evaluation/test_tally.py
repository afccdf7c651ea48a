"""Tallies against sklearn's scores, by case, and summed over parts."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from evolora.backbones.batch import Batch
from evolora.evaluation.tally import Accuracy, MacroF1, Tally


def batch_of(labels: torch.Tensor, codes: torch.Tensor) -> Batch:
    return Batch(
        inputs={},
        labels=labels,
        keys=tuple(map(str, range(len(labels)))),
        present={"text": codes != 1, "image": codes != 2},
    )


def drawn(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


CODES = torch.tensor([0, 1, 2, 0, 0, 1, 2, 0, 1, 0])


def parts(tally: Tally, scores: torch.Tensor, labels: torch.Tensor, offset: int) -> Tally:
    for rows in (slice(0, 4), slice(4, 10)):
        tally.add(scores[rows], batch_of(labels[rows], CODES[rows]), offset)
    return tally


def test_accuracy_and_its_cases() -> None:
    scores, labels = drawn(10, 6), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    tally = parts(Accuracy(), scores, labels, 2)
    said = scores.argmax(dim=1)
    assert tally.score() == accuracy_score(labels + 2, said)
    for code, name in enumerate(("complete", "text_missing", "image_missing")):
        rows = code == CODES
        assert tally.by_case()[name] == accuracy_score(labels[rows] + 2, said[rows])


def test_macro_f1_and_its_cases() -> None:
    scores, labels = drawn(10, 6), (drawn(10, 3).flip(0) > 0.6).float()
    tally = parts(MacroF1(3), scores, labels, 3)
    said = scores[:, 3:] > 0.5
    expected = f1_score(labels, said, average="macro", zero_division=0)
    assert tally.score() == pytest.approx(expected)
    rows = CODES == 1
    expected = f1_score(labels[rows], said[rows], average="macro", zero_division=0)
    assert tally.by_case()["text_missing"] == pytest.approx(expected)


def test_golden_f1() -> None:
    """G8: over the task's own labels 1, over four labels with two absent 0.5."""
    scores = torch.tensor([[2.0, -1, 0, 0], [-1, 3, 0, 0]]).sigmoid()
    own, four = MacroF1(2), MacroF1(4)
    complete = torch.zeros(2, dtype=torch.long)
    own.add(scores, batch_of(torch.eye(2), complete), 0)
    four.add(scores, batch_of(torch.eye(4)[:2], complete), 0)
    assert (own.score(), four.score()) == (1.0, 0.5)


def test_a_case_that_does_not_occur_has_no_score() -> None:
    tally = Accuracy()
    tally.add(drawn(2, 3), batch_of(torch.tensor([0, 1]), torch.tensor([1, 1])), 0)
    assert set(tally.by_case()) == {"text_missing"}
