"""Where cells run: processes of this machine; ``evolora.sweep.cluster`` has Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from evolora.errors import unknown_name
from evolora.sweep.cells import OUTCOME, Outcome, run_cell
from evolora.sweep.grid import Cell

ENGINES = ("local", "ray")


class Engine(ABC):
    """Runs cells, ``workers`` at a time."""

    workers: int

    @abstractmethod
    def start(self, cell: Cell, folder: Path) -> None:
        """Begin a cell, whose run is kept in ``folder``."""

    @abstractmethod
    def ended(self, seconds: float) -> list[tuple[Cell, Outcome]]:
        """Return the cells that ended since the last call; wait at most so long for one."""

    @abstractmethod
    def close(self) -> None:
        """End what is still running; its next start goes on from its checkpoint."""


def make_engine(name: str, workers: int | None) -> Engine:
    """Return an engine by name.

    Args:
        name: "local" or "ray".
        workers: cells at a time; None takes the cores of the machine or of the cluster.
    """
    if name == "local":
        return LocalEngine(workers)
    if name == "ray":
        from evolora.sweep.cluster import RayEngine

        return RayEngine(workers)
    raise unknown_name("engine", name, ENGINES)


class LocalEngine(Engine):
    """A process of its own for each cell, so that a crash is one cell's.

    Processes are forked from a server that has imported torch already, where the system can.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or os.cpu_count() or 1
        self._context: ForkServerContext | SpawnContext
        if sys.platform == "win32":
            self._context = multiprocessing.get_context("spawn")
        else:
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload(["evolora.training.continual"])
        self._running: dict[BaseProcess, tuple[Cell, Path]] = {}

    def start(self, cell: Cell, folder: Path) -> None:
        process = self._context.Process(
            target=_in_process, args=(cell.config.to_json(), str(folder)), name=cell.name
        )
        process.start()
        self._running[process] = (cell, folder)

    def ended(self, seconds: float) -> list[tuple[Cell, Outcome]]:
        wait([process.sentinel for process in self._running], timeout=seconds)
        done = [process for process in self._running if not process.is_alive()]
        found = []
        for process in done:
            cell, folder = self._running.pop(process)
            process.join()
            found.append((cell, _outcome(process.exitcode or 0, folder)))
        return found

    def close(self) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.join()
        self._running.clear()


FINISHED, UNFINISHED = 0, 3
"""Exit codes of a cell's process; others are those of a crash."""


def _in_process(config: Mapping[str, Any], folder: str) -> None:
    """Run a cell in this process; it ends with its parent, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    outcome = run_cell(config, Path(folder))
    raise SystemExit(FINISHED if outcome.state == "finished" else UNFINISHED)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)  # files are written whole or not at all


def _outcome(code: int, folder: Path) -> Outcome:
    """Return how a cell's process ended."""
    if code == FINISHED:
        return Outcome(state="finished")
    if code == UNFINISHED:
        from evolora.storage.files import read_json

        kept = read_json(folder / OUTCOME, kind="outcome")
        return Outcome(state=kept["state"], error=kept["error"])
    by = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return Outcome(state="failed", error=f"its process ended with {by}")
