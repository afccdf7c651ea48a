"""`evolora run --resume` of one folder by two processes at once, after a third was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

CONFIG = """
method: {type: sequential-lora, r: 2, target_modules: [q_proj]}
stream: {name: mosaic/domains, order: [digits, flags], limit: 16, test_limit: 10}
backbone: clip-tiny
training: {max_steps: 20, per_device_train_batch_size: 4, augment: false, logging_steps: 1,
           save_steps: 5}
"""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "evolora", "run", str(folder / "run.yaml"), "--quiet"]
    return subprocess.Popen(
        [*command, "--out", str(folder / "out"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]


def test_of_two_that_go_on_with_one_run_one_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    first = start(tmp_path)
    until((tmp_path / "out/checkpoints/001-000005/state.json").exists, first)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    learned = next(event for event in events(tmp_path) if event["event"] == "task")

    second = start(tmp_path, "--resume")
    lock = tmp_path / "out/.lock"
    try:
        until(lambda: str(second.pid) in lock.read_text(), second)
        os.kill(second.pid, signal.SIGSTOP)  # so that it is still at it
        third = start(tmp_path, "--resume")
        out, err = third.communicate(timeout=200)
    finally:
        os.kill(second.pid, signal.SIGCONT)
    assert third.returncode == 2 and out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith(f"error: {tmp_path / 'out'} is in use") and str(second.pid) in line

    assert second.wait(timeout=200) == 0, second.communicate()[1]
    second.communicate()
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["finished"] and [step["task"] for step in record["history"]] == [
        "digits",
        "flags",
    ]
    found = events(tmp_path)
    assert next(event for event in found if event["event"] == "task") == learned
    steps = [(event["task"], event["step"]) for event in found if event["event"] == "step"]
    assert steps == [(task, step) for task in ("digits", "flags") for step in range(1, 21)]
    assert not lock.exists()
