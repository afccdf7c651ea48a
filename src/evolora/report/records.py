"""What a finished run left in its folder, read back and checked: the input of every report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evolora.errors import StorageError
from evolora.evaluation.matrix import Matrix
from evolora.evaluation.metrics import summary

BASE = "base"  # the route of a sample that no expert answers
Model = TypeVar("Model", bound=BaseModel)


class _Known(BaseModel):
    # Later versions add fields; a report of an older program still shows what it knows.
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Protocol(_Known):
    """How test samples were classified and routed."""

    label_space: str
    routing: str
    group_size: int = Field(default=1, ge=1)


class Step(_Known):
    """What learning one task cost: seconds, parameters (numbers) and bytes after it."""

    task: str
    seconds_learn: float = Field(ge=0)
    seconds_evaluate: float = Field(ge=0)
    trainable_parameters: int = Field(ge=0)
    stored_parameters: int = Field(ge=0)
    stored_bytes: int = Field(ge=0)
    final_loss: float | None = None


class RunFile(_Known):
    """``run.json``."""

    format_version: Literal[1]
    name: str = Field(min_length=1)
    method: dict[str, Any]
    stream: str
    tasks: tuple[str, ...] = Field(min_length=1)
    protocol: Protocol
    seed: int
    config_hash: str
    versions: dict[str, str]
    device: str
    processes: int = Field(ge=1)
    started: str
    seconds: float = Field(ge=0)
    history: tuple[Step, ...]


class AfterTask(_Known):
    """Which route answered how many test samples of each task, after learning ``task``."""

    task: str
    routes: dict[str, dict[str, int]]


class TowerExperts(_Known):
    """Selections of each expert: task -> layer -> expert; and the frozen ids per layer."""

    tasks: dict[str, list[list[int]]]
    frozen: list[list[int]] = Field(default_factory=list)


class Routing(_Known):
    """``routing.json``."""

    format_version: Literal[1]
    after: tuple[AfterTask, ...] = ()
    experts: dict[str, TowerExperts] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run: what was done, the scores, and who answered what.

    Args:
        folder: name of the run's folder, without its parents (a report is shown to others).
        run: contents of ``run.json``.
        matrix: contents of ``matrix.json``; the same tasks in the same order.
        routing: contents of ``routing.json``, or None where the method routes nothing.
    """

    folder: str
    run: RunFile
    matrix: Matrix
    routing: Routing | None = None

    @classmethod
    def load(cls, folder: str | Path) -> RunRecord:
        """Return the run in a folder.

        Raises:
            StorageError: ``run.json`` or ``matrix.json`` is missing, or a file is corrupt, of a
                newer format or about other tasks; the message names the file.
        """
        root = Path(folder)
        if not root.is_dir():
            raise StorageError(f"{root}: no such run folder")
        run = _read(root / "run.json", RunFile)
        matrix = Matrix.load(root / "matrix.json")
        if matrix.tasks != run.tasks:
            raise StorageError(
                f"{root / 'matrix.json'}: its tasks {', '.join(matrix.tasks)} are not those of "
                f"run.json: {', '.join(run.tasks)}"
            )
        path = root / "routing.json"
        routing = _read(path, Routing) if path.exists() else None
        if routing is not None:
            _check_routing(path, routing, run.tasks)
        return cls(folder=root.resolve().name, run=run, matrix=matrix, routing=routing)

    @property
    def task_free(self) -> bool:
        """Whether the run had to find the route of each sample itself, and says how it did."""
        routed = self.routing is not None and bool(self.routing.after)
        return routed and self.run.protocol.routing == "task-free"

    @property
    def scores(self) -> dict[str, float | None]:
        """Metrics, selection quality and cost by column name; None where it does not apply."""
        history = self.run.history
        return {
            **summary(self.matrix),
            "selector_accuracy": self.selector_accuracy(),
            "unseen_to_base": self.unseen_to_base(),
            "trainable_parameters": (
                float(max(step.trainable_parameters for step in history)) if history else None
            ),
            "stored_parameters": float(history[-1].stored_parameters) if history else None,
            "seconds": self.run.seconds,
        }

    def selector_accuracy(self) -> float | None:
        """Return the share of learned tasks' test samples that the right task answered at the end.

        None unless the run was task-free; samples are pooled, so a large test set weighs more.
        """
        if not self.task_free or self.routing is None:
            return None
        end = max(self.routing.after, key=lambda after: self.position(after.task))
        return _share(
            (counts, task)
            for task, counts in end.routes.items()
            if self.position(task) <= self.position(end.task)
        )

    def unseen_to_base(self) -> float | None:
        """Return the share of test samples of tasks still to come that the base model answered.

        Pooled over every row but the last, which has no task to come. None unless task-free.
        """
        if not self.task_free or self.routing is None:
            return None
        return _share(
            (counts, BASE)
            for after in self.routing.after
            for task, counts in after.routes.items()
            if self.position(task) > self.position(after.task)
        )

    def position(self, task: str) -> int:
        """Return the place of a task in the learning order, from 0."""
        return self.run.tasks.index(task)

    def right_route_shares(self) -> list[list[float | None]]:
        """Return (T, T) shares of task j's samples routed right after task i.

        Right is task j's own route once it is learned (j <= i), the base before. None where
        nothing was routed.
        """
        size = len(self.run.tasks)
        shares: list[list[float | None]] = [[None] * size for _ in range(size)]
        for after in self.routing.after if self.routing else ():
            i = self.position(after.task)
            for task, counts in after.routes.items():
                j = self.position(task)
                shares[i][j] = _share([(counts, task if j <= i else BASE)])
        return shares


def _share(parts: Iterable[tuple[dict[str, int], str]]) -> float | None:
    """Share of all counted samples that took the route named beside each count table."""
    right = total = 0
    for counts, route in parts:
        right += counts.get(route, 0)
        total += sum(counts.values())
    return right / total if total else None


def _read(path: Path, model: type[Model]) -> Model:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StorageError(f"{path}: missing; a finished run has it") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read as JSON ({error})") from error
    if isinstance(data, Mapping) and data.get("format_version") not in (1, None):
        raise StorageError(f"{path}: format {data['format_version']!r} is not readable; known: 1")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"
            for fault in error.errors()[:3]
        )
        raise StorageError(f"{path}: {faults}") from error


def _check_routing(path: Path, routing: Routing, tasks: tuple[str, ...]) -> None:
    for where, name in _routing_names(routing):
        if name not in tasks:
            raise StorageError(f"{path}: {where} names the task {name!r}, run.json does not")
    for after in routing.after:
        if any(count < 0 for counts in after.routes.values() for count in counts.values()):
            raise StorageError(f"{path}: a count after {after.task!r} is negative")
    for tower, experts in routing.experts.items():
        shapes = Counter(tuple(len(layer) for layer in layers) for layers in experts.tasks.values())
        if len(shapes) > 1:
            raise StorageError(f"{path}: experts.{tower} has tasks with different layers or sizes")


def _routing_names(routing: Routing) -> Iterator[tuple[str, str]]:
    for after in routing.after:
        yield "after", after.task
        for task in after.routes:
            yield f"after {after.task!r}", task
