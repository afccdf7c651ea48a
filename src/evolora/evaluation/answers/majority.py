"""What can be answered without looking, and without learning: the commonest answer of each wording.

A wording that the training samples do not have (multiple choice names other options each time) is
given the commonest answer of all. It is a floor: a model that saw no image but learned can be above
it, for that run a method on the stream with ``blind: true``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from evolora.errors import DataError
from evolora.evaluation.answers.tally import AnswerTally
from evolora.registry import ANSWER_METRICS
from evolora.streams.task import Examples, Label, Task


@dataclass(frozen=True, kw_only=True)
class MajorityBaseline:
    """What the commonest answers score on one task's test set.

    Args:
        task: its name.
        metric: name of the metric.
        score: by that metric.
        samples: number of test samples.
        answers: wordings that have a commonest answer of their own.
        commonest: the commonest answer of all.
    """

    task: str
    metric: str
    score: float
    samples: int
    answers: int
    commonest: str


def majority_baseline(task: Task) -> MajorityBaseline:
    """Return the score of the commonest training answers on a task whose answers are texts.

    Of answers that are equally common, the first in the alphabet counts.

    Raises:
        DataError: the task's answers are classes.
    """
    if not task.labels.text:
        raise DataError(f"task {task.name!r} has classes; a majority answer needs texts")
    by_wording: dict[str, Counter[str]] = defaultdict(Counter)
    for wording, answers in _asked(task.train):
        by_wording[wording][answers[0]] += 1
    total = sum(by_wording.values(), Counter[str]())
    commonest = _commonest(total)
    tally = AnswerTally(ANSWER_METRICS.get(task.metric))
    for row, (wording, answers) in enumerate(_asked(task.test)):
        given = _commonest(by_wording[wording]) if wording in by_wording else commonest
        tally.add([row], [given], [answers])
    return MajorityBaseline(
        task=task.name,
        metric=task.metric,
        score=tally.score(),
        samples=len(task.test),
        answers=len(by_wording),
        commonest=commonest,
    )


def _commonest(answers: Counter[str]) -> str:
    return min(answers, key=lambda text: (-answers[text], text))


def _asked(data: Examples) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield what each sample asks, without its images, and what counts as right."""
    for index in range(len(data)):
        example = data[index]
        said = example.inputs.get("text", "")
        yield said if isinstance(said, str) else "\n".join(said), _texts(example.label)


def _texts(label: Label) -> tuple[str, ...]:
    if isinstance(label, str):
        return (label,)
    if isinstance(label, tuple) and label and all(isinstance(one, str) for one in label):
        return tuple(str(one) for one in label)
    raise DataError(f"a sample without an answer in words: {label!r}")
