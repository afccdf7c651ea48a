"""Tallies: counts over a test set from which its score follows, summed over batches and processes.

Accuracy counts right answers; macro-F1 judges several labels per sample, over the task's own
classes (:mod:`evolora.evaluation.scores`). Both are also kept by which modality was missing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evolora.backbones.batch import Batch
from evolora.evaluation.scores import label_marks, macro_f1_of_counts
from evolora.streams.missing import CODE_NAMES, LOST

BESIDE = ("following", "normalised", "captions", "questions")
"""What an `Evaluation` may have beside its score, by task in ``routing.json``."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How one task's test set was answered.

    Args:
        score: the task's metric, in [0, 1]; CIDEr-D of generated captions in [0, 10].
        samples: number of test samples.
        routes: who answered ("base", a task's name, "shared") -> number of samples.
        by_case: the score over complete samples and over those that lack a modality.
        following: share of generated answers in the format that was asked for; None where the task
            names none.
        normalised: accuracy of generated answers whatever their form, see
            :mod:`evolora.evaluation.answers.formats`; None as above and where the metric is not
            exact.
        captions: CIDEr-D of those answers that must be sentences, in [0, 10], beside an exact
            metric; None where no question asks for one.
        questions: the exact metric over the other answers; None likewise.
    """

    score: float
    samples: int
    routes: Mapping[str, int]
    by_case: Mapping[str, float]
    following: float | None = None
    normalised: float | None = None
    captions: float | None = None
    questions: float | None = None


def cases(batch: Batch) -> Tensor:
    """Return the missing code of each row, (b,): 0 complete, 1 without text, 2 without image.

    Where there are other modalities too, having one of them is no lack of the others.
    """
    codes = torch.zeros(len(batch), dtype=torch.long)
    if set(batch.present) - set(LOST.values()):
        return codes
    for code, name in LOST.items():
        if name in batch.present:
            codes[~batch.present[name].cpu()] = code
    return codes


class Tally(ABC):
    """Counts of one test set, split by case.

    Attributes:
        counts: (3, ...) whole numbers; the sum over processes is their common tally.
    """

    counts: Tensor

    def add(self, scores: Tensor, batch: Batch, offset: int) -> None:
        """Count a batch answered with scores (b, c); the task's classes begin at ``offset``."""
        self.count(self.marks(scores, batch.labels, offset), cases(batch))

    def count(self, marks: Tensor, codes: Tensor) -> None:
        """Count samples by their marks (b, ...) and missing codes (b,)."""
        self.counts.index_add_(0, codes, marks)

    @abstractmethod
    def marks(self, scores: Tensor, labels: Tensor, offset: int) -> Tensor:
        """Return (b, ...) whole numbers on the CPU: what each sample adds to its case's counts."""

    @abstractmethod
    def _score(self, counts: Tensor) -> float | None: ...

    def score(self) -> float:
        """Return the score over all samples, in [0, 1]."""
        return self._score(self.counts.sum(dim=0)) or 0.0

    def by_case(self) -> Mapping[str, float]:
        """Return the score over the samples of each case that occurs."""
        scores = zip(CODE_NAMES, map(self._score, self.counts), strict=True)
        return {name: score for name, score in scores if score is not None}


class Accuracy(Tally):
    """Share of samples whose most probable class is their label."""

    def __init__(self) -> None:
        self.counts = torch.zeros(len(CODE_NAMES), 2, dtype=torch.long)

    def marks(self, scores: Tensor, labels: Tensor, offset: int) -> Tensor:
        right = (scores.argmax(dim=1) == labels + offset).long().cpu()
        return torch.stack([right, torch.ones_like(right)], dim=1)

    def _score(self, counts: Tensor) -> float | None:
        right, total = counts.tolist()
        return right / total if total else None


class MacroF1(Tally):
    """Mean F1 of the task's classes.

    Args:
        classes: number of the task's classes.
    """

    def __init__(self, classes: int) -> None:
        # Per case: right, wrongly given and missed labels, and the number of samples.
        self.counts = torch.zeros(len(CODE_NAMES), 4, classes, dtype=torch.long)

    def marks(self, scores: Tensor, labels: Tensor, offset: int) -> Tensor:
        truth = labels.cpu()
        own = scores[:, offset : offset + truth.shape[1]].cpu()
        marks = torch.from_numpy(label_marks(own, truth))
        return torch.cat([marks, torch.ones_like(marks[:, :1])], dim=1)

    def _score(self, counts: Tensor) -> float | None:
        return macro_f1_of_counts(counts[:3]) if int(counts[3, 0]) else None


def tally_for(metric: str, classes: int) -> Tally:
    """Return the tally of a task's metric."""
    return MacroF1(classes) if metric == "macro-f1" else Accuracy()
