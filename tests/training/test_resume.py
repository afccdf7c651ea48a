"""Killed at any moment and resumed, a run ends bit for bit where it would have ended."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.training import worker

from evolora.registry import METHODS

EQUAL = ("matrix.json", "routing.json", "experts.safetensors", "evolora.json", "README.md")
KILL_9 = -signal.SIGKILL
ALWAYS = ("moe-adapters", "joint-lora", "full-finetuning")


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes forked from a clean server that has imported torch once: each starts fast."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.preload"])
    return context


@pytest.fixture(scope="module")
def whole(processes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of moe-adapters that nobody interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "whole"
    assert live(processes, folder, "moe-adapters") == 0
    return folder


def live(processes: Any, folder: Path, method: str, kill: int | str | None = None) -> int:
    """Run or resume in a new process, to the end or its own kill; return the exit code."""
    ticks = str(folder) + "-ticks.json"
    process = processes.Process(target=worker.live, args=(str(folder), method, kill, ticks))
    process.start()
    process.join(timeout=120)
    assert not process.is_alive(), "the run hangs"
    code = int(process.exitcode)
    process.close()
    assert code in (0, KILL_9), f"exit code {code}"
    return code


def ticks_of(folder: Path) -> list[str]:
    return list(json.loads(Path(str(folder) + "-ticks.json").read_text()))


def assert_equal_runs(run: Path, expected: Path) -> None:
    """Compare everything a run leaves, but for wall times."""
    names = {path.relative_to(expected) for path in expected.rglob("*")}
    assert {path.relative_to(run) for path in run.rglob("*")} == names  # no temporary file is left
    for name in EQUAL:
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    for path in expected.glob("checkpoints/*/tensors.safetensors"):
        same = run / path.relative_to(expected)
        assert same.read_bytes() == path.read_bytes(), path
    assert log_of(run) == log_of(expected)
    assert timeless(json.loads((run / "run.json").read_text())) == timeless(
        json.loads((expected / "run.json").read_text())
    )


def log_of(run: Path) -> list[Any]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [timeless(json.loads(line)) for line in lines]


def timeless(value: Any) -> Any:
    if isinstance(value, list):
        return [timeless(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {k: timeless(v) for k, v in value.items() if "seconds" not in k and k != "started"}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow)
        for name in METHODS.names()
    ],
)
def test_five_kills_at_seeded_moments_change_nothing(
    method: str, processes: Any, whole: Path, tmp_path: Path
) -> None:
    if method != "moe-adapters":
        whole = tmp_path / "whole"
        assert live(processes, whole, method) == 0
    moments = len(ticks_of(whole))
    draw = random.Random(f"five kills {method}")
    killed = 0
    for _ in range(50):
        # A life does a fifth of the run on average, so that five of them are killed before the end.
        kill = draw.randrange(moments // 3)
        if live(processes, tmp_path / "killed", method, kill) == 0:
            break
        killed += 1
        if killed == 5:
            assert live(processes, tmp_path / "killed", method) == 0
            break
    assert killed == 5
    assert_equal_runs(tmp_path / "killed", whole)
    steps = [e["step"] for e in log_of(tmp_path / "killed") if e["event"] == "step"]
    total = 21 if method == "joint-lora" else 7
    rounds = 0 if method == "zero-shot" else 1 if method == "joint-lora" else 3
    assert steps == list(range(1, total + 1)) * rounds


def test_a_kill_while_any_file_is_written_changes_nothing(
    processes: Any, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    seen = list(dict.fromkeys(ticks_of(whole)))
    files = {name.split(":")[1] for name in seen if name.startswith("half:")}
    assert files == {
        *EQUAL, "config.json", "tensors.safetensors", "state.json", "run.json",
    }  # fmt: skip
    for moment in [name for name in seen if name.startswith("half:")]:
        assert live(processes, run, "moe-adapters", moment) == KILL_9, moment
    assert live(processes, run, "moe-adapters", "whole:state.json") in (0, KILL_9)
    assert live(processes, run, "moe-adapters") == 0
    assert_equal_runs(run, whole)


@pytest.mark.parametrize("moment", ["bar:features", "bar:test green shapes"])
def test_a_kill_between_training_and_the_checkpoint_changes_nothing(
    moment: str, processes: Any, whole: Path, tmp_path: Path
) -> None:
    seen = ticks_of(whole)
    first = seen.index("bar:green shapes")
    assert live(processes, tmp_path / "killed", "moe-adapters", seen.index(moment, first)) == KILL_9
    assert live(processes, tmp_path / "killed", "moe-adapters") == 0
    assert_equal_runs(tmp_path / "killed", whole)


def test_a_kill_in_every_stage_of_pathweave_changes_nothing(processes: Any, tmp_path: Path) -> None:
    assert live(processes, tmp_path / "whole", "pathweave") == 0
    run = tmp_path / "killed"
    reached = {"bar:video#4": 4, "bar:audio#4": 4, "bar:pc#4": 4, "bar:test pc": 7}
    for moment, step in reached.items():
        assert live(processes, run, "pathweave", moment) == KILL_9, moment
        last = log_of(run)[-1]
        assert (last["event"], last["step"]) == ("step", step), moment
        assert last["task"] in moment
    assert live(processes, run, "pathweave") == 0
    assert_equal_runs(run, tmp_path / "whole")


@pytest.mark.slow
def test_kills_at_random_seconds_change_nothing(
    processes: Any, whole: Path, tmp_path: Path
) -> None:
    """The same without ticks: whatever the process is doing when the time is up."""
    draw = random.Random(11)
    killed = 0
    for _ in range(40):
        process = processes.Process(
            target=worker.live, args=(str(tmp_path / "killed"), "moe-adapters", None, None)
        )
        process.start()
        process.join(timeout=draw.uniform(0.2, 1.2))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        killed += 1
    assert live(processes, tmp_path / "killed", "moe-adapters") == 0
    assert killed >= 1
    assert_equal_runs(tmp_path / "killed", whole)
