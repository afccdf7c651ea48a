"""Batch: samples on their way to a frozen model, and what one pass through its base gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from evolora.backbones.memory import Known
from evolora.errors import ConfigError
from evolora.randomness import StepRandom
from evolora.streams.task import Label


class LazyInputs(Mapping[str, Tensor]):
    """Inputs that are read when first asked for: what is known of a sample needs no decoding.

    Args:
        names: inputs there will be.
        rows: rows of ``read`` that this mapping stands for.
        read: from row numbers to the inputs of these rows.
    """

    def __init__(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        read: Callable[[Sequence[int]], Mapping[str, Tensor]],
    ) -> None:
        self._names, self._rows, self._read = tuple(names), tuple(rows), read
        self._values: Mapping[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._values is None:
            self._values = self._read(self._rows)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def take(self, rows: Sequence[int]) -> Mapping[str, Tensor]:
        """Return the given rows, still unread if nothing was read yet."""
        if self._values is not None:
            return {name: value[list(rows)] for name, value in self._values.items()}
        return LazyInputs(self._names, [self._rows[row] for row in rows], self._read)


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Activations with which a tower can go on, instead of beginning with the inputs.

    Args:
        cut: block that is run next.
        hidden: (b, n, d) activations entering it.
        mask: (b, n) bool, False at padding; None where there is none.
    """

    cut: int
    hidden: Tensor
    mask: Tensor | None = None

    def take(self, rows: Tensor) -> Prefix:
        """Return the given rows."""
        mask = None if self.mask is None else self.mask[rows]
        return replace(self, hidden=self.hidden[rows], mask=mask)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Preprocessed samples on the model's device.

    Args:
        inputs: name -> tensor with rows first, as the model's towers take them.
        labels: (b,) int64 class index; with several labels per sample (b, c) float of 0 and 1.
        keys: identifier of each sample.
        task: index of the samples' task in the stream; read in training and by oracles only.
        tasks: task of each row where a training batch has rows of several; ``task`` is the newest.
            Labels are then class indices of each row's own task.
        random: randomness of the training step; None in evaluation.
        step_labels: class indices of the whole global batch where several processes share it.
        step_tasks: ``tasks`` of the whole global batch.
        step_sizes: ``Backbone.row_sizes`` of the whole global batch where several processes share
            it and rows differ in size.
        known: which samples these are and where results on them are kept; None computes all anew.
        prefix: activations to go on from (of the tower that sees images); None begins with the
            inputs.
        answers: the texts that count as right of each row, where answers are texts; ``labels`` are
            zeros then.
        present: modality -> (b,) whether the sample has it, from the data; a modality that is not
            named is present everywhere. What ``inputs`` hold for a missing one is a constant.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    keys: tuple[str, ...]
    task: int | None = None
    tasks: tuple[int, ...] = ()
    random: StepRandom | None = None
    step_labels: Tensor | None = None
    step_tasks: tuple[int, ...] = ()
    step_sizes: Tensor | None = None
    known: Known | None = None
    prefix: Prefix | None = None
    answers: tuple[tuple[str, ...], ...] = ()
    present: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.labels.shape[0]

    def with_random(self, random: StepRandom) -> Batch:
        """Return the same samples with a training step's randomness."""
        return replace(self, random=random)

    def joined(self, others: Sequence[Batch]) -> Batch:
        """Return the rows of this batch and of others of its task; nothing is known of them."""
        parts = [self, *others]
        return replace(
            self,
            inputs={name: torch.cat([part.inputs[name] for part in parts]) for name in self.inputs},
            labels=torch.cat([part.labels for part in parts]),
            keys=tuple(key for part in parts for key in part.keys),
            tasks=tuple(task for part in parts for task in part.tasks),
            answers=tuple(accepted for part in parts for accepted in part.answers),
            known=None,
            prefix=None,
            present={
                name: torch.cat([part.present[name] for part in parts]) for name in self.present
            },
        )

    def take(self, rows: Tensor) -> Batch:
        """Return the given rows as a batch of their own."""
        chosen = rows.tolist()
        if isinstance(self.inputs, LazyInputs):
            inputs = self.inputs.take(chosen)
        else:
            inputs = {name: value[rows] for name, value in self.inputs.items()}
        return replace(
            self,
            inputs=inputs,
            labels=self.labels[rows],
            keys=tuple(self.keys[row] for row in chosen),
            tasks=tuple(self.tasks[row] for row in chosen) if self.tasks else (),
            answers=tuple(self.answers[row] for row in chosen) if self.answers else (),
            known=self.known.take(chosen) if self.known else None,
            prefix=self.prefix.take(rows) if self.prefix else None,
            present={name: value[rows] for name, value in self.present.items()},
        )

    def of_task(self, task: int) -> tuple[Tensor, Batch]:
        """Return which rows of a mixed batch are a task's, and what its loss needs of them."""
        device = self.labels.device
        rows = torch.tensor([row for row, own in enumerate(self.tasks) if own == task])
        rows = rows.to(device, torch.long)
        part = replace(self, inputs={}, known=None, prefix=None, present={}).take(rows)
        step = self.step_labels
        if step is not None:
            step = step[[row for row, own in enumerate(self.step_tasks) if own == task]]
        return rows, replace(part, task=task, tasks=(), step_labels=step, step_tasks=())


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What one pass through the untouched base gives: reused for routing and for base answers.

    Args:
        embedding: (b, p) what the base model's answer is computed from.
        features: name -> (b, f) routing features; "modalities" is (b, m, f), a unit vector per
            modality, NaN where the sample lacks it.
    """

    embedding: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def take(self, rows: Tensor) -> Encoded:
        """Return the given rows."""
        features = {name: value[rows] for name, value in self.features.items()}
        return Encoded(embedding=self.embedding[rows], features=features)


def label_tensor(labels: Sequence[Label], device: torch.device | str = "cpu") -> Tensor:
    """Return ``Batch.labels``: (b,) int64, or (b, c) float32 where samples have several.

    Samples of tasks that have fewer classes are filled up with zeros; texts are no classes and give
    zeros (see :func:`answer_texts`).
    """
    if answer_texts(labels):
        return torch.zeros(len(labels), dtype=torch.int64, device=device)
    several: list[Any] = [label for label in labels if isinstance(label, tuple)]
    if not several:
        return torch.tensor(labels, dtype=torch.int64, device=device)
    if len(several) < len(labels):
        raise ConfigError("samples with one and with several labels cannot share a batch")
    most = max(len(label) for label in several)
    filled = [label + (0,) * (most - len(label)) for label in several]
    return torch.tensor(filled, dtype=torch.float32, device=device)


def answer_texts(labels: Sequence[Label]) -> tuple[tuple[str, ...], ...]:
    """Return ``Batch.answers`` of samples whose answers are texts; () where they are classes."""
    found = [(label,) if isinstance(label, str) else label for label in labels]
    texts = [
        tuple(str(text) for text in label)
        for label in found
        if isinstance(label, tuple) and label and isinstance(label[0], str)
    ]
    if texts and len(texts) < len(labels):
        raise ConfigError("samples answered by texts and by classes cannot share a batch")
    return tuple(texts)
