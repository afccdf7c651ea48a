"""Stateless batches: which samples step s of task t sees is a function of (seed, task, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from evolora.backbones.base import Backbone, Batch
from evolora.errors import EvoloraError
from evolora.randomness import StepRandom, derive_seed, generator
from evolora.streams.task import Example, Examples, Joined
from evolora.training.config import TrainingConfig
from evolora.training.replay import Replayed
from evolora.training.samples import Samples


@dataclass(frozen=True, kw_only=True)
class Share:
    """This process's part of every global batch.

    Args:
        index, count: rank and number of processes.
    """

    index: int = 0
    count: int = 1


class ShuffledRows:
    """Endless epochs over n rows; every epoch is its own permutation, drawn when it is reached."""

    def __init__(self, rows: int, *seed: object) -> None:
        self.rows, self.seed = rows, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def take(self, start: int, count: int) -> list[int]:
        """Return the rows at positions start .. start + count of the endless sequence."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.rows)
        if epoch != self._epoch:
            draw = generator(*self.seed, "epoch", epoch)
            self._epoch, self._order = epoch, torch.randperm(self.rows, generator=draw)
        return int(self._order[offset])


class MixedRows:
    """New rows and, in even turns, a share of old ones that come after them in the data set."""

    def __init__(self, new: ShuffledRows, old: ShuffledRows, share: float) -> None:
        self.new, self.old, self.share = new, old, share

    def take(self, start: int, count: int) -> list[int]:
        """Return the rows at positions start .. start + count of the endless sequence."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> int:
        before = int(position * self.share)
        if int((position + 1) * self.share) == before:
            return self.new.take(position - before, 1)[0]
        return self.new.rows + self.old.take(before, 1)[0]


class TrainingBatches:
    """Iterates over this process's micro-batches of one task from any step on.

    Args:
        data: training split.
        backbone: turns samples into tensors.
        config: batch size, accumulation, augmentation, workers.
        seed: run seed.
        task: index of the task.
        share: this process's part.
        samples: where samples are remembered, so that results on them are computed once; not used
            where training augments.
        replayed: samples of earlier tasks that batches are mixed with.
    """

    def __init__(
        self,
        data: Examples,
        backbone: Backbone,
        config: TrainingConfig,
        *,
        seed: int,
        task: int,
        share: Share,
        samples: Samples | None = None,
        replayed: Replayed | None = None,
    ) -> None:
        self.data, self.backbone, self.config = data, backbone, config
        self.samples = None if config.augment else samples
        self.seed, self.task, self.share = seed, task, share
        self.rows: ShuffledRows | MixedRows = ShuffledRows(len(data), seed, "order", task)
        self.tasks: list[int] = []
        if replayed is not None:
            old = ShuffledRows(len(replayed.data), seed, "replay", task)
            self.rows = MixedRows(self.rows, old, replayed.share)
            self.data = Joined([data, replayed.data])
            self.tasks = [task] * len(data) + list(replayed.tasks)

    def from_step(self, step: int) -> Iterator[Batch]:
        """Yield the micro-batches of optimizer steps ``step`` .. ``max_steps``."""
        config = self.config
        plan = [
            self._own_rows(s * config.gradient_accumulation_steps + micro)
            for s in range(step, config.max_steps)
            for micro in range(config.gradient_accumulation_steps)
        ]
        first = step * config.gradient_accumulation_steps
        for offset, (rows, examples) in enumerate(zip_longest(plan, self._read(plan))):
            yield self._batch(rows, examples, first + offset)

    def _read(self, plan: list[list[int]]) -> Iterator[list[Example]]:
        """Yield the samples of each batch that has to be read ahead.

        Where samples are remembered, a batch reads what it misses by itself; worker processes read
        about one epoch ahead of it, in which every row is met for the first time.
        """
        if self.samples is not None:
            epoch = -(-len(self.data) // self.config.per_device_train_batch_size)
            plan = plan[:epoch] if self.config.dataloader_num_workers else []
        if not plan:
            return
        loader: DataLoader[Any] = DataLoader(
            _Indexed(self.data),
            batch_sampler=plan,
            num_workers=self.config.dataloader_num_workers,
            collate_fn=_all_read,
        )
        for examples in loader:
            if isinstance(examples, EvoloraError):
                raise examples
            yield examples

    def _own_rows(self, micro_step: int) -> list[int]:
        size = self.config.per_device_train_batch_size
        start = micro_step * size * self.share.count + self.share.index * size
        return self.rows.take(start, size)

    def _batch(self, rows: list[int], examples: list[Example] | None, micro_step: int) -> Batch:
        size = self.config.per_device_train_batch_size
        random = StepRandom(
            derive_seed(self.seed, "step", self.task, micro_step),
            first_row=self.share.index * size,
            global_rows=size * self.share.count,
        )
        if self.samples is not None:
            batch = self.samples.batch(self.data, rows, task=self.task, examples=examples)
        else:
            assert examples is not None
            batch = self.backbone.collate(
                examples, task=self.task, random=random if self.config.augment else None
            )
        if not self.tasks:
            return batch.with_random(random)
        everywhere = self.rows.take(micro_step * size * self.share.count, size * self.share.count)
        return replace(
            batch,
            random=random,
            tasks=tuple(self.tasks[row] for row in rows),
            step_tasks=tuple(self.tasks[row] for row in everywhere),
        )


def in_turn(feeds: Sequence[TrainingBatches], step: int) -> Iterator[Batch]:
    """Yield steps of several tasks in turn: overall step s is step s // t of task s % t."""
    count = len(feeds)
    micro = feeds[0].config.gradient_accumulation_steps
    sources = [
        feed.from_step((step + count - 1 - index) // count) for index, feed in enumerate(feeds)
    ]
    total = feeds[0].config.max_steps * count
    for overall in range(step, total):
        for _ in range(micro):
            yield next(sources[overall % count])


def evaluation_batches(
    data: Examples, backbone: Backbone, size: int, rows: range, samples: Samples | None = None
) -> Iterator[Batch]:
    """Yield the given rows of a data set in order, without augmentation.

    Args:
        data: data set.
        backbone: turns samples into tensors.
        size: rows of a batch.
        rows: which.
        samples: where samples are remembered; None reads them and computes all anew.
    """
    for start in range(rows.start, rows.stop, size):
        part = range(start, min(start + size, rows.stop))
        if samples is None:
            yield backbone.collate([data[row] for row in part])
        else:
            yield samples.batch(data, part)


class _Indexed(Dataset[Any]):
    """A torch Dataset over any Examples.

    An unreadable sample is returned as its error: raised in a worker process, it would reach the
    user as a message with the worker's traceback in it.
    """

    def __init__(self, data: Examples) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Example | EvoloraError:
        try:
            return self.data[index]
        except EvoloraError as error:
            return error


def _all_read(samples: list[Example | EvoloraError]) -> list[Example] | EvoloraError:
    """Return the samples, or the error of the first that could not be read."""
    examples = [sample for sample in samples if isinstance(sample, Example)]
    errors = [sample for sample in samples if isinstance(sample, EvoloraError)]
    return errors[0] if errors else examples
