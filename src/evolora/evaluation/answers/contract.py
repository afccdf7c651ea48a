"""What a metric of generated answers is, and the decorators that enter one under its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps

from evolora.errors import DataError
from evolora.registry import ANSWER_METRICS

References = Sequence[str]
"""The accepted answers of one sample, at least one."""

JudgeOne = Callable[[str, References], float]
JudgeAll = Callable[[Sequence[str], Sequence[References]], list[float]]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a test set.

    Args:
        per_sample: one score per answer, in the order given.
        mean: their plain mean, the same to the last bit in any order.
    """

    per_sample: tuple[float, ...]
    mean: float


@dataclass(frozen=True, kw_only=True)
class AnswerMetric:
    """One metric of generated answers.

    Args:
        name: public name ("rouge-l").
        owner: the function that defines it, by module and name.
        judge: all predictions and their references -> one score per sample. A metric over a corpus
            looks at all of them; the others judge each sample alone.
        largest: the best score; 1, but 10 of CIDEr-D. The worst is 0.
        higher_is_better: true of every metric here.
    """

    name: str
    owner: str
    judge: JudgeAll = field(repr=False)
    largest: float = 1.0
    higher_is_better: bool = True

    def score(self, predictions: Sequence[str], references: Sequence[References]) -> Scores:
        """Return the scores of a test set.

        Args:
            predictions: one text per sample; it may be empty.
            references: the accepted answers of each sample, at least one each.

        Raises:
            DataError: nothing to judge, lengths differ, a sample without a reference, or something
                that is no text; a metric may ask for more of its references.
        """
        _check(predictions, references)
        found = tuple(self.judge(predictions, references))
        return Scores(per_sample=found, mean=math.fsum(found) / len(found))


def per_sample(name: str, *, summary: str) -> Callable[[JudgeOne], JudgeOne]:
    """Return a decorator that enters a function of one answer as a metric; it stays a function."""

    def enter(judge: JudgeOne) -> JudgeOne:
        @wraps(judge)
        def judge_all(predictions: Sequence[str], references: Sequence[References]) -> list[float]:
            scores = []
            for row, (text, accepted) in enumerate(zip(predictions, references, strict=True)):
                try:
                    scores.append(judge(text, accepted))
                except DataError as error:
                    raise DataError(f"{name}, sample {row}: {error}") from error
            return scores

        over_corpus(name, summary=summary)(judge_all)
        return judge

    return enter


def over_corpus(name: str, *, summary: str, largest: float = 1.0) -> Callable[[JudgeAll], JudgeAll]:
    """Return a decorator that enters a function of all answers as a metric."""

    def enter(judge: JudgeAll) -> JudgeAll:
        owner = f"{judge.__module__}.{judge.__qualname__}"
        metric = AnswerMetric(name=name, owner=owner, judge=judge, largest=largest)
        ANSWER_METRICS.register(name, summary=summary)(metric)
        return judge

    return enter


def _check(predictions: Sequence[str], references: Sequence[References]) -> None:
    if isinstance(predictions, str) or isinstance(references, str):
        raise DataError("predictions and references are lists, one entry per sample; got one text")
    if len(predictions) != len(references):
        raise DataError(
            f"{len(predictions)} predictions and {len(references)} lists of references were given; "
            "each sample needs both"
        )
    if not predictions:
        raise DataError("no answers to judge")
    for row, (text, accepted) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(text, str):
            raise DataError(f"prediction {row} must be a text; got {type(text).__name__}")
        if isinstance(accepted, str):
            raise DataError(f"the references of sample {row} must be a list; got one text")
        if not accepted:
            raise DataError(f"sample {row} has no reference; every sample needs at least one")
        wrong = [one for one in accepted if not isinstance(one, str)]
        if wrong:
            raise DataError(
                f"the references of sample {row} must be texts; got {type(wrong[0]).__name__}"
            )
