"""Testing: a learner answers a task's test set, and the answers are judged together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evolora.answering import answerer
from evolora.evaluation.answers.formats import parse_formats
from evolora.evaluation.answers.tally import Answered, AnswerTally
from evolora.evaluation.tally import Evaluation, cases, tally_for
from evolora.registry import ANSWER_METRICS
from evolora.routing.route import BASE
from evolora.streams.task import LabelSpace, Task

if TYPE_CHECKING:
    from evolora.learner import Learner


def judge_classes(learner: Learner, task: Task, space: LabelSpace, offset: int) -> Evaluation:
    """Return how well a learner tells classes apart, see ``Learner.evaluate``."""
    tally = tally_for(task.metric, len(task.labels.classes))
    routes = _Routes(learner, task)
    rows = learner.own_range(len(task.test))
    with learner.reporter.bar(f"test {task.name}", len(rows)) as bar:
        for batch in learner.batches(task.test, rows):
            predicted = learner.method.predict(batch, space, oracle=routes.oracle)
            tally.add(predicted.scores, batch, offset)
            routes.add(predicted.tasks)
            bar.advance(len(batch))
    tally.counts = learner.summed(tally.counts)
    return Evaluation(
        score=tally.score(),
        samples=len(task.test),
        routes=routes.counted(),
        by_case=tally.by_case(),
    )


def judge_texts(learner: Learner, task: Task) -> Evaluation:
    """Return how well a learner writes answers, by the task's metric.

    Raises:
        ConfigError: the metric is none of texts.
        DataError: a test sample has no answer.
    """
    tally = AnswerTally(ANSWER_METRICS.get(task.metric), parse_formats(task.answer_format))
    routes = _Routes(learner, task)
    rows = learner.own_range(len(task.test))
    done = rows.start
    with learner.reporter.bar(f"test {task.name}", len(rows)) as bar:
        for batch in learner.batches(task.test, rows):
            written = learner.method.write(batch, task.labels, oracle=routes.oracle)
            here = range(done, done + len(batch))
            tally.add(here, written.texts, batch.answers, cases(batch).tolist())
            routes.add(written.tasks)
            done += len(batch)
            bar.advance(len(batch))
    tally.gather(_gather if learner.share.count > 1 else lambda own: own)
    return Evaluation(
        score=tally.score(),
        samples=len(task.test),
        routes=routes.counted(),
        by_case=tally.by_case(),
        following=tally.following(),
        normalised=tally.normalised(),
        captions=tally.captions(),
        questions=tally.questions(),
    )


def largest_score(task: Task) -> float:
    """Return the best score a task's metric gives: 1, but 10 of CIDEr-D."""
    return ANSWER_METRICS.get(task.metric).largest if task.labels.text else 1.0


class _Routes:
    """Counts who answered: the base, or which task's experts."""

    def __init__(self, learner: Learner, task: Task) -> None:
        self.learner = learner
        names = learner.task_names
        self.oracle = names.index(task.name) if task.name in names else None
        self.counts = torch.zeros(len(names) + 1, dtype=torch.long)  # base, tasks...

    def add(self, tasks: Tensor) -> None:
        self.counts += torch.bincount(tasks.cpu() + 1, minlength=len(self.counts))

    def counted(self) -> Mapping[str, int]:
        base, *tasks = self.learner.summed(self.counts).tolist()
        counted = [(BASE, base), *enumerate(tasks)]
        return {answerer(self.learner.method, task): count for task, count in counted if count}


def _gather(own: list[Answered]) -> list[Answered]:
    """Return the answers of all processes."""
    from accelerate.utils import gather_object

    everybody: list[Answered] = gather_object(own)
    return everybody
