"""The sequence: learn t, freeze, evaluate every task, checkpoint, go on; and a run's files.

run/
  run.json matrix.json routing.json   what happened, for reports
  log.jsonl                           one line per logged step and per task
  evolora.json experts.safetensors README.md   the artefact
  checkpoints/                        to go on after a kill
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evolora.allocation.value import FILE as ALLOCATION
from evolora.config import RunConfig, load_stream
from evolora.errors import StorageError, StreamError, unknown_name
from evolora.evaluation.cost import Cost
from evolora.evaluation.matrix import Matrix
from evolora.evaluation.sources import SourceShares
from evolora.evaluation.tally import BESIDE
from evolora.evaluation.testing import largest_score
from evolora.learner import Learner, Progress
from evolora.storage.checkpoint import Checkpoint, load_newest, save_checkpoint
from evolora.storage.files import read_json, sweep_temporary, write_json
from evolora.storage.lock import locked
from evolora.storage.state import export_state, load_state
from evolora.streams.missing import CODE_NAMES, COMPLETE
from evolora.streams.task import LabelSpace, Stream, Task
from evolora.training.progress import Reporter
from evolora.training.samples import Samples

if TYPE_CHECKING:
    from accelerate import Accelerator

RUN_FORMAT = 1


@dataclass(kw_only=True)
class Record:
    """What a run has done so far; JSON values, kept in every checkpoint.

    Args:
        matrix: accuracy matrix.
        history: one entry per learned task, for run.json.
        routes: one entry per filled row, for routing.json.
        usage: tower -> task -> expert counts per layer.
        seconds: wall time so far, without the time between a kill and its resumption.
    """

    matrix: Matrix
    history: list[dict[str, Any]] = field(default_factory=list)
    routes: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, dict[str, list[list[int]]]] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "matrix": self.matrix.to_json(),
            "history": self.history,
            "routes": self.routes,
            "usage": self.usage,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        """Return what :meth:`to_json` described."""
        return cls(
            matrix=Matrix.from_json(value["matrix"]),
            history=list(value["history"]),
            routes=list(value["routes"]),
            usage=dict(value["usage"]),
            seconds=float(value["seconds"]),
        )


class ContinualRun:
    """One learner through one stream, in one folder.

    Args:
        config: what to run.
        folder: where everything is written.
        stream: the stream, if it is at hand already.
        backbone: the backbone, if it is at hand already (several runs may share one).
        reporter: progress; its log is set to the run's ``log.jsonl``.
        samples: what is known of samples already, from a run on the same backbone.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        *,
        stream: Stream | None = None,
        backbone: Any | None = None,
        reporter: Reporter | None = None,
        samples: Samples | None = None,
    ) -> None:
        from evolora.backbones.loading import load_backbone
        from evolora.training.runtime import build_accelerator

        self.config, self.folder = config, folder
        self.accelerator: Accelerator = build_accelerator(config.training, folder)
        self.reporter = reporter or Reporter()
        if self.accelerator.is_main_process:
            self.reporter.log = folder / "log.jsonl"
        else:
            self.reporter = Reporter()
        options = {key: value for key, value in config.stream.items() if key != "name"}
        self.stream = stream or load_stream(config.stream["name"], **options)
        self.learner = Learner(
            backbone or load_backbone(**asdict(config.backbone)),
            method=config.method,
            training=config.training,
            seed=config.seed,
            evaluation_batch_size=config.evaluation.batch_size,
            accelerator=self.accelerator,
            reporter=self.reporter,
            evaluation_cache=config.evaluation.cache,
            samples=samples,
            regularizers=config.regularizers,
        )
        names = [task.name for task in self.stream]
        for setting in ("learning_rates", "known_tasks"):
            for name in getattr(config.training, setting):
                if name not in names:
                    raise unknown_name(f"task in training.{setting}", name, names)
        counts = [len(task.test) for task in self.stream]
        largest = [largest_score(task) for task in self.stream]
        self.record = Record(matrix=Matrix.empty(names, counts, largest))
        self._started = time.perf_counter()
        self._began = datetime.now(UTC).isoformat(timespec="seconds")

    @property
    def checkpoints(self) -> Path:
        """Folder of this run's checkpoints."""
        return self.folder / "checkpoints"

    def run(self, *, resume: bool = False) -> Matrix:
        """Learn and evaluate the whole stream; return the accuracy matrix.

        Raises:
            StorageError: the folder holds another run, or one that would be overwritten, or
                another process is at this run.
        """
        main = self.accelerator.is_main_process
        with locked(self.folder, "run") if main else nullcontext():
            return self._run(resume)

    def _run(self, resume: bool) -> Matrix:
        first, progress = self._start(resume)
        tasks = list(self.stream)
        if first >= len(tasks):
            self._finish()  # the run may have been killed before its last files were written
            return self.record.matrix
        unlearned = self.learner.backbone.answers != "heads"  # heads answer nothing unlearned
        if unlearned and self.config.evaluation.baseline and self.record.matrix.baseline is None:
            self.record.matrix.set_baseline(self._zero_shot(tasks))
        if self.learner.method.joint:
            self._joint(tasks, progress)
        else:
            for index in range(first, len(tasks)):
                self._one(tasks, index, progress)
                progress = None
        self._finish()
        return self.record.matrix

    # -- one task --------------------------------------------------------------------------------

    def _one(self, tasks: Sequence[Task], index: int, progress: Progress | None) -> None:
        task = tasks[index]
        start = time.perf_counter()
        loss = self.learner.learn(task, progress=progress, save=self._saver(index))
        learned = time.perf_counter()
        self._row(tasks, index)
        self._note(task.name, loss, learned - start, time.perf_counter() - learned)
        self._save(index + 1, 0, {})

    def _joint(self, tasks: Sequence[Task], progress: Progress | None) -> None:
        start = time.perf_counter()
        loss = self.learner.learn_jointly(tasks, progress=progress, save=self._saver(0))
        learned = time.perf_counter()
        self._row(tasks, len(tasks) - 1)
        self._note("all tasks", loss, learned - start, time.perf_counter() - learned)
        self._save(len(tasks), 0, {})

    def _row(self, tasks: Sequence[Task], index: int) -> None:
        """Evaluate every task the protocol can judge now and fill the matrix row."""
        scores: dict[str, float] = {}
        routes: dict[str, dict[str, int]] = {}
        cases: dict[str, dict[str, float]] = {}
        forms: dict[str, dict[str, float]] = {name: {} for name in BESIDE}
        sources = SourceShares(self.learner.method, index)
        by_task = self.stream.label_protocol == "task"
        space, offsets = (None, []) if by_task else seen_labels(tasks[: index + 1])
        whole = by_task and self.learner.backbone.answers != "heads"
        for position, task in enumerate(tasks if whole else tasks[: index + 1]):
            offset = 0 if by_task else offsets[position]
            with sources.noted() if position == index else nullcontext():
                result = self.learner.evaluate(task, labels=space, offset=offset)
            scores[task.name], routes[task.name] = result.score, dict(result.routes)
            cases[task.name] = dict(result.by_case)
            for name, found in forms.items():
                if (share := getattr(result, name)) is not None:
                    found[task.name] = share
        self.record.matrix.set_row(index, scores)
        entry: dict[str, Any] = {"task": tasks[index].name, "routes": routes}
        if any(set(found) - {CODE_NAMES[COMPLETE]} for found in cases.values()):
            entry["scores_by_missing"] = cases
        entry.update({name: found for name, found in forms.items() if found})
        if drawn := sources.to_json(self.learner.summed):
            entry["sources"] = drawn
        self.record.routes.append(entry)

    def _note(self, name: str, loss: float | None, learning: float, testing: float) -> None:
        cost = self.learner.costs[-1].to_json()
        entry = {
            "task": name,
            "seconds_learn": round(learning, 3),
            "seconds_evaluate": round(testing, 3),
            **cost,
            "final_loss": loss,
        }
        method = self.learner.method
        if method.entries is not None:
            newest = len(method.task_names) - 1
            entry["full_tuning"] = method.entries.full_tuning(method.task_modalities, newest)
        self.record.history.append(entry)
        for key, counter in self.learner.method.counters().items():
            tower = key.split("/")[0]
            layers = self.record.usage.setdefault(tower, {}).setdefault(name, [])
            layers.append(counter.counts.tolist())
        self.reporter.event("task", **entry)

    def _zero_shot(self, tasks: Sequence[Task]) -> dict[str, float]:
        from evolora.methods.zero_shot import ZeroShotConfig

        with self.learner.backbone.host.disabled():
            plain = Learner(
                self.learner.backbone,
                method=ZeroShotConfig(),
                training=self.config.training,
                evaluation_batch_size=self.config.evaluation.batch_size,
                accelerator=self.accelerator,
                reporter=self.reporter,
                evaluation_cache=self.config.evaluation.cache,
                samples=self.learner.samples,
            )
            return {task.name: plain.evaluate(task).score for task in tasks}

    # -- files -----------------------------------------------------------------------------------

    def _start(self, resume: bool) -> tuple[int, Progress | None]:
        """Return (first task to learn, where its learning stopped or None)."""
        mine = self.config.hash()
        if (self.folder / "run.json").exists() or (self.folder / "config.json").exists():
            known = self._known_hash()
            if not resume:
                raise StorageError(
                    f"{self.folder} already holds a run; continue it with --resume, "
                    "or choose another --out"
                )
            if known != mine:
                raise StorageError(
                    f"{self.folder} holds a run of another configuration "
                    f"({known}, this is {mine}); "
                    "choose another --out"
                )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            sweep_temporary(self.folder)
            write_json(
                self.folder / "config.json",
                {"format_version": 1, "config_hash": mine, "config": self.config.to_json()},
            )
        newest = load_newest(self.checkpoints) if resume else None
        if newest is None:
            self.reporter.rewind(0)
            return 0, None
        return self._restore(newest)

    def _known_hash(self) -> str:
        return str(read_json(self.folder / "config.json", kind="run")["config_hash"])

    def _restore(self, checkpoint: Checkpoint) -> tuple[int, Progress | None]:
        self.record = Record.from_json(checkpoint.state["record"])
        self.learner.costs = [
            Cost(**{field.name: entry[field.name] for field in fields(Cost)})
            for entry in self.record.history
        ]
        self.reporter.rewind(int(checkpoint.state["log_bytes"]))
        tasks = list(self.stream)
        began = len(tasks) if self.learner.method.joint else checkpoint.task + (checkpoint.step > 0)
        for task in tasks[:began]:
            self.learner.begin(task)
            if not self.learner.method.joint and len(self.learner.task_names) <= checkpoint.task:
                self.learner.method.finish_task()
        moments = {k: v for k, v in checkpoint.tensors.items() if k.startswith("optimizer.")}
        own = {k: v for k, v in checkpoint.tensors.items() if not k.startswith("optimizer.")}
        load_state(self.learner.method, own)
        if not self.accelerator.is_main_process:
            for counter in self.learner.method.counters().values():
                if not counter.replicated:
                    counter.reset()  # the main process holds the sum of all
        if checkpoint.step == 0:
            if self.accelerator.is_main_process:  # perhaps killed between checkpoint and files
                self._write_record(finished=checkpoint.task == len(tasks))
            return checkpoint.task, None
        return checkpoint.task, Progress(step=checkpoint.step, moments=moments)

    def _saver(self, index: int) -> Any:
        def save(step: int, moments: Mapping[str, Tensor]) -> None:
            self._save(index, step, moments)

        return save

    def _save(self, task: int, step: int, moments: Mapping[str, Tensor]) -> None:
        state = export_state(self.learner.method)
        if step > 0:
            state.update(self._summed_counts())
        if self.accelerator.is_main_process:
            self.record.seconds += time.perf_counter() - self._started
            self._started = time.perf_counter()
            kept = {"record": self.record.to_json(), "log_bytes": self.reporter.position()}
            save_checkpoint(
                self.checkpoints,
                Checkpoint(task=task, step=step, tensors={**state, **moments}, state=kept),
            )
            if step == 0:
                self._write_record(finished=task == len(self.stream))
        self.accelerator.wait_for_everyone()

    def _summed_counts(self) -> dict[str, Tensor]:
        """Return the usage counts of all processes together, as a checkpoint keeps them."""
        if self.accelerator.num_processes == 1:
            return {}
        device = self.accelerator.device
        return {
            f"layers.{key}.usage.counts": self.accelerator.reduce(
                counter.counts.to(device), reduction="sum"
            ).cpu()
            for key, counter in self.learner.method.counters().items()
            if not counter.replicated
        }

    def _write_record(self, *, finished: bool) -> None:
        from evolora import __version__

        config, method = self.config, self.learner.method
        selector = getattr(method.config, "selector", None)
        write_json(self.folder / "matrix.json", self.record.matrix.to_json())
        if method.allocation is not None:
            method.allocation.save(self.folder / ALLOCATION)
        write_json(self.folder / "routing.json", self._routing())
        write_json(
            self.folder / "run.json",
            {
                "format_version": RUN_FORMAT,
                "name": config.title,
                "method": config.to_json()["method"],
                "stream": self.stream.name,
                "source": self.stream.source,
                "backbone": self.learner.backbone.describe(),
                "tasks": [task.name for task in self.stream],
                "protocol": {
                    "label_space": self.stream.label_protocol,
                    "routing": method.routing,
                    "group_size": getattr(selector, "group_size", 1),
                },
                "seed": config.seed,
                "config_hash": config.hash(),
                "versions": {
                    "evolora": __version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
                "device": str(self.accelerator.device),
                "processes": self.accelerator.num_processes,
                "started": self._began,
                "seconds": round(self.record.seconds, 3),
                "finished": finished,
                "history": self.record.history,
            },
        )

    def _routing(self) -> dict[str, Any]:
        experts: dict[str, Any] = {
            tower: {"tasks": tasks, "frozen": []} for tower, tasks in self.record.usage.items()
        }
        for key, layer in self.learner.method.layers.items():
            tower = key.split("/")[0]
            if tower in experts and hasattr(layer, "bank"):
                bank: Any = layer.bank
                experts[tower]["frozen"].append(bank.frozen_ids())
        return {"format_version": 1, "after": self.record.routes, "experts": experts}

    def _finish(self) -> None:
        self.learner.save_pretrained(self.folder)
        if self.config.training.report_to:
            self.accelerator.end_training()


def seen_labels(tasks: Sequence[Task]) -> tuple[LabelSpace, list[int]]:
    """Return the union label space of tasks and the index of each task's first class in it."""
    offsets = [sum(len(t.labels.classes) for t in tasks[:i]) for i in range(len(tasks))]
    classes = tuple(name for task in tasks for name in task.labels.classes)
    first = tasks[0].labels
    if any(task.labels.multi_label != first.multi_label for task in tasks):
        raise StreamError("tasks of one and of several labels per sample cannot share classes")
    return replace(first, classes=classes), offsets
