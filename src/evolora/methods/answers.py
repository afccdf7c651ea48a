"""What a method is trained for, and what it answers: classes with their chances, or texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.backbones.answer_tokens import Limit
from evolora.backbones.batch import Batch
from evolora.errors import ConfigError
from evolora.streams.task import LabelSpace


@dataclass(frozen=True, kw_only=True)
class Objective:
    """How class logits become a training loss.

    Args:
        label_smoothing: in [0, 1).
        max_classes: classes in one step's softmax: those of the batch plus a random sample of the
            others; None takes the whole label space, as the paper does.
    """

    label_smoothing: float = 0.0
    max_classes: int | None = None

    def loss(self, logits: Tensor, targets: Tensor, labels: LabelSpace) -> Tensor:
        """Return the loss of logits (b, c): cross-entropy, or binary of each label."""
        smoothing = self.label_smoothing
        if labels.multi_label:
            targets = targets.to(logits.dtype) * (1.0 - smoothing) + 0.5 * smoothing
            return F.binary_cross_entropy_with_logits(logits, targets)
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def step_classes(self, batch: Batch, labels: LabelSpace) -> tuple[Sequence[int] | None, Tensor]:
        """Return (class indices of this step's softmax or None for all, targets within them)."""
        limit = self.max_classes
        if limit is None or len(labels.classes) <= limit or batch.random is None:
            return None, batch.labels
        if limit < 2:
            raise ConfigError(f"max_classes must be at least 2; got {limit}")
        order = batch.random.whole().normal("classes", (len(labels.classes),), torch.empty(()))
        together = batch.labels if batch.step_labels is None else batch.step_labels
        present = torch.tensor(sorted(set(together.tolist())))
        order[present] += 1e6
        subset = torch.topk(order, max(limit, len(present))).indices.sort().values
        position = torch.full((len(labels.classes),), -1)
        position[subset] = torch.arange(len(subset))
        return subset.tolist(), position.to(batch.labels.device)[batch.labels]


def answer_limit(batch: Batch, labels: LabelSpace, spaces: Sequence[LabelSpace]) -> Limit:
    """Return how many tokens of an answer count in training.

    Args:
        batch: the samples; where it has rows of several tasks, each goes by its own.
        labels: of the batch's task.
        spaces: of all tasks.
    """
    if not batch.tasks:
        return labels.max_new_tokens
    return [spaces[own].max_new_tokens for own in batch.tasks]


def all_prompts(spaces: Sequence[LabelSpace]) -> LabelSpace:
    """Return the prompts of several tasks, each once, as classes that are their own prompts."""
    prompts = dict.fromkeys(prompt for own in spaces for prompt in own.prompts())
    return LabelSpace(classes=tuple(prompts), templates=("{}",))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Answers for a batch.

    Args:
        scores: (b, c) probabilities over the label space; they sum to 1 unless a sample may have
            several labels.
        tasks: (b,) which task's experts answered, or BASE.
    """

    scores: Tensor
    tasks: Tensor

    @property
    def labels(self) -> Tensor:
        """(b,) most probable class."""
        return self.scores.argmax(dim=1)


@dataclass(frozen=True, kw_only=True)
class Written:
    """Answers for a batch of a model that writes.

    Args:
        texts: one per row.
        tasks: (b,) which task's experts answered, or BASE.
    """

    texts: tuple[str, ...]
    tasks: Tensor
