"""``evolora demo``: the main job on the embedded model and data, offline, all methods.

Three parts: image domains (``demo.yaml``), image + text with either one missing
(``demo_missing.yaml``), and a model of images that learns video and sound
(``demo_modalities.yaml``). Each method is an ordinary run (``runs/demo/METHOD``) in a process of
its own with one thread, as many at a time as there are cores. A demo that was interrupted goes on;
a finished run is kept.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolora.assets import ROOT
from evolora.errors import unknown_name
from evolora.storage.files import make_folder
from evolora.training.progress import terminal_progress
from evolora.training.standing import is_finished, standing

if TYPE_CHECKING:
    from evolora.config import RunConfig
    from evolora.demo_missing import Asked
    from evolora.demo_modalities import Heard
    from evolora.report.records import RunRecord
    from evolora.streams.task import Stream
    from evolora.training.samples import Samples

MISSING, MODALITIES = "missing-", "modalities-"
PARTS = {
    "": ROOT / "demo.yaml",
    MISSING: ROOT / "demo_missing.yaml",
    MODALITIES: ROOT / "demo_modalities.yaml",
}
"""How the names of a part's runs begin -> its file."""
POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo did.

    Args:
        runs: method -> run folder, in the order of the tables.
        asked: what DeLo answered, if it is among the runs.
        heard: what PathWeave answered, if it is among the runs.
        report: HTML page.
        seconds: wall time of this call.
    """

    runs: Mapping[str, Path]
    asked: Asked | None
    heard: Sequence[Heard]
    report: Path
    seconds: float

    def records(self) -> dict[str, RunRecord]:
        """Return the finished runs by method."""
        from evolora.report.records import RunRecord

        return {name: RunRecord.load(folder) for name, folder in self.runs.items()}

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        from evolora.evaluation.metrics import summary

        return {
            "runs": {name: summary(record.matrix) for name, record in self.records().items()},
            "asked": self.asked and self.asked.to_json(),
            "heard": [one.to_json() for one in self.heard],
            "report": str(self.report),
            "seconds": round(self.seconds, 1),
        }

    def print(self) -> None:
        """Print the tables, what DeLo and PathWeave answered, and where the report is."""
        from rich.console import Console

        from evolora.demo_missing import print_missing
        from evolora.demo_modalities import print_modalities
        from evolora.report.tables import summary_table

        console = Console()
        parts: dict[str, list[RunRecord]] = {prefix: [] for prefix in PARTS}
        for name, record in self.records().items():
            parts[part_of(name)].append(record)
        if parts[""]:
            console.print(summary_table(parts[""]))
        if parts[MISSING]:
            print_missing(parts[MISSING], self.asked, console)
        if parts[MODALITIES]:
            print_modalities(parts[MODALITIES], self.heard, console)
        console.print(f"report: {self.report}  ({self.seconds:.0f} s)", soft_wrap=True)


def part_of(name: str) -> str:
    """Return how the names of a run's part begin."""
    return next((prefix for prefix in (MISSING, MODALITIES) if name.startswith(prefix)), "")


def demo_configs(methods: Sequence[str] | None = None, seed: int = 0) -> dict[str, RunConfig]:
    """Return the configuration of each of the demo's runs, by method.

    Args:
        methods: a choice of them; None takes all.
        seed: run seed.

    Raises:
        ConfigError: a name the demo does not have.
    """
    from evolora.config import parse_config
    from evolora.config_text import read_yaml

    configs = {}
    for prefix, file in PARTS.items():
        whole = read_yaml(file)
        known: dict[str, Any] = whole.pop("methods")
        for name, given in known.items():
            own = dict(given)
            training = {**whole["training"], **own.pop("training", {})}
            value = {**whole, "method": {"type": name, **own}, "training": training, "seed": seed}
            configs[prefix + name] = parse_config(value, source=f"demo method {prefix}{name}")
    for name in methods or ():
        if name not in configs:
            raise unknown_name("demo method", name, configs)
    return {name: configs[name] for name in methods or configs}


