"""How far the run in a folder is, told from its files alone."""

from __future__ import annotations

import json
from pathlib import Path

from evolora.config import RunConfig
from evolora.errors import StorageError
from evolora.storage.files import read_json


def is_finished(folder: Path, config: RunConfig) -> bool:
    """Return whether the folder holds this very run, complete."""
    if not (folder / "evolora.json").exists() or not (folder / "run.json").exists():
        return False
    try:
        record = read_json(folder / "run.json", kind="run")
    except StorageError:
        return False
    return bool(record.get("finished")) and record.get("config_hash") == config.hash()


def standing(folder: Path) -> tuple[int, str]:
    """Return (steps done over all tasks, what is being done) from a run's log."""
    try:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, "waiting"
    finished, step, title = 0, 0, ""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the last line may be half written
        if event["event"] == "task":
            finished, step, title = finished + step, 0, event["task"]
        elif event["event"] == "step":
            step, title = event["step"], event["task"]
    return finished + step, title
