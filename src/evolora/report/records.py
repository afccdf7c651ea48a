"""What a finished run left in its folder, read back and checked: the input of every report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from evolora.errors import EvoloraError, StorageError
from evolora.evaluation.matrix import Matrix
from evolora.evaluation.metrics import summary
from evolora.report.files import AfterTask, Robustness, Routing, RunFile, read
from evolora.streams.missing import CODE_NAMES, MissingConfig
from evolora.streams.missing_manifest import missing_settings

BASE = "base"  # the route of a sample that no expert answers

Beside = Literal["following", "normalised", "captions", "questions"]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run: what was done, the scores, and who answered what.

    Args:
        folder: name of the run's folder, without its parents (a report is shown to others).
        run: contents of ``run.json``.
        matrix: contents of ``matrix.json``; the same tasks in the same order.
        routing: contents of ``routing.json``, or None where the method routes nothing.
        missing: what its stream's samples lacked, or None.
        robustness: contents of ``robustness.json``, or None where no curve was measured.
    """

    folder: str
    run: RunFile
    matrix: Matrix
    routing: Routing | None = None
    missing: MissingConfig | None = None
    robustness: Robustness | None = None

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
        run = read(root / "run.json", RunFile)
        matrix = Matrix.load(root / "matrix.json")
        if matrix.tasks != run.tasks:
            raise StorageError(
                f"{root / 'matrix.json'}: its tasks {', '.join(matrix.tasks)} are not those of "
                f"run.json: {', '.join(run.tasks)}"
            )
        path = root / "routing.json"
        routing = read(path, Routing) if path.exists() else None
        if routing is not None:
            _check_routing(path, routing, run.tasks)
        path = root / "robustness.json"
        robustness = read(path, Robustness) if path.exists() else None
        if robustness is not None and set(robustness.samples) != set(run.tasks):
            raise StorageError(f"{path}: its tasks are not those of run.json; measure it again")
        return cls(
            folder=root.resolve().name,
            run=run,
            matrix=matrix,
            routing=routing,
            missing=_missing(root / "config.json"),
            robustness=robustness,
        )

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
            **self.missing_scores(),
            "following": _mean(self.final("following").values()),
            "normalised": _mean(self.final("normalised").values()),
            "captions": _mean(self.final("captions").values()),
        }

    def missing_scores(self) -> dict[str, float | None]:
        """Return the final AP by what is missing, and all of it with the task told.

        With the task told: names begin with "told_"; from ``robustness.json``, at the run's own
        test table. None unless the run inferred the task.
        """
        end = self.end
        found = end.scores_by_missing if end else {}
        own: dict[str, float | None] = {case: _mean_of(case, found) for case in CODE_NAMES}
        point = self.robustness.own if self.robustness else None
        told = point.oracle if point and self.run.protocol.routing == "task-free" else None
        return {
            **own,
            "told_cmml_ap": told.ap if told else None,
            "told_cmml_last": told.tasks.get(self.run.tasks[-1]) if told else None,
            **{f"told_{case}": told.by_missing.get(case) if told else None for case in CODE_NAMES},
        }

    @property
    def end(self) -> AfterTask | None:
        """What the test sets gave after the last task; None of an unfinished run."""
        last = self.run.tasks[-1]
        after = self.routing.after if self.routing else ()
        return next((one for one in after if one.task == last), None)

    def final(self, what: Beside) -> dict[str, float]:
        """Return task -> one of what is kept beside the scores, see ``AfterTask``."""
        return dict(getattr(self.end, what)) if self.end else {}

    def fresh(self, what: Beside) -> dict[str, float]:
        """Return the same of each task when it was just learned."""
        after = self.routing.after if self.routing else ()
        found = {one.task: getattr(one, what).get(one.task) for one in after}
        return {task: share for task, share in found.items() if share is not None}

    @property
    def missing_words(self) -> str:
        """What its stream's samples lacked, in a few words: "missing both 70 %"; or nothing."""
        return f"missing {self.missing.words()}" if self.missing else ""

    @property
    def size(self) -> int:
        """Number of tasks."""
        return len(self.run.tasks)

    def selector_accuracy(self) -> float | None:
        """Return the share of learned tasks' test samples that the right task answered at the end.

        None unless the run was task-free; samples are pooled, so a large test set weighs more. The
        right one for a task that taught nothing (the base knew it) is the base.
        """
        if not self.task_free or self.routing is None:
            return None
        end = max(self.routing.after, key=lambda after: self.position(after.task))
        known = {step.task for step in self.run.history if step.trainable_parameters == 0}
        return _share(
            (counts, BASE if task in known else task)
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


def _mean(shares: Iterable[float]) -> float | None:
    known = list(shares)
    return fmean(known) if known else None


def _mean_of(case: str, tasks: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return the mean score on one case, over the tasks that have such samples."""
    scores = [cases[case] for cases in tasks.values() if case in cases]
    return fmean(scores) if scores else None


def _missing(path: Path) -> MissingConfig | None:
    """Return what a run's configuration says of missing modalities.

    A manifest file that is no longer where the configuration says tells nothing.
    """
    try:
        stream = json.loads(path.read_bytes())["config"]["stream"]
        return missing_settings(stream.get("missing"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EvoloraError):
        return None


def _share(parts: Iterable[tuple[dict[str, int], str]]) -> float | None:
    """Share of all counted samples that took the route named beside each count table."""
    right = total = 0
    for counts, route in parts:
        right += counts.get(route, 0)
        total += sum(counts.values())
    return right / total if total else None


def _check_routing(path: Path, routing: Routing, tasks: tuple[str, ...]) -> None:
    for where, name in _routing_names(routing):
        if name not in tasks:
            raise StorageError(f"{path}: {where} names the task {name!r}, run.json does not")
    for after in routing.after:
        if any(count < 0 for counts in after.routes.values() for count in counts.values()):
            raise StorageError(f"{path}: a count after {after.task!r} is negative")
    for tower, experts in routing.experts.items():
        if (
            len({len(layers) for layers in experts.tasks.values()}) > 1
        ):  # pools may grow, towers not
            raise StorageError(f"{path}: experts.{tower} has tasks with different layers")


def _routing_names(routing: Routing) -> Iterator[tuple[str, str]]:
    for after in routing.after:
        yield "after", after.task
        for task in after.routes:
            yield f"after {after.task!r}", task
