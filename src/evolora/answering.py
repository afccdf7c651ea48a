"""Answering: from images and texts to labels, each input on its own, and who answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from evolora.backbones.base import Batch
from evolora.errors import ConfigError, DataError, unknown_name
from evolora.evaluation.scores import THRESHOLD
from evolora.given import example_of, rows_of
from evolora.methods.base import Method
from evolora.routing.route import BASE
from evolora.routing.selector import AlwaysSelector
from evolora.streams.task import MAX_NEW_TOKENS, LabelSpace

BASE_NAME, SHARED_NAME = "base", "shared"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the learner says about one input.

    Args:
        label: class name; with several labels per input, all that are more probable than not,
            joined by ", " (maybe none); of a model that writes, the text.
        score: its probability among the classes considered, in [0, 1]; of the best of several. None
            of a text.
        task: name of the task whose experts answered, "base", or "shared" experts.
        top: (class name, probability) of the five best, best first.
        used: the modalities that were looked at.
    """

    label: str
    score: float | None
    task: str
    top: tuple[tuple[str, float], ...] = ()
    used: tuple[str, ...] = ("image",)

    def line(self, *, used: bool) -> str:
        """Return the answer and who gave it on one line, with the modalities if ``used``."""
        looked_at = f" from {' and '.join(self.used)}" if used else ""
        chance = "" if self.score is None else f"{100 * self.score:.1f} %\t"
        return f"{self.label}\t{chance}by {self.task}{looked_at}"


def answer_inputs(
    method: Method,
    given: Mapping[str, Any],
    *,
    classes: Sequence[str] | None,
    task: str | None,
    batch_size: int,
) -> list[Answer]:
    """Answer inputs, given by modality, with a method as it stands; see ``Learner.predict``."""
    sources = rows_of(method, given)
    chosen = None if task is None else _learned_index(method, task)
    _check_classes(classes)
    method.eval()
    answers: list[Answer] = []
    for start in range(0, len(sources), batch_size):  # decoded part by part: photographs are large
        part = range(start, min(start + batch_size, len(sources)))
        examples = [example_of(method, sources, index) for index in part]
        batch = method.backbone.collate(examples)
        if method.backbone.answers == "text":
            found = _texts(method, batch, classes, chosen)
        elif chosen is None:
            found = _answers(method, batch, classes)
        else:
            found = _told_answers(method, batch, classes, chosen)
        seen = method.backbone.modalities
        for answer, example in zip(found, examples, strict=True):
            used = tuple(modality for modality in seen if modality in example.inputs)
            answers.append(replace(answer, used=used))
    return answers


def answerer(method: Method, task: int) -> str:
    """Return who answers: "base", a task's name, or "shared" where tasks share experts."""
    if task == BASE:
        return BASE_NAME
    return SHARED_NAME if method.routing == "none" else method.task_names[task]


def _learned_index(method: Method, task: str) -> int:
    if not method.task_names:
        raise ConfigError(f"task {task!r} is not learned; nothing is learned yet")
    if task not in method.task_names:
        raise unknown_name("task", task, method.task_names)
    return method.task_names.index(task)


def _answers(method: Method, batch: Batch, classes: Sequence[str] | None) -> list[Answer]:
    with torch.no_grad():
        encoded, chosen = method.route(batch)
        embedding, tasks = method.embed(batch, encoded, chosen), chosen.tasks
    answers: list[Answer | None] = [None] * len(batch)
    for task in torch.unique(tasks).tolist():
        space = answer_space(method, task, classes)
        rows = torch.nonzero(tasks == task).squeeze(1)
        with torch.no_grad():
            scores = method.score(embedding[rows], tasks[rows], space).scores
        for row, values in zip(rows.tolist(), scores, strict=True):
            answers[row] = _answer(values, space, answerer(method, task))
    return [answer for answer in answers if answer is not None]


def _told_answers(
    method: Method, batch: Batch, classes: Sequence[str] | None, chosen: int
) -> list[Answer]:
    """Answer a batch with the experts of one task, or the base where the method has none."""
    space = method.labels[chosen]
    if classes is not None:
        space = replace(space, classes=tuple(classes))
    experts = _told_experts(method, chosen)
    with torch.no_grad():
        scores = method.answer(batch, *method.told(batch, experts), space).scores
    name = BASE_NAME if experts == BASE else method.task_names[chosen]
    return [_answer(values, space, name) for values in scores]


def _told_experts(method: Method, chosen: int) -> int:
    """Return the experts of a task, or BASE where the method has none."""
    selector = method.selector
    frozen = isinstance(selector, AlwaysSelector) and selector.task == BASE
    return BASE if frozen else method.expert_task(chosen)


def _texts(
    method: Method, batch: Batch, classes: Sequence[str] | None, chosen: int | None
) -> list[Answer]:
    """Let the model write; no longer than the longest answer of any task it has learned."""
    if classes is not None:
        raise ConfigError("this model writes its answers; put the choices into the text")
    longest = max((own.max_new_tokens for own in method.labels), default=MAX_NEW_TOKENS)
    tasks, told = None, ""
    if chosen is not None:
        experts = _told_experts(method, chosen)
        told = BASE_NAME if experts == BASE else method.task_names[chosen]
        tasks = method.told(batch, experts)[1]
    written = method.write(batch, LabelSpace.of_texts(longest), tasks=tasks)
    names = [told or answerer(method, task) for task in written.tasks.tolist()]
    return [
        Answer(label=text, score=None, task=name)
        for text, name in zip(written.texts, names, strict=True)
    ]


def answer_space(method: Method, task: int, classes: Sequence[str] | None) -> LabelSpace:
    """Return what an answer of ``task`` (or BASE) is chosen from, see ``Learner.predict``."""
    if not method.labels and classes is None:
        raise DataError("nothing is learned yet; pass classes=[...] to ask the base model")
    known = method.labels
    separate = task != BASE and method.routing == "task-free"
    if classes is not None:
        return (
            LabelSpace(classes=tuple(classes))
            if not separate
            else replace(known[task], classes=tuple(classes))
        )
    if separate:
        return known[task]
    names = dict.fromkeys(name for labels in known for name in labels.classes)
    return LabelSpace(classes=tuple(names), multi_label=any(one.multi_label for one in known))


def _check_classes(classes: Sequence[str] | None) -> None:
    """Refuse what is no list of class names: one string would be taken letter by letter."""
    if classes is None:
        return
    wrong = isinstance(classes, str) or not isinstance(classes, Sequence)
    if wrong or not all(isinstance(name, str) and name.strip() for name in classes):
        raise ConfigError(f"classes must be a list of class names; got {classes!r}")
    if not classes:
        raise ConfigError("classes must name at least one class; got an empty list")


def _answer(scores: Tensor, space: LabelSpace, task: str) -> Answer:
    values, indices = scores.topk(min(5, len(space.classes)))
    top = tuple(
        (space.classes[index], float(value))
        for index, value in zip(indices.tolist(), values, strict=True)
    )
    label = top[0][0]
    if space.multi_label:
        given = zip(space.classes, scores.tolist(), strict=True)
        label = ", ".join(name for name, chance in given if chance > THRESHOLD)
    return Answer(label=label, score=top[0][1], task=task, top=top)
