"""What a comparison starts, keeps and tries again; each cell a real run, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from evolora.errors import StorageError
from evolora.storage.lock import locked
from evolora.sweep.cells import OUTCOME, Outcome, run_cell
from evolora.sweep.comparison import run_comparison, unfinished
from evolora.sweep.engines import Engine
from evolora.sweep.grid import Cell, Grid
from evolora.sweep.grid_file import read_grid

STREAM = {"name": "mosaic/domains", "order": ["digits", "flags"], "limit": 8, "test_limit": 5}
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 1, "augment": False}
LOW = {"type": "sequential-lora", "r": 2, "target_modules": ["q_proj"]}


class Here(Engine):
    """One cell at a time, in this process."""

    def __init__(self) -> None:
        self.workers, self.closed = 1, 0
        self.started: list[str] = []
        self._done: list[tuple[Cell, Outcome]] = []

    def start(self, cell: Cell, folder: Path) -> None:
        self.started.append(f"{cell.method}-{cell.seed}")
        self._done.append((cell, run_cell(cell.config.to_json(), folder)))

    def ended(self, seconds: float) -> list[tuple[Cell, Outcome]]:
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        self.closed += 1


def grid_of(folder: Path, methods: list[Any], **given: Any) -> Grid:
    value = {
        "streams": {"small": {"stream": STREAM, "backbone": "clip-tiny", "training": TRAINING}},
        "methods": methods,
        **given,
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(value))
    return read_grid([folder / "grid.yaml"])


def compared(folder: Path, grid: Grid) -> tuple[dict[str, Any], list[str]]:
    """The comparison, and the cells that were started for it."""
    engine = Here()
    value = run_comparison(grid, folder / "out", engine, progress=False)
    assert engine.closed
    return value, engine.started


def test_only_what_is_not_finished_is_started(tmp_path: Path) -> None:
    one = grid_of(tmp_path, ["linear-probe"])
    assert compared(tmp_path, one)[1] == ["linear-probe-0"]
    value, started = compared(tmp_path, one)
    assert started == [] and value["finished"]
    folder = tmp_path / "out" / one.cells[0].folder
    before = (folder / "run.json").stat()

    more = grid_of(tmp_path, ["linear-probe", "zero-shot"], seeds=2)
    value, started = compared(tmp_path, more)
    assert started == ["zero-shot-0", "linear-probe-1", "zero-shot-1"]
    after = (folder / "run.json").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert [cell["state"] for cell in value["cells"]] == ["finished"] * 4

    changed = {"method": "linear-probe", "training": {"max_steps": 3}}
    assert compared(tmp_path, grid_of(tmp_path, [changed]))[1] == ["linear-probe-0"]

    (folder / "run.json").write_text(
        json.dumps(json.loads((folder / "run.json").read_text()) | {"config_hash": "0" * 64})
    )
    assert compared(tmp_path, one)[1] == ["linear-probe-0"]  # of another run: not taken for it
    assert compared(tmp_path, one)[1] == []


def test_a_cell_that_failed_is_tried_again_and_the_others_are_not(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, ["linear-probe", {"name": "low", "method": LOW}])
    folder = tmp_path / "out" / grid.cells[1].folder
    folder.mkdir(parents=True)
    (folder / "checkpoints").write_text("in the way")
    value, started = compared(tmp_path, grid)
    assert started == ["linear-probe-0", "low-0"]
    assert [cell["state"] for cell in value["cells"]] == ["finished", "failed"]
    (told,) = unfinished(value)
    assert told.startswith("small/low (order default, seed 0): ") and "checkpoints" in told
    assert json.loads((folder / OUTCOME).read_text())["state"] == "failed"

    (folder / "checkpoints").unlink()
    value, started = compared(tmp_path, grid)
    assert started == ["low-0"] and value["finished"] and unfinished(value) == []
    assert not (folder / OUTCOME).exists()


def test_a_cell_that_another_process_runs_is_left_to_it(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, ["zero-shot"])
    with locked(tmp_path / "out" / grid.cells[0].folder, "run"):
        value, _ = compared(tmp_path, grid)
    assert "is in use: this run is running in process" in unfinished(value)[0]
    assert compared(tmp_path, grid)[0]["finished"]


def test_an_engine_is_closed_where_the_folder_is_in_use(tmp_path: Path) -> None:
    engine = Here()
    grid = grid_of(tmp_path, ["zero-shot"])
    with (
        locked(tmp_path / "out", "comparison"),
        pytest.raises(StorageError, match="this comparison is running in process"),
    ):
        run_comparison(grid, tmp_path / "out", engine, progress=False)
    assert engine.closed and engine.started == []


def test_what_cannot_run_on_a_backbone_is_tried_once_and_under_no_other_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = grid_of(tmp_path, ["map"], seeds=3)
    value, started = compared(tmp_path, grid)
    assert started == ["map-0"] and value["finished"] and unfinished(value) == []
    assert {cell["state"] for cell in value["cells"]} == {"not applicable"}
    assert compared(tmp_path, grid)[1] == []
    monkeypatch.setattr("evolora.__version__", "another")  # which may know how
    assert compared(tmp_path, grid)[1] == ["map-0"]
