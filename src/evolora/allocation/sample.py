"""A task's training samples, as a method may look at them before it learns the task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evolora.backbones.batch import Batch
from evolora.randomness import generator


@dataclass(frozen=True, kw_only=True)
class TaskSamples:
    """The training samples of a task, seen from one of several processes.

    Args:
        rows: number of samples.
        read: gives chosen rows as batches of the task, without augmentation.
        index, count: rank and number of processes.
        summed: sums a tensor over all processes; every process must call it.
    """

    rows: int
    read: Callable[[Sequence[int]], Iterable[Batch]]
    index: int = 0
    count: int = 1
    summed: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def drawn(self, number: int, *seed: object) -> list[int]:
        """Return rows drawn without repetition, ascending; all processes draw the same."""
        order = torch.randperm(self.rows, generator=generator(*seed))
        return sorted(order[:number].tolist())

    def share(self, rows: Sequence[int]) -> Sequence[int]:
        """Return this process's part of rows."""
        first = len(rows) * self.index // self.count
        return rows[first : len(rows) * (self.index + 1) // self.count]
