"""Generated answers of one test set, collected over batches and processes, then judged together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evolora.errors import DataError
from evolora.evaluation.answers.contract import AnswerMetric, References, Scores
from evolora.evaluation.answers.formats import (
    NORMALISED,
    AnswerFormat,
    demanded,
    follows,
    normalised_match,
)
from evolora.registry import ANSWER_METRICS
from evolora.streams.missing import CODE_NAMES, COMPLETE


@dataclass(frozen=True)
class Answered:
    """One test sample that was answered.

    Args:
        row: of the test set; a row that several processes answer counts once.
        prediction: what the model wrote.
        references: what counts as right.
        code: what was missing, see ``evaluation.tally.cases``.
    """

    row: int
    prediction: str
    references: tuple[str, ...]
    code: int = COMPLETE


Gather = Callable[[list[Answered]], list[Answered]]


class AnswerTally:
    """The answers of one test set. Texts are kept: a metric over a corpus needs all of them.

    Unlike the counts of :mod:`evolora.evaluation.tally`, answers of several processes are not
    summed but gathered (``accelerate.utils.gather_object``), once, before the score is asked for.

    Args:
        metric: how they are judged.
        formats: what the task asks for; none where it does not say.
    """

    def __init__(self, metric: AnswerMetric, formats: tuple[AnswerFormat, ...] = ()) -> None:
        self.metric = metric
        self.formats = formats
        self._answered: dict[int, Answered] = {}

    def __len__(self) -> int:
        return len(self._answered)

    def add(
        self,
        rows: Sequence[int],
        predictions: Sequence[str],
        references: Sequence[References],
        codes: Sequence[int] | None = None,
    ) -> None:
        """Add a batch: rows of the test set, what was written, what is right, what was missing.

        Raises:
            DataError: the lengths differ.
        """
        missing = [COMPLETE] * len(rows) if codes is None else codes
        lengths = (len(rows), len(predictions), len(references), len(missing))
        if len(set(lengths)) > 1:
            raise DataError(
                "a batch of answers needs as many rows, predictions, references and codes; "
                f"got {', '.join(map(str, lengths))}"
            )
        for row, text, accepted, code in zip(rows, predictions, references, missing, strict=True):
            self._enter(Answered(row, text, tuple(accepted), code))

    def gather(self, gather: Gather) -> None:
        """Take in what the other processes answered; every process must call this."""
        for one in gather(list(self._answered.values())):
            self._enter(one)

    def score(self) -> float:
        """Return the metric's mean over all samples."""
        return self._scores().mean

    def by_case(self) -> Mapping[str, float]:
        """Return the mean over the samples of each case that occurs.

        A metric over a corpus judges all of them together first: CIDEr-D counts its documents over
        the whole test set, so the score is the weighted mean of the cases.
        """
        found = self._scores().per_sample
        parts: dict[str, list[float]] = {}
        for one, score in zip(self.answered(), found, strict=True):
            parts.setdefault(CODE_NAMES[one.code], []).append(score)
        return {name: math.fsum(parts[name]) / len(parts[name]) for name in sorted(parts)}

    def following(self) -> float | None:
        """Return the share of answers in the format that was asked for; None where none was."""
        if not self.formats:
            return None
        answered = self.answered()
        kept = [follows(self.formats, one.prediction, one.references) for one in answered]
        return sum(kept) / len(kept)

    def normalised(self) -> float | None:
        """Return the accuracy whatever the answers' form; None without format or exact metric."""
        if not self.formats or self.metric.name not in NORMALISED:
            return None
        answered = self.answered()
        right = [normalised_match(self.formats, one.prediction, one.references) for one in answered]
        return math.fsum(right) / len(right)

    def captions(self) -> float | None:
        """Return the CIDEr-D of the answers that must be sentences, of an exact metric's task.

        Document frequencies come from the references of these samples alone. None where no sample
        asks for a sentence, or another metric judges.
        """
        asked = self._sentences(wanted=True)
        return None if not asked else _mean(ANSWER_METRICS.get("cider-d"), asked)

    def questions(self) -> float | None:
        """Return the exact metric's mean over the other answers, where there are captions too."""
        others = self._sentences(wanted=False)
        return _mean(self.metric, others) if others and self._sentences(wanted=True) else None

    def answered(self) -> list[Answered]:
        """Return the answers in the order of the test set."""
        return [self._answered[row] for row in sorted(self._answered)]

    def _sentences(self, *, wanted: bool) -> list[Answered]:
        """Return the answers of an exact metric that must be sentences, or the others."""
        if self.metric.name not in NORMALISED or not self.formats:
            return []
        return [
            one
            for one in self.answered()
            if (demanded(self.formats, one.references).name == "sentence") == wanted
        ]

    def _scores(self) -> Scores:
        answered = self.answered()
        return self.metric.score(
            [one.prediction for one in answered], [one.references for one in answered]
        )

    def _enter(self, one: Answered) -> None:
        self._answered.setdefault(one.row, one)


def _mean(metric: AnswerMetric, answered: Sequence[Answered]) -> float:
    texts, references = zip(*((one.prediction, one.references) for one in answered), strict=True)
    return metric.score(texts, references).mean
