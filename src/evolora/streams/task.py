"""Task and Stream: what is learned, in which order, and what a prediction is judged against."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, Protocol, runtime_checkable

from evolora.errors import StreamError

LabelProtocol = Literal["task", "seen"]
Label = int | tuple[int, ...] | str | tuple[str, ...]
"""A class index; with several labels per sample, a 0 or 1 for each class of the task; where answers
are texts, the right one or all that count as right."""
MAX_NEW_TOKENS = 64
"""Longest answer in tokens where a task does not say."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sample as a data set gives it, before any preprocessing.

    Args:
        inputs: modality -> value; "image" is a uint8 tensor (3, height, width) in RGB, "text" a
            string. A missing modality is absent from the mapping, never a placeholder. Where
            answers are texts, "image" may be a tuple of images and "text" the turns of a
            conversation (user, assistant, user, ...) as a tuple; "<image>" in a user's turn says
            where an image stands, else images come first.
        label: class index; with several labels per sample, a 0 or 1 for each class of the task;
            where answers are texts, the right one, or several that count as right.
        key: stable identifier within its task and split (file name, row number); names the sample
            in errors and caches.
    """

    inputs: Mapping[str, Any]
    label: Label
    key: str


@runtime_checkable
class Examples(Protocol):
    """A map-style data set: length and random access by index. Decoding happens on access.

    A row is the same sample each time it is asked for: what a model made of it is kept.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True, kw_only=True)
class LabelSpace:
    """The classes a prediction chooses from, and how a class name is put into words.

    Args:
        classes: human-readable class names; the index is the label.
        templates: prompts with one "{}"; the first is used in training, all are averaged in
            evaluation (CLIP's prompt ensembling).
        multi_label: a sample may have any number of the classes (judged by F1, trained by BCE).
        text: answers are texts that the model writes; there are no classes. See :meth:`of_texts`.
        max_new_tokens: longest text in tokens; the rest of a longer one is cut off, in training and
            in answers.
    """

    classes: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)
    multi_label: bool = False
    text: bool = False
    max_new_tokens: int = MAX_NEW_TOKENS

    @classmethod
    def of_texts(cls, max_new_tokens: int = MAX_NEW_TOKENS) -> LabelSpace:
        """Return the space of all texts up to a length."""
        return cls(classes=(), templates=(), text=True, max_new_tokens=max_new_tokens)

    def __post_init__(self) -> None:
        if self.text:
            if self.classes or self.multi_label:
                raise StreamError("answers are texts or classes, not both")
            if self.max_new_tokens < 1:
                raise StreamError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}")
            return
        if not self.classes:
            raise StreamError("a label space needs at least one class; got none")
        if len(set(self.classes)) != len(self.classes):
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise StreamError(f"class names must be unique; repeated: {', '.join(twice[:5])}")
        for template in self.templates or ("",):
            if template.count("{}") != 1:
                raise StreamError(f"a prompt template needs exactly one '{{}}'; got {template!r}")

    def prompts(self, template: int = 0) -> list[str]:
        """Return one prompt per class from the given template."""
        return [self.templates[template].format(name) for name in self.classes]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to learn: its three splits, its label space and how it is judged.

    Args:
        name: unique within its stream.
        train, val, test: data sets; ``val`` calibrates (thresholds, never weights) and may be
            empty, then a share of ``train`` is held out for it.
        labels: label space of this task alone.
        modalities: the modalities this task's inputs may have.
        metric: name of the metric of a test score: "accuracy" of one class per sample, "macro-f1"
            of several (see :mod:`evolora.evaluation.scores`); where answers are texts, one of
            ``evolora.registry.ANSWER_METRICS`` ("exact-match").
        answer_format: where answers are texts, the form that the questions ask for ("yes-no",
            "words:3", see :mod:`evolora.evaluation.answers.formats`); "" where they ask for none.
    """

    name: str
    train: Examples
    val: Examples
    test: Examples
    labels: LabelSpace
    modalities: tuple[str, ...] = ("image",)
    metric: str = "accuracy"
    answer_format: str = ""

    def __post_init__(self) -> None:
        if len(self.train) == 0 or len(self.test) == 0:
            raise StreamError(
                f"task {self.name!r} needs training and test samples; "
                f"got {len(self.train)} and {len(self.test)}"
            )
        if self.labels.text:
            from evolora.registry import ANSWER_METRICS

            ANSWER_METRICS.get(self.metric)  # one of classes would fail after training
        if self.answer_format:
            from evolora.evaluation.answers.formats import parse_formats

            if not self.labels.text:
                raise StreamError(f"task {self.name!r} has classes; formats are of texts")
            parse_formats(self.answer_format)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Ordered tasks.

    Args:
        name: public name ("mosaic/domains").
        tasks: in learning order.
        label_protocol: "task": a test sample is classified among its own task's classes (MTIL);
            "seen": among the classes of every task learned so far (class-incremental).
        source: one line on where the data came from, for reports.
    """

    name: str
    tasks: tuple[Task, ...]
    label_protocol: LabelProtocol = "task"
    source: str = ""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise StreamError(f"stream {self.name!r} has no tasks")
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise StreamError(f"stream {self.name!r} repeats a task name: {names}")
        if self.label_protocol == "seen" and any(task.labels.text for task in self.tasks):
            raise StreamError("label_protocol 'seen' joins classes; answers here are texts")

    def __iter__(self) -> Any:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def reordered(self, order: Sequence[str]) -> Stream:
        """Return the stream with its tasks (or a subset of them) in the order of ``order``."""
        by_name = {task.name: task for task in self.tasks}
        unknown = [name for name in order if name not in by_name]
        if unknown:
            from evolora.errors import unknown_name

            raise unknown_name("task", unknown[0], by_name)
        return Stream(
            name=self.name,
            tasks=tuple(by_name[name] for name in order),
            label_protocol=self.label_protocol,
            source=self.source,
        )


class Joined:
    """Data sets one after another, as one."""

    def __init__(self, parts: Sequence[Examples]) -> None:
        self.parts = tuple(parts)
        self.starts = [0, *accumulate(len(part) for part in self.parts)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Example:
        part, row = self.place(index)
        return part[row]

    def place(self, index: int) -> tuple[Examples, int]:
        """Return the data set that a row is of, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"no row {index}: there are {len(self)}")
        part = bisect_right(self.starts, index) - 1
        return self.parts[part], index - self.starts[part]


@dataclass(frozen=True)
class Subset:
    """Some rows of a data set, in the given order."""

    data: Examples
    indices: Sequence[int] = field(default_factory=tuple)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.data[self.indices[index]]
