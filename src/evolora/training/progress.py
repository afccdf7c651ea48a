"""What a run tells while it works: progress bars on the terminal, JSON lines in the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolora.errors import StorageError

if TYPE_CHECKING:
    from rich.progress import Progress


class Reporter:
    """Silent by default; with a rich ``Progress`` it shows bars, with a file it appends JSON lines.

    Args:
        progress: a started rich progress display, or None.
        log: JSONL file, or None.
    """

    def __init__(self, progress: Progress | None = None, log: Path | None = None) -> None:
        self.progress, self.log = progress, log

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Bar]:
        """Show a bar of ``total`` units while the block runs."""
        if self.progress is None:
            yield Bar(None, None)
            return
        identifier = self.progress.add_task(title, total=total, completed=done, note="")
        try:
            yield Bar(self.progress, identifier)
        finally:
            self.progress.remove_task(identifier)

    def event(self, kind: str, **values: Any) -> None:
        """Append one JSON line {"event": kind, ...}."""
        if self.log is None:
            return
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": kind, **values}) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self.log}: {error.strerror or error}") from error

    def position(self) -> int:
        """Return the length of the log in bytes, which a checkpoint remembers."""
        return self.log.stat().st_size if self.log and self.log.exists() else 0

    def rewind(self, position: int) -> None:
        """Cut the log back to a checkpoint's length; what came after will be done again."""
        if self.log is None:
            return
        try:
            if self.log.exists() and self.log.stat().st_size > position:
                with self.log.open("r+b") as file:
                    file.truncate(position)
        except OSError as error:
            raise StorageError(f"cannot write {self.log}: {error.strerror or error}") from error


class Bar:
    """One progress bar, or nothing."""

    def __init__(self, progress: Progress | None, identifier: Any) -> None:
        self._progress, self._identifier = progress, identifier

    def advance(self, units: int = 1, note: str = "") -> None:
        """Move on by ``units`` and show ``note`` behind the bar."""
        if self._progress is not None:
            self._progress.update(self._identifier, advance=units, note=note)


@contextmanager
def terminal_progress(enabled: bool = True) -> Iterator[Progress | None]:
    """Yield a started rich progress display on standard error, or None when it is not wanted."""
    if not enabled:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield progress
