"""A toy run in a process of its own, which can be told to kill itself (-9) at an exact moment.

A moment is a tick: every advance of a bar (training step, batch of features, batch of a test) and,
for every file that is written, "half:NAME" (half of its bytes are in the temporary file) and
"whole:NAME" (just before it is renamed). Counting ticks instead of seconds makes a seeded moment
the same on every machine.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tests.backbones.qformers import qformer
from tests.backbones.writers import writer
from tests.conftest import ToyProcessor, toy_model, toy_task
from tests.methods import modalities
from tests.methods.texts import task

from evolora.allocation.settings import GradientAllocationConfig
from evolora.backbones.base import Backbone
from evolora.backbones.clip import DualEncoder
from evolora.config import EvaluationConfig, RunConfig
from evolora.evaluation.answers.tally import AnswerTally
from evolora.methods.d_mole import DMoLEConfig
from evolora.methods.er import ERConfig
from evolora.methods.ewc import EWCConfig
from evolora.methods.full_finetuning import FullFinetuningConfig
from evolora.methods.linear_probe import LinearProbeConfig
from evolora.methods.lora import JointLoRAConfig, LoRAPerTaskConfig, SequentialLoRAConfig
from evolora.methods.lwf import LwFConfig
from evolora.methods.moe_adapters import MoEAdaptersConfig
from evolora.methods.o_lora import OLoRAConfig
from evolora.methods.pathweave import PathWeaveConfig
from evolora.methods.zero_shot import ZeroShotConfig
from evolora.registry import METHODS
from evolora.regularizers.settings import ResoraConfig
from evolora.routing.autoencoders import AutoEncoderTraining, UnitAutoEncoderTraining
from evolora.routing.selector import AutoEncoderSelectorConfig, RecogniserConfig
from evolora.streams.task import Stream, Task
from evolora.training.config import TrainingConfig
from evolora.training.continual import ContinualRun
from evolora.training.progress import Bar, Reporter

PLUGGED = ("pathweave",)
"""Methods that need a model which modalities are plugged into."""
LORA: dict[str, Any] = {"r": 2, "lora_dropout": 0.1, "target_modules": ("q_proj", "fc1")}
TOY: dict[str, Any] = {
    "moe-adapters": MoEAdaptersConfig(
        num_experts=4,
        r=4,
        dropout=0.1,
        freeze_top=2,
        selector=AutoEncoderSelectorConfig(training=AutoEncoderTraining(hidden=4, steps=20)),
    ),
    "joint-lora": JointLoRAConfig(**LORA),
    "sequential-lora": SequentialLoRAConfig(**LORA),
    "ewc": EWCConfig(**LORA, fisher_samples=6),
    "er": ERConfig(**LORA, capacity=12),
    "lwf": LwFConfig(r=2, lora_dropout=0.1),
    "o-lora": OLoRAConfig(r=2, lora_dropout=0.1),
    "pathweave": PathWeaveConfig(r=2),
    "lora-per-task": LoRAPerTaskConfig(**LORA),
    "allocated-lora": LoRAPerTaskConfig(
        **LORA, allocation=GradientAllocationConfig(budget=4, sample=9)
    ),
    "d-mole": DMoLEConfig(
        **LORA,
        allocation=GradientAllocationConfig(budget=4, sample=9),
        selector=RecogniserConfig(
            quantile=1.0, margin=3.0, training=UnitAutoEncoderTraining(hidden=4, steps=20)
        ),
    ),
    "full-finetuning": FullFinetuningConfig(),
    "linear-probe": LinearProbeConfig(),
    "zero-shot": ZeroShotConfig(),
    "regularised-lora": SequentialLoRAConfig(**LORA),
}
TERMS: dict[str, Any] = {
    "regularised-lora": (
        ResoraConfig(
            weight=0.5,
            min_tokens=4,
            adaptivity="learned",
            measure_down="f_corr",
            measure_up="f_contrib",
        ),
    )
}
"""Regularizers of toy methods that have some."""
WRITING = {"lwf", "o-lora"}
"""Of these the toy model writes its answers."""


def toy_config(method: str, **training: Any) -> RunConfig:
    """Return a run of a few steps per task; a method without a toy entry runs with its defaults."""
    settings: dict[str, Any] = {
        "max_steps": 7,
        "warmup_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "save_steps": 3,
        "logging_steps": 1,
        **training,
    }
    config = TOY.get(method) or METHODS.get(method).config_class()
    return RunConfig(
        method=config,
        stream={"name": "toy"},
        training=TrainingConfig(**settings),
        evaluation=EvaluationConfig(batch_size=5),
        seed=3,
        regularizers=TERMS.get(method, ()),
    )


def toy_run(
    folder: Path, method: str, *, reporter: Reporter | None = None, **training: Any
) -> ContinualRun:
    """Return the run of a method on toy tasks, backbone and data made from seeds."""
    tasks: tuple[Task, ...] = tuple(toy_task(index, 20) for index in range(3))
    backbone: Backbone
    if method in WRITING:
        backbone, tasks = writer("internvl"), written_tasks()
    elif method in PLUGGED:
        backbone = qformer("blip2-opt")
        tasks = tuple(modalities.task(stage, 12) for stage in ("image", "video", "audio", "pc"))
    else:
        backbone = DualEncoder(toy_model(), ToyProcessor(), name="toy")
    return ContinualRun(
        toy_config(method, **training),
        folder,
        stream=Stream(name="toy", tasks=tasks),
        backbone=backbone,
        reporter=reporter,
    )


def written_tasks() -> tuple[Task, ...]:
    """Return two tasks answered by texts; some questions come without an image."""
    first = task("first", "red dot", metric="token-f1")
    return first, task("second", "blue cross", metric="rouge-l")


@contextmanager
def texts_written() -> Iterator[list[list[str]]]:
    """Collect the texts of every test set as they are judged, in its order."""
    found: list[list[str]] = []
    score = AnswerTally.score

    def noting(tally: AnswerTally) -> float:
        found.append([one.prediction for one in tally.answered()])
        return score(tally)

    AnswerTally.score = noting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        AnswerTally.score = score  # type: ignore[method-assign]


class Ticks(Reporter):
    """Counts moments; at the one that is named, the process kills itself.

    Args:
        kill: number of the tick (from 0), or its name ("half:state.json"), with how many of that
            name came before ("bar:audio#4"); None never kills.
    """

    def __init__(self, kill: int | str | None = None) -> None:
        super().__init__()
        self.kill, self.seen = kill, []  # type: tuple[int | str | None, list[str]]

    def tick(self, name: str) -> None:
        if self.kill in (len(self.seen), name, f"{name}#{self.seen.count(name)}"):
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append(name)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Bar]:
        outer = self

        class Ticking(Bar):
            def advance(self, units: int = 1, note: str = "") -> None:
                outer.tick(f"bar:{title}")

        yield Ticking(None, None)

    def watch_files(self) -> None:
        """Tick half-way through every file and before its rename. For a process of its own."""
        from evolora.storage import files

        replace: Callable[..., None] = os.replace

        def renaming(source: str, target: Any) -> None:
            content = Path(source).read_bytes()
            Path(source).write_bytes(content[: len(content) // 2])
            self.tick(f"half:{Path(target).name}")
            Path(source).write_bytes(content)
            self.tick(f"whole:{Path(target).name}")
            replace(source, target)

        files.os = type("Os", (), {**vars(os), "replace": staticmethod(renaming)})  # type: ignore


def live(folder: str, method: str, kill: int | str | None, ticks: str | None) -> None:
    """Run (or resume) until the end or the moment ``kill``; write the ticks seen to a file."""
    torch.set_num_threads(1)
    reporter = Ticks(kill)
    reporter.watch_files()
    toy_run(Path(folder), method, reporter=reporter).run(resume=True)
    if ticks:
        Path(ticks).write_text(json.dumps(reporter.seen))


def main() -> None:
    """For launchers: FOLDER METHOD {settings as JSON}; each rank lists what it displayed."""
    torch.set_num_threads(1)
    folder, method, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    kill = settings.pop("kill", None)
    rank = int(os.environ.get("RANK", "0"))
    reporter = Ticks(kill if rank == settings.pop("kill_rank", 0) else None)
    run = toy_run(folder, method, reporter=reporter, **settings)
    with texts_written() as texts:
        run.run(resume=True)
    counters = run.learner.method.counters()
    frozen = {k: m.bank.frozen_ids() for k, m in run.learner.method.layers.items() if k in counters}
    (folder.parent / f"{folder.name}-rank{rank}.json").write_text(
        json.dumps(
            {
                "shown": len(reporter.seen),
                "processes": run.accelerator.num_processes,
                "counts": {key: counter.counts.tolist() for key, counter in counters.items()},
                "frozen": frozen,
                "texts": texts,
            }
        )
    )


def warm() -> None:
    """Import what a run imports lazily, so that processes forked from here need not."""
    import accelerate.tracking
    import rich.progress  # noqa: F401
    import tokenizers  # noqa: F401

    accelerate.tracking.get_available_trackers()
    toy_model()
    ToyProcessor()
    gc.freeze()  # a collection per task would walk all of torch and transformers


if __name__ == "__main__":
    main()