def run_demo(
    out: Path, *, methods: Sequence[str] | None = None, seed: int = 0, progress: bool = True
) -> DemoResult:
    """Run the demo and write its report.

    Args:
        out: folder of the runs and the report.
        methods: names, or None for all.
        seed: run seed.
        progress: show one bar per method.
    """
    from evolora.demo_missing import ask
    from evolora.demo_modalities import ask_each
    from evolora.report.page import write_report

    start = time.perf_counter()
    configs = demo_configs(methods, seed)
    make_folder(out)
    folders = {name: out / name for name in configs}
    _run_all(configs, folders, progress)
    delo, paths = f"{MISSING}delo", f"{MODALITIES}pathweave"
    result = DemoResult(
        runs=folders,
        asked=ask(folders[delo], configs[delo].stream) if delo in folders else None,
        heard=ask_each(folders[paths], configs[paths].stream) if paths in folders else [],
        report=out / "report.html",
        seconds=time.perf_counter() - start,
    )
    write_report(list(result.records().values()), result.report, "Evolora demo")
    return replace(result, seconds=time.perf_counter() - start)


def _run_all(configs: Mapping[str, RunConfig], folders: Mapping[str, Path], progress: bool) -> None:
    context = multiprocessing.get_context("spawn")
    cores = os.cpu_count() or 1
    workers = max(1, min(cores, len(configs)))
    with terminal_progress(progress) as bars, ProcessPoolExecutor(workers, context) as pool:
        # The longest runs stand last in the table; started first, they leave no core idle.
        jobs = {
            name: pool.submit(_one, config.to_json(), folders[name])
            for name, config in reversed(list(configs.items()))
        }
        tasks = {
            name: bars.add_task(name, total=_total_steps(config), note="waiting") if bars else None
            for name, config in configs.items()
        }
        try:
            for _ in _until_done(list(jobs.values())):
                for name, task in tasks.items():
                    if bars is not None and task is not None:
                        steps, note = standing(folders[name])
                        bars.update(task, completed=steps, note=note)
            for job in jobs.values():
                job.result()
        except BaseException:
            for job in jobs.values():
                job.cancel()
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise


def _until_done(jobs: Sequence[Future[None]]) -> Iterator[None]:
    """Yield every half second until all jobs are done or one has failed."""
    pending = set(jobs)
    while pending:
        done, pending = wait(pending, timeout=POLL_SECONDS)
        yield
        if any(job.exception() is not None for job in done):
            return


def _one(config: Mapping[str, Any], folder: Path) -> None:
    """Run one method to the end in this process, going on where an earlier demo stopped."""
    import torch

    torch.set_num_threads(1)
    from evolora.config import parse_config
    from evolora.training.continual import ContinualRun

    settings = parse_config(config)
    if is_finished(folder, settings):
        return
    stream, samples = _shared(json.dumps(settings.stream), json.dumps(asdict(settings.backbone)))
    run = ContinualRun(settings, folder, stream=stream, backbone=samples.backbone, samples=samples)
    try:
        run.run(resume=(folder / "config.json").exists())
    finally:
        run.learner.method.remove()


@cache
def _shared(stream: str, backbone: str) -> tuple[Stream, Samples]:
    """Return what the runs of a process have in common: the tasks, and the base's view of them."""
    from evolora.backbones.loading import load_backbone
    from evolora.config import load_stream
    from evolora.training.config import TrainingConfig
    from evolora.training.prefix_cache import build_memory
    from evolora.training.samples import Samples

    model = load_backbone(**json.loads(backbone))
    memory = build_memory(TrainingConfig(), model.device)
    return load_stream(**json.loads(stream)), Samples(model, memory)


def _total_steps(config: RunConfig) -> int:
    from evolora.config import load_stream

    options = {key: value for key, value in config.stream.items() if key != "name"}
    tasks = len(load_stream(str(config.stream["name"]), **options))
    return (tasks - len(config.training.known_tasks)) * config.training.max_steps
