"""Tallies: counts over a test set from which its score follows, summed over batches and processes.

Accuracy counts right answers. Macro-F1 judges several labels per sample: a class is said to be there
if its probability exceeds 1/2; F1 = 2 TP / (2 TP + FP + FN) of each of the task's own classes, 0
where a class neither occurs nor is predicted; the score is their mean. Both are also kept by which
modalities the samples lacked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from evolora.backbones.batch import Batch

CASES = ("complete", "text missing", "image missing")
"""What a sample may lack; the index is the missing code of its manifest."""
THRESHOLD = 0.5


def cases(batch: Batch) -> Tensor:
    """Return the missing code of each row, (b,): 0 complete, 1 without text, 2 without image."""
    codes = torch.zeros(len(batch), dtype=torch.long)
    for code, name in ((1, "text"), (2, "image")):
        if name in batch.present:
            codes[~batch.present[name].cpu()] = code
    return codes


class Tally(ABC):
    """Counts of one test set, split by case.

    Attributes:
        counts: (3, ...) whole numbers; the sum over processes is their common tally.
    """

    counts: Tensor

    @abstractmethod
    def add(self, scores: Tensor, batch: Batch, offset: int) -> None:
        """Count a batch answered with scores (b, c); the task's classes begin at ``offset``."""

    @abstractmethod
    def _score(self, counts: Tensor) -> float | None: ...

    def score(self) -> float:
        """Return the score over all samples, in [0, 1]."""
        return self._score(self.counts.sum(dim=0)) or 0.0

    def by_case(self) -> Mapping[str, float]:
        """Return the score over the samples of each case that occurs."""
        scores = zip(CASES, map(self._score, self.counts), strict=True)
        return {name: score for name, score in scores if score is not None}


class Accuracy(Tally):
    """Share of samples whose most probable class is their label."""

    def __init__(self) -> None:
        self.counts = torch.zeros(len(CASES), 2, dtype=torch.long)

    def add(self, scores: Tensor, batch: Batch, offset: int) -> None:
        right = (scores.argmax(dim=1) == batch.labels + offset).cpu()
        self.counts.index_add_(0, cases(batch), torch.stack([right, right >= 0], 1).long())

    def _score(self, counts: Tensor) -> float | None:
        right, total = counts.tolist()
        return right / total if total else None


class MacroF1(Tally):
    """Mean F1 of the task's classes.

    Args:
        classes: number of the task's classes.
    """

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(len(CASES), classes, 4, dtype=torch.long)

    def add(self, scores: Tensor, batch: Batch, offset: int) -> None:
        truth = batch.labels.cpu() > THRESHOLD
        said = scores[:, offset : offset + truth.shape[1]].cpu() > THRESHOLD
        found = torch.stack([said & truth, said & ~truth, ~said & truth, ~said & ~truth], 2)
        self.counts.index_add_(0, cases(batch), found.long())

    def _score(self, counts: Tensor) -> float | None:
        if not int(counts.sum()):
            return None
        right, wrong, missed, _ = counts.unbind(1)
        judged = 2 * right + wrong + missed
        return float((2 * right / judged.clamp(min=1)).double().mean())


def tally_for(metric: str, classes: int) -> Tally:
    """Return the tally of a task's metric."""
    return MacroF1(classes) if metric == "macro-f1" else Accuracy()
