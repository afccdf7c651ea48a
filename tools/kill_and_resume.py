"""Kills a run in every stage and in an evaluation, resumes it, and compares what it leaves.

A run that nobody interrupts comes first. The other one lives several lives, each a process of its
own that is `evolora run CONFIG ... --resume`: one for each task that is trained, which gets SIGKILL
in the step behind a checkpoint of that task, one that gets it while the last row of the matrix is
measured, and one that reaches the end. Matrix, routes, artefact, checkpoints and log, but for wall
times, must be the same to the bit. Processes are forked from one that has imported the library.

  python tools/kill_and_resume.py configs/bench/smol_qformer.yaml --out OUT stream.test_limit=4
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_pretraining.command import start
from evolora.cli import main as evolora
from evolora.errors import EvoloraError

FILES = ("matrix.json", "routing.json", "experts.safetensors", "evolora.json")
POLL = 0.02  # seconds between looks at the log


class Run:
    """A run's folder, and processes that work on it.

    Args:
        folder: where it writes.
        words: configuration and overrides.
    """

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        self.folder, self.words = folder, words

    def live(self, moment: Callable[[], bool] | None = None) -> tuple[float, float, int]:
        """Starts or resumes it, to the end or until SIGKILL at a moment.

        Returns:
            Wall seconds, CPU seconds, and the most memory in MB.

        Raises:
            EvoloraError: it failed, or was over before the moment.
        """
        began, child = time.monotonic(), os.fork()
        if child == 0:
            self._work()
        killed = False
        while True:
            found, status, usage = os.wait4(child, os.WNOHANG)
            if found:
                break
            if moment is not None and not killed and moment():
                os.kill(child, signal.SIGKILL)
                killed = True
            time.sleep(POLL)
        wanted = 0 if moment is None else -signal.SIGKILL
        code = os.waitstatus_to_exitcode(status)
        if code != wanted:
            raise EvoloraError(f"{self.folder}: a process ended with {code}, not with {wanted}")
        spent = usage.ru_utime + usage.ru_stime
        return time.monotonic() - began, spent, usage.ru_maxrss // 1024

    def _work(self) -> None:
        code = 1
        try:
            evolora(["run", *self.words, "--out", str(self.folder), "--resume", "--quiet"])
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)

    def log(self) -> list[Mapping[str, Any]]:
        """Returns the events so far; a line that is being written is none."""
        path = self.folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        found = []
        for line in lines:
            try:
                found.append(timeless(json.loads(line)))
            except json.JSONDecodeError:
                break
        return found

    def reached(self, task: str, step: int) -> bool:
        """Returns whether a step of a task is done."""
        wanted = {"event": "step", "task": task, "step": step}
        return any(wanted.items() <= event.items() for event in self.log())

    def differs(self, other: Run) -> list[str]:
        """Returns what it left that the other did not leave just so."""
        kept = [
            path.relative_to(self.folder) for path in self.folder.glob("checkpoints/*/tensors*")
        ]
        names = [*map(Path, FILES), *sorted(kept)]
        found = [
            str(name)
            for name in names
            if (self.folder / name).read_bytes() != (other.folder / name).read_bytes()
        ]
        return found if self.log() == other.log() else [*found, "log.jsonl"]


def timeless(value: Any) -> Any:
    """Returns JSON without wall times."""
    if isinstance(value, list):
        return [timeless(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {name: timeless(part) for name, part in value.items() if "seconds" not in name}


def moments_of(whole: Run, killed: Run, into: float) -> dict[str, Callable[[], bool]]:
    """Returns when to kill: a step behind half of each task's, and so far into the last row."""
    steps: dict[str, int] = {}
    for event in whole.log():
        if event["event"] == "step":
            steps[event["task"]] = event["step"]

    def trained(task: str) -> Callable[[], bool]:
        return lambda: killed.reached(task, steps[task] // 2 + 1)

    last, since = list(steps)[-1], [0.0]

    def tested() -> bool:
        if since[0] == 0 and killed.reached(last, steps[last]):
            since[0] = time.monotonic()
        return since[0] > 0 and time.monotonic() - since[0] > into

    return {**{task: trained(task) for task in steps}, f"evaluation after {last}": tested}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config", help="of the run")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--out", type=Path, required=True, help="folder of both runs")
    parser.add_argument("--steps", type=int, default=4, help="of a task; half of them is kept")
    parser.add_argument("--into", type=float, default=5.0, help="seconds into the evaluation")
    args = parser.parse_intermixed_args(words)
    often = {"max_steps": args.steps, "save_steps": args.steps // 2, "logging_steps": 1}
    settings = [f"training.{name}={value}" for name, value in often.items()]
    whole, killed = (
        Run(args.out / name, [args.config, *settings, *args.overrides])
        for name in ("whole", "killed")
    )
    told = "{}: {:.0f} s, {:.0f} CPU s, {} MB"
    print(told.format("uninterrupted", *whole.live()), flush=True)
    for stage, moment in moments_of(whole, killed, args.into).items():
        print(told.format(f"killed in {stage}", *killed.live(moment)), flush=True)
    print(told.format("resumed to the end", *killed.live()), flush=True)
    if different := killed.differs(whole):
        raise EvoloraError(f"not the same: {', '.join(different)}")
    print("the same to the bit: " + ", ".join((*FILES, "checkpoints", "log.jsonl")))


if __name__ == "__main__":
    start(main)
