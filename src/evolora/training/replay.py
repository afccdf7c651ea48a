"""Replay: samples of earlier tasks, read again from the training sets they came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evolora.errors import ConfigError, DataError
from evolora.methods.base import Method
from evolora.randomness import derive_seed
from evolora.streams.task import Examples, Joined, Subset, Task
from evolora.training.held_out import split_held_out

Keys = Callable[[Examples], Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """Samples that are mixed into the batches of a later task.

    Args:
        data: the samples.
        tasks: task of each.
        share: of every batch that they make up, in (0, 1).
    """

    data: Examples
    tasks: tuple[int, ...]
    share: float


class Archive:
    """Training sets of learned tasks, by name, for methods that replay their samples.

    Args:
        method: whose samples; one without a reservoir keeps nothing.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.at_hand: dict[str, Examples] = {}

    def keep(self, task: Task) -> None:
        """Keep a task's training set at hand, if the method replays."""
        if self.method.reservoir is not None:
            self.at_hand[task.name] = split_held_out(task)[0]

    def replayed(self, keys: Keys) -> Replayed | None:
        """Return the samples that the reservoir remembers, or None if there is nothing to replay.

        Args:
            keys: from a data set to the keys of its samples, which tell whether they are the same.

        Raises:
            ConfigError: the data of an earlier task is not at hand.
            DataError: it is not what was learned.
        """
        reservoir = self.method.reservoir
        if reservoir is None or len(reservoir) == 0:
            return None
        parts: list[Examples] = []
        tasks: list[int] = []
        for task, name in enumerate(self.method.task_names):
            rows, digests = reservoir.of_task(task)
            if rows:
                parts.append(self._same(name, rows, digests, keys))
                tasks += [task] * len(rows)
        return Replayed(data=Joined(parts), tasks=tuple(tasks), share=reservoir.share)

    def _same(self, name: str, rows: Sequence[int], digests: Sequence[int], keys: Keys) -> Examples:
        """Return rows of an earlier task; refuse others than those that were learned."""
        if name not in self.at_hand:
            raise ConfigError(
                f"{self.method.config.type} replays {len(rows)} samples of task {name!r}, whose "
                "data is not at hand; give the earlier tasks to learner.recall(tasks) first"
            )
        data = self.at_hand[name]
        if max(rows) >= len(data):
            raise DataError(
                f"the data of task {name!r} is not what was learned: row {max(rows)} is "
                f"remembered, it has {len(data)}"
            )
        part = Subset(data, rows)
        for row, digest, key in zip(rows, digests, keys(part), strict=True):
            if derive_seed(key) != digest:
                raise DataError(
                    f"the data of task {name!r} is not what was learned: row {row} is now {key!r}"
                )
        return part
