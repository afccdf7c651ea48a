"""Cells on a Ray cluster, each a task with one CPU; the folder must be one that all nodes see."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evolora.errors import ConfigError
from evolora.sweep.cells import Outcome, run_cell
from evolora.sweep.engines import Engine
from evolora.sweep.grid import Cell


class RayEngine(Engine):
    """Runs cells on the cluster that this process is connected to, or that Ray finds or starts.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, workers: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                "engine ray: Ray is not installed; pip install 'evolora[ray]', or --engine local"
            ) from error
        self._ray = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            ray.init(log_to_driver=False, include_dashboard=False)
        cluster: Any = ray  # which is not typed throughout, or not there
        self.workers = workers or max(1, int(cluster.cluster_resources().get("CPU", 1)))
        self._run = ray.remote(num_cpus=1, max_retries=0)(_on_node)
        self._running: dict[Any, Cell] = {}

    def start(self, cell: Cell, folder: Path) -> None:
        task = self._run.remote(cell.config.to_json(), str(folder.resolve()))
        self._running[task] = cell

    def ended(self, seconds: float) -> list[tuple[Cell, Outcome]]:
        tasks = list(self._running)
        done, _ = self._ray.wait(tasks, num_returns=len(tasks), timeout=seconds)
        return [(self._running.pop(task), self._outcome(task)) for task in done]

    def _outcome(self, task: Any) -> Outcome:
        try:
            outcome: Outcome = self._ray.get(task)
        except self._ray.exceptions.RayError as error:  # a worker or node that is gone
            line = " ".join(str(error).split())
            return Outcome(state="failed", error=f"{type(error).__name__}: {line[:300]}")
        return outcome

    def close(self) -> None:
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._running.clear()
        if self._mine:
            self._ray.shutdown()


def _on_node(config: Mapping[str, Any], folder: str) -> Outcome:
    return run_cell(config, Path(folder))
