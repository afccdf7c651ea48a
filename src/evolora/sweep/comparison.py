"""A comparison from beginning to end: what is left of the grid is run, then all of it compared."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolora.report.records import RunRecord
from evolora.storage.lock import locked
from evolora.sweep.cells import Outcome, known_as_unsuitable
from evolora.sweep.engines import Engine
from evolora.sweep.grid import Cell, Grid
from evolora.sweep.results import CellResult, write_comparison
from evolora.training.progress import terminal_progress
from evolora.training.standing import is_finished, standing

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

POLL_SECONDS = 0.5


def run_comparison(
    grid: Grid, out: Path, engine: Engine, *, progress: bool = True
) -> dict[str, Any]:
    """Run the cells of a grid that are not finished; return ``comparison.json``.

    A cell that fails is reported and the others go on. When interrupted, what there is is written
    before the interruption goes on.

    Args:
        grid: what to compare.
        out: folder of the comparison; one process at a time may use it.
        engine: where cells run; it is closed.
        progress: show bars.

    Raises:
        StorageError: the folder cannot be written, or is in use.
    """
    with closing(engine), locked(out, "comparison"):
        job = _Job(grid, out, engine)
        try:
            with terminal_progress(progress) as bars:
                job.run(bars)
        finally:
            engine.close()
            value = write_comparison(grid, job.results(), out)
    return value


@dataclass
class _Job:
    """The cells of a comparison that is running.

    Attributes:
        outcomes: cells that ended, now or before.
        running: cell -> its bar.
    """

    grid: Grid
    out: Path
    engine: Engine
    outcomes: dict[Cell, Outcome] = field(default_factory=dict)
    running: dict[Cell, TaskID | None] = field(default_factory=dict)

    def run(self, bars: Progress | None) -> None:
        for cell in self.grid.cells:
            if self._is_finished(cell):
                self.outcomes[cell] = Outcome(state="finished")
            elif (known := known_as_unsuitable(cell, self.out / cell.folder)) is not None:
                self._settle(cell, known)
        whole = bars.add_task("cells", total=len(self.grid.cells), note="") if bars else None
        while self._fill(bars) or self.running:
            if bars is not None and whole is not None:
                bars.update(whole, completed=len(self.outcomes), note=self._failures())
                self._show(bars)
            for cell, outcome in self.engine.ended(POLL_SECONDS):
                bar = self.running.pop(cell)
                if bars is not None and bar is not None:
                    bars.remove_task(bar)
                self._settle(cell, outcome)

    def results(self) -> list[CellResult]:
        """Return what became of each cell so far."""
        found = []
        for cell in self.grid.cells:
            outcome = self.outcomes.get(cell)
            if outcome is None and self._is_finished(cell):  # ended while it was interrupted
                outcome = Outcome(state="finished")
            done = outcome is not None and outcome.state == "finished"
            found.append(
                CellResult(
                    cell=cell,
                    state=outcome.state if outcome else "waiting",
                    error=outcome.error if outcome else None,
                    record=RunRecord.load(self.out / cell.folder) if done else None,
                )
            )
        return found

    def _is_finished(self, cell: Cell) -> bool:
        return is_finished(self.out / cell.folder, cell.config)

    def _fill(self, bars: Progress | None) -> bool:
        """Start cells while there is room; return whether one was started."""
        started = False
        for cell in self.grid.cells:
            if len(self.running) >= self.engine.workers:
                break
            if cell in self.outcomes or cell in self.running:
                continue
            self.engine.start(cell, self.out / cell.folder)
            bar = bars.add_task(cell.name, total=None, note="starting") if bars else None
            self.running[cell] = bar
            started = True
        return started

    def _settle(self, cell: Cell, outcome: Outcome) -> None:
        """Keep an outcome; what a method cannot run on, it cannot under any seed or order."""
        self.outcomes[cell] = outcome
        if outcome.state != "not applicable":
            return
        for other in self.grid.cells:
            if (other.stream, other.method) == (cell.stream, cell.method):
                self.outcomes.setdefault(other, outcome)

    def _failures(self) -> str:
        failed = sum(outcome.state == "failed" for outcome in self.outcomes.values())
        return f"{failed} failed" if failed else ""

    def _show(self, bars: Progress) -> None:
        for cell, bar in self.running.items():
            if bar is not None:
                steps, note = standing(self.out / cell.folder)
                bars.update(bar, completed=steps, note=note)


def unfinished(comparison: Mapping[str, Any]) -> list[str]:
    """Return a line for each cell that failed: its name, its error and its log file."""
    return [
        f"{cell['stream']}/{cell['method']} (order {cell['order']}, seed {cell['seed']}): "
        f"{cell['error']} (see {cell['log']})"
        for cell in comparison["cells"]
        if cell["state"] == "failed"
    ]
