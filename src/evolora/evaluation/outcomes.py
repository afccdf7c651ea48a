"""Outcomes: each test sample answered once in every state that it can be in.

A prediction depends on its own sample alone, so the score under any table of missing modalities
can be put together from these: complete, without text, without image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evolora.backbones.batch import Batch
from evolora.evaluation.tally import tally_for
from evolora.methods.base import Method
from evolora.streams.missing import CODE_NAMES, COMPLETE, Incomplete, Missing, draw_codes, own_codes
from evolora.streams.task import LabelSpace, Subset, Task
from evolora.training.batches import evaluation_batches
from evolora.training.continual import seen_labels

if TYPE_CHECKING:
    from evolora.learner import Learner

TASK_FREE, ORACLE = "task_free", "oracle"
"""Ways to answer: nobody tells the task, or it is told."""


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """How one task's test samples were answered in every state.

    Args:
        task: the task.
        own: (n,) missing code of each sample before any table.
        marks: way -> (n, 3, ...) what a sample adds to the task's tally in each state (see
            ``Tally.marks``); zero in a state that it cannot be in.
        recognised: (n, 3) whether its task was; None where the method does not look for it.
    """

    task: Task
    own: tuple[int, ...]
    marks: Mapping[str, Tensor]
    recognised: Tensor | None

    def codes(self, missing: Missing, seed: int) -> Tensor:
        """Return the missing code (n,) of each sample under a table."""
        count, name = len(self.own), self.task.name
        drawn = draw_codes(count, missing, seed=seed, task=name, split="test", own=self.own)
        return torch.tensor(drawn)

    def score(self, way: str, codes: Tensor) -> tuple[float, Mapping[str, float]]:
        """Return the score under a table, and the score by what is missing."""
        tally = tally_for(self.task.metric, len(self.task.labels.classes))
        tally.count(self.marks[way][torch.arange(len(codes)), codes], codes)
        return tally.score(), tally.by_case()


def judged(tasks: Sequence[Task], protocol: str) -> list[tuple[Task, LabelSpace, int]]:
    """Return each task with what its test is judged among and where its own classes begin there.

    Args:
        tasks: all learned tasks.
        protocol: the stream's ``label_protocol``.
    """
    if protocol == "task":
        return [(task, task.labels, 0) for task in tasks]
    space, offsets = seen_labels(tasks)
    return [(task, space, offset) for task, offset in zip(tasks, offsets, strict=True)]


@torch.no_grad()
def answer_states(learner: Learner, task: Task, labels: LabelSpace, offset: int) -> Outcomes:
    """Answer each test sample of a learned task in every state that it can be in.

    Args:
        learner: who answers.
        task: samples before a table; those that lack a modality by themselves have one state.
        labels: what to choose from.
        offset: index of the task's first class in ``labels``.
    """
    method, count = learner.method, len(task.test)
    method.eval()
    index = learner.task_names.index(task.name)
    tally = tally_for(task.metric, len(task.labels.classes))
    own = own_codes(task.test) or (COMPLETE,) * count
    parts = [
        [row for row, code in enumerate(own) if code in (COMPLETE, state)]
        for state in range(len(CODE_NAMES))
    ]
    kept: dict[str, Tensor] = {}

    def keep(name: str, rows: Sequence[int], state: int, values: Tensor) -> None:
        if name not in kept:
            kept[name] = values.new_zeros(count, len(CODE_NAMES), *values.shape[1:])
        kept[name][list(rows), state] = values

    with learner.reporter.bar(f"test {task.name}", sum(map(len, parts))) as bar:
        for state, rows in enumerate(parts):
            data = Subset(Incomplete(data=task.test, codes=(state,) * count), rows)
            samples = learner.samples if learner.evaluation_cache else None
            size, done = learner.evaluation_batch_size, 0
            for batch in evaluation_batches(
                data, learner.backbone, size, range(len(rows)), samples
            ):
                mine = rows[done : done + len(batch)]
                scores, recognised = _answer(method, batch, labels, index)
                for way, values in scores.items():
                    keep(way, mine, state, tally.marks(values, batch.labels, offset))
                if recognised is not None:
                    keep("recognised", mine, state, recognised.cpu())
                done += len(batch)
                bar.advance(len(batch))
    return Outcomes(task=task, own=own, recognised=kept.pop("recognised", None), marks=kept)


def _answer(
    method: Method, batch: Batch, labels: LabelSpace, index: int
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return way -> scores (b, c), and where the task was recognised (b,) or None."""
    if method.routing == "oracle":
        return {ORACLE: method.predict(batch, labels, oracle=index).scores}, None
    encoded, found = method.route(batch)
    free = method.answer(batch, encoded, found, labels).scores
    if method.routing == "none":
        return {TASK_FREE: free}, None
    right = found.tasks == method.expert_task(index)
    wrong = torch.nonzero(~right)[:, 0]
    told = free.clone()  # a task that was recognised answers as one that is told
    if len(wrong):
        others = batch.take(wrong)
        tasks = method.told(others, method.expert_task(index))[1]
        base = encoded.take(wrong) if encoded else None
        told[wrong] = method.answer(others, base, tasks, labels).scores
    return {TASK_FREE: free, ORACLE: told}, right
